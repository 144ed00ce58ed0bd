"""The reference's log-probs of a dataset: computed once, kept beside the data, and used while nothing has changed."""

import array
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import safetensors
import safetensors.torch
import torch

from model import Transformer
from spo import head, parallel
from spo.files import atomic_write, file_sha256
from spo.groups import EncodedGroup, micro_batches


@torch.no_grad()
def compute_logps(
    groups: Sequence[EncodedGroup], reference: Transformer, size: int | None = None
) -> list[tuple[float, ...]]:
    """Return the log-probs of each group's responses, in the order of the groups. Collective.

    size  groups per forward pass; None: what fits
    """
    order = sorted(range(len(groups)), key=lambda i: groups[i].longest)  # micro_batches' own order
    missing = -len(order) % parallel.world_size()
    order = order[:1] * missing + order  # sharded, every process takes part in every pass
    mine = [groups[i] for i in parallel.deal(order)]
    logps: list[list[float]] = []
    for batch in micro_batches(mine, size, reference):
        logps += head.sequence_logps(reference, batch).double().tolist()
    computed = parallel.undeal(parallel.all_gather(logps))
    by_index = dict(zip(order, computed, strict=True))
    return [tuple(by_index[i]) for i in range(len(groups))]


def with_reference_logps(
    groups: Sequence[EncodedGroup], reference: Transformer, size: int | None = None
) -> list[EncodedGroup]:
    """Return the groups with their `reference_logps`. Collective."""
    logps = compute_logps(groups, reference, size)
    return [
        replace(group, reference_logps=known) for group, known in zip(groups, logps, strict=True)
    ]


class ReferenceCache:
    """DATA.reference_logps.safetensors: a number per response (NaN: not yet), and the hashes of what it depends on."""

    def __init__(self, data: str, groups: Sequence[EncodedGroup], init_from: str, dtype: str):
        self.path = f"{data}.reference_logps.safetensors"
        self.shape = (len(groups), len(groups[0].responses))
        digest = hashlib.sha256()
        for group in groups:
            for ids in (group.prompt, *group.responses):
                digest.update(array.array("q", [len(ids), *ids]).tobytes())
        self.key = {
            "data and tokenizer": digest.hexdigest(),  # the tokenizer is in the ids
            "weights": sha256_of_weights(init_from),
            "dtype": dtype,
        }

    def read(self) -> torch.Tensor:
        """Return the log-probs (G, n), float64. Prints why, if the file is there and cannot be used."""
        nothing = torch.full(self.shape, math.nan, dtype=torch.float64)
        if not os.path.isfile(self.path):
            return nothing
        try:
            with safetensors.safe_open(self.path, framework="pt") as f:
                former, logps = f.metadata() or {}, f.get_tensor("logps")
        except (OSError, safetensors.SafetensorError):
            print(f"{self.path}: damaged; computed anew", flush=True)
            return nothing
        differing = [name for name, value in self.key.items() if former.get(name) != value]
        if differing or logps.shape != self.shape or logps.dtype != torch.float64:
            other = " and ".join(differing) or "groups"
            print(f"{self.path}: of other {other}; computed anew", flush=True)
            return nothing
        return logps

    def write(self, logps: torch.Tensor) -> None:
        """Keep the log-probs. Prints why, if that is not possible."""
        try:
            with atomic_write(self.path) as f:
                f.write(safetensors.torch.save({"logps": logps}, self.key))
        except OSError as error:
            print(f"{self.path}: not kept, {error.strerror}", flush=True)


def sha256_of_weights(init_from: str) -> str:
    """Return the SHA-256 of a file; of a folder, that of the hashes of its files."""
    if os.path.isfile(init_from):
        return file_sha256(init_from)
    names = sorted(os.listdir(init_from))
    files = [os.path.join(init_from, name) for name in names]
    hashes = "".join(file_sha256(file) for file in files if os.path.isfile(file))
    return hashlib.sha256(hashes.encode()).hexdigest()


def add_reference_logps(
    groups: Sequence[EncodedGroup],
    wanted: Iterable[int],
    reference: Transformer,
    cache: ReferenceCache | None,
    size: int | None,
) -> list[EncodedGroup]:
    """Return the groups, those of the indices `wanted` with `reference_logps`: from the cache, or computed and kept.

    cache  of rank 0; None: nothing is kept
    """
    wanted = sorted(set(wanted))
    if parallel.on_rank_0(lambda: cache is not None):
        logps = parallel.on_rank_0(lambda: cache.read())
    else:
        logps = torch.full((len(groups), 1), math.nan)
    missing = [i for i in wanted if bool(logps[i].isnan().any())]
    found = {i: tuple(logps[i].tolist()) for i in wanted}
    if missing:
        parallel.print0(f"the reference reads {len(missing):,} groups, once")
        computed = compute_logps([groups[i] for i in missing], reference, size)
        found |= dict(zip(missing, computed, strict=True))
        if cache is not None:
            logps[missing] = torch.tensor([found[i] for i in missing], dtype=torch.float64)
            cache.write(logps)
    return [replace(group, reference_logps=found.get(i)) for i, group in enumerate(groups)]
