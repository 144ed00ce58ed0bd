"""The states of a run on disk: what --resume continues from.

A state is a folder of safetensors (weights and optimizer, written by torch.distributed.checkpoint:
each process writes its part, and any number of processes can read it) with a state.json and the
SHA-256 of every file. Nothing in it can run code.
"""

import contextlib
import glob
import json
import os
import shutil
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from model import Transformer
from spo import parallel
from spo.files import file_sha256, flush, named_errors

STATES_KEPT = 2


def tensors_of(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and moments by name, as they are in memory: what is saved, and loaded into."""
    tensors = {}
    for name, weight in model.named_parameters():
        if not optimizer.state[weight]:  # before the first step
            optimizer.state[weight] = {
                # A fused optimizer counts its steps where the weights are.
                "step": torch.zeros(
                    (), device=weight.device if optimizer.defaults["fused"] else None
                ),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        tensors[f"model.{name}"] = weight.detach()
        for key, value in optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def save_state(folder: str, step: int, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write folder/step_N, under that name when all of it is on the disk. Collective.

    metadata  what JSON can hold, the same in every process
    OSError, naming the folder, if it cannot be written.
    """
    path = os.path.join(folder, f"step_{step:08d}")
    temporary = f"{path}.tmp"
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)

    def finish() -> None:
        with open(os.path.join(temporary, "state.json"), "w", encoding="utf-8") as f:
            json.dump(metadata | {"step": step}, f)
        names = sorted(os.listdir(temporary))
        hashes = {name: file_sha256(os.path.join(temporary, name)) for name in names}
        with open(os.path.join(temporary, "SHA256SUMS"), "w", encoding="utf-8") as f:
            f.writelines(f"{digest}  {name}\n" for name, digest in hashes.items())
        for name in [*names, "SHA256SUMS", "."]:
            flush(os.path.join(temporary, name))
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
        flush(folder)
        for old in states_in(folder)[:-STATES_KEPT]:
            shutil.rmtree(old)

    try:
        with named_errors(path, size, temporary):
            parallel.on_rank_0(begin)
            with distributed_checkpoint() as dcp:
                writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
                dcp.save(tensors, storage_writer=writer, no_dist=parallel.world_size() == 1)
            parallel.on_rank_0(finish)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def states_in(folder: str) -> list[str]:
    """Return the states of a run, oldest first."""
    paths = glob.glob(os.path.join(glob.escape(folder), "step_*"))
    return sorted(path for path in paths if not path.endswith(".tmp"))


def find_state(folder: str, which: str) -> str | None:
    """Return the state to continue from. which: "newest", "auto", or a path.

    newest  ValueError if there is none, or if it is damaged, naming the one before it
    auto    the newest that is whole; None if there is none
    """
    states = states_in(folder)
    if which == "auto":
        for path in reversed(states):
            reason = damage(path)
            if reason is None:
                return path
            print(f"{path}: {reason}; passed over", flush=True)
        return None
    if which == "newest" and not states:
        mend = "start it without --resume, or with --resume=auto"
        raise ValueError(f"--resume: there is no state of a run in {folder}; {mend}")
    path = states[-1] if which == "newest" else which.rstrip("/")
    if os.path.realpath(path) not in map(os.path.realpath, states):
        there = ", ".join(states) or "none"
        raise ValueError(f"--resume={path}: is no state of this run; there are {there}")
    reason = damage(path)
    if reason is not None:
        others = [other for other in states if other != path and damage(other) is None]
        offer = f"--resume={others[-1]}" if others else "start anew without --resume"
        raise ValueError(f"{path}: {reason}; use {offer}")
    return path


def damage(path: str) -> str | None:
    """Say what is wrong with a state, by the SHA-256 of its files; None: nothing."""
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


def read_metadata(path: str) -> dict:
    with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
        return json.load(f)


def load_state(path: str, tensors: dict[str, Tensor]) -> None:
    """Read a state into tensors of the same names, on any number of processes. Collective."""
    with distributed_checkpoint() as dcp:
        reader = dcp.HuggingFaceStorageReader(path)
        dcp.load(tensors, storage_reader=reader, no_dist=parallel.world_size() == 1)


@contextlib.contextmanager
def distributed_checkpoint() -> Iterator:
    """torch.distributed.checkpoint, without its warning that there is but one process."""
    # Imported here because it takes as long as everything else together, even for --help.
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield dcp
