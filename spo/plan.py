"""What a run needs of every process's memory, by arithmetic from the model's shape: `spo_train.py --plan=PROCESSES`.

An estimate for deciding what to rent and which flags to give. Weights, gradients, moments, caches and logits are exact;
activations are what autograd keeps of a layer (tests/test_plan.py compares); an allocator's fragmentation is not in it.
"""

import os
from dataclasses import dataclass

import torch

from model import QUERIES, SHORT, ModelArgs, Transformer

GIB = 2**30


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


def saved_by_layer(args: ModelArgs, sequences: int, length: int, width: int, on_cpu: bool) -> int:
    """Bytes that autograd keeps of one layer for sequences of `length` tokens, at `width` bytes a number.

    Inputs of the matrices, and what attention, SwiGLU and RMSNorm need of themselves. The norms upcast 16-bit numbers, and so
    does attention on a CPU, which keeps its probabilities, too.
    """
    kv_dim = args.n_kv_heads * args.head_dim
    upcast = 4 if width == 2 else 0
    norms = 2 * args.dim * (2 * width + upcast) + 2 * 4
    attention = (args.dim + 2 * kv_dim) * width + 2 * args.dim * width + args.n_heads * 4
    swiglu = 4 * args.hidden_dim * width
    scores = 0
    if on_cpu and length <= SHORT:
        attention += (args.dim + 2 * kv_dim) * upcast
        scores = (
            4
            * args.n_heads
            * sum(
                (min(i + QUERIES, length) - i) * min(i + QUERIES, length)
                for i in range(0, length, QUERIES)
            )
        )
    return sequences * (length * (norms + attention + swiglu) + scores)


def memory(args: ModelArgs, tied: bool, load: Load) -> dict[str, int]:
    """Bytes of each kind, for one process."""
    with torch.device("meta"):
        model = Transformer(args, tied)
    numbers = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layers[0].parameters())
    root = numbers - layer * args.n_layers
    share = -(-numbers // load.processes)
    width = 2 if load.dtype == "bfloat16" else 4
    sharded = load.processes > 1 or load.dtype == "bfloat16"
    tokens = load.sequences * load.longest
    samples = -(-load.online // load.processes)
    stories = max(samples, min(128, -(-load.eval_stories // load.processes)))
    on_cpu = load.device == "cpu"
    of_layer = saved_by_layer(args, load.sequences, load.longest, width, on_cpu)
    kept = (
        tokens * args.dim * width * args.n_layers + of_layer
        if load.activation_checkpointing
        else of_layer * args.n_layers
    )
    cache_tokens = min(args.max_seq_len, load.new_tokens + load.longest)
    return {
        "weights": 4 * share,
        "gradients": 4 * share,
        "AdamW's moments": 8 * share,
        "reference": 4 * share if load.reference else 0,
        "gathered layers": width * (2 * layer + root) if sharded else 0,
        "activations": kept,
        "gradient of the logits": 4 * tokens * args.vocab_size,  # written over the logits
        "classifier for the KL": width * args.vocab_size * args.dim
        if sharded and load.online
        else 0,
        "reference's states of the samples": width
        * samples
        * min(load.new_tokens, args.max_seq_len)
        * args.dim,
        "whole policy to generate": width * numbers if sharded else 0,
        "whole reference to judge": width * numbers if sharded and load.eval_stories else 0,
        "weights laid out to generate": width * numbers if on_cpu else 0,
        "key-value cache": 2
        * stories
        * cache_tokens
        * args.n_layers
        * args.n_kv_heads
        * args.head_dim
        * (4 if on_cpu else width),
    }


def report(args: ModelArgs, tied: bool, load: Load) -> str:
    """A table of the kinds, the peak of training and of generation, and whether they fit."""
    kinds = memory(args, tied, load)
    always = ("weights", "AdamW's moments", "reference", "reference's states of the samples")
    phases = {
        "training": (
            *always,
            "gradients",
            "gathered layers",
            "activations",
            "gradient of the logits",
            "classifier for the KL",
        ),
        "generation and evaluation": (
            *always,
            "whole policy to generate",
            "whole reference to judge",
            "weights laid out to generate",
            "key-value cache",
        ),
    }
    peaks = {phase: sum(kinds[kind] for kind in names) for phase, names in phases.items()}
    lines = [
        f"memory of each of {load.processes} processes, {load.dtype}, {load.sequences} sequences of up to "
        f"{load.longest} tokens at a time:"
    ]
    lines += [f"  {kind:<36}{size / GIB:9.3f} GiB" for kind, size in kinds.items() if size]
    lines += [f"  peak of {phase:<28}{size / GIB:9.3f} GiB" for phase, size in peaks.items()]
    there, what = available(load.device, load.processes)
    verdict = "fits" if max(peaks.values()) <= 0.95 * there else "does not fit"
    lines.append(f"  {verdict}: {what} has {there / GIB:.1f} GiB for each")
    return "\n".join(lines)


def available(device: str, processes: int) -> tuple[int, str]:
    """Bytes for each process, and of what."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return properties.total_memory, properties.name
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes, "this machine"
