"""Sampling: streams, terminators, distributions; stories that a kill does not lose."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, tiny

import tinystories_data as data
from spo import generate as generation
from spo.checkpoint import save_pt
from spo.demo_stories import story
from spo.generate import generate, sample_token
from spo.groups import EncodedGroup
from spo.pretokenize import train_tokenizer


def test_a_rows_text_depends_on_neither_neighbours_nor_batch_size():
    model = tiny()
    prompts = [[1], [1, 5, 9], [1, 7], [1], [1, 2, 3, 4, 5]]
    together = generate(model, prompts, 40, stop_ids=[3], seed=11)
    for row, prompt in enumerate(prompts):
        assert generate(model, [prompt], 40, stop_ids=[3], seed=11, first_row=row) == [
            together[row]
        ]
    assert generate(model, prompts, 40, stop_ids=[3], seed=12) != together
    assert generate(model, torch.tensor([[1], [1]]), 9, seed=5) == generate(
        model, [[1], [1]], 9, seed=5
    )


def test_a_sequence_ends_with_its_terminator_and_never_holds_it_before():
    rows = generate(tiny(), [[1, 3]] * 32, 30, stop_ids=[3, 8], seed=0)
    ended = [row for row in rows if row[-1] in (3, 8)]
    assert ended and all(len(row) == 30 for row in rows if row not in ended)
    assert not any(token in (3, 8) for row in rows for token in row[:-1])


def test_a_terminator_in_a_prompt_ends_nothing():
    """Prompts of unlike lengths are read side by side: the longer one's tokens are not drawn."""
    rows = generate(tiny(), [[1], [1, 3, 3, 5]] * 4, 12, temperature=0, stop_ids=range(64))
    assert [len(row) for row in rows] == [1] * 8  # whatever is drawn first ends it
    alone = generate(tiny(), [[1, 3, 3, 5]], 1, temperature=0)
    assert rows[1::2] == alone * 4


def test_a_prompt_as_long_as_the_context_leaves_no_room(tokenizer, capsys):
    prompts = ["the owl sang", "the"]
    lengths = [len(tokenizer.encode(prompt, bos=True)) for prompt in prompts]
    for more, fitting in ((0, [1]), (1, [0, 1])):
        model = tiny(vocab_size=512, max_seq_len=lengths[0] + more)
        assert generation.prompts_that_fit(prompts, ["a", "b"], tokenizer, model) == fitting
    assert "a: a prompt of" in capsys.readouterr().err


def test_a_character_that_the_limit_cuts_is_left_out_of_the_text(tokenizer):
    """An owl emoji is four bytes, and so four tokens."""
    begin, whole = tokenizer.encode("", bos=True), tokenizer.encode("owl \U0001f989")
    for cut, text in ((0, "owl \U0001f989"), (1, "owl"), (3, "owl")):
        group = EncodedGroup(begin, [whole[: len(whole) - cut]], 0)
        (record,) = generation.story_records([group], [""], tokenizer, 1)
        assert record["text"].strip() == text and record["finished"] is False


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(sample_token(logits.clone(), uniforms, 1.0), minlength=4) / 20000
    assert torch.allclose(share, logits[0].softmax(0), atol=0.01)
    assert set(sample_token(logits.clone(), uniforms, 1.0, top_k=2).tolist()) == {0, 1}
    assert set(sample_token(logits.clone(), uniforms, 1.0, top_p=0.7).tolist()) == {
        0,
        1,
    }  # 0.64 alone is less than 0.7
    assert set(sample_token(logits.clone(), uniforms, 1.0, top_p=0.6).tolist()) == {0}


def shares(logits, count: int, **how) -> torch.Tensor:
    """How often each id is drawn from one row of logits."""
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = sample_token(logits.expand(count, -1).clone(), uniforms, **how)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / count


SHUFFLED = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5])  # the likeliest ids are 1, 3, 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_divides_the_logits(temperature):
    """Chi-square with 4 degrees of freedom: above 18.5 once in a thousand."""
    count, expected = 20000, (SHUFFLED / temperature).softmax(0)
    found = shares(SHUFFLED, count, temperature=temperature)
    assert float((count * (found - expected) ** 2 / expected).sum()) < 18.5


def test_truncation_keeps_the_likeliest_ids_wherever_they_stand():
    """p = 0.08, 0.54, 0.03, 0.20, 0.12 (and what is left of a share of 1)."""
    p = SHUFFLED.softmax(0)
    for kept, how in (
        ([1, 3], {"top_k": 2}),
        ([1, 3], {"top_p": 0.7}),
        ([1], {"top_p": 0.5}),
        ([1, 3, 4], {"top_p": 0.8}),
        ([1, 3], {"top_k": 3, "top_p": 0.7}),
    ):
        found = shares(SHUFFLED, 20000, temperature=1.0, **how)
        assert found.nonzero().flatten().tolist() == kept, how
        assert torch.allclose(found[kept], p[kept] / p[kept].sum(), atol=0.015), how


