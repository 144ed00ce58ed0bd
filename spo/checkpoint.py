"""Checkpoint files, read and written in one place: ours (.pt, llama2.c's .pt too) and llama2.c's binary v0, v1, v2.

A file of its own because spo_train, sample, export and the data scripts all read checkpoints and only
model.py stands below all of them; model.py stays the model alone.

A `.pt` is {"model", "model_args", "config", "step", ...}, always loaded with weights_only=True: a checkpoint
can hold tensors, numbers and strings, never code. Every file is written to a temporary name, flushed to
the disk and renamed: a reader finds the old file or the new one, never half of one.
"""

import dataclasses
import math
import os
import struct
import zipfile
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model import ModelArgs, Transformer
from spo.files import atomic_write
from spo.folders import load_folder

MAGIC = 0x616B3432  # "ak42", the first four bytes of llama2.c's versions 1 and 2
HEADER_FIELDS = (
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "max_seq_len",
)
TINYSTORIES_EOS_ID = (
    1  # BOS: in llama2.c's data the next story's BOS ends a story, and EOS is never trained
)


@dataclass
class Checkpoint:
    """A model in memory and what is known about it.

    config["eos_id"] is the id that ends a response; step counts optimizer steps.
    """

    model: Transformer
    config: dict = field(default_factory=dict)
    step: int = 0

    @property
    def eos_id(self) -> int:
        return self.config.get("eos_id", TINYSTORIES_EOS_ID)


def copy_tokenizer(tokenizer, folder: str) -> None:
    """tokenizer.model and, for run.c, tokenizer.bin into a folder. ValueError if another model's are there already."""
    path = os.path.join(folder, "tokenizer.model")
    with open(tokenizer.path, "rb") as f:
        content = f.read()
    if os.path.isfile(path):
        with open(path, "rb") as f:
            if f.read() != content:
                raise ValueError(
                    f"{path} is the tokenizer of another model; choose another folder, or remove it"
                )
    with atomic_write(path) as f:
        f.write(content)
    if tokenizer.kind == "sentencepiece":  # run.c reads no other
        with atomic_write(os.path.join(folder, "tokenizer.bin")) as f:
            f.write(tokenizer.to_llama2c())


def load(path: str, device: str = "cpu") -> Checkpoint:
    """Read a `.pt`, a llama2.c `.bin` (any version), or a folder of Meta or Hugging Face. ValueError, naming the file, if it
    cannot be used.
    """
    if os.path.isdir(path):
        model, eos_id = load_folder(path)
        checkpoint = Checkpoint(model, {"eos_id": eos_id})
    elif os.path.isfile(path):
        checkpoint = load_llama2c(path) if path.endswith(".bin") else load_pt(path)
    else:
        raise ValueError(f"{path}: no such checkpoint; expected a .pt or a llama2.c .bin file")
    checkpoint.model.to(device).eval()
    return checkpoint


def save_pt(path: str, checkpoint: Checkpoint, **extra) -> None:
    """Write `.pt`, atomically. extra: further entries (tensors, numbers, strings, and containers of them)."""
    model = checkpoint.model
    entries = {
        "model": model.state_dict(),
        "model_args": dataclasses.asdict(model.args),
        "config": checkpoint.config,
        "step": checkpoint.step,
    }
    with atomic_write(path) as f:
        torch.save(entries | extra, f)


def load_pt(path: str) -> Checkpoint:
    file = PtFile(path)
    return Checkpoint(build(path, file.args, file.weights), file.config, file.step)


class PtFile:
    """A `.pt`, its weights mapped: they stay on the disk until they, or some of their rows, are read (folders.fill)."""

    def __init__(self, path: str):
        self.path = path
        self.args, self.weights, self.config, self.step = read_pt(path)
        output, embedding = (
            self.weights.get("output.weight"),
            self.weights.get("tok_embeddings.weight"),
        )
        self.tied = output is None or (embedding is not None and torch.equal(output, embedding))
        self.eos_id = self.config.get("eos_id", TINYSTORIES_EOS_ID)

    def rows(self, name: str, rows: slice, shape: tuple[int, ...]) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"{self.path}: {name} is missing")
        return self.weights[name][rows]


