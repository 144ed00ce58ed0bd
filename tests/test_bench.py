"""The benchmark runs; what it says about a machine is nothing to assert."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, os.path.join(ROOT, "experiments"))
import bench

from model import Transformer


def test_the_products_of_a_token_are_the_matrices_of_the_model():
    for shape in bench.SHAPES:
        with torch.device("meta"):
            matrices = sum(
                p.numel() for p in Transformer(bench.shape_of(shape)).parameters() if p.dim() == 2
            )
        assert bench.products(shape) == matrices  # tied: the embedding is the classifier, once


def test_a_measurement_is_a_line_of_json(capsys):
    done = subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, "experiments", "bench.py"),
            "--measure=W3/260K",
            "--tiny",
        ],
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert (
        result["tokens"] == 32 * 256 and len(result["seconds"]) == 3 and min(result["seconds"]) > 0
    )


def test_the_table_compares_with_the_first_of_a_workload(monkeypatch, capsys):
    def pretend(workload, what, seconds):
        return {
            "seconds": [2.0 if what.startswith("TRL") else 1.0],
            "tokens": 100,
            "flops": 10**9,
            "peak_mb": 5.0,
        }

    monkeypatch.setattr(bench, "measured", pretend)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    bench.main(["--only=W1", "--rounds=1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| W1 | TRL")]
    assert len(rows) == 3 and all(row.endswith("| 50 | 5 | 50% | 0.50 |") for row in rows)
    with pytest.raises(SystemExit):
        bench.main(["--only=W9"])


def test_what_takes_too_long_or_is_slower_in_bfloat16_is_left_out(monkeypatch, capsys):
    asked = []

    def pretend(workload, what, seconds):
        asked.append(what)
        if what == "15M":
            return None
        slow = "bfloat16" in what
        return {"seconds": [45.0 if slow else 1.0], "tokens": 100, "flops": 10**9, "peak_mb": 5.0}

    monkeypatch.setattr(bench, "measured", pretend)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: True)
    bench.main(["--only=W3"])
    printed = capsys.readouterr().out
    assert " cores, " in printed and "torch computes with" in printed
    assert "left out: all in bfloat16, whose products take 45 times as long here" in printed
    assert "left out: W3/15M, longer than its" in printed
    assert "left out of round 2: W3/15M" in printed
    assert [what for what in asked if "bfloat16" in what] == ["matmul, bfloat16"]
    assert asked.count("15M") == 1 and asked.count("260K") == 2
