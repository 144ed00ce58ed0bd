"""Processes: which one this is, what all have together, and weights sharded over them.

torchrun starts several processes, and every model is then sharded over them (FSDP2). Without
torchrun there is one, and nothing is sharded. bfloat16 is FSDP2's mixed precision, for one process,
too: weights, sums and optimizer stay float32, and the layers compute in bfloat16. The functions act
on a model that they are handed.
"""

import contextlib
import datetime
import functools
import gc
import math
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import Transformer, TransformerBlock, rope_tables

# A process that does not answer is waited for this long; SPO_TIMEOUT_MINUTES changes it. What the
# first one does alone (hashing, judging, writing) may take as long as it likes.
TIMEOUT_MINUTES = 10.0

_alone = False  # inside `alone()`
store: dist.Store | None = None  # what the processes tell each other outside of collectives
_turns = 0  # how often on_rank_0 was called
place = "the start"  # how far this process has come, for messages

# --- device and precision ------------------------------------------------------------------------


def pick_device(given: str) -> str:
    """Return the device of a --device flag. A GPU has a number: that of the process, for "cuda".

    given  "": cuda if there is one, else cpu
    ValueError if it is not there, or if several processes would share one GPU.
    """
    name = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        each = "torchrun gives each process a GPU of its own; give --device=cuda"
        raise ValueError(f"--device={name}: {each}")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        message = f"--device={given or name}: not available on this machine; use --device=cpu"
        gpus = torch.cuda.device_count()
        if name.startswith("cuda") and gpus:
            message += f"; its GPUs are cuda:0 to cuda:{gpus - 1}, one for each process"
        raise ValueError(message) from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # streams and graphs are made on the current device
    return name


def pick_dtype(name: str, device: str) -> str:
    """Return the precision of --dtype. "": bfloat16 on a GPU that computes in it, else float32.

    A CPU that does would gain a tenth, and lose 2 to 3% of the gradient (experiments/RESULTS.md).
    """
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return name or ("bfloat16" if on_gpu else "float32")


# --- processes -----------------------------------------------------------------------------------


def start(device: str, dtype: str = "float32") -> tuple[str, str]:
    """Join the processes of torchrun, if there are several; return this process's (device, dtype).

    device, dtype  as the flags have them; "": picked for this machine
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    global store
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and dtype == "float32":
        return device, dtype
    if not dist.is_initialized():
        if size == 1:
            joined, rank_here = dist.HashStore(), 0
        else:
            joined, rank_here, _ = next(dist.rendezvous("env://", timeout=timeout()))
            # torchrun keeps one store over its restarts, with the addresses of the processes that
            # died.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            joined = store = dist.PrefixStore(f"attempt {attempt}", joined)
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            timeout=timeout(),
            store=joined,
            rank=rank_here,
            world_size=size,
        )
    return device, dtype


def timeout() -> datetime.timedelta:
    """Return how long a process waits for another. ValueError if the environment says no number."""
    minutes = os.environ.get("SPO_TIMEOUT_MINUTES", "")
    try:
        limit = datetime.timedelta(minutes=float(minutes or TIMEOUT_MINUTES))
    except (ValueError, OverflowError):
        raise ValueError(f"SPO_TIMEOUT_MINUTES={minutes}: is no number of minutes") from None
    if limit <= datetime.timedelta(0):
        raise ValueError(f"SPO_TIMEOUT_MINUTES={minutes}: must be above 0")
    return limit


def end() -> None:
    """Leave the other processes, at the end of a run that went well."""
    if dist.is_initialized():
        gc.collect()  # sharded models hold on to the process group
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work as the only process for a while, whatever the others do."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Return this process's number, from 0."""
    return 0 if _alone or not dist.is_initialized() else dist.get_rank()


def world_size() -> int:
    """Return how many processes there are."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def print0(text: str) -> None:
    """Print a text once, and not in every process."""
    if rank() == 0:
        print(text, flush=True)


def note0(text: str) -> None:
    """Print a remark once on stderr, where it does not mix with what a command is asked for."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def share(count: int) -> slice:
    """Return this process's part of `count` things; the parts of all ranks are all things.

    count=10, 3 processes -> slice(0, 3), slice(3, 6), slice(6, 10)
    """
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


def deal(things: list) -> list:
    """Return every world_size-th thing: of things in order of length, all get long and short ones.

    things=[a, b, c, d, e], 2 processes -> [a, c, e], [b, d]
    """
    return things[rank() :: world_size()]