def read_pt(path: str) -> tuple[ModelArgs, dict[str, Tensor], dict, int]:
    """(model_args, weights, config, step) of a `.pt`. ValueError, naming the file, if it cannot be used."""
    try:
        entries = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # what a damaged file raises depends on which byte is wrong
        reason = (
            "it holds Python objects and could run code"
            if "Unsupported" in str(error)
            else "it is damaged"
        )
        raise ValueError(
            f"{path}: not loaded, {reason}, or it is no checkpoint of ours or llama2.c's"
        ) from None
    parts = (
        [entries.get("model"), entries.get("model_args")] if isinstance(entries, dict) else [None]
    )
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"{path}: has no 'model' and 'model_args'; expected a checkpoint of ours or llama2.c's"
        )
    weights, model_args = parts
    known = {f.name for f in dataclasses.fields(ModelArgs)}
    unknown = set(map(str, model_args)) - known
    if unknown:
        raise ValueError(
            f"{path}: model_args has {', '.join(sorted(unknown))}, which this model does not know"
        )
    try:
        args = ModelArgs(**model_args)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    # llama2.c saves compiled models, whose names carry a prefix
    weights = {str(k).removeprefix("_orig_mod."): v for k, v in weights.items()}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise ValueError(f"{path}: {name} is no tensor")
    config, step = entries.get("config"), entries.get("step")
    return (
        args,
        weights,
        config if isinstance(config, dict) else {},
        step if isinstance(step, int) else 0,
    )


def build(path: str, args: ModelArgs, weights: dict[str, Tensor]) -> Transformer:
    """A Transformer that holds these weights; ValueError naming the first that is missing or does not fit."""
    output, embedding = weights.get("output.weight"), weights.get("tok_embeddings.weight")
    tied = output is None or (embedding is not None and torch.equal(output, embedding))
    with torch.device("meta"):
        model = Transformer(args, tied)
    expected = model.state_dict()
    weights = weights if output is not None else weights | {"output.weight": embedding}
    for name, shape in ((k, v.shape) for k, v in expected.items()):
        if weights.get(name) is None or weights[name].shape != shape:
            found = (
                "missing" if weights.get(name) is None else f"of shape {tuple(weights[name].shape)}"
            )
            raise ValueError(f"{path}: {name} is {found}, model_args ask for {tuple(shape)}")
    if set(weights) != set(expected):
        raise ValueError(
            f"{path}: {sorted(set(weights) - set(expected))[0]} is no part of this model"
        )
    model = Transformer(args, tied)
    model.load_state_dict(weights)
    return model


# llama2.c's binary formats. v0: 7 int32, then float32 tensors, RoPE tables among them, "untied" told by a
# negative vocab_size. v1: a header of 256 bytes, then float32. v2: the same header and a group size, norms in
# float32, every matrix as int8 with one float32 scale for each group_size weights along its rows.


def per_layer(model: Transformer, name: str) -> list[Tensor]:
    return [layer.get_parameter(f"{name}.weight") for layer in model.layers]


def v0_tensors(model: Transformer) -> list[Tensor]:
    """The model's tensors in the order of v0, RoPE tables included."""
    tensors = [model.tok_embeddings.weight]
    for name in (
        "attention_norm",
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "attention.wo",
        "ffn_norm",
    ):
        tensors += per_layer(model, name)
    for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        tensors += per_layer(model, name)
    tensors += [model.norm.weight, model.freqs_cos, model.freqs_sin]
    return tensors if model.tied else tensors + [model.output.weight]


def norms(model: Transformer) -> list[Tensor]:
    """The vectors, first in v1 and v2."""
    return per_layer(model, "attention_norm") + per_layer(model, "ffn_norm") + [model.norm.weight]


def matrices(model: Transformer) -> list[Tensor]:
    """The matrices, behind the norms in v1 and v2."""
    tensors = [model.tok_embeddings.weight]
    for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo"):
        tensors += per_layer(model, name)
    for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        tensors += per_layer(model, name)
    return tensors if model.tied else tensors + [model.output.weight]


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def largest_group_size(args: ModelArgs) -> int:
    """The largest power of two up to 64 that divides every input dimension: runq.c walks rows in whole groups."""
    return math.gcd(64, math.gcd(args.dim, args.hidden_dim))


