"""The order of the data: which groups a step trains on. Each epoch is a permutation."""

import functools

import torch


@functools.lru_cache(maxsize=2)
def permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return which of `count` groups make up the batch of a step. Each epoch is a permutation."""
    indices = []
    # By arithmetic and not by a running generator: a run that is resumed finds its place at once.
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        indices.append(permutation(count, seed + epoch)[place])
    return indices


def indices_of_run(config, count: int) -> set[int]:
    """Return which of `count` groups any step of the run uses.

    config  of a run: max_iters, batch_size and seed are read here
    """
    used: set[int] = set()
    for step in range(config.max_iters):
        used |= set(batch_indices(count, config.batch_size, step, config.seed))
    return used
