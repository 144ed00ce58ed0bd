"""Run every part of the GPU measurements in its own process: `bash experiments/gpu.sh`.

A part that fails, or that takes longer than its limit, becomes a row of the table, and the next
part begins. The parts stand in order of worth, because the whole call ends after `--minutes`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from spo.config import flag, main_program, parse

BENCH = f"{sys.executable} {ROOT}/experiments/bench.py"
TRAIN = f"{sys.executable} {ROOT}/spo_train.py"
DATA = f"{sys.executable} {ROOT}/tinystories_data.py"

# The demo's stages in small: the same commands on a text of 12 lines.
TINY_DEMO = f"""
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do
    echo '{{"text": "Once upon a time, an owl number '$i' sang '$i' songs to a cat."}}'
done >text.jsonl
{DATA} train_vocab --data=text.jsonl --vocab_size=290
{TRAIN} --loss=sft --data=text.jsonl --init_from=scratch --tokenizer=data/tok290.model \
    --dim=32 --n_layers=1 --n_heads=2 \
    --max_seq_len=64 --max_iters=2 --batch_size=4 --out_dir=reference
{DATA} generate --checkpoint=reference/ckpt.pt --num_stories=16 --max_new_tokens=24
{DATA} rank --stories=stories.jsonl
{TRAIN} --loss=spo_rank --data=ranked.jsonl --init_from=reference/ckpt.pt \
    --max_iters=2 --batch_size=2 --eval_stories=4 --kl_batch_size=4 --max_new_tokens=24
"""
STORIES260K = f"""
{DATA} generate --checkpoint="$SPO_DATA/stories260K.bin" --tokenizer="$SPO_DATA/tok512.model" \
    --num_stories=4096 --batch_size=1024
{DATA} rank --stories=stories.jsonl
{TRAIN} --loss=spo_rank --init_from="$SPO_DATA/stories260K.bin" \
    --tokenizer="$SPO_DATA/tok512.model" --data=ranked.jsonl --eval_interval=8
