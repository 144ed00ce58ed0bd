"""The study: its runs on a small model, killed and continued; what is compared is comparable."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import findings
import numpy as np
import pytest
import study
import study_run
import torch
from matched_kl import Contrast
from study_run import Run

import spo_train
from losses import LOSSES
from spo.reference import compute_logps

ROOT = os.path.dirname(study.ROWS)


@pytest.fixture
def flags(workshop, tokenizer):
    return [
        "--init_from=start.pt",
        f"--tokenizer={tokenizer.path}",
        "--num_groups=16",
        "--pool=64",
        "--stories=4",
        "--max_new_tokens=16",
        "--steps=1",
        "--seeds=1",
        "--jobs=2",
        "--rows=study.jsonl",
        "--folder=study",
    ]


@pytest.fixture
def world(flags, tokenizer):
    config = study.parse(study.StudyConfig, flags, "study.py")
    inputs = study.inputs_of(config)
    study.make_world(config, *inputs)
    return study_run.World(*inputs, config.folder, 4, 16)


def command(flags):
    return [sys.executable, os.path.join(ROOT, "study.py"), *flags]


def rows_without_times(path):
    return sorted(
        json.dumps({k: v for k, v in row.items() if k != "seconds"}, sort_keys=True)
        for row in study.read_rows(path)
    )


@pytest.mark.slow
def test_a_study_that_is_killed_and_cut_goes_on_to_the_rows_of_an_unbroken_one(flags):
    asked = [*flags, "--only=learning"]
    subprocess.run(command(asked), check=True)
    unbroken = rows_without_times("study.jsonl")
    assert len(unbroken) == 2 + 2 * len(study.LOSSES)
    os.remove("study.jsonl")
    killed = subprocess.Popen(command(asked), start_new_session=True)
    while not (os.path.isfile("study.jsonl") and len(study.read_rows("study.jsonl")) > 4):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)  # its workers end by themselves
    killed.wait()
    with open("study.jsonl", "r+b") as f:
        f.truncate(os.path.getsize("study.jsonl") - 9)  # and its last line was half-written
    again = subprocess.run(command(asked), capture_output=True, text=True)
    assert again.returncode == 0 and "its last line is cut" in again.stdout
    assert rows_without_times("study.jsonl") == unbroken
    before = os.path.getmtime("study.jsonl")
    subprocess.run(command(asked), check=True)
    assert os.path.getmtime("study.jsonl") == before  # what is there is not run again


def test_rows_of_another_model_are_refused_and_so_is_another_file(flags, world):
    rows = study.Rows("study.jsonl", {"model": "a"})
    rows.handle.close()
    with pytest.raises(ValueError, match="--rows=study.jsonl: its runs are of another model"):
        study.Rows("study.jsonl", {"model": "b"})
    with open("other.jsonl", "w") as f:
        f.write('{"world": {}}\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match="other.jsonl line 2: not a line of a study"):
        study.read_rows("other.jsonl")


@pytest.mark.slow
def test_no_time_no_runs_and_that_is_said(flags):
    done = subprocess.run(
        command([*flags, "--only=learning", "--minutes=0.0001"]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "18 runs left out" in done.stdout and len(study.read_rows("study.jsonl")) == 2


@pytest.mark.parametrize("loss", ["dpo", "spo_rank"])
def test_a_run_is_what_the_trainer_s_functions_make(world, loss):
    """Three steps by hand, with SPO's KL on fresh samples, end at the KL of the row."""
    run = Run(loss, 5, 1e-3, steps=3)
    policy = study_run.trainable(world)
    config = dataclasses.replace(run.config(), max_new_tokens=16)
    objective = config.objective()
    optimizer = spo_train.make_optimizer(config, policy)
    prompts = [world.tokenizer.encode("", bos=True)]
    if objective.online:
        samples = spo_train.draw_samples(config, policy, world.reference, prompts, 0)
    for step in range(3):
        study_run.add_gradient(world, run, policy, step)
        if objective.online:
            spo_train.kl_gradient(objective.beta, policy, samples)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        spo_train.optimizer_step(optimizer, spo_train.learning_rate(config, step))
    row = study_run.train(world, run)
    assert [point["step"] for point in row["checkpoints"]] == [0, 1, 2, 3]
    kl = world.evaluation(5).evaluate(policy, 3, "select").kl
    assert row["checkpoints"][-1]["kl"] == pytest.approx(kl, abs=1e-5)  # rounded
    assert row["checkpoints"][0]["kl"] == 0 and kl > 1e-4


