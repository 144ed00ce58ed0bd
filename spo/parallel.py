"""Processes and what they share: sums over all of them, sharded weights, and the state of a run on disk.

Acts on a model that it is handed; the model never asks for it. Started by torchrun there are several processes, and every
model is sharded over them (FSDP2); else there is one, and nothing is sharded. bfloat16 is FSDP2's mixed precision, for one
process, too: weights, sums and optimizer stay float32, layers compute in bfloat16.

The state of a run is a folder of safetensors (weights and optimizer, written by torch.distributed.checkpoint, each process
its part, readable by any number of processes) and a state.json. Nothing in it can run code.
"""

import contextlib
import datetime
import functools
import gc
import glob
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spo.files import file_sha256, flush

KEPT = 2  # states of a run on disk
PATIENCE = datetime.timedelta(
    hours=6
)  # the others wait for the first process while it asks an API judge


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and its device."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    def say(self, text: str) -> None:
        """Print it, once for all processes."""
        if self.rank == 0:
            print(text, flush=True)

    def share(self, count: int) -> slice:
        """This process's part of `count` things, in order; all parts together are all of them."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """The largest of all processes' numbers."""
        return value if self.size == 1 else max(self.gather(value))

    def gather(self, thing) -> list:
        """What every process has, in the order of their ranks, on all of them."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def from_first(self, make):
        """What make() returns in the first process, which alone calls it; if it raises there, every process does."""
        if self.size == 1:
            return make()
        result = [None, None]
        if self.rank == 0:
            try:
                result[0] = make()
            except (ValueError, OSError) as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]


def start(device: str, dtype: str = "float32") -> World:
    """Join the processes of torchrun, if there are several. device: cpu, or cuda for the one of this process's number."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and dtype == "float32":
        return World(device=device)
    if device == "cuda" and size > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if size == 1:
            store, rank = dist.HashStore(), 0
        else:
            store, rank, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
            # torchrun keeps one store over its restarts, and in it the addresses of the processes that died.
            store = dist.PrefixStore(
                f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
            )
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
    return World(dist.get_rank(), size, device, dtype)


def end() -> None:
    """Leave the other processes, at the end of a run that went well."""
    if dist.is_initialized():
        gc.collect()  # sharded models hold on to the process group
        dist.barrier()
        dist.destroy_process_group()


def shard(model, world: World) -> None:
    """Leaves this process its part of every weight; a layer is gathered when it is used. One process in float32: as it is."""
    if world.size == 1 and world.dtype == "float32":
        return
    # Here, and not above: importing it takes as long as all the rest, even for --help.
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Inputs are not cast: the rotary tables would lose their precision, in the policy and not in what it is compared with.
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    precision = {"mp_policy": low} if world.dtype == "bfloat16" else {}
    for layer in model.layers:
        fully_shard(layer, **precision)
    # The root is resharded, too: it would stay whole after a pass without gradient, and the next pass would use it
    # as it was before the optimizer's step.
    fully_shard(model, reshard_after_forward=True, **precision)
    for method in ("with_head", "next_logits"):
        register_fsdp_forward_method(model, method)


def can_compile(device: str, say: Callable[[str], None]) -> bool:
    """Does torch.compile work here? If not, why is said, and training can go on without."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # no C++ compiler, no Triton, too new a Python
        say(f"continuing without --compile (slower): {str(error).strip().splitlines()[0]}")
        return False
    return True


def compile_layers(model) -> None:
    """torch.compile them for whole sequences of any length. Generation goes without: its cache grows with every token."""
    for layer in model.layers:
        layer.forward = functools.partial(
            compiled_without_cache, torch.compile(layer.forward, dynamic=True), layer.forward
        )


def compiled_without_cache(compiled, plain, x, cos, sin, cache):
    return (compiled if cache is None else plain)(x, cos, sin, cache)


def checkpoint_activations(model) -> None:
    """A layer's activations are computed again in the backward pass, and only its input is kept."""
    for layer in model.layers:
        layer.forward = functools.partial(recomputed, layer.forward)


def recomputed(forward, *inputs):
    return (
        checkpoint(forward, *inputs, use_reentrant=False)
        if torch.is_grad_enabled()
        else forward(*inputs)
    )


@contextlib.contextmanager
def whole(*models) -> Iterator[None]:
    """For a phase without training: every process has all weights, and works at its own pace."""
    modules = [m for model in models if model is not None for m in model.modules() if is_sharded(m)]
    for model in modules:
        model.set_reshard_after_forward(False, recurse=False)
        model.unshard()
    try:
        yield
    finally:
        for model in modules:
            model.set_reshard_after_forward(True, recurse=False)
            model.reshard()


