"""What a run needs of every process's memory, by arithmetic: `spo_train.py --plan=PROCESSES`.

An estimate for deciding what to rent and which flags to give. Weights, gradients, moments, caches
and logits are exact; activations are what autograd keeps of a layer (tests/test_plan.py compares);
an allocator's fragmentation is not in it.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model import ModelArgs, Transformer
from spo import parallel
from spo.fast_block import MOST_TOKENS, QUERIES_PER_BLOCK
from spo.generate import stories_at_a_time
from spo.groups import Batch, EncodedGroup, padded_width, split_groups

GIB = 2**30
MOST_KEPT = 2 * GIB  # bytes of the graphs of a step's micro-batches held at once, on a CPU
GROUPS_LOOKED_AT = 1000  # for the longest of a dataset
ALWAYS = ("weights", "AdamW's moments", "reference", "reference's states of the samples")
PHASES = {
    "training": (
        *ALWAYS,
        "gradients",
        "gathered layers",
        "activations",
        "gradient of the logits",
        "classifier for the KL",
        "classifiers in float32",
    ),
    "generation and evaluation": (
        *ALWAYS,
        "whole policy to generate",
        "whole reference to judge",
        "weights laid out to generate",
        "key-value cache",
        "weights kept while rounding is measured",
    ),
}


@dataclass
class Load:
    """What the flags and the data make a process work on."""

    processes: int
    device: str
    dtype: str
    reference: bool
    online: int  # samples of the policy, over all processes; 0: none
    eval_stories: int
    sequences: int  # in one micro-batch
    longest: int  # tokens of the longest of them
    new_tokens: int
    activation_checkpointing: bool
    gpu_gib: float | None = None  # of a GPU that need not be here


def first_groups(groups: Sequence[EncodedGroup]) -> list[EncodedGroup]:
    """Return as many groups as tell what a large dataset is like."""
    return [groups[i] for i in range(min(GROUPS_LOOKED_AT, len(groups)))]


def load_of(config, objective, args: ModelArgs, groups: Sequence[EncodedGroup]) -> Load:
    """Return what `spo_train.py` with these flags, this objective and this data works on."""
    device = "cuda" if config.gpu_gib else config.device
    longest = max(group.longest for group in first_groups(groups))
    width = padded_width(longest, args.max_seq_len)
    n = len(groups[0].responses)
    groups_each = max(1, config.batch_size // config.plan)
    device_type = device.split(":")[0]
    ends = split_groups([n * width] * groups_each, config.micro_batch_size, args.dim, device_type)
    return Load(
        processes=config.plan,
        device=device,
        gpu_gib=config.gpu_gib,
        dtype=config.dtype,
        reference=objective.needs_reference or config.judged,
        online=config.kl_batch_size if objective.online else 0,
        eval_stories=max(config.eval_stories, config.eval_pool) if config.judged else 0,
        sequences=n * ends[1],
        longest=width,
        new_tokens=config.max_new_tokens,
        activation_checkpointing=config.activation_checkpointing,
    )


def saved_by_layer(args: ModelArgs, sequences: int, length: int, width: int, on_cpu: bool) -> int:
    """Return the bytes that autograd keeps of one layer, at `width` bytes a number.

    They are the inputs of the matrices, and what attention, SwiGLU and RMSNorm need besides. The
    norms upcast 16-bit numbers. On a CPU attention keeps its probabilities, in float32.
    """
    kv_dim = args.n_kv_heads * args.head_dim
    upcast = 4 if width == 2 else 0
    norms = 2 * args.dim * (2 * width + upcast) + 2 * 4
    qkv = args.dim + 2 * kv_dim
    attention = qkv * width + 2 * args.dim * width + args.n_heads * 4
    swiglu = 4 * args.hidden_dim * width
    scores = folded = 0
    if on_cpu and length <= MOST_TOKENS and width > 2:  # spo/fast_block.py
        norms = 2 * (args.dim + 1) * width
        attention = (qkv + args.dim) * width
        swiglu = 3 * args.hidden_dim * width
        for first in range(0, length, QUERIES_PER_BLOCK):
            last = min(first + QUERIES_PER_BLOCK, length)
            scores += width * args.n_heads * (last - first) * last
        folded = 2 * width * args.dim * (qkv + 2 * args.hidden_dim)  # the matrices side by side
    return sequences * (length * (norms + attention + swiglu) + scores) + folded


def can_keep(model: Transformer, batches: list[Batch]) -> bool:
    """Tell whether the graphs of all batches may be held at once: those of one process, if small.

    Small is a quarter of the memory, and on a CPU 2 GiB at most. Sharded layers are gathered for
    each pass and its backward, one after the other.
    """
    if parallel.world_size() > 1:
        return False
    args, on_cpu = model.args, model.device.type == "cpu"
    low = parallel.computes_in_bfloat16(model)
    width = 2 if low else model.tok_embeddings.weight.itemsize
    bytes_kept = 0
    for batch in batches:
        rows, length = batch.tokens.shape
        saved = saved_by_layer(args, rows, length, width, on_cpu)
        bytes_kept += saved * args.n_layers + 4 * int(batch.mask.sum()) * args.vocab_size
    there, _ = available(model.device.type, 1)
    return bytes_kept <= (min(MOST_KEPT, there / 4) if on_cpu else there / 4)


def memory(args: ModelArgs, tied: bool, load: Load) -> dict[str, int]:
    """Return the bytes of each kind, for one process."""
    with torch.device("meta"):
        model = Transformer(args, tied)
    numbers = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layers[0].parameters())
    root = numbers - layer * args.n_layers
    share = math.ceil(numbers / load.processes)
    width = 2 if load.dtype == "bfloat16" else 4
    sharded = load.processes > 1 or load.dtype == "bfloat16"
    on_cpu = load.device == "cpu"
    tokens = load.sequences * load.longest
    samples = math.ceil(load.online / load.processes)
    at_a_time = stories_at_a_time(args, load.device)
    stories = min(at_a_time, math.ceil(load.eval_stories / load.processes))
    activations = saved_by_layer(args, load.sequences, load.longest, width, on_cpu)
    if load.activation_checkpointing:  # one layer's, and the inputs of all
        activations += tokens * args.dim * width * args.n_layers
    else:
        activations *= args.n_layers
    sample_tokens = samples * min(load.new_tokens, args.max_seq_len)
    cached_tokens = max(samples, stories) * min(args.max_seq_len, load.new_tokens + load.longest)
    cached_numbers = 2 * args.n_layers * args.n_kv_heads * args.head_dim
    classifier = args.vocab_size * args.dim
    kinds = {
        "weights": 4 * share,
        "gradients": 4 * share,
        "AdamW's moments": 8 * share,
        "activations": activations,
        "gradient of the logits": 4 * tokens * args.vocab_size,  # written over the logits
        "reference's states of the samples": width * sample_tokens * args.dim,
        "key-value cache": cached_tokens * cached_numbers * (4 if on_cpu else width),
        "reference": 4 * share if load.reference else 0,
    }
    if sharded:
        kinds["gathered layers"] = width * (2 * layer + root)
        kinds["classifier for the KL"] = width * classifier if load.online else 0
        kinds["whole policy to generate"] = width * numbers
        kinds["whole reference to judge"] = width * numbers if load.eval_stories else 0
    if on_cpu and width == 2 and load.reference:  # on a GPU they are kept in the CPU's memory
        kinds["weights kept while rounding is measured"] = 4 * share
    if on_cpu and width == 2:  # of the policy, and for the KL of the reference
        kinds["classifiers in float32"] = 4 * classifier * (2 if load.online else 1)
    if on_cpu:
        kinds["weights laid out to generate"] = width * numbers
    return kinds


def peaks(kinds: dict[str, int]) -> dict[str, int]:
    """Return the bytes of each phase at its peak."""
    return {phase: sum(kinds.get(kind, 0) for kind in names) for phase, names in PHASES.items()}


def report(args: ModelArgs, tied: bool, load: Load) -> str:
    """Return a table of the kinds, the peaks of both phases, and whether they fit."""
    kinds = memory(args, tied, load)
    at_a_time = f"{load.sequences} sequences of up to {load.longest} tokens at a time"
    lines = [f"memory of each of {load.processes} processes, {load.dtype}, {at_a_time}:"]
    for kind, size in kinds.items():
        if size:
            lines.append(f"  {kind:<36}{size / GIB:9.3f} GiB")
    for phase, size in peaks(kinds).items():
        lines.append(f"  peak of {phase:<28}{size / GIB:9.3f} GiB")
    if load.gpu_gib:
        there, what = load.gpu_gib * GIB, "such a GPU"
    else:
        there, what = available(load.device, load.processes)
    verdict = "fits" if max(peaks(kinds).values()) <= 0.95 * there else "does not fit"
    lines.append(f"  {verdict}: {what} has {there / GIB:.1f} GiB for each")
    return "\n".join(lines)


def available(device: str, processes: int) -> tuple[int, str]:
    """Return the bytes that there are for each process, and of what."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, properties.name
    if not hasattr(os, "sysconf"):  # Windows
        return 4 * GIB // processes, "this machine, of unknown memory"
    pages = os.sysconf("SC_PHYS_PAGES")
    return os.sysconf("SC_PAGE_SIZE") * pages // processes, "this machine"
