"""The states of a run on disk: what --resume continues from.

A state is a folder: each process writes its rows of every weight and moment into a safetensors file
of its own, one tensor at a time, and any number of processes can read them. state.json and the
SHA-256 of each file stand beside them. Nothing in a state can run code.
"""

import functools
import glob
import hashlib
import json
import math
import os
import shutil
import struct

import torch
from safetensors import safe_open
from torch import Tensor

from model import Transformer
from spo import parallel
from spo.files import file_sha256, flush, named_errors, write_text

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
    OSError, naming the folder, in every process if one of them cannot write.
    """
    path = os.path.join(folder, f"step_{step:08d}")
    temporary = f"{path}.tmp"
    part = f"part-{parallel.rank() + 1:05d}-of-{parallel.world_size():05d}.safetensors"
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    named = functools.partial(named_errors, path, size, temporary)

    def begin() -> None:
        with named():
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)

    def write_part() -> tuple[str, str] | OSError:
        try:
            with named():
                return part, write_tensors(os.path.join(temporary, part), tensors)
        except OSError as error:
            return error

    def finish() -> None:
        with named():
            write_text(os.path.join(temporary, "state.json"), json.dumps(metadata | {"step": step}))
            hashes = dict(parts)
            hashes["state.json"] = file_sha256(os.path.join(temporary, "state.json"))
            sums = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
            write_text(os.path.join(temporary, "SHA256SUMS"), sums)
            flush(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(temporary, path)
            flush(folder)
            for old in states_in(folder)[:-STATES_KEPT]:
                shutil.rmtree(old)

    try:
        parallel.on_rank_0(begin)
        parts = parallel.all_gather(write_part())
        for failed in parts:
            if isinstance(failed, OSError):
                raise failed
        parallel.on_rank_0(finish)
    except OSError:
        if parallel.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_tensors(path: str, tensors: dict[str, Tensor]) -> str:
    """Write this process's rows of tensors as a safetensors file; return its SHA-256.

    One tensor is copied at a time, and none that lies on the CPU: safetensors' own save_file would
    hold a copy of everything that is on a GPU.
    """
    header: dict = {}
    end = 0
    for name, tensor in tensors.items():
        local = parallel.local(tensor)
        dtype = {torch.float32: "F32", torch.float64: "F64"}[local.dtype]
        offsets = [end, end + local.nbytes]
        header[name] = {"dtype": dtype, "shape": list(local.shape), "data_offsets": offsets}
        end += local.nbytes
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(math.ceil(len(encoded) / 8) * 8)  # tensors begin at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for content in (struct.pack("<Q", len(encoded)), encoded):
            f.write(content)
            digest.update(content)
        for tensor in tensors.values():
            content = parallel.local(tensor).detach().cpu().contiguous().flatten().numpy().data
            f.write(content)
            digest.update(content)
    flush(path)
    return digest.hexdigest()


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
    if any(name.startswith("shard-") for name in expected):
        return "written by an earlier version, which kept states in another format"
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
    """Read a state into tensors of the same names. Each process reads its rows, and no others."""
    parts = [
        safe_open(file, "pt")
        for file in sorted(glob.glob(os.path.join(glob.escape(path), "part-*")))
    ]
    for name, tensor in tensors.items():
        local = parallel.local(tensor)
        if tensor.dim() == 0:  # a count of steps, which all parts hold
            local.copy_(parts[0].get_tensor(name))
            continue
        wanted = parallel.rows_of(tensor, parallel.rank(), parallel.world_size())
        start = 0  # of the part's first row, in the whole tensor
        for part in parts:
            rows = part.get_slice(name)
            count = rows.get_shape()[0]
            first, last = max(wanted.start, start), min(wanted.stop, start + count)
            if first < last:
                here = rows[first - start : last - start]
                local[first - wanted.start : last - wanted.start].copy_(here)
            start += count
