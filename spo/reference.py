"""What the reference says of the dataset: computed once, kept beside the data, and used again while nothing has changed."""

import array
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable

import safetensors
import safetensors.torch
import torch

from model import Transformer
from spo import head
from spo.files import atomic_write, file_sha256
from spo.groups import EncodedGroup, longest_sequence, micro_batches
from spo.parallel import World


@torch.no_grad()
def with_reference_logps(
    groups: list[EncodedGroup],
    reference: Transformer,
    size: int | None = None,
    world: World = World(),
) -> list[EncodedGroup]:
    """The groups with `reference_logps`, in their order. size: groups per forward pass; None: what fits."""
    order = sorted(
        range(len(groups)), key=lambda i: longest_sequence(groups[i])
    )  # micro_batches' own
    order = (
        order[:1] * (-len(order) % world.size) + order
    )  # sharded, every process takes part in every pass
    mine = [groups[i] for i in order[world.rank :: world.size]]
    logps = []
    for batch in micro_batches(mine, size, reference.args, world.device, world.most):
        values = reference.with_head(
            batch.tokens, lambda *own: head.sequence_logps(*own, batch.tokens, batch.mask)
        )
        logps += values.double().view(-1, batch.n).tolist()
    parts, scored = world.gather(logps), list(groups)
    for place, i in enumerate(order):
        known = tuple(parts[place % world.size][place // world.size])
        scored[i] = dataclasses.replace(groups[i], reference_logps=known)
    return scored


class ReferenceCache:
    """DATA.reference_logps.safetensors: a number per response (NaN: not yet), and the hashes of what it depends on."""

    def __init__(self, data: str, groups: list[EncodedGroup], init_from: str, dtype: str):
        self.path = f"{data}.reference_logps.safetensors"
        self.shape = (len(groups), len(groups[0].responses))
        digest = hashlib.sha256()
        for group in groups:
            for ids in (group.prompt, *group.responses):
                digest.update(array.array("q", [len(ids), *ids]).tobytes())
        # The tokenizer is in the ids.
        self.key = {
            "data and tokenizer": digest.hexdigest(),
            "weights": digest_of_weights(init_from),
            "dtype": dtype,
        }

    def read(self) -> tuple[torch.Tensor, str]:
        """(log-probs (G, n), float64; what to say, if the file is there and of no use)."""
        nothing = torch.full(self.shape, math.nan, dtype=torch.float64)
        if not os.path.isfile(self.path):
            return nothing, ""
        try:
            with safetensors.safe_open(self.path, framework="pt") as f:
                former, logps = f.metadata() or {}, f.get_tensor("logps")
        except (OSError, safetensors.SafetensorError):
            return nothing, f"{self.path}: damaged; computed anew"
        differing = [name for name, value in self.key.items() if former.get(name) != value]
        if differing or logps.shape != self.shape or logps.dtype != torch.float64:
            return (
                nothing,
                f"{self.path}: of other {' and '.join(differing) or 'groups'}; computed anew",
            )
        return logps, ""

    def write(self, logps: torch.Tensor) -> str:
        """What to say, if it cannot be kept."""
        try:
            with atomic_write(self.path) as f:
                f.write(safetensors.torch.save({"logps": logps}, self.key))
        except OSError as error:
            return f"{self.path}: not kept, {error.strerror}"
        return ""


def digest_of_weights(init_from: str) -> str:
    """Of a file, or of the files of a folder."""
    if os.path.isfile(init_from):
        return file_sha256(init_from)
    names = sorted(
        name for name in os.listdir(init_from) if os.path.isfile(os.path.join(init_from, name))
    )
    return hashlib.sha256(
        "".join(file_sha256(os.path.join(init_from, name)) for name in names).encode()
    ).hexdigest()


def complete(
    groups: list[EncodedGroup],
    wanted: set[int],
    reference: Transformer,
    cache: ReferenceCache | None,
    size: int | None,
    world: World,
    say: Callable[[str], None],
) -> list[EncodedGroup]:
    """The groups, those whose number is `wanted` with `reference_logps`: read from the cache, else computed and kept."""
    logps, remark = (
        world.from_first(cache.read) if cache else (torch.full((len(groups), 1), math.nan), "")
    )
    if remark:
        say(remark)
    missing = [i for i in sorted(wanted) if bool(logps[i].isnan().any())]
    found = {i: tuple(logps[i].tolist()) for i in wanted}
    if missing:
        say(f"the reference reads {len(missing):,} groups, once")
        scored = with_reference_logps([groups[i] for i in missing], reference, size, world)
        found |= {i: group.reference_logps for i, group in zip(missing, scored)}
        if cache:
            logps[missing] = torch.tensor([found[i] for i in missing], dtype=torch.float64)
            remark = world.from_first(lambda: cache.write(logps))
            if remark:
                say(remark)
    return [
        dataclasses.replace(group, reference_logps=found[i]) if i in wanted else group
        for i, group in enumerate(groups)
    ]