def undeal(parts: list[list]) -> list:
    """Put what every process made of its dealt things back into the order of all things.

    parts=[[a, c, e], [b, d]] -> [a, b, c, d, e]
    """
    count = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        value = value.to(device, copy=True)
        dist.all_reduce(value)
    return value


def all_reduce_max(value: int) -> int:
    """Return the largest of all processes' numbers."""
    return value if world_size() == 1 else max(all_gather(value))


def all_gather(thing) -> list:
    """Return what every process has, in the order of their ranks, on all of them."""
    things = [thing] * world_size()
    if world_size() > 1:
        dist.all_gather_object(things, thing)
    return things


def on_rank_0(make: Callable):
    """Call make() in the first process alone; return its result, or raise its error, in all.

    The others wait as long as it takes.
    """
    global _turns
    if world_size() == 1:
        return make()
    _turns += 1
    result = [None, None]
    if rank() == 0:
        try:
            result[0] = make()
        except (ValueError, OSError) as error:
            result[1] = error
        store.set(f"turn {_turns}", "done")
    pause = 0.001
    while not store.check([f"turn {_turns}"]):
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def refuse_uneven(name: str, count: int) -> None:
    """ValueError, naming the flag and counts that would do, if the processes cannot share it."""
    size = world_size()
    if count % size:
        would_do = [n for n in (count - count % size, count - count % size + size) if n > 0]
        fit = " or ".join(map(str, would_do))
        uneven = f"{size} processes cannot share it evenly; {fit} would do"
        raise ValueError(f"--{name}={count}: {uneven}")


def refuse_differences(identity: dict[str, dict]) -> None:
    """ValueError if the processes were given different flags, or read different inputs."""
    ours = all_gather(identity)
    for other, theirs in enumerate(ours):
        for kind, what in (("flags", "was started with"), ("inputs", "reads")):
            for name, value in ours[0][kind].items():
                if theirs[kind].get(name) != value:
                    raise ValueError(f"rank {other} {what} another --{name} than rank 0")


def note_place(name: str) -> None:
    """Keep how far this process has come, for the message when another does not answer."""
    global place
    place = name


# --- means ---------------------------------------------------------------------------------------


class GlobalMean:
    """Means over the groups of all processes, added up micro-batch by micro-batch."""

    def __init__(self, count: int):
        """count: the groups of all processes"""
        self.count = count
        self.means: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value a group: {name: (B,)}."""
        for name, value in values.items():
            self.means[name] = self.means.get(name, 0) + value.detach().sum() / self.count

    def over_all_processes(self) -> dict[str, float]:
        return {name: float(all_reduce_sum(value)) for name, value in self.means.items()}


# --- sharded models ------------------------------------------------------------------------------


def shard(model: Transformer, dtype: str = "float32") -> None:
    """Leave this process its part of every weight; a layer is gathered while it is used.

    One process in float32 keeps the model as it is. Gradients are SUMS over the processes, so a
    loss is divided by the number of all groups and by nothing else.
    """
    model.low_precision = dtype == "bfloat16"
    if world_size() == 1 and dtype == "float32":
        return
    # Imported here because it takes as long as everything else together, even for --help.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Inputs are not cast: the rotary tables would lose their precision.
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    precision = {"mp_policy": low} if dtype == "bfloat16" else {}
    # torch fears that a layer's output is changed in place; no output is, anywhere here.
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module.*returned a view tensor")
    # Without a mesh a run on the CPU of a machine with a GPU would be sharded over the GPU.
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **precision)
    # The root is resharded, too. It would otherwise stay gathered after a pass without gradient,
    # and the next pass would use it as it was before the optimizer's step.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, **precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    model.call_with_weights = types.MethodType(lambda self, f, *inputs: f(self, *inputs), model)
    register_fsdp_forward_method(model, "call_with_weights")


def with_weights(model: Transformer, function: Callable, *inputs):
    """Return function(model, *inputs), for a function that uses the root's weights."""
    if is_sharded(model):
        return model.call_with_weights(function, *inputs)
    return function(model, *inputs)


def is_sharded(model: Transformer) -> bool:
    return hasattr(model, "unshard")  # fully_shard gave it that


def computes_in_bfloat16(model: Transformer) -> bool:
    return getattr(model, "low_precision", False)