"""


@dataclass
class GpuConfig:
    out: str = flag("out/gpu", "the folder of the results")
    only: str = flag(
        "",
        "one part",
        choices=["", "tests", "W4", "generation", "7B", "demo", "stories260K", "head"],
    )
    minutes: float = flag(5.0, "when the whole call ends")
    tiny: bool = flag(False, "tiny shapes, also on a CPU: to see that the script works")


@dataclass
class Part:
    """A bash script that prints its figures as lines of JSON, and the seconds it may take.

    missing  why it cannot run here; "": it can
    """

    name: str
    script: str
    seconds: int
    missing: str = ""


def parts(tiny: bool) -> list[Part]:
    small = " --tiny" if tiny else ""
    device = "cpu" if tiny else "cuda"
    pytest = f"{sys.executable} -m pytest -q -m gpu tests/test_gpu.py"
    tests = f"cd {ROOT} && SPO_TEST_DEVICE={device} {pytest}"
    no_data = (
        ""
        if os.environ.get("SPO_DATA")
        else "SPO_DATA names no folder with stories260K.bin and tok512.model"
    )
    listed = [
        Part("tests", tests, 100),
        Part("W4", f"{BENCH} --measure=W4{small}", 100),
        Part("generation", f"{BENCH} --measure=generation{small}", 50),
        Part("7B", f"{BENCH} --measure=7B{small}", 60),
        Part("demo", TINY_DEMO if tiny else f"{TRAIN} --loss=spo_rank", 80),
        Part("stories260K", STORIES260K, 60, no_data or ("--tiny leaves it out" if tiny else "")),
        Part("head", f"{BENCH} --measure=head{small}", 30),
    ]
    # The limits are a GPU's. At tiny shapes a CPU may be as slow as it likes.
    return [replace(part, seconds=3600) for part in listed] if tiny else listed


def run_part(part: Part, seconds: float, log: str) -> dict:
    """Run a part's script in an empty folder; return its status, seconds and figures.

    log  the file that all parts append their output to
    """
    if part.missing:
        return {"part": part.name, "status": "skipped", "reason": part.missing}
    if seconds < 1:
        return {"part": part.name, "status": "skipped", "reason": "no time was left"}
    started, status = time.monotonic(), "passed"
    with tempfile.TemporaryDirectory() as folder, open(log, "a", encoding="utf-8") as output:
        output.write(f"\n===== {part.name}\n")
        output.flush()
        begin = output.tell()
        environment = os.environ | {"SPO_FIGURES": os.path.abspath(log), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            ["bash", "-e", "-c", part.script],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            if process.wait(seconds):
                status = f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with open(log, "rb") as f:
        f.seek(begin)
        lines = f.read().decode("utf-8", "replace").splitlines()
    figures = [json.loads(line) for line in lines if line.startswith('{"')]
    last = next(
        (line for line in reversed(lines) if line.strip() and not line.startswith('{"')), ""
    )
    return {
        "part": part.name,
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "last line": last.strip()[:200],
        "figures": figures,
    }


def rows_of(row: dict) -> list[tuple[str, ...]]:
    """A part's rows of the table: its status, then each figure."""
    rows = [
        (row["part"], row["status"], row.get("reason") or f"{row['seconds']} s; {row['last line']}")
    ]
    rate = None
    for figure in row.get("figures", []):
        what = figure.get("what", "")
        if "seconds" not in figure:
            rows.append(
                (
                    "",
                    what,
                    figure.get("error")
                    or ", ".join(f"{k} {v}" for k, v in figure.items() if k != "what"),
                )
            )
            continue
        seconds = sorted(figure["seconds"])[len(figure["seconds"]) // 2]
        if what.startswith("matmul"):
            rate = figure["flops"] / seconds
            rows.append(("", what, f"{rate / 1e12:.1f} TFLOP/s"))
            continue
        values = [
            f"{seconds:.4f} s",
            f"{figure['tokens'] / seconds:,.0f} tokens/s",
            f"{figure['flops'] / seconds / rate:.0%} of matmul" if rate else "matmul not measured",
            f"{figure['peak_mb']:,.0f} MB",
        ]
        values += (
            [f"planned {figure['planned_mb']:,.0f} MB, {figure['layers']} layers"]
            if "layers" in figure
            else []
        )
        values += (
            [f"a refresh of the samples {figure['sampling']:.2f} s"]
            if figure.get("sampling")
            else []
        )
        rows.append(("", what, ", ".join(values)))
    return rows


def versions() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    python, today = sys.version.split()[0], time.strftime("%d %B %Y")
    return f"{gpu}, torch {torch.__version__}, Python {python}, {today}"


def main(argv: list[str]) -> None:
    config = parse(GpuConfig, argv, "gpu.sh", "Measure everything that a GPU has to show.")
    if not torch.cuda.is_available() and not config.tiny:
        raise ValueError(
            "there is no CUDA device here; --tiny runs the script itself at tiny shapes"
        )
    os.makedirs(config.out, exist_ok=True)
    open(os.path.join(config.out, "output.log"), "w").close()
    deadline = time.monotonic() + 60 * config.minutes
    table = ["| part | | |", "|---|---|---|"]
    with open(os.path.join(config.out, "results.jsonl"), "w", encoding="utf-8") as results:
        results.write(
            json.dumps(
                {
                    "machine": versions(),
                    "command": shlex.join(["bash", "experiments/gpu.sh", *argv]),
                }
            )
            + "\n"
        )
        for part in parts(config.tiny):
            if config.only in ("", part.name):
                left = min(part.seconds, deadline - time.monotonic())
                row = run_part(part, left, os.path.join(config.out, "output.log"))
                results.write(json.dumps(row) + "\n")
                results.flush()
                table += ["| " + " | ".join(cells) + " |" for cells in rows_of(row)]
                print("\n".join(table[-len(rows_of(row)) :]), flush=True)
    with open(os.path.join(config.out, "table.md"), "w", encoding="utf-8") as f:
        f.write(f"{versions()}\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    main_program(main)
