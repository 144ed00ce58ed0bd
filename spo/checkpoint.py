"""Read every format of weights through one interface; read and write `.pt` files.

`open_weights(path)` reads a `.pt` (ours, llama2.c's), a llama2.c `.bin` of version 0, 1 or 2, and
the folders of Meta and Hugging Face. What it returns has

    path, args (ModelArgs), tied, eos_ids, step, config, evaluation    what it says of the model
    rows(name, rows)    those rows of a weight, read from the mapped file

so a process can read its own shard, and nothing is ever in memory twice. A checkpoint can hold
tensors, numbers and strings, and never code: weights_only=True, everywhere.
"""

import dataclasses
import math
import os
import re
import struct
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import ModelArgs, Transformer, rope_tables
from spo import fast, parallel
from spo.config import flag, refuse_if
from spo.files import atomic_write, check_sha256
from spo.folders import HuggingFaceFolder, MetaFolder
from spo.weights import check_shapes, check_tensor, make_args, shapes_of, token_ids

# In llama2.c's data the next story's BOS (1) ends a story, and EOS (2) is never trained.
LLAMA2C_EOS_ID = 1

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
MATRICES_OF_A_LAYER = (
    "attention.wq",
    "attention.wk",
    "attention.wv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)

# --- loading -------------------------------------------------------------------------------------


@dataclass
class WeightsFlags:
    """The flags of every command that reads a model."""

    max_seq_len: int | None = flag(None, "context length; default: the model's", least=1)
    rope_factor: float | None = flag(
        None, "of Meta's folders of Llama 3.1 (8) and 3.2 (32), which do not say it", above=0
    )


def open_weights(path: str, flags=None):
    """Open a file or folder of weights. ValueError, naming it, if it cannot be used.

    flags  a config with the fields of WeightsFlags; None: what the files say
    """
    flags = flags or WeightsFlags()
    is_meta = os.path.isfile(os.path.join(path, "params.json"))
    refuse_if(flags.rope_factor and not is_meta, f"--rope_factor: {path} is no folder of Meta's")
    source = MetaFolder(path, flags.rope_factor) if is_meta else _open_other(path)
    if flags.max_seq_len:
        fields = dataclasses.asdict(source.args) | {"max_seq_len": flags.max_seq_len}
        source.args = make_args(path, **fields)
    return source


def _open_other(path: str):
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "run.json")):
            names = [name for name in ("best.pt", "ckpt.pt") if os.path.isfile(f"{path}/{name}")]
            raise ValueError(f"{path}: is the folder of a run; name {' or '.join(names)} in it")
        if os.path.isfile(os.path.join(path, "config.json")):
            return HuggingFaceFolder(path)
        neither = "neither Meta's folder (params.json) nor Hugging Face's (config.json)"
        raise ValueError(f"{path}: {neither}")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such checkpoint; {where_to_get(path)}")
    return Llama2cFile(path) if path.endswith(".bin") else PtFile(path)


def where_to_get(path: str) -> str:
    """Say what a name that is no file may mean: a model on the Hugging Face hub, perhaps."""
    if re.fullmatch(r"[\w-]+/[\w.-]+", path) and not path.endswith((".pt", ".bin")):
        folder = path.split("/")[1]
        fetch = f"`hf download {path} --local-dir {folder}` fetches it from the Hugging Face hub"
        return f"{fetch}, and then its name here is {folder}"
    latest = os.path.join(os.path.dirname(path), "ckpt.pt")
    if os.path.basename(path) == "best.pt" and os.path.isfile(latest):
        return f"a run that judges nothing has no best.pt; {latest} is there"
    return "expected a .pt, a llama2.c .bin, or a folder as Meta or Hugging Face publish it"


def kind_of(path: str) -> str:
    """Say what a file is that is no checkpoint, by how it begins; "" if that is not known."""
    with open(path, "rb") as f:
        start = f.read(64)
    if b"<unk>" in start:
        return "it is a sentencepiece tokenizer (--tokenizer)"
    if start.lstrip()[:1] in (b"{", b"["):
        return "it is JSON, a dataset or a configuration"
    return ""


def load(path: str, device: str = "cpu", flags=None) -> Transformer:
    """Read a whole model in float32, with its eos_ids.

    ValueError, naming the file, if it cannot be used.
    """
    source = open_weights(path, flags)
    model = without_weights(source)
    load_rows(model, source, device)
    return model.eval()


