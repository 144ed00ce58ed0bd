"""Flags from a dataclass."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ONE_THREAD, ROOT, log_of

from spo.config import flag, parse


@dataclass
class Config:
    out: str = flag("out", "a folder")
    beta: float | None = flag(None, "a number, 100% typed")
    steps: int = flag(3, "how many")
    decay: bool = flag(True, "a switch")
    data: str = flag("", "a file", choices=["", "a", "b"])
    learning_rate: float = flag(0.1, "a step's size")


def test_values_are_typed_by_their_annotation():
    config = parse(Config, ["--beta=1", "--steps", "5", "--decay=false", "--data=a"], "prog")
    assert config == Config("out", 1.0, 5, False, "a") and isinstance(config.beta, float)
    assert (
        parse(Config, ["--decay"], "prog").decay is True and parse(Config, [], "prog") == Config()
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--bata=1"], "prog: --bata: no such option; did you mean --beta?"),
        (["--step=1"], "prog: --step: no such option; did you mean --steps?"),
        (["--lr=1"], "prog: --lr: no such option; did you mean --learning_rate?"),
        (["--zzz"], "prog: --zzz: no such option; see --help"),
        (["stray"], "prog: stray: every value belongs to an option, as in --NAME=stray"),
        (["--steps=1.5"], "invalid int value: '1.5'"),
        (["--decay=maybe"], "'maybe' is neither true nor false"),
        (["--data=c"], "invalid choice: 'c'"),
        (["--steps"], "expected one argument"),
        (["--beta=__import__('os').system('true')"], "invalid float value"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, flags, "prog")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"], "prog")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "100% typed" in text and "how many; default: 3" in text
    assert "a file; one of a, b" in text
    assert all(f"--{name}" in text for name in ("out", "beta", "steps", "decay", "data"))


OWN_LOSS = """
import sys
import spo, losses, torch

@losses.objective(data="pair")
def hinge(policy_logps, *, delta: float = 1, power: int = 1):  # a float whose default is whole
    return torch.relu(delta - (policy_logps[:, 0] - policy_logps[:, 1])) ** power

import spo_train
spo_train.main(sys.argv[1:])
"""


def test_a_loss_of_ones_own_brings_its_flags(workshop, tokenizer, tmp_path):
    """And its numbers are in the log's values, in config.json and in the card."""
    (tmp_path / "own.py").write_text(OWN_LOSS)
    flags = ["--init_from=start.pt", f"--tokenizer={tokenizer.path}", "--eval_stories=0"]
    flags += ["--max_iters=2", "--batch_size=4", "--log_interval=1", "--data=pair.jsonl"]

    def run(*more: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "own.py", *flags, *more]
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": ROOT}
        return subprocess.run(words, capture_output=True, text=True, env=environment)

    done = run("--loss=hinge", "--delta=400.5")
    assert done.returncode == 0 and "hinge(delta 400.5, power 1)" in done.stdout, done.stderr
    first = log_of("out")[0]  # no margin is as wide: the loss is delta minus the mean margin
    assert first["loss"] == pytest.approx(400.5 - first["margin"], rel=1e-5)
    refused = run("--loss=dpo", "--delta=1").stderr  # the other losses do not take it
    assert "--delta: dpo with regularizer none does not take it" in refused
    assert "hinge: default 1\n" in run("--help").stdout
