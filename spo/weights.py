"""What files of weights have to hold, checked before anything is built or allocated.

A header can say anything. Here its numbers are compared with each other, and with the tensors that
the files really have, one layer at a time: a model of 10^9 layers fails at the first that is not
there.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model import ModelArgs

REAL_NUMBERS = ("norm_eps", "rope_theta", "dropout")
MOST_ROTATIONS = 2**27  # context times width of a head; the two tables then take half a gigabyte
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def make_args(path: str, **fields) -> ModelArgs:
    """Return the ModelArgs of a header. ValueError, naming the file, for numbers that cannot be."""
    scaling = fields.get("rope_scaling")
    if scaling is not None:
        check_scaling(path, scaling)
    for name, value in fields.items():
        if name == "rope_scaling":
            continue
        if value is None and name in ("n_kv_heads", "hidden_dim"):  # they have defaults
            continue
        kinds = int | float if name in REAL_NUMBERS else int
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{path}: {name} is {value!r:.60}, which is no number for it")
        if not (0 <= value < 2**40 and math.isfinite(value)):
            raise ValueError(f"{path}: {name} is {value!r:.60}, which cannot be")
    try:
        args = ModelArgs(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if args.max_seq_len * args.head_dim > MOST_ROTATIONS:
        most = f"the most is {MOST_ROTATIONS // args.head_dim:,} with these heads"
        raise ValueError(f"{path}: a context of {args.max_seq_len:,} tokens is too long; {most}")
    return args


def check_scaling(path: str, scaling) -> None:
    """ValueError, naming the file, for anything but the numbers of Llama 3.1's scaling."""
    names = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    good = isinstance(scaling, dict) and scaling.keys() == names
    for value in scaling.values() if good else ():
        good &= isinstance(value, int | float) and math.isfinite(value) and value > 0
    if not good or scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        numbers = ", ".join(sorted(names))
        raise ValueError(f"{path}: rope_scaling {scaling!r:.120}: needs {numbers}, above 0")


def token_ids(path: str, name: str, value, args: ModelArgs) -> tuple[int, ...]:
    """Return the token ids that a header names, one or a list of them.

    ValueError, naming the file, if they are none.
    """
    ids = value if isinstance(value, list) and value else [value]
    for one in ids:
        if not isinstance(one, int) or not 0 <= one < args.vocab_size:
            raise ValueError(f"{path}: {name} is {one!r:.60}, no id below {args.vocab_size}")
    return tuple(ids)


def shapes_of(args: ModelArgs, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of every weight of a model."""
    dim, kv_dim, hidden = args.dim, args.n_kv_heads * args.head_dim, args.hidden_dim
    yield "tok_embeddings.weight", (args.vocab_size, dim)
    for i in range(args.n_layers):
        yield f"layers.{i}.attention.wq.weight", (dim, dim)
        yield f"layers.{i}.attention.wk.weight", (kv_dim, dim)
        yield f"layers.{i}.attention.wv.weight", (kv_dim, dim)
        yield f"layers.{i}.attention.wo.weight", (dim, dim)
        yield f"layers.{i}.feed_forward.w1.weight", (hidden, dim)
        yield f"layers.{i}.feed_forward.w2.weight", (dim, hidden)
        yield f"layers.{i}.feed_forward.w3.weight", (hidden, dim)
        yield f"layers.{i}.attention_norm.weight", (dim,)
        yield f"layers.{i}.ffn_norm.weight", (dim,)
    yield "norm.weight", (dim,)
    if not tied:
        yield "output.weight", (args.vocab_size, dim)


def check_shapes(
    path: str,
    args: ModelArgs,
    tied: bool,
    look: Callable[[str, tuple], tuple | None],
    spell: Callable[[str], str] = str,
) -> None:
    """ValueError, naming the file and the weight, if one is missing or has another shape.

    look   of a weight's name and the shape that it has to have, returns the shape in the files, or
           None if it is not there
    spell  returns what the files call a weight
    """
    for name, shape in shapes_of(args, tied):
        found = look(name, shape)
        if found is None:
            raise ValueError(f"{path}: has no {spell(name)}, which its header asks for")
        if tuple(found) != shape:
            is_of = f"{spell(name)} is of shape {tuple(found)}"
            raise ValueError(f"{path}: {is_of}, its header asks for {shape}")


def check_tensor(path: str, name: str, tensor) -> Tensor:
    """Return a tensor of a .pt, .pth or .bin. ValueError, naming the file, if it is no plain one:
    sparse, quantised, of whole or complex numbers, or larger than what the file holds of it.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path}: {name} is no tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {name} is not a dense tensor")
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{path}: {name} is of {kind}; floats of 16 to 64 bits are read")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(f"{path}: {name} is larger than what the file holds of it")
    return tensor
