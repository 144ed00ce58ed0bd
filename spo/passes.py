"""The forward passes of a step, and the batch's mean that a loss compares its groups with."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from losses import Objective, reads
from model import Transformer
from spo import parallel, plan
from spo.groups import Batch


def passes_and_mean(
    objective: Objective, forward: Callable, policy: Transformer, batches: list[Batch], count: int
) -> tuple[Iterable[dict[str, Tensor]], dict[str, Tensor]]:
    """Return each batch's tensors, as forward(batch) gives them, and {name: a mean}.

    The mean is that of mu's or z0's statistic over the `count` groups of all batches and processes.
    With a single micro-batch the loss takes it itself. Else it has to be known before the first
    backward pass: the graphs of all batches are kept, if they are small, or there is one more
    pass, without gradient.
    """
    passes = map(forward, batches)
    if objective.statistic is None or (len(batches) == 1 and parallel.world_size() == 1):
        return passes, {}
    name, function = objective.statistic
    if "policy_logps" not in reads(function):  # lengths are known without a pass
        tensors = [{"lengths": batch.lengths} for batch in batches]
    elif plan.can_keep(policy, batches):
        passes = tensors = list(passes)
    else:
        with torch.no_grad():
            tensors = list(map(forward, batches))
    with torch.no_grad():
        values = torch.cat(list(map(objective.statistic_of, tensors))).sum(0)
    return passes, {name: parallel.all_reduce_sum(values) / count}
