"""What has to hold on a GPU: SPO_TEST_DEVICE=cuda asks for it, cpu runs the same tests on a CPU.

Each test writes what it measured, as a line of JSON, into the file that SPO_FIGURES names.
"""

import json
import os
import subprocess
import sys

import bench
import pytest
import torch
from helpers import ROOT, gradients_of, log_of, perturbed, random_groups, size_for, tiny

from losses import LOSSES, Objective
from spo import fast, parallel
from spo.generate import generate
from spo.reference import with_reference_logps
from spo_train import PolicySamples, kl_gradient, preference_gradient

DEVICE = os.environ.get("SPO_TEST_DEVICE", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICE, reason="SPO_TEST_DEVICE is unset: it names the device, cuda"),
]


def record(what: str, **values) -> None:
    if path := os.environ.get("SPO_FIGURES"):
        with open(path, "a", encoding="utf-8") as f:
            f.write("\n" + json.dumps({"what": what} | values) + "\n")


def step_on(device: str, loss: str) -> tuple[float, float, torch.Tensor]:
    """(loss, KL, gradient) of one step's two terms in float64."""
    reference = tiny().double()
    policy = fast.use(perturbed(reference).to(device))
    fast.use(reference.to(device))
    objective = Objective(loss)
    groups = with_reference_logps(random_groups(8, size_for(loss)), reference, 3)
    metrics = preference_gradient(objective, policy, reference, groups, 3)
    if objective.online:
        samples = PolicySamples.of(random_groups(6, 1, seed=1), reference, 3)
        metrics |= kl_gradient(objective.beta, policy, samples)
    gradient = torch.cat([grad.flatten() for grad in gradients_of(policy)]).cpu()
    return metrics["loss"], metrics.get("kl", 0.0), gradient


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_step_is_that_of_the_cpu(loss):
    here, there = step_on("cpu", loss), step_on(DEVICE, loss)
    error = float((here[2] - there[2]).norm() / here[2].norm())
    record(f"gradient of {loss} against the CPU's, float64", error=f"{error:.1e}")
    assert here[:2] == pytest.approx(there[:2], rel=1e-9) and error < 1e-9


def test_greedy_text_is_that_of_the_cpu():
    prompts = [[1], [1, 5, 9], [1, 7]]
    for dtype in (torch.float32, torch.float64):
        model = tiny().to(dtype)
        expected = generate(model, prompts, 40, temperature=0)
        assert generate(model.to(DEVICE), prompts, 40, temperature=0) == expected


def test_sampled_text_is_that_of_the_cpu_and_ends_alike():
    """In float64 the draws agree, too: every row has its own random numbers, made on the CPU."""
    model, prompts = tiny().double(), [[1], [1, 5, 9], [1, 7], [1]] * 8
    expected = generate(model, prompts, 40, stop_ids=[3], seed=5)
    assert generate(model.to(DEVICE), prompts, 40, stop_ids=[3], seed=5) == expected


def test_the_errors_of_each_precision():
    for line in bench.gradient_errors("260K", "spo_rank"):
        record(
            f"error of spo_rank in {line['what']}",
            loss=f"{line['error']:.1e}",
            gradient=f"{line['gradient_error']:.1e}",
        )
        assert line["gradient_error"] < (0.1 if line["what"] == "bfloat16" else 0.01)


def trained(*flags: str) -> str:
    """The last line of a run with deterministic algorithms: the final weights' hash."""
    code = (
        "import hashlib, sys, torch\n"
        f"sys.path.insert(0, {ROOT!r})\n"
        "torch.use_deterministic_algorithms(True, warn_only=True)\n"
        "import spo_train\n"
        "spo_train.main(sys.argv[1:])\n"
        "weights = torch.load('out/ckpt.pt', weights_only=True)['model']\n"
        "content = b''.join(weights[n].numpy().tobytes() for n in sorted(weights))\n"
        "print(hashlib.sha256(content).hexdigest())"
    )
    flags = (
        "--init_from=start.pt",
        "--data=ranked.jsonl",
        "--max_iters=8",
        "--batch_size=4",
        "--eval_interval=4",
        "--eval_stories=4",
        "--max_new_tokens=16",
        "--kl_interval=3",
        "--log_interval=1",
        f"--device={DEVICE}",
        "--dtype=float32",
        "--report=false",
        *flags,
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_a_resumed_run_ends_with_the_same_bits(workshop, tokenizer):
    """Resumed between two refreshes of the policy's samples, which come from the state."""
    flag = f"--tokenizer={tokenizer.path}"
    unbroken, log = trained(flag), log_of("out")
    assert trained(flag, "--resume=out/state/step_00000004") == unbroken
    assert log_of("out") == log
    record("resume with deterministic algorithms: the same weights and log, bit for bit")


def test_one_process_in_bfloat16_is_near_float32_and_its_kl_begins_at_0(workshop):
    logs = []
    for dtype in ("float32", "bfloat16"):
        workshop("spo_rank", "--max_iters=4", f"--device={DEVICE}", f"--dtype={dtype}")
        logs.append([entry for entry in log_of("out") if "loss" in entry])
        parallel.end()
    assert logs[1][0]["kl"] == 0 and logs[1][-1]["kl"] > 0
    assert logs[1][0]["logps/chosen"] == pytest.approx(logs[0][0]["logps/chosen"], rel=0.02)


def test_the_plan_is_the_peak_within_a_tenth():
    if DEVICE == "cpu":
        pytest.skip("a CPU's allocator does not count")
    bench.SHAPES["1B"] = (2048, 16, 16, 16, 5632, 32000)
    for loss in ("spo", "dpo"):
        result = bench.our_step("1B", loss, 8, 2, dtype="bfloat16", fit=True, count=3)
        record(
            f"peak of {loss}, {result['layers']} layers of 2,048",
            measured_mb=round(result["peak_mb"]),
            planned_mb=round(result["planned_mb"]),
        )
        assert result["planned_mb"] == pytest.approx(result["peak_mb"], rel=0.1)