def without_weights(source) -> Transformer:
    """Make the model of `source` on the meta device: it takes no memory until load_rows."""
    with torch.device("meta"):
        model = Transformer(source.args, source.tied)
    model.eos_ids = source.eos_ids
    return model


@torch.no_grad()
def load_rows(model: Transformer, source, device: str, rank: int = 0, size: int = 1) -> None:
    """Give a model on the meta device its memory, its tables and its weights.

    Of a model that is sharded over `size` processes, only the rows of process `rank` are read.
    """
    model.to_empty(device=device)
    if model.tied:  # to_empty made two matrices of one
        model.output.weight = model.tok_embeddings.weight
    for name, weight in model.named_parameters():
        local = parallel.local(weight)
        rows = source.rows(name, parallel.rows_of(weight, rank, size))
        if rows.shape != local.shape:
            found, expected = tuple(rows.shape), tuple(local.shape)
            raise ValueError(f"{source.path}: {name} is of shape {found}, expected {expected}")
        local.copy_(rows)
        if not local.isfinite().all():
            raise ValueError(f"{source.path}: {name} holds NaN or infinity; it cannot be used")
    tables = rope_tables(model.args)
    if not all(table.isfinite().all() for table in tables):
        raise ValueError(f"{source.path}: rope_theta {model.args.rope_theta:g} cannot be")
    model.freqs_cos.copy_(tables[0])
    model.freqs_sin.copy_(tables[1])
    fast.use(model)


def load_and_shard(
    model: Transformer, source, device: str, dtype: str, compiled: bool = False
) -> None:
    """Read the weights of a model on the meta device, compile its layers, and shard it. Collective.

    Each process reads its own rows only. A tied classifier has to be loaded before it is sharded,
    so tied models, which are small, are read whole.

    source  None: the model has its weights already
    """
    processes = parallel.world_size()
    by_rows = source is not None and processes > 1 and not model.tied
    if source is not None and not by_rows:
        load_rows(model, source, device)
    if compiled:
        parallel.compile_layers(model)
    parallel.shard(model, dtype)
    if by_rows:
        load_rows(model, source, device, parallel.rank(), processes)


@torch.no_grad()
def movement_kept(model: Transformer, source, dtype: str) -> float:
    """Return the share of the weights moved since `source` that differ from it in `dtype`, too.

    Collective: each process compares its own rows.
    """
    low = getattr(torch, dtype)
    counts = torch.zeros(2, dtype=torch.float64)
    for name, weight in model.named_parameters():
        rows = parallel.rows_of(weight, parallel.rank(), parallel.world_size())
        now = parallel.local(weight)
        before = source.rows(name, rows).to(now)
        moved = now != before
        kept = moved & (now.to(low) != before.to(low))
        counts += torch.stack([moved.sum(), kept.sum()]).cpu()
    all_moved, all_kept = parallel.all_reduce_sum(counts).tolist()
    return all_kept / all_moved if all_moved else 1.0


def is_tied(weights: dict[str, Tensor]) -> bool:
    """Tell whether the classifier is the embedding: absent, or equal to it."""
    output = weights.get("output.weight")
    embedding = weights.get("tok_embeddings.weight")
    return output is None or (embedding is not None and torch.equal(output, embedding))


# --- .pt -----------------------------------------------------------------------------------------


def save_pt(
    path: str, model: Transformer, step: int = 0, config: dict | None = None, **more
) -> None:
    """Write {"model", "model_args", "config", "step", ...} atomically; eos_ids go into config.

    more  further entries: tensors, numbers, strings, and containers of them
    """
    more_eos_ids = {"eos_ids": list(model.eos_ids)} if len(model.eos_ids) > 1 else {}
    entries = {
        "model": model.state_dict(),
        "model_args": llama2c_args(model.args),
        "config": (config or {}) | {"eos_id": model.eos_id} | more_eos_ids,
        "step": step,
    }
    size = sum(weight.nbytes for weight in model.parameters())
    with atomic_write(path, size) as f:
        torch.save(entries | more, f)


def llama2c_args(args: ModelArgs) -> dict:
    """Return the arguments by name: those that llama2.c does not know only where they matter."""
    named = dataclasses.asdict(args)
    for name, default in (("rope_theta", 10000.0), ("rope_scaling", None)):
        if named[name] == default:
            del named[name]
    return named