@contextlib.contextmanager
def moved_by_rounding(model: Transformer, seed: int) -> Iterator[None]:
    """Move the weights of a model for a while, so that about a quarter round to another bfloat16.

    A weight moves by up to half the distance between two bfloat16 numbers. One that is such a
    number itself, as published weights are, would always round back: it moves by up to the whole
    distance. A weight of 0 stays.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    before = []
    for weight in model.parameters():
        mine = local(weight).detach()
        rows = rows_of(weight, rank(), world_size())
        before.append((mine, mine.to("cpu", copy=True)))
        draw = functools.partial(
            torch.rand, weight.shape, generator=generator, device=generator.device
        )
        steps = draw()[rows] - 0.5
        spread = draw()[rows] - 0.5
        steps += spread * (mine == mine.bfloat16())
        steps[mine == 0] = 0.0
        # frexp: |weight| is in [2^(exponent - 1), 2^exponent), where numbers of 8 bits lie
        # 2^(exponent - 8) apart.
        mine += torch.ldexp(steps, torch.frexp(mine).exponent - 8)
    try:
        yield
    finally:
        for mine, original in before:
            mine.copy_(original)


@contextlib.contextmanager
def unsharded(*models: Transformer) -> Iterator[None]:
    """Give every process all weights for a phase without training, each at its own pace."""
    modules = [m for model in models for m in model.modules() if is_sharded(m)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded. Collective: every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def full_model(model: Transformer, dtype: str) -> Transformer | None:
    """Return a model with all weights on rank 0, and None on the others. Collective.

    dtype  of the copy; the model's own weights are float32, and stay so
    ValueError, in all, if a weight is not finite.
    """
    refuse_non_finite(model)
    if not is_sharded(model) and dtype == "float32":
        return model if rank() == 0 else None
    weights = {}
    for name, weight in model.state_dict().items():  # one at a time
        whole = full_tensor(weight)
        if rank() == 0:
            weights[name] = whole.to("cpu", getattr(torch, dtype))
    if rank() > 0:
        return None
    with torch.device("meta"):
        copy = Transformer(model.args, model.tied)
    copy.load_state_dict(weights, assign=True)
    if copy.tied:
        copy.output.weight = copy.tok_embeddings.weight
    copy.freqs_cos, copy.freqs_sin = rope_tables(model.args)
    copy.eos_ids = model.eos_ids
    return copy


def refuse_non_finite(model: Transformer) -> None:
    """ValueError naming a weight that holds NaN or infinity. Collective."""
    names = [
        name for name, weight in model.named_parameters() if not local(weight).isfinite().all()
    ]
    for bad in filter(None, all_gather(names)):
        lower = "ckpt.pt holds the last evaluation, a lower --learning_rate may help"
        raise ValueError(f"{place}: {bad[0]} of the policy is not finite; {lower}")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rows_of(tensor: Tensor, process: int, size: int) -> slice:
    """Return the rows of a tensor that FSDP2 gives to a process, out of `size`."""
    mine = len(local(tensor))
    if mine == len(tensor):  # it is not sharded
        return slice(0, mine)
    start = min(process * math.ceil(len(tensor) / size), len(tensor))
    return slice(start, start + mine)


def clip_gradient(model: Transformer, limit: float) -> float:
    """Scale the gradient down to a norm of `limit` (0: leave it) and return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))
    return float(full_tensor(norm))


# --- compiled and recomputed layers --------------------------------------------------------------


def can_compile(device: str) -> bool:
    """Tell whether torch.compile works here. If it does not, print why: training can go without."""
    if device == "cpu":
        print0("--compile: on a CPU the layers are faster without it")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, too new a Python
        reason = str(error).strip().splitlines()[0]
        print0(f"continuing without --compile (slower): {reason}")
        return False
    return True


def compile_layers(model: Transformer) -> None:
    """Compile the layers for whole sequences of any length. Generation goes without."""
    for layer in model.layers:
        plain = functools.partial(TransformerBlock.forward, layer)
        compiled = torch.compile(plain, dynamic=True)
        layer.forward = functools.partial(_compiled_without_cache, compiled, plain)


def _compiled_without_cache(compiled, plain, x, cos, sin, cache):
    return (compiled if cache is None else plain)(x, cos, sin, cache)


def checkpoint_activations(model: Transformer) -> None:
    """Keep only the input of each layer, and compute its activations again in the backward pass."""
    for layer in model.layers:
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward, *inputs):
    if torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)
