"""Run by torchrun with two processes: prints, for every objective, how far the sharded loss and
gradient are from one's.

torchrun --standalone --nproc_per_node=2 tests/layouts.py [all]

Without `all` in float64 and two micro-batches a process only.
"""

import copy
import json
import os
import sys

import torch

TESTS = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]
from helpers import perturbed, random_groups, size_for, tiny

from losses import LOSSES, REGULARIZERS, Objective, settings_of
from spo import parallel
from spo.reference import with_reference_logps
from spo_train import PolicySamples, kl_gradient, preference_gradient


def gradients(objective, policy, reference, groups, samples, micro_batch_size):
    """(loss, {name: gradient}) of a layout."""
    policy.zero_grad()
    groups = with_reference_logps(groups, reference, micro_batch_size)
    metrics = preference_gradient(objective, policy, reference, groups, micro_batch_size)
    if objective.online:
        kl_gradient(objective.beta, policy, PolicySamples.of(samples, reference, micro_batch_size))
    gradient = {name: parallel.full_tensor(p.grad) for name, p in policy.named_parameters()}
    return metrics["loss"], gradient


def main() -> None:
    parallel.start("cpu")
    errors = {}
    cases = [(loss, "") for loss in LOSSES] + [("spo", name) for name in REGULARIZERS]
    everything = sys.argv[1:] == ["all"]
    for dtype in (torch.float64, torch.float32) if everything else (torch.float64,):
        for loss, regularizer in cases:
            reference = tiny().to(dtype)
            policy = perturbed(reference)
            groups, samples = random_groups(8, size_for(loss)), random_groups(6, 1, seed=1)
            number = {"gamma": 0.05} if "gamma" in settings_of(LOSSES[loss]) else {}
            objective = Objective(loss, regularizer, **number)
            with parallel.alone():
                loss_one, one = gradients(objective, policy, reference, groups, samples, 8)
            sharded, frozen = copy.deepcopy(policy), copy.deepcopy(reference)
            parallel.shard(sharded)
            parallel.shard(frozen)
            for size in (1, 2, 4) if everything else (2,):
                loss_two, two = gradients(objective, sharded, frozen, groups, samples, size)
                largest = max(float(g.abs().max()) for g in one.values())
                error = max(float((one[name] - two[name]).abs().max()) for name in one) / largest
                case = f"{loss} {regularizer} {dtype} {size}".replace("torch.", "")
                errors[case] = max(error, abs(loss_one - loss_two) / max(1.0, abs(loss_one)))
    for count in (7, 8):  # whole and sharded, an odd number of groups and an even one
        some = random_groups(count, 4)
        with parallel.alone():
            one = with_reference_logps(some, reference)
        two = with_reference_logps(some, frozen)
        pairs = [
            pair
            for a, b in zip(one, two, strict=True)
            for pair in zip(a.reference_logps, b.reference_logps, strict=True)
        ]
        errors[f"reference of {count} {dtype}"] = max(abs(x - y) / abs(x) for x, y in pairs)
    parallel.print0(json.dumps(errors))
    del policy, reference, sharded, frozen, one, two
    parallel.end()


if __name__ == "__main__":
    main()