class PtFile:
    """A `.pt` of ours or of llama2.c, its weights mapped: they stay on the disk until read."""

    def __init__(self, path: str):
        """ValueError, naming the file, if it is damaged: a zip has a CRC-32 of every record."""
        self.path = path
        entries = self._read_entries()
        # llama2.c saves compiled models, whose names carry a prefix
        named = {str(k).removeprefix("_orig_mod."): v for k, v in entries["model"].items()}
        self.weights = {name: check_tensor(path, name, tensor) for name, tensor in named.items()}
        self.tied = is_tied(self.weights)
        self.args = self._args(entries["model_args"])
        check_shapes(path, self.args, self.tied, self._shape_of)
        known = {name for name, _ in shapes_of(self.args, tied=False)}
        for name in self.weights:
            if name not in known and name not in ("freqs_cos", "freqs_sin"):
                raise ValueError(f"{path}: {name} is no part of this model")
        config, step = entries.get("config"), entries.get("step")
        self.config = config if isinstance(config, dict) else {}
        self.step = step if isinstance(step, int) else 0
        numbers = entries.get("evaluation")
        self.evaluation = numbers if isinstance(numbers, dict) else {}
        first = self.config.get("eos_id", LLAMA2C_EOS_ID)  # of checkpoints before eos_ids
        self.eos_ids = token_ids(path, "eos_ids", self.config.get("eos_ids", first), self.args)

    def _read_entries(self) -> dict:
        nothing = "or it is no checkpoint of ours or llama2.c's"
        mapped = zipfile.is_zipfile(self.path)
        if mapped and not is_whole_zip(self.path):
            raise ValueError(f"{self.path}: not loaded, it is damaged, {nothing}")
        try:
            entries = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # what a damaged file raises depends on which byte is wrong
            if kind := kind_of(self.path):
                raise ValueError(f"{self.path}: no checkpoint: {kind}") from None
            unsafe = "Unsupported global" in str(error) or "Unsupported class" in str(error)
            reason = "it holds Python objects and could run code" if unsafe else "it is damaged"
            raise ValueError(f"{self.path}: not loaded, {reason}, {nothing}") from None
        parts = ("model", "model_args")
        is_ours = isinstance(entries, dict) and all(isinstance(entries.get(p), dict) for p in parts)
        if not is_ours:
            expected = "expected a checkpoint of ours or llama2.c's"
            raise ValueError(f"{self.path}: has no 'model' and 'model_args'; {expected}")
        return entries

    def _args(self, model_args: dict) -> ModelArgs:
        known = {field.name for field in dataclasses.fields(ModelArgs)}
        unknown = ", ".join(sorted(set(map(str, model_args)) - known))
        if unknown:
            raise ValueError(
                f"{self.path}: model_args has {unknown}, which this model does not know"
            )
        return make_args(self.path, **model_args)

    def _shape_of(self, name: str, _) -> tuple | None:
        weight = self.weights.get(name)
        return None if weight is None else weight.shape

    def rows(self, name: str, rows: slice) -> Tensor:
        return self.weights[name][rows]