def test_generate_ends_with_the_context_and_refuses_a_prompt_that_fills_it():
    assert [len(row) for row in generate(tiny(), [[1], [1] * 63], 500)] == [63, 1]
    with pytest.raises(ValueError, match="64 tokens leaves no room in a context of 64"):
        generate(tiny(), [[1] * 64], 5)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def common(tmp_path) -> list[str]:
    (tmp_path / "lines.txt").write_text("\n".join(story(random.Random(i)) for i in range(300)))
    train_tokenizer(str(tmp_path / "lines.txt"), 512, str(tmp_path / "tokenizer"))
    save_pt(str(tmp_path / "m.pt"), tiny(vocab_size=512))
    return [
        "generate",
        f"--checkpoint={tmp_path / 'm.pt'}",
        "--num_stories=23",
        "--batch_size=4",
        "--max_new_tokens=20",
        f"--out={tmp_path / 's.jsonl'}",
    ]


def generated(tmp_path, command: list[str]) -> bytes:
    data.main(command)
    return (tmp_path / "s.jsonl").read_bytes()


def interrupted_at(call: int, calls: list):
    """generation.generate, but Ctrl-C at its n-th call; 0: never."""
    original = generation.generate

    def generate(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    return generate


def test_stories_do_not_depend_on_the_batch_size(tmp_path, common):
    assert generated(tmp_path, common) == generated(tmp_path, [*common, "--batch_size=100"])


def test_an_interrupted_run_goes_on_and_equals_an_unbroken_one(
    tmp_path, common, monkeypatch, capsys
):
    unbroken = generated(tmp_path, common)
    for stop in range(1, 7):
        os.remove(tmp_path / "s.jsonl")
        with monkeypatch.context() as broken:
            broken.setattr(generation, "generate", interrupted_at(stop, []))
            with pytest.raises(KeyboardInterrupt):
                data.main(common)
        assert not (tmp_path / "s.jsonl").exists()
        with monkeypatch.context() as counted:
            counted.setattr(generation, "generate", interrupted_at(0, calls := []))
            assert generated(tmp_path, common) == unbroken
        assert len(calls) == 6 - (stop - 1)  # only what was missing
    assert "the first 20 from an interrupted run" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path))[-2:] == [
        "tokenizer.model",
        "tokenizer.vocab",
    ]  # nothing is left over


def test_a_part_cut_anywhere_is_gone_on_with(tmp_path, common, monkeypatch):
    unbroken = generated(tmp_path, common)
    with monkeypatch.context() as broken:
        broken.setattr(generation, "generate", interrupted_at(4, []))
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
        assert generated(tmp_path, common) == unbroken


def test_a_part_with_a_flipped_bit_is_never_gone_on_with(tmp_path, common, monkeypatch):
    """200 places: each is noticed, or cut off with the end of the file."""
    unbroken = generated(tmp_path, common)
    os.remove(tmp_path / "s.jsonl")
    with monkeypatch.context() as broken:
        broken.setattr(generation, "generate", interrupted_at(4, []))
        with pytest.raises(KeyboardInterrupt):
            data.main(common)
    path, rng, read = tmp_path / "s.jsonl.part", random.Random(0), 0
    part = path.read_bytes()
    settings = json.loads(part.split(b"\t")[0])["settings"]
    for _ in range(200):
        content = bytearray(part)
        content[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = data.PartialFile(str(tmp_path / "s.jsonl"), settings)
        except ValueError as error:
            assert "s.jsonl.part: damaged" in str(error)
            continue
        read += 1
        whole = [json.loads(line.split(b"\t")[0]) for line in part.split(b"\n")[1:-1]]
        assert found.records == whole[: len(found.records)]
        found.file.close()
    assert read < 5
    path.write_bytes(part)
    assert generated(tmp_path, common) == unbroken


def test_another_command_does_not_go_on_with_it(tmp_path, common, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(generation, "generate", interrupted_at(3, []))
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
        str(tmp_path / "m.pt"), tiny(vocab_size=512, n_kv_heads=4)
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
        (f"--prompts={prompts}", r"p.jsonl line 1: its prompt holds .ud800, half of"),
        ("--temperature=nan", "--temperature=nan: must be finite, 0 or more"),
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
    generated(tmp_path, [*common, f"--prompts={prompts}"])
    records = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == ["Once upon a time"] * 12 + ["One day, Mia"] * 11
    assert [r["index"] for r in records] == list(range(23)) and not all(
        r["finished"] for r in records
    )


@pytest.mark.slow
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
    assert generated(tmp_path, [*common, "--num_stories=1000", "--batch_size=100"]) == killed