def quantize(weight: Tensor, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8: (values (numel,) int8, scales (numel / group_size,) float32); error <= scale / 2."""
    groups = as_numpy(weight).reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    values = np.rint(groups / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8)
    return values.reshape(-1), scales.astype(np.float32)


def save_llama2c(
    path: str, model: Transformer, version: int = 0, group_size: int | None = None
) -> None:
    """Write llama2.c's binary, one tensor at a time, atomically; the model is left as it is.

    version     0: what run.c reads; 1: the same behind a proper header; 2: int8, what runq.c reads
    group_size  of version 2; None: the largest that fits. ValueError if it does not divide every row
    """
    args = model.args
    numbers = [getattr(args, name) for name in HEADER_FIELDS]
    if version == 2:
        group_size = group_size or largest_group_size(args)
        for name in ("dim", "hidden_dim"):
            if group_size < 1 or getattr(args, name) % group_size:
                fits = largest_group_size(args)
                raise ValueError(
                    f"--group_size={group_size} does not divide {name} {getattr(args, name)}; {fits} fits"
                )
    with atomic_write(path) as f:
        if version == 0:
            vocab_size = args.vocab_size if model.tied else -args.vocab_size
            f.write(struct.pack("<7i", *numbers[:5], vocab_size, args.max_seq_len))
            for tensor in v0_tensors(model):
                as_numpy(tensor).tofile(f)
            return
        header = struct.pack("<Ii7iB", MAGIC, version, *numbers, model.tied)
        header += struct.pack("<i", group_size) if version == 2 else b""
        f.write(header.ljust(256, b"\0"))
        for tensor in norms(model):
            as_numpy(tensor).tofile(f)
        for tensor in matrices(model):
            for array in quantize(tensor, group_size) if version == 2 else (as_numpy(tensor),):
                array.tofile(f)


def llama2c_size(args: ModelArgs, tied: bool, version: int, group_size: int) -> int:
    """Bytes of a llama2.c file, by arithmetic alone."""
    kv_dim = args.n_kv_heads * args.head_dim
    vectors = (2 * args.n_layers + 1) * args.dim
    per_block = 2 * args.dim * (args.dim + kv_dim) + 3 * args.dim * args.hidden_dim
    numbers = args.n_layers * per_block + args.vocab_size * args.dim * (1 if tied else 2)
    if version == 0:
        return 28 + 4 * (vectors + numbers + args.max_seq_len * args.head_dim)  # the RoPE tables
    return (
        256 + 4 * vectors + (4 * numbers if version == 1 else numbers + 4 * numbers // group_size)
    )


def load_llama2c(path: str) -> Checkpoint:
    """Read llama2.c's binary of any version; int8 weights come back as float32. Damaged: ValueError.

    The file says nothing of norm_eps and rope_theta: they are 1e-5 and 10000, as in run.c.
    """
    data = (
        np.memmap(path, dtype=np.uint8, mode="r")
        if os.path.getsize(path)
        else np.empty(0, np.uint8)
    )
    head = bytes(data[:256])
    version, group_size = 0, 0
    if len(head) < 28:
        raise ValueError(f"{path}: damaged: {len(head)} bytes are too few for a llama2.c model")
    if struct.unpack_from("<I", head)[0] == MAGIC and len(head) == 256:
        version, *numbers, tied = struct.unpack_from("<i7iB", head, 4)
        group_size = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
    else:
        numbers = list(struct.unpack_from("<7i", head))
        tied, numbers[5] = numbers[5] > 0, abs(numbers[5])
    if (
        version not in (0, 1, 2)
        or min(numbers) < 1
        or max(numbers) > 2**24
        or (version == 2 and group_size < 1)
    ):
        raise ValueError(
            f"{path}: not a llama2.c model (its header reads {numbers}, version {version})"
        )
    try:
        args = ModelArgs(**dict(zip(HEADER_FIELDS, numbers)))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if version == 2 and (args.dim % group_size or args.hidden_dim % group_size):
        raise ValueError(f"{path}: damaged: its rows are not made of groups of {group_size}")
    # The size is checked before anything is built: a damaged header could ask for the whole memory.
    size = llama2c_size(args, bool(tied), version, group_size)
    if len(data) != size:
        raise ValueError(f"{path}: damaged: {len(data)} bytes, its header asks for {size}")
    model, offset = Transformer(args, bool(tied)), 28 if version == 0 else 256

    def take(count: int, dtype) -> Tensor:
        nonlocal offset
        array = np.frombuffer(data, dtype=dtype, count=count, offset=offset)
        offset += array.nbytes
        return torch.from_numpy(array.astype(np.float32))

    with torch.no_grad():
        for tensor in v0_tensors(model) if version == 0 else norms(model):
            tensor.copy_(take(tensor.numel(), np.float32).view(tensor.shape))
        for tensor in matrices(model) if version else []:
            if version == 1:
                tensor.copy_(take(tensor.numel(), np.float32).view(tensor.shape))
            else:
                values = take(tensor.numel(), np.int8).view(-1, group_size)
                scales = take(tensor.numel() // group_size, np.float32)
                tensor.copy_((values * scales.unsqueeze(1)).view(tensor.shape))
    return Checkpoint(model)
