"""experiments/gpu.sh: it runs to its end, and a part that fails takes nothing with it."""

import json
import os
import subprocess
import sys

import gpu
import pytest
from helpers import ROOT


def results(folder) -> list[dict]:
    with open(folder / "results.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.mark.slow
def test_the_script_runs_to_its_end_at_tiny_shapes(tmp_path):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # the script calls python3
    environment = os.environ | {"OUT": str(tmp_path / "gpu"), "OMP_NUM_THREADS": "1", "PATH": path}
    environment.pop("SPO_DATA", None)
    command = ["bash", os.path.join(ROOT, "experiments", "gpu.sh"), "--tiny", "--minutes=60"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    header, *rows = results(tmp_path / "gpu")
    assert "torch" in header["machine"]
    by_name = {row["part"]: row for row in rows}
    assert list(by_name) == ["tests", "W4", "generation", "7B", "demo", "stories260K", "head"]
    assert (
        by_name["stories260K"]["status"] == "skipped"
        and "SPO_DATA" in by_name["stories260K"]["reason"]
    )
    for name in by_name.keys() - {"stories260K"}:
        assert by_name[name]["status"] == "passed", (
            by_name[name],
            (tmp_path / "gpu" / "output.log").read_text(),
        )
    assert len(by_name["W4"]["figures"]) == 5 and len(by_name["generation"]["figures"]) == 4
    assert not [
        figure
        for row in rows
        for figure in row.get("figures", [])
        if "error" in figure and "seconds" in figure
    ]
    assert sorted(os.listdir(tmp_path / "gpu")) == ["output.log", "results.jsonl", "table.md"]


def test_a_part_that_fails_or_hangs_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    listed = [
        gpu.Part("tests", "echo some; exit 3", 3600),
        gpu.Part("W4", "sleep 600 & sleep 600", 1),
        gpu.Part("generation", "no_such_command", 3600),
        gpu.Part("7B", "", 60, "it needs something that is not here"),
        gpu.Part("head", """echo '{"what": "figure", "error": "7"}'; echo the end""", 3600),
    ]
    monkeypatch.setattr(gpu, "parts", lambda tiny: listed)
    gpu.main([f"--out={tmp_path}", "--tiny"])
    rows = results(tmp_path)[1:]
    assert [row["status"] for row in rows] == [
        "failed with exit code 3",
        "stopped after 1 s",
        "failed with exit code 127",
        "skipped",
        "passed",
    ]
    assert rows[0]["last line"] == "some" and rows[4]["figures"] == [
        {"what": "figure", "error": "7"}
    ]
    table = (tmp_path / "table.md").read_text()
    assert (
        "| 7B | skipped | it needs something that is not here |" in table
        and "|  | figure | 7 |" in table
    )


def test_a_measurement_that_fails_leaves_the_others_in_the_table():
    measured = {"seconds": [1.0], "tokens": 5, "flops": 10, "peak_mb": 1.0}
    figures = [{"what": "matmul, bfloat16", "error": "no memory"}, {"what": "spo"} | measured]
    row = {"part": "W4", "status": "passed", "seconds": 1, "last line": "", "figures": figures}
    assert ("", "matmul, bfloat16", "no memory") in gpu.rows_of(row)
    assert gpu.rows_of(row)[-1][2].startswith("1.0000 s, 5 tokens/s, matmul not measured")


def test_one_part_alone_and_no_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "parts", lambda tiny: [gpu.Part("W4", "true", 9), gpu.Part("head", "true", 9)]
    )
    gpu.main([f"--out={tmp_path}", "--tiny", "--only=head"])
    assert [row["part"] for row in results(tmp_path)[1:]] == ["head"]
    gpu.main([f"--out={tmp_path}", "--tiny", "--minutes=0"])
    assert {row["reason"] for row in results(tmp_path)[1:]} == {"no time was left"}


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device here; --tiny"):
        gpu.main([f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
