"""Stories that a kill does not lose."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_model import tiny

import tinystories_data as data
from spo import sampling
from spo.checkpoint import Checkpoint, save_pt
from spo.demo_stories import story
from spo.pretokenize import train_tokenizer


@pytest.fixture
def common(tmp_path) -> list[str]:
    (tmp_path / "lines.txt").write_text("\n".join(story(random.Random(i)) for i in range(300)))
    train_tokenizer(str(tmp_path / "lines.txt"), 512, str(tmp_path / "tokenizer"))
    save_pt(str(tmp_path / "m.pt"), Checkpoint(tiny(vocab_size=512), {"eos_id": 1}))
    return [
        "generate",
        f"--checkpoint={tmp_path / 'm.pt'}",
        "--num_stories=23",
        "--batch_size=4",
        "--max_new_tokens=20",
        f"--out={tmp_path / 's.jsonl'}",
    ]


def generate(tmp_path, command: list[str]) -> bytes:
    data.main(command)
    return (tmp_path / "s.jsonl").read_bytes()


def interrupted_at(call: int, calls: list):
    """sampling.generate, but Ctrl-C at its n-th call; 0: never."""
    original = sampling.generate

    def generate(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    return generate


def test_an_interrupted_run_goes_on_and_equals_an_unbroken_one(
    tmp_path, common, monkeypatch, capsys
):
    unbroken = generate(tmp_path, common)
    for stop in range(1, 7):
        os.remove(tmp_path / "s.jsonl")
        with monkeypatch.context() as broken:
            broken.setattr(sampling, "generate", interrupted_at(stop, []))
            with pytest.raises(KeyboardInterrupt):
                data.main(common)
        assert not (tmp_path / "s.jsonl").exists()
        with monkeypatch.context() as counted:
            counted.setattr(sampling, "generate", interrupted_at(0, calls := []))
            assert generate(tmp_path, common) == unbroken
        assert len(calls) == 6 - (stop - 1)  # only what was missing
    assert "the first 20 from an interrupted run" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path))[-2:] == [
        "tokenizer.model",
        "tokenizer.vocab",
    ]  # nothing is left over


def test_a_part_cut_anywhere_is_gone_on_with(tmp_path, common, monkeypatch):
    unbroken = generate(tmp_path, common)
    with monkeypatch.context() as broken:
        broken.setattr(sampling, "generate", interrupted_at(4, []))
        with pytest.raises(KeyboardInterrupt):
            data.main(common)
    part = (tmp_path / "s.jsonl.part").read_bytes()
    for cut in [
        0,
        1,
        100,
        *range(len(part) // 2, len(part), len(part) // 7),
        len(part) - 1,
        len(part),
    ]:
        (tmp_path / "s.jsonl.part").write_bytes(part[:cut])
        assert generate(tmp_path, common) == unbroken


def test_another_command_does_not_go_on_with_it(tmp_path, common, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(sampling, "generate", interrupted_at(3, []))
        with pytest.raises(KeyboardInterrupt):
            data.main(common)
    part = (tmp_path / "s.jsonl.part").read_bytes()
    for changed in (["--seed=1"], ["--temperature=0.5"], ["--num_stories=24"]):
        name = changed[0].split("=")[0]
        with pytest.raises(
            ValueError, match=f"s.jsonl.part: was begun with another {name}; remove it"
        ):
            data.main(common + changed)
    save_pt(
        str(tmp_path / "m.pt"), Checkpoint(tiny(vocab_size=512, n_kv_heads=4), {"eos_id": 1})
    )  # the same name, other weights
    with pytest.raises(ValueError, match="another --checkpoint"):
        data.main(common)
    assert (tmp_path / "s.jsonl.part").read_bytes() == part
    header = part.split(b"\n")[0]
    for damaged in (
        b"[]\n[]\n",
        header + b"\n5\n",
        header + b"\n" + b"[" * 9999 + b"\n",
        header + b'\n{"text": "a"}\n',
    ):
        (tmp_path / "s.jsonl.part").write_bytes(damaged)
        with pytest.raises(ValueError, match="s.jsonl.part: damaged"):
            data.main([*common, f"--checkpoint={tmp_path / 'm.pt'}"])
    (tmp_path / "s.jsonl.part").write_bytes(header + b"\n")  # no story yet: nothing to lose
    data.main([*common, "--seed=1"])


def test_what_no_model_can_be_asked_is_refused(tmp_path, common):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "\\ud800"}\n')
    for flag, message in (
        (f"--prompts={prompts}", 'p.jsonl line 1: no "prompt"'),
        ("--temperature=nan", "temperature >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            data.main([*common, flag])
    assert not (tmp_path / "s.jsonl").exists()
    data.main(
        [*common, "--max_new_tokens=1" + "0" * 30, "--num_stories=1"]
    )  # as long as the context


def test_stories_of_a_prompts_file_continue_their_prompts(tmp_path, common):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"prompt": "Once upon a time"})
        + "\n"
        + json.dumps({"prompt": "One day, Mia"})
        + "\n"
    )
    generate(tmp_path, [*common, f"--prompts={prompts}"])
    records = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == ["Once upon a time"] * 12 + ["One day, Mia"] * 11
    assert [r["index"] for r in records] == list(range(23)) and not all(
        r["finished"] for r in records
    )


def test_a_killed_process_goes_on(tmp_path, common):
    """kill -9, as soon as there is something to lose."""
    command = [
        sys.executable,
        os.path.join(ROOT, "tinystories_data.py"),
        *common,
        "--num_stories=1000",
    ]
    part = tmp_path / "s.jsonl.part"
    for lines in (2, 60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not part.exists() or part.read_bytes().count(b"\n") < lines
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert part.exists() and not (tmp_path / "s.jsonl").exists()
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0 and "from an interrupted run" in finished.stdout
    killed = (tmp_path / "s.jsonl").read_bytes()
    assert generate(tmp_path, [*common, "--num_stories=1000", "--batch_size=100"]) == killed
