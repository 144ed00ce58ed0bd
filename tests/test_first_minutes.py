"""What a newcomer sees: where the program is, what to look at, and advice that is right."""

import io
import os
import random
import re
import subprocess
import sys

import pytest
from helpers import ROOT, command, write

import judge
import spo_train
import tinystories_data as data
from spo import checkpoint, demo_stories, progress


def test_a_captured_log_has_no_control_characters(workshop, tokenizer):
    """As `| tee log.txt` gets it: lines only, and the bars' too."""
    flags = ["--loss=spo_rank", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    flags += ["--data=ranked.jsonl", "--batch_size=4", "--max_iters=4", "--eval_interval=2"]
    flags += ["--eval_stories=4", "--eval_pool=16", "--max_new_tokens=16"]
    done = subprocess.run(command(1, *flags), capture_output=True)
    assert done.returncode == 0
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)


def test_a_long_task_says_how_far_it_is(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress.progress(3, "sampling", "stories") as bar:
        progress.show_beside(bar, "$0.10")
        bar.update(2)
    assert "sampling: 2 of 3 stories, 00:00, $0.10\n" in stream.getvalue()
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_run_says_what_to_look_at_and_what_came_out(workshop, capsys):
    workshop("dpo_rank", "--max_iters=2")
    printed = capsys.readouterr().out
    assert "look at the win-rates below; the loss of one step is mostly noise" in printed
    claim = r"best.pt (?:is \w+: it )?wins (\d+)% \[.*\] against the stories of the model that you"
    found = re.search(claim, printed)
    step, rate = re.search(r"  best \(step (\d+)\) +([\d.]+)%", printed).groups()
    if step == "0":  # it is the model that it would be compared with
        assert not found and "nothing got better" in printed
    else:
        assert int(found[1]) == round(float(rate))
    workshop("dpo_rank", "--max_iters=2", "--eval_stories=0")
    assert "look at the win-rates" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag,hint",
    [
        ("--lr=1", "--learning_rate"),
        ("--epochs=3", "--max_iters"),
        ("--steps=3", "--max_iters"),
        ("--model=x", "--init_from"),
        ("--dataset=x", "--data"),
        ("--output-dir=x", "--out_dir"),
    ],
)
def test_other_programs_words_get_the_right_hint(flag, hint, capsys):
    with pytest.raises(SystemExit):
        spo_train.main([flag])
    assert f"no such option; did you mean {hint}?" in capsys.readouterr().err


def test_a_misspelled_judge_is_not_asked_for_a_key(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"text": "A story."})
    for name in ("ofline", "Offline", "off-line"):
        with pytest.raises(ValueError, match=f"--judge={name}: did you mean offline"):
            judge.main([path, path, f"--judge={name}"])


def test_a_name_of_the_hub_says_how_to_download_it():
    with pytest.raises(ValueError, match="`hf download meta-llama/Llama-2-7b-hf --local-dir Llama"):
        checkpoint.load("meta-llama/Llama-2-7b-hf")
    with pytest.raises(ValueError, match="expected a .pt, a llama2.c .bin, or a folder"):
        checkpoint.load("out/nothing.pt")


def test_swapped_files_are_told_apart(workshop, tokenizer):
    with pytest.raises(ValueError, match="no checkpoint: it is a sentencepiece tokenizer"):
        workshop("dpo_rank", f"--init_from={tokenizer.path}")
    with pytest.raises(ValueError, match="no checkpoint: it is JSON"):
        workshop("dpo_rank", "--init_from=ranked.jsonl")


def test_advice_leads_to_a_command_that_works(workshop, tmp_path, tokenizer):
    """Every dataset that a loss refuses: what the message names takes that very file."""
    for loss, file in (("dpo", "best"), ("dpo", "text"), ("dpo_rank", "best"), ("dpo", "ranked")):
        with pytest.raises(ValueError) as error:
            workshop(loss, f"--data={file}.jsonl")
        advised = re.search(r"tinystories_data.py (pairs --data=\S+ --out=\S+)", str(error.value))
        if file == "ranked":
            data.main(advised[1].split())
        else:
            assert advised is None


def test_what_goes_wrong_while_it_trains_is_said_once(workshop, capsys, monkeypatch):
    gradients = iter([1.0, 0.0, 0.0, 1.0])
    falling = iter([-100.0, -150.0, -500.0, -900.0])
    compute = spo_train.preference_gradient

    def spoiled(*arguments):
        return compute(*arguments) | {"logps/chosen": next(falling)}

    monkeypatch.setattr(spo_train, "preference_gradient", spoiled)
    monkeypatch.setattr(spo_train.parallel, "clip_gradient", lambda *_: next(gradients))
    workshop("dpo_rank", "--max_iters=4", "--eval_stories=0")
    printed = capsys.readouterr().out
    assert printed.count("step 1: the gradient is exactly 0, so nothing is learned") == 1
    assert printed.count("exactly 0") == 1
    assert "step 2: the chosen responses' log-prob has fallen by 400 nats" in printed
    assert printed.count("diverges") == 1


def test_the_demo_says_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "demo_text", lambda: None)
    monkeypatch.setattr(data, "demo_reference", lambda *_: True)
    monkeypatch.setattr(data, "demo_groups", lambda _: None)
    data.build_demo(spo_train.TrainConfig(device="cpu", dtype="float32"), None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"demo, {i} of 4" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("ending,reader", [("csv", "read_csv"), ("parquet", "read_parquet")])
def test_a_table_gets_the_two_lines_that_convert_it(workshop, tmp_path, ending, reader):
    (tmp_path / f"pairs.{ending}").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=f"is a table; pandas converts it: .*pd.{reader}"):
        workshop("dpo", f"--data=pairs.{ending}")


def test_a_record_of_other_columns_says_which_it_has(workshop, tmp_path):
    path = write(tmp_path / "d.jsonl", {"question": "a", "good": "b", "bad": "c"})
    with pytest.raises(ValueError, match='or "text"; it has question, good, bad'):
        workshop("dpo", f"--data={path}")


def test_a_batch_larger_than_the_data_is_said(workshop, capsys):
    workshop("dpo_rank", "--batch_size=16", "--max_iters=1", "--eval_stories=0")
    printed = capsys.readouterr().out
    assert "12 groups of 4 in ranked.jsonl (fewer than --batch_size=16: some count twice" in printed
    assert "; 1 step of " in printed and "out/ckpt.pt: the model after 1 step" in printed


def test_a_byte_order_mark_and_columns_of_nulls_are_read(workshop, tmp_path, capsys):
    record = {"prompt": "", "chosen": "the owl sang", "rejected": "an owl", "ranking": None}
    text = {"text": "the owl sang a song", "prompt": None, "chosen": None, "rejected": None}
    for name, one in (("pairs", record), ("text", text)):
        path = write(tmp_path / f"{name}.jsonl", one, one)
        content = (tmp_path / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text("\ufeff" + content, encoding="utf-8")
        data.main(["check", f"--data={path}"])
    printed = capsys.readouterr().out
    assert "2 of 2 responses, known of their order: ranking" in printed
    assert "2 of 1 response, known of their order: text" in printed


def test_the_readmes_prompt_is_one_that_the_demos_grammar_knows():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        (prompt,) = re.findall(r'sample.py --checkpoint=out/best.pt --prompt="(.*?)"', f.read())
    stories = [demo_stories.story(random.Random(seed)) for seed in range(300)]
    assert sum(story.startswith(prompt) for story in stories) > 3
