"""Run by torchrun with two processes: prints, for every objective, how far the sharded loss and gradient are from one process's.

torchrun --standalone --nproc_per_node=2 tests/layouts.py
"""

import copy
import json
import os
import sys

import torch

sys.path[:0] = [
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    os.path.dirname(os.path.abspath(__file__)),
]
from test_model import tiny
from test_spo_train import perturbed, random_groups, size_for

from losses import LOSSES, REGULARIZERS
from spo import parallel
from spo.groups import micro_batches
from spo.parallel import World, full
from spo.reference import with_reference_logps
from step import online_of, preference_backward, regularizer_backward
from train_config import TrainConfig, objective_of, settings_of


def gradients(world, objective, policy, reference, groups, samples, micro_batch_size):
    """(loss, {name: gradient}) of a layout."""
    policy.zero_grad()
    config = TrainConfig(micro_batch_size=micro_batch_size)
    groups = with_reference_logps(groups, reference, micro_batch_size, world)
    batches = micro_batches(
        groups[world.rank :: world.size], micro_batch_size, policy.args, "cpu", world.most
    )
    logged = preference_backward(objective, policy, reference, batches, world)
    if objective.online:
        logged |= regularizer_backward(
            objective, policy, reference, online_of(config, samples, reference, world), world
        )
    return float(logged["loss"]), {name: full(p.grad) for name, p in policy.named_parameters()}


def main() -> None:
    world, errors = parallel.start("cpu"), {}
    cases = [(loss, "") for loss in LOSSES] + [("spo", name) for name in REGULARIZERS]
    for dtype in (torch.float64, torch.float32):
        for loss, regularizer in cases:
            reference = tiny().to(dtype)
            policy, groups, samples = (
                perturbed(reference),
                random_groups(8, size_for(loss)),
                random_groups(6, 1, seed=1),
            )
            number = {"gamma": 0.05} if "gamma" in settings_of(LOSSES[loss]) else {}
            objective = objective_of(TrainConfig(loss=loss, regularizer=regularizer, **number))
            layout = (objective, policy, reference, groups, samples)
            loss_one, one = gradients(World(), *layout, 8)
            sharded, frozen = copy.deepcopy(policy), copy.deepcopy(reference)
            parallel.shard(sharded, world)
            parallel.shard(frozen, world)
            for size in (1, 2, 4):
                loss_two, two = gradients(world, objective, sharded, frozen, groups, samples, size)
                largest = max(float(g.abs().max()) for g in one.values())
                error = max(float((one[name] - two[name]).abs().max()) for name in one) / largest
                errors[f"{loss} {regularizer} {dtype} {size}".replace("torch.", "")] = max(
                    error, abs(loss_one - loss_two) / max(1.0, abs(loss_one))
                )
    for count in (7, 8):  # whole and sharded, an odd number of groups and an even one
        some = random_groups(count, 4)
        one, two = (
            with_reference_logps(some, model, None, w)
            for model, w in ((reference, World()), (frozen, world))
        )
        errors[f"reference of {count} float32"] = max(
            abs(x - y) / abs(x)
            for a, b in zip(one, two)
            for x, y in zip(a.reference_logps, b.reference_logps)
        )
    if world.rank == 0:
        print(json.dumps(errors))
    del layout, policy, reference, sharded, frozen, one, two
    parallel.end()


if __name__ == "__main__":
    main()