def test_a_run_ends_with_an_evaluation_and_one_that_diverges_says_so(world):
    assert Run("dpo", 0, 1e-4, steps=16).checkpoints == [0, 1, 2, 3, 5, 8, 12, 16]
    row = study_run.train(world, Run("spo_basic", 0, 1e30, "alpha=0", "none", steps=2))
    assert "the weights are not finite" in row["failure"]
    assert row["checkpoints"][0]["step"] == 0


@pytest.mark.parametrize("to_the_end,steps", [(False, [0]), (True, [0, 1, 2])])
def test_a_run_ends_past_the_largest_kl_unless_it_goes_to_the_end(
    world, monkeypatch, to_the_end, steps
):
    monkeypatch.setattr(study_run, "MOST_NATS", -1.0)
    row = study_run.train(world, Run("dpo", 0, 1e-4, steps=2, to_the_end=to_the_end))
    assert [point["step"] for point in row["checkpoints"]] == steps


def test_all_objectives_see_the_same_groups_and_the_reference_read_them_right(world):
    lines = {
        loss: [group.line for step in range(2) for group in world.batch(Run(loss, 3, 1e-4), step)]
        for loss in LOSSES
        if LOSSES[loss].data != "text"
    }
    assert len(set(map(tuple, lines.values()))) == 1
    assert lines["dpo"] != [group.line for group in world.batch(Run("dpo", 4, 1e-4), 0)]
    for group in world.batch(Run("dpo", 3, 1e-4), 0):
        assert group.reference_logps == pytest.approx(compute_logps([group], world.reference)[0])


def test_pairs_are_the_best_and_the_worst_and_a_ranking_is_its_own_order():
    for i in range(4):
        assert study_run.orders(Run("dpo", 0, 1e-4), i, None) == [(0, 3)]
        assert study_run.orders(Run("spo_rank", 0, 1e-4), i, None) == [(0, 1, 2, 3)]


def test_noise_is_the_same_for_all_objectives_and_as_much_as_asked():
    count = 4000
    flipped = [study_run.orders(Run("dpo", 0, 1e-4, noise=0.4), i, None) for i in range(count)]
    assert np.mean([o == [(3, 0)] for o in flipped]) == pytest.approx(0.4, abs=0.02)
    assert all(o in ([(3, 0)], [(0, 3)]) for o in flipped)
    shuffled = [
        study_run.orders(Run("spo_rank", 0, 1e-4, noise=0.4), i, None) for i in range(count)
    ]
    wrong = [o != [(0, 1, 2, 3)] for o in shuffled]
    assert np.mean(wrong) == pytest.approx(0.4 * 23 / 24, abs=0.02)
    for pair, ranking in zip(flipped, shuffled, strict=True):  # the same groups
        assert pair == [(3, 0)] or ranking == [(0, 1, 2, 3)]
    assert study_run.orders(Run("dpo", 0, 1e-4, labels="adjacent"), 0, None) == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


def test_bradley_terry_labels_have_its_probabilities():
    run = Run("spo_basic", 0, 1e-4, labels="bradley_terry")
    scores = [2.0, 1.0, 1.0, 0.5]
    drawn = [study_run.orders(run, i, lambda: scores)[0] for i in range(20_000)]
    for a, b in ((0, 1), (1, 2), (0, 3)):
        wins, losses = drawn.count((a, b)), drawn.count((b, a))
        expected = 1 / (1 + np.exp(scores[b] - scores[a]))
        assert wins / (wins + losses) == pytest.approx(expected, abs=0.02)


