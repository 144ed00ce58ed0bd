"""What the reference says of the dataset, kept beside it, and of the policy's samples."""

import array
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import safetensors
import safetensors.torch
import torch

from model import Transformer
from spo import head, parallel
from spo.files import atomic_write, inputs_sha256
from spo.groups import Batch, EncodedGroup, micro_batches, own_micro_batches
from spo.progress import progress


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
    hidden = parallel.rank() > 0
    with progress(len(mine), "the reference reads", "groups", disable=hidden, leave=False) as bar:
        for batch in micro_batches(mine, size, reference):
            logps += head.sequence_logps(reference, batch).double().tolist()
            bar.update(len(batch.lengths))
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


def sha256_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


class ReferenceCache:
    """DATA.reference_logps.safetensors: a number per response (NaN: not yet), and its key."""

    def __init__(self, data: str, groups: Sequence[EncodedGroup], init_from: str, dtype: str):
        self.path = f"{data}.reference_logps.safetensors"
        self.shape = (len(groups), len(groups[0].responses))
        digest = hashlib.sha256()
        for group in groups:
            for ids in (group.prompt, *group.responses):
                digest.update(array.array("q", [len(ids), *ids]).tobytes())
        self.key = {
            "data and tokenizer": digest.hexdigest(),  # the tokenizer is in the ids
            "weights": inputs_sha256(init_from),
            "dtype": dtype,
        }

    def read(self) -> torch.Tensor:
        """Return the log-probs (G, n), float64.

        Prints why, if the file is there and cannot be used.
        """
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
        if former.get("sha256") != sha256_of(logps):
            print(f"{self.path}: damaged; computed anew", flush=True)
            return nothing
        return logps

    def write(self, logps: torch.Tensor) -> None:
        """Keep the log-probs. Prints why, if that is not possible."""
        try:
            with atomic_write(self.path, logps.nbytes) as f:
                key = self.key | {"sha256": sha256_of(logps)}
                f.write(safetensors.torch.save({"logps": logps}, key))
        except OSError as error:
            print(f"{self.path}: not kept, {error.strerror}", flush=True)


def add_reference_logps(
    groups: Sequence[EncodedGroup], wanted: Iterable[int], reference: Transformer, config
) -> list[EncodedGroup]:
    """Return the groups, those of the indices `wanted` with `reference_logps`. Collective.

    They are read from the cache beside the data, or computed and kept there. A model from scratch
    has no file that a cache could be checked by.

    config  of a run: data, init_from, dtype and micro_batch_size are read here
    """
    factor = f" rope_factor {config.rope_factor:g}" if config.rope_factor else ""
    key = (config.data, groups, config.init_from, config.dtype + factor)
    from_file = config.init_from != "scratch"
    cache = parallel.on_rank_0(lambda: ReferenceCache(*key)) if from_file else None
    return complete(groups, wanted, reference, cache, config.micro_batch_size)


def complete(
    groups: Sequence[EncodedGroup],
    wanted: Iterable[int],
    reference: Transformer,
    cache: ReferenceCache | None,
    size: int | None = None,
) -> list[EncodedGroup]:
    """Do what add_reference_logps says. cache: used by rank 0; None: nothing is kept."""
    wanted = sorted(set(wanted))
    nothing = torch.full((len(groups), 1), math.nan)
    logps = parallel.on_rank_0(lambda: cache.read() if cache else nothing)
    missing = [i for i in wanted if bool(logps[i].isnan().any())]
    found = {i: tuple(logps[i].tolist()) for i in wanted}
    if missing:
        parallel.print0(f"the reference reads {len(missing):,} groups, once")
        computed = compute_logps([groups[i] for i in missing], reference, size)
        found |= dict(zip(missing, computed, strict=True))
        if cache is not None and parallel.rank() == 0:
            logps[missing] = torch.tensor([found[i] for i in missing], dtype=torch.float64)
            cache.write(logps)
    return [replace(group, reference_logps=found.get(i)) for i, group in enumerate(groups)]


@torch.no_grad()
def kl_of_rounding(
    reference: Transformer, groups: Sequence[EncodedGroup], seed: int
) -> float | None:
    """Return the KL, in nats a sample, that bfloat16 shows where there is none; None in float32.

    It is the KL of the reference to itself, after its weights moved by a rounding: layers in
    bfloat16 compute both with errors of their own. No smaller KL can be told from 0. Collective.

    groups  samples of all processes
    """
    if not parallel.computes_in_bfloat16(reference):
        return None
    batches = own_micro_batches(groups, reference)
    # Not taken from the gathered weights below, which are other ones the second time.
    classifier = head.full_classifier(reference, torch.bfloat16)
    with parallel.unsharded(reference):
        hidden = [head.hidden_states(reference, batch) for batch in batches]
    total = torch.zeros((), dtype=torch.float64)
    with parallel.moved_by_rounding(reference, seed), parallel.unsharded(reference):
        for batch, states in zip(batches, hidden, strict=True):
            kl, _ = head.token_kl(reference, batch, head.ReferenceStates(states, classifier))
            total += kl.double().sum().cpu()
    return float(parallel.all_reduce_sum(total)) / len(groups)


# --- of the policy's samples ---------------------------------------------------------------------


@dataclass
class PolicySamples:
    """Samples of the policy, kept for kl_interval steps, with what the KL needs of the reference.

    groups  what all processes drew; None: nothing yet
    mine    this process's share: micro-batches, and the reference's hidden states (M, T, D) of each
    """

    groups: list[EncodedGroup] | None
    reference: Transformer | None
    mine: list[tuple[Batch, torch.Tensor]]

    @classmethod
    def of(cls, groups, reference, micro_batch_size: int | None) -> "PolicySamples":
        if groups is None:
            return cls(None, None, [])
        share = groups[parallel.share(len(groups))]
        batches = micro_batches(share, micro_batch_size, reference)
        hidden = [head.hidden_states(reference, batch) for batch in batches]
        return cls(groups, reference, list(zip(batches, hidden, strict=True)))

    def with_reference(self) -> Iterator[tuple[Batch, head.ReferenceStates]]:
        """Yield the batches and what the KL needs of the reference, its classifier gathered."""
        classifier = head.full_classifier(self.reference, self.mine[0][1].dtype)
        for batch, hidden in self.mine:
            yield batch, head.ReferenceStates(hidden, classifier)
