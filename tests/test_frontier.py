"""The sweep over objectives: runs, the table at equal KL, the figure; stopped and continued."""

import inspect
import json
import os
import subprocess

import frontier
import pytest

import spo_train
import tinystories_data as data
from spo.config import parse
from spo_train import TrainConfig


@pytest.fixture
def flags(workshop, tokenizer):
    return [
        "--data=ranked.jsonl",
        "--init_from=start.pt",
        f"--tokenizer={tokenizer.path}",
        "--max_iters=3",
        "--eval_interval=1",
        "--eval_stories=4",
        "--max_new_tokens=12",
        "--batch_size=4",
        "--learning_rate=0.05",
    ]


@pytest.mark.slow
def test_a_sweep_ends_in_a_table_and_a_figure_and_is_not_run_twice(flags, tmp_path, capsys):
    frontier.main([*flags, "--methods=dpo_rank,spo_basic+none"])
    out = capsys.readouterr().out
    assert "at equal KL" in out and "0.5 nats" in out and "spo_basic+none" in out
    with open("out/frontier/table.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    assert [row["method"] for row in rows] == ["dpo_rank"] * 3 + ["spo_basic+none"]
    for row in rows:  # what a run did not reach is missing
        missing = [row[nats] is None for nats in ("0.5", "1", "2", "4")]
        assert missing == sorted(missing)
    assert (tmp_path / "out/frontier/frontier.png").stat().st_size > 5000
    logs = [path.stat().st_mtime_ns for path in tmp_path.glob("out/frontier/*/log.jsonl")]
    frontier.main([*flags, "--methods=dpo_rank,spo_basic+none"])
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("out/frontier/*/log.jsonl")] == logs
    frontier.main(["--runs=out/frontier/*", "--out_dir=again"])  # the same curves, of the folders
    with open("again/table.jsonl", encoding="utf-8") as f:
        again = [json.loads(line) for line in f]
    readings = [{k: v for k, v in row.items() if k not in ("method", "setting")} for row in rows]
    assert [{k: v for k, v in row.items() if k in readings[0]} for row in again] == readings


def test_a_run_that_was_not_judged_is_passed_over(workshop, tokenizer, capsys):
    flags = ["--data=ranked.jsonl", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    flags += ["--loss=best_sft", "--max_iters=1", "--eval_stories=0", "--out_dir=runs/sft"]
    spo_train.main(flags)
    with pytest.raises(ValueError, match=r"--runs=runs/\*: there is no judged run"):
        frontier.main(["--runs=runs/*"])


def test_a_run_that_fails_is_named_with_its_output_and_is_not_taken_for_done(flags, tmp_path):
    output = "out/frontier/dpo_rank_beta=0.0001/output.txt"
    with pytest.raises(ValueError, match=f"--loss=dpo_rank .* failed, see {output}"):
        frontier.main([*flags, "--methods=dpo_rank", "--learning_rate=-1"])
    assert not list(tmp_path.glob("out/frontier/*/done"))


def test_every_objective_has_a_sweep_of_flags_that_it_takes():
    assert set(frontier.SWEEPS) == set(frontier.LOSSES)
    for loss, sweep in frontier.SWEEPS.items():
        takes = set(inspect.signature(frontier.LOSSES[loss]).parameters)
        assert set(sweep) <= takes | (
            {"beta"} if frontier.LOSSES[loss].regularizer != "none" else set()
        )


@pytest.mark.parametrize(
    "flag,message",
    [
        ("--methods=spoo", "'spoo' is no objective"),
        ("--jobs=0", "--jobs=0"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(flags, flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        frontier.main([*flags, flag])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["table2", "table3", "table4"])
@pytest.mark.parametrize("scale", ["demo", "260K", "110M"])
@pytest.mark.parametrize("judge", ["offline", "org/model"])
def test_the_table_scripts_call_what_is_there(table, scale, judge, tmp_path):
    """With a `python` that writes down its arguments: every flag and method is one that the scripts
    take.
    """
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" >"$(basename "$1")${2%%[!a-z]*}.args"\n', encoding="utf-8"
    )
    stub.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SCALE": scale,
        "JUDGE": judge,
        "CHECKPOINT": "model.pt",
        "TOKENIZER": "t.model",
    }
    if judge != "offline":
        environment["JUDGE_FLAGS"] = "--usd_per_million_in=1 --usd_per_million_out=2 --max_usd=150"
    script = os.path.join(frontier.ROOT, "experiments", f"{table}.sh")
    subprocess.run(["bash", script], cwd=tmp_path, env=environment, check=True)
    arguments = (tmp_path / "frontier.py.args").read_text(encoding="utf-8").splitlines()[1:]
    config = parse(frontier.FrontierConfig, arguments, "frontier.py")
    assert frontier.methods_of(config)
    run = scale if judge == "offline" else f"{scale}-org_model"
    assert config.out_dir == f"out/{table}-{run}" and config.data == (
        f"data/{run}/ranked.jsonl" if run != "demo" else ""
    )
    parse(TrainConfig, config.train_flags.split(), "spo_train.py")
    if run != "demo":
        steps = {"generate": data.GenerateConfig, "rank": data.RankConfig}
        for step, config_class in steps.items():
            arguments = (
                (tmp_path / f"tinystories_data.py{step}.args")
                .read_text(encoding="utf-8")
                .splitlines()[2:]
            )
            steps[step] = parse(config_class, arguments, step)
        assert steps["generate"].out == steps["rank"].stories and steps["rank"].out == config.data
        assert (
            steps["rank"].judge == config.judge == judge and steps["rank"].max_usd == config.max_usd
        )
    if judge != "offline":  # every process has a journal of its own, and its part of the budget
        shares = [frontier.share_of(config, folder) for folder in ("a", "b")]
        assert shares[0].journal == "a/journal.jsonl" and shares[1].journal == "b/journal.jsonl"
        runs = sum(
            len(frontier.settings_of(sweep)) for sweep in frontier.methods_of(config).values()
        )
        assert shares[0].max_usd == pytest.approx(150 / runs)


def test_an_unknown_scale_is_refused(tmp_path):
    script = os.path.join(frontier.ROOT, "experiments", "table2.sh")
    done = subprocess.run(
        ["bash", script],
        cwd=tmp_path,
        env=os.environ | {"SCALE": "7B"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "SCALE=7B: choose demo, 260K or 110M" in done.stderr


@pytest.mark.parametrize("table", [1, 2, 3, 4])
def test_an_argument_to_a_table_is_refused_and_nothing_runs(tmp_path, table):
    script = os.path.join(frontier.ROOT, "experiments", f"table{table}.sh")
    done = subprocess.run(["bash", script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "--help: takes no arguments" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_sweep_on_a_ranking_trains_pairwise_losses_on_the_best_and_the_worst(tmp_path):
    """And best-of-n losses on the group with its best named."""
    data_file = tmp_path / "r.jsonl"
    data_file.write_text(json.dumps({"responses": list("abcd"), "ranking": [3, 0, 2, 1]}) + "\n")
    config = frontier.FrontierConfig(
        data=str(data_file), init_from="m.pt", tokenizer="t.model", out_dir=str(tmp_path)
    )
    *_, files = frontier.files_for(config)
    pair = json.loads(open(files["pair"]).read())
    assert (pair["responses"], pair["ranking"]) == (["d", "b"], [0, 1])
    best = json.loads(open(files["best"]).read())
    assert (best["responses"], best["best"]) == (list("abcd"), 3)