def is_whole_zip(path: str) -> bool:
    """Tell whether a zip's records, none of which is compressed, have the CRC-32 it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
            return stored and archive.testzip() is None
    except Exception:  # what a damaged zip raises depends on which byte is wrong
        return False


# --- llama2.c's .bin -----------------------------------------------------------------------------
# v0: 7 int32, then float32 tensors, RoPE tables among them; a negative vocab_size says "untied".
# v1: a header of 256 bytes, then float32. v2: the same header and a group size, norms in float32,
# and every matrix as int8 with one float32 scale for each group_size weights along its rows.


def llama2c_layout(args: ModelArgs, tied: bool, version: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return the (name, shape) of every tensor of a file, in its order."""
    tables = (args.max_seq_len, args.head_dim // 2)
    shapes = dict(shapes_of(args, tied)) | {"freqs_cos": tables, "freqs_sin": tables}

    def of_layers(name: str) -> list[str]:
        return [f"layers.{i}.{name}.weight" for i in range(args.n_layers)]

    matrices = {name: of_layers(name) for name in MATRICES_OF_A_LAYER}
    classifier = [] if tied else ["output.weight"]
    if version == 0:
        attention, ffn = MATRICES_OF_A_LAYER[:4], MATRICES_OF_A_LAYER[4:]
        names = ["tok_embeddings.weight", *of_layers("attention_norm")]
        names += [name for matrix in attention for name in matrices[matrix]]
        names += of_layers("ffn_norm")
        names += [name for matrix in ffn for name in matrices[matrix]]
        names += ["norm.weight", "freqs_cos", "freqs_sin", *classifier]
    else:
        names = [*of_layers("attention_norm"), *of_layers("ffn_norm"), "norm.weight"]
        names += ["tok_embeddings.weight"]
        names += [name for matrix in MATRICES_OF_A_LAYER for name in matrices[matrix]]
        names += classifier
    return [(name, shapes[name]) for name in names]


def llama2c_size(shape: tuple[int, ...], version: int, group_size: int) -> int:
    """Return the bytes of one tensor."""
    numbers = math.prod(shape)
    if version == 2 and len(shape) == 2:
        return numbers + 4 * (numbers // group_size)
    return 4 * numbers


class Llama2cFile:
    """llama2.c's binary of any version; int8 weights come back as float32.

    The file says nothing of norm_eps and rope_theta: they are 1e-5 and 10000, as in run.c.
    """

    eos_ids = (LLAMA2C_EOS_ID,)
    step = 0
    config: dict = {}
    evaluation: dict = {}

    def __init__(self, path: str):
        """ValueError, naming the file, if it is damaged.

        Its size is checked before anything is built.
        """
        self.path = path
        check_sha256(path)
        empty = os.path.getsize(path) == 0
        self.data = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
        self.version, self.group_size, numbers, self.tied = self._header()
        self.args = make_args(path, **dict(zip(HEADER_FIELDS, numbers, strict=True)))
        args, size = self.args, self.group_size
        if self.version == 2 and (args.dim % size or args.hidden_dim % size):
            raise ValueError(f"{path}: damaged: its rows are not made of groups of {size}")
        if self._least_size() > len(self.data):  # before the layout of a million layers is made
            raise ValueError(self._wrong_size(self._least_size()))
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}  # name -> (offset, shape)
        offset = 28 if self.version == 0 else 256
        for name, shape in llama2c_layout(args, self.tied, self.version):
            self.places[name] = (offset, shape)
            offset += llama2c_size(shape, self.version, self.group_size)
        if len(self.data) != offset:
            raise ValueError(self._wrong_size(offset))

    def _header(self) -> tuple[int, int, list[int], bool]:
        """Return (version, group size, the numbers of HEADER_FIELDS, tied)."""
        head = bytes(self.data[:256])
        if len(head) < 28:
            few = f"{len(head)} bytes are too few for a llama2.c model"
            raise ValueError(f"{self.path}: damaged: {few}")
        version, group_size = 0, 0
        if struct.unpack_from("<I", head)[0] == MAGIC and len(head) == 256:
            version, *numbers, tied = struct.unpack_from("<i7iB", head, 4)
            group_size = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
        else:
            numbers = list(struct.unpack_from("<7i", head))
            tied = numbers[5] > 0
            numbers[5] = abs(numbers[5])
        impossible = min(numbers) < 1 or max(numbers) > 2**24 or (version == 2 and group_size < 1)
        if version not in (0, 1, 2) or impossible:
            reads = f"its header reads {numbers}, version {version}"
            raise ValueError(f"{self.path}: not a llama2.c model ({reads})")
        return version, group_size, numbers, bool(tied)

    def _least_size(self) -> int:
        """Return the bytes of the matrices alone, by arithmetic."""
        args = self.args
        kv_dim = args.n_kv_heads * args.head_dim
        layer = 2 * args.dim * (args.dim + kv_dim) + 3 * args.dim * args.hidden_dim
        numbers = args.n_layers * layer + args.vocab_size * args.dim
        return numbers if self.version == 2 else 4 * numbers

    def _wrong_size(self, size: int) -> str:
        return f"{self.path}: damaged: {len(self.data)} bytes, its header asks for {size}"

    def rows(self, name: str, rows: slice) -> Tensor:
        offset, shape = self.places[name]
        width = math.prod(shape[1:])
        start, count = rows.start * width, (rows.stop - rows.start) * width
        if self.version < 2 or len(shape) == 1:
            values = np.frombuffer(self.data, np.float32, count, offset + 4 * start)
            return torch.from_numpy(values.copy()).view(-1, *shape[1:])
        values = np.frombuffer(self.data, np.int8, count, offset + start).astype(np.float32)
        scales_at = offset + math.prod(shape) + 4 * (start // self.group_size)
        scales = np.frombuffer(self.data, np.float32, count // self.group_size, scales_at)
        scaled = values.reshape(-1, self.group_size) * scales[:, None]
        return torch.from_numpy(scaled).view(-1, *shape[1:])