def is_sharded(model) -> bool:
    return hasattr(model, "unshard")  # fully_shard gave it that


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, that may be sharded; every process has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# --- the state of a run --------------------------------------------------------------------------


def tensors_of_run(model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimizer's moments by name, as they are in memory: what is saved, and loaded into."""
    tensors = {}
    for name, weight in model.named_parameters():
        if not optimizer.state[weight]:  # before the first step
            optimizer.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        tensors[f"model.{name}"] = weight.detach()
        tensors |= {
            f"optimizer.{name}.{key}": value for key, value in optimizer.state[weight].items()
        }
    return tensors


def save_state(
    folder: str, step: int, tensors: dict[str, Tensor], facts: dict, world: World
) -> None:
    """folder/step_N, under that name only when all of it is on the disk; the last KEPT stay.

    facts  what JSON can hold, the same in every process
    """
    path = os.path.join(folder, f"step_{step:08d}")
    temporary = f"{path}.tmp"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    world.gather(None)  # all wait for the folder
    with distributed_checkpoint() as dcp:
        writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=world.size == 1)
    if world.rank == 0:
        with open(os.path.join(temporary, "state.json"), "w", encoding="utf-8") as f:
            json.dump(facts | {"step": step}, f)
        names = sorted(os.listdir(temporary))
        sums = "".join(f"{file_sha256(os.path.join(temporary, name))}  {name}\n" for name in names)
        with open(os.path.join(temporary, "SHA256SUMS"), "w", encoding="utf-8") as f:
            f.write(sums)
        for name in [*names, "SHA256SUMS", "."]:
            flush(os.path.join(temporary, name))
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
        flush(folder)
        for old in states_in(folder)[:-KEPT]:
            shutil.rmtree(old)
    world.gather(None)


def states_in(folder: str) -> list[str]:
    """The states of a run, oldest first."""
    return sorted(
        p for p in glob.glob(os.path.join(glob.escape(folder), "step_*")) if not p.endswith(".tmp")
    )


def find_state(folder: str, which: str) -> str | None:
    """The state to go on from. which: "newest", "auto", or a path.

    newest  ValueError if there is none, or if it is damaged, naming the one before it
    auto    the newest that is whole; None if there is none
    """
    states = states_in(folder)
    if which == "auto":
        for path in reversed(states):
            if (reason := damage(path)) is None:
                return path
            print(f"{path}: {reason}; passed over", flush=True)
        return None
    if which == "newest" and not states:
        raise ValueError(
            f"--resume: there is no state of a run in {folder}; start it without --resume, or with --resume=auto"
        )
    path = states[-1] if which == "newest" else which.rstrip("/")
    if os.path.realpath(path) not in map(os.path.realpath, states):
        raise ValueError(
            f"--resume={path}: is no state of this run; there are {', '.join(states) or 'none'}"
        )
    if (reason := damage(path)) is not None:
        others = [other for other in states if other != path and damage(other) is None]
        offer = f"--resume={others[-1]}" if others else "start anew without --resume"
        raise ValueError(f"{path}: {reason}; use {offer}")
    return path


def damage(path: str) -> str | None:
    """What is wrong with a state, by the SHA-256 of its files; None: nothing."""
    try:
        with open(os.path.join(path, "SHA256SUMS"), encoding="utf-8") as f:
            expected = dict(reversed(line.rstrip("\n").split("  ", 1)) for line in f)
    except (OSError, ValueError):
        return "damaged: its SHA256SUMS cannot be read"
    if "state.json" not in expected or set(expected) | {"SHA256SUMS"} != set(os.listdir(path)):
        return "damaged: its files are not those of SHA256SUMS"
    for name, digest in expected.items():
        if file_sha256(os.path.join(path, name)) != digest:
            return f"damaged: {name} has another SHA-256 than when it was written"
    return None


def facts_of(path: str) -> dict:
    with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
        return json.load(f)


def load_state(path: str, tensors: dict[str, Tensor], world: World) -> None:
    """Reads a state into tensors of the same names and shapes, sharded over any number of processes."""
    with distributed_checkpoint() as dcp:
        dcp.load(
            tensors, storage_reader=dcp.HuggingFaceStorageReader(path), no_dist=world.size == 1
        )


@contextlib.contextmanager
def distributed_checkpoint() -> Iterator:
    """torch.distributed.checkpoint, without its warning that there is but one process."""
    import torch.distributed.checkpoint as dcp  # here for the same reason as in `shard`

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield dcp