def test_the_slope_is_one_for_a_policy_that_is_the_theorem_s(world):
    """A policy whose log-probs are rewards / alpha plus a constant has the slope 1."""
    run = Run("spo_basic", 0, 1e-4, "alpha=0.5", labels="bradley_terry")
    rewards = {
        tuple(response): score
        for i, group in enumerate(world.groups)
        for response, score in zip(group.responses, world.scores(i), strict=True)
    }

    def logps(policy, batch):
        values = []
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
            values.append(rewards[tuple(tokens[mask].tolist())] / 0.5 - 40)
        return torch.tensor(values).view(-1, batch.n)

    original = study_run.head.sequence_logps
    study_run.head.sequence_logps = logps
    try:
        found = study_run.theorem_slope(world, run, world.reference)
    finally:
        study_run.head.sequence_logps = original
    # float32, of offsets of 40 nats
    assert found["slope"] == pytest.approx(1.0, abs=1e-3)
    assert found["r2"] == pytest.approx(1.0, abs=1e-3) and found["error"] < 1e-3


def test_adamw_scales_as_torch_s_does():
    """The scaled gradient is AdamW's update without momentum, weight decay and learning rate."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0)
    moment = study_run.SecondMoment(0.9)
    for _ in range(3):
        gradient = torch.randn(7, dtype=torch.float64)
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(before - parameter.detach(), moment.scaled(gradient))
        moment.add(gradient)


def test_stories_of_other_flags_and_unknown_questions_are_refused(flags, world):
    config = study.parse(study.StudyConfig, [*flags, "--pool=65"], "study.py")
    with pytest.raises(ValueError, match="--folder=study: its stories are of another model or"):
        study.make_world(config, *study.inputs_of(config))
    with pytest.raises(ValueError, match="--only=E9: no such question"):
        study.main([*flags, "--only=E9"])


def test_only_what_every_reading_shows_is_called_shown(monkeypatch):
    """Three contrasts in two readings: alike, unlike, and alike undecided."""

    def contrast(name: str, p_margin: float) -> Contrast:
        return Contrast(name, 6, 0.1, -1.0, 1.2, 1.0, 1.0, p_margin)

    first = [contrast("a", 0.01), contrast("b", 0.024), contrast("c", 0.3)]
    second = [contrast("a", 0.02), contrast("b", 0.026), contrast("c", 0.9)]
    monkeypatch.setattr(findings, "e1_readings", lambda _: {"one": first, "two": second})
    expected = {"a": "no difference", "b": "depends on the reading", "c": "not decided"}
    assert findings.in_every_reading(None) == expected


def test_every_number_of_the_documents_is_that_of_the_runs(capsys):
    findings.main(["--check"])
    assert "as the runs say" in capsys.readouterr().out


def test_a_document_with_another_number_is_named(tmp_path, monkeypatch):
    with open(os.path.join(findings.ROOT, "docs", "findings.md"), encoding="utf-8") as f:
        block = re.search(r"<!-- E0 -->.*?<!-- end -->", f.read(), re.DOTALL)[0]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "findings.md").write_text(block.replace("55.0", "55.1"), encoding="utf-8")
    (tmp_path / "README.md").write_text("", encoding="utf-8")
    monkeypatch.setattr(findings, "ROOT", str(tmp_path))
    with pytest.raises(ValueError, match="docs/findings.md: not what .*study.jsonl says"):
        findings.main(["--check"])


def test_questions_without_runs_have_no_answer_yet(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"world": {}}\n', encoding="utf-8")
    findings.main([f"--rows={tmp_path / 'rows.jsonl'}"])
    assert capsys.readouterr().out.count("No runs yet.") == len(findings.QUESTIONS)
