"""Files: written whole or not at all, and never over what is read."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, tiny, write

import alpaca_data
import export
import sample
import tinystories_data as data
from spo import files
from spo.checkpoint import load, save_pt
from spo.files import atomic_write, write_jsonl


@pytest.fixture
def room(tmp_path, tokenizer, monkeypatch):
    """A working directory with a model, its tokenizer, stories and rankings."""
    monkeypatch.chdir(tmp_path)
    save_pt("m.pt", tiny(vocab_size=512))
    with open(tokenizer.path, "rb") as f:
        (tmp_path / "tokenizer.model").write_bytes(f.read())
    texts = ["The owl sang a song to the moon.", "A cat ran home and slept all day long."]
    write(tmp_path / "stories.jsonl", *({"text": text} for text in texts))
    write(tmp_path / "ranked.jsonl", {"responses": texts, "ranking": [1, 0]})
    write(tmp_path / "prompts.jsonl", {"prompt": "the owl"})
    (tmp_path / "sft.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    return tmp_path


SAME = [
    (export, ["m.pt", "--checkpoint=m.pt"], "m.pt"),
    (export, ["./tokenizer.model", "--checkpoint=m.pt", "--tokenizer=tokenizer.model"], "./tok"),
    (data, ["generate", "--checkpoint=m.pt", "--out=m.pt"], "--out=m.pt"),
    (data, ["rank", "--stories=stories.jsonl", "--out=./stories.jsonl"], "--out=./stories.jsonl"),
    (data, ["best_of_n", "--data=ranked.jsonl", "--out=ranked.jsonl"], "--out=ranked.jsonl"),
    (data, ["pairs", "--data=link.jsonl", "--out=ranked.jsonl"], "--out=ranked.jsonl"),
    (sample, ["--checkpoint=m.pt", "--out=m.pt"], "--out=m.pt"),
    (sample, ["--checkpoint=m.pt", "--prompts=prompts.jsonl", "--out=prompts.jsonl"], "--out="),
    (alpaca_data, ["sft", "--data=sft.json", "--out=sft.json"], "--out=sft.json"),
]


@pytest.mark.parametrize("script,flags,named", SAME)
def test_what_is_read_is_never_written_over(room, script, flags, named):
    os.symlink("ranked.jsonl", "link.jsonl")  # by real path, whatever it is called
    before = {path: path.read_bytes() for path in room.iterdir()}
    with pytest.raises(ValueError, match="is read, too, and would be replaced") as error:
        script.main(flags)
    assert str(error.value).startswith(named)
    assert {path: path.read_bytes() for path in room.iterdir()} == before


def test_a_hugging_face_folder_is_not_written_over_itself(room):
    export.main(["hf", "--checkpoint=m.pt", "--version=-1"])
    for target, reason in (("hf/", "is read, too"), ("m.pt/", "m.pt: is a file")):
        with pytest.raises(ValueError, match=reason):
            export.main([target, "--hf=hf", "--version=-1"])
    assert load("hf").tied


@pytest.mark.parametrize("out", ["nowhere/x.jsonl", "folder"])
def test_a_target_that_cannot_be_written_is_named_before_the_work(room, monkeypatch, out):
    os.makedirs("folder")
    monkeypatch.setattr(sample.checkpoint, "load", lambda *_: pytest.fail("it went to work"))
    for script, flags in ((sample, []), (data, ["generate"])):
        with pytest.raises(ValueError, match=f"--out={out}: (there is no folder|is a folder)"):
            script.main([*flags, "--checkpoint=m.pt", f"--out={out}"])


def test_what_is_no_regular_file_is_written_to_and_not_replaced(room):
    words = [sys.executable, os.path.join(ROOT, "tinystories_data.py"), "pairs"]
    done = subprocess.run(
        [*words, "--data=ranked.jsonl", "--out=/dev/stdout"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[0])["ranking"] == [0, 1]
    assert os.path.islink("/dev/stdout")
    full = subprocess.run(
        [*words, "--data=ranked.jsonl", "--out=/dev/full"], capture_output=True, text=True
    )
    assert full.returncode == 2 and "No space left" in full.stderr
    assert len(full.stderr.splitlines()) == 1 and not os.path.isfile("/dev/full")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = str(tmp_path / "a.jsonl")
    write_jsonl(path, [{"a": 1}])
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n' and os.listdir(tmp_path) == [
        "a.jsonl"
    ]


def test_a_file_gets_its_name_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *a: calls.append("replace") or replace(*a))
    write_jsonl(str(tmp_path / "a.jsonl"), [{"a": 1}])
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("can_link", [True, False])
def test_a_file_with_two_names_keeps_both_when_one_is_replaced(tmp_path, monkeypatch, can_link):
    """As best.pt and ckpt.pt of one step do, also where a disk has no links."""

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    if not can_link:
        monkeypatch.setattr(os, "link", no_links)
    ckpt, best = str(tmp_path / "ckpt.pt"), str(tmp_path / "best.pt")
    for content in ("first", "second"):
        files.write_text(ckpt, content)
        files.link(ckpt, best)
        files.link(ckpt, best)  # once more
        assert os.path.samefile(ckpt, best) is can_link
    files.write_text(ckpt, "third")
    assert open(best).read() == "second" and sorted(os.listdir(tmp_path)) == ["best.pt", "ckpt.pt"]
