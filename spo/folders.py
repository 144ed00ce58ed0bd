"""The weights of folders as Meta and Hugging Face publish them, read row by row from mapped files.

They have the interface that spo/checkpoint.py describes. No file is ever read whole.
"""

import glob
import math
import os

import torch
from safetensors import safe_open
from torch import Tensor

from model import ModelArgs
from spo.files import check_sha256, read_json_object
from spo.weights import check_shapes, check_tensor, make_args, shapes_of, token_id

SAFETENSORS_DTYPES = ("F64", "F32", "F16", "BF16")
HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def map_pt(path: str) -> dict[str, Tensor]:
    """Return the tensors of a .pth or .bin, mapped: the disk is read where they are used."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what a damaged file raises depends on which byte is wrong
        raise ValueError(f"{path}: damaged, or not a file of tensors") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: not a file of tensors by name")
    return {str(name): check_tensor(path, name, tensor) for name, tensor in tensors.items()}


class MetaFolder:
    """params.json and consolidated.*.pth, the parts of Meta's model parallelism."""

    step = 0
    config: dict = {}
    tied = False

    def __init__(self, path: str):
        self.path = path
        params = read_json_object(os.path.join(path, "params.json"))
        if params.get("use_scaled_rope"):
            lacks = "this model has no scaled rotary embedding (Llama 3.1 and later)"
            raise ValueError(f"{path}: use_scaled_rope: {lacks}")
        files = sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
        self.parts = [map_pt(file) for file in files]
        if not self.parts:
            raise ValueError(f"{path}: no consolidated.*.pth beside params.json")
        try:
            self.args = self._args(params)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: params.json or the weights lack {error}") from None
        self.eos_id = 2 if self.args.vocab_size < 128_000 else 128_001  # Llama 2's, Llama 3's
        check_shapes(path, self.args, False, self._shape_of)
        self.shapes = dict(shapes_of(self.args, tied=False))

    def _args(self, params: dict) -> ModelArgs:
        embeddings = [part["tok_embeddings.weight"] for part in self.parts]
        # Llama 3 splits the vocabulary over the parts, Llama 2 the width.
        split = embeddings[0].shape[1] == params["dim"] and len(self.parts) > 1
        hidden_rows = [len(part["layers.0.feed_forward.w1.weight"]) for part in self.parts]
        return make_args(
            self.path,
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            vocab_size=sum(map(len, embeddings)) if split else len(embeddings[0]),
            hidden_dim=sum(hidden_rows),
            norm_eps=params["norm_eps"],
            rope_theta=params.get("rope_theta", 10000.0),
            max_seq_len=params.get("max_seq_len", 4096),
        )

    def _shape_of(self, name: str, wanted: tuple) -> tuple | None:
        """Return the shape that the parts of a weight have together."""
        shapes = [tuple(part[name].shape) for part in self.parts if name in part]
        if len(shapes) < len(self.parts):
            return None
        if set(shapes) == {wanted} or any(len(shape) != 2 for shape in shapes):
            return shapes[0]  # every part has all of it
        rows, columns = zip(*shapes, strict=True)
        if set(columns) == {wanted[-1]}:
            return sum(rows), columns[0]
        return (rows[0], sum(columns)) if len(set(rows)) == 1 else shapes[0]

    def rows(self, name: str, rows: slice) -> Tensor:
        shape = self.shapes[name]
        parts = [part[name] for part in self.parts]
        if parts[0].shape == shape:  # every part has all of it
            return parts[0][rows]
        if sum(map(len, parts)) != shape[0] or parts[0].shape[1:] != shape[1:]:
            return torch.cat(
                [part[rows] for part in parts], dim=1
            )  # the parts are blocks of columns
        cut, start = [], 0  # the parts are blocks of rows
        for part in parts:
            cut.append(part[max(0, rows.start - start) : max(0, rows.stop - start)])
            start += len(part)
        return torch.cat(cut)


def hf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    if not name.startswith("layers."):
        return HF_NAMES[name.removesuffix(".weight")] + ".weight"
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{HF_NAMES[rest.removesuffix('.weight')]}.weight"


def has_rotated_heads(name: str) -> bool:
    """Tell whether Hugging Face orders the rows of a weight by its other spelling of the rotary
    embedding.
    """
    return name.endswith(("wq.weight", "wk.weight"))


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of whole heads, (rows, D), from Hugging Face's order (first halves, then second)
    to ours.

    A head of 4 rows [a, b, c, d] is [a, c, b, d] there: pairs (0, 1), (2, 3) become (0, 2), (1, 3).
    """
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


class HuggingFaceFolder:
    """config.json and model*.safetensors or pytorch_model*.bin, in one file or several with an
    index.
    """

    step = 0
    config: dict = {}

    def __init__(self, path: str):
        self.path = path
        config = read_json_object(os.path.join(path, "config.json"))
        try:
            self._refuse_what_the_model_lacks(config)
            self.args = self._args(config)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: config.json lacks {error}") from None
        if config.get("head_dim") not in (None, self.args.head_dim):
            head_dim = f"head_dim {config['head_dim']}"
            raise ValueError(f"{path}: {head_dim} is not hidden_size / num_attention_heads")
        self.tied = bool(config.get("tie_word_embeddings", False))
        eos = config.get("eos_token_id", 2)
        eos = eos[0] if isinstance(eos, list) and eos else eos
        self.eos_id = token_id(path, "eos_token_id", eos, self.args)
        self.files = self._open_files()
        check_shapes(path, self.args, self.tied, self._shape_of, hf_name)

    def _refuse_what_the_model_lacks(self, config: dict) -> None:
        scaling = config.get("rope_scaling") or {}
        parameters = config.get("rope_parameters") or {}
        if scaling or parameters.get("rope_type", "default") != "default":
            lacks = "this model has no scaled rotary embedding"
            raise ValueError(f"{self.path}: rope_scaling {scaling or parameters}: {lacks}")
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise ValueError(f"{self.path}: {name}: this model has no biases")
        kind, activation = config.get("model_type", "llama"), config.get("hidden_act", "silu")
        if kind != "llama" or activation != "silu":
            raise ValueError(f"{self.path}: a {kind} with {activation}: only Llama is read")

    def _args(self, config: dict) -> ModelArgs:
        parameters = config.get("rope_parameters") or {}
        theta = config.get("rope_theta") or parameters.get("rope_theta", 10000.0)
        return make_args(
            self.path,
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads"),
            vocab_size=config["vocab_size"],
            hidden_dim=config["intermediate_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=theta,
            max_seq_len=config["max_position_embeddings"],
        )

    def _open_files(self) -> dict:
        """Return {published name: a slice of its mapped file}."""
        pattern = os.path.join(glob.escape(self.path), "*.safetensors")
        files: dict = {}
        for file in sorted(glob.glob(pattern)):
            check_sha256(file)
            try:
                handle = safe_open(file, "pt")
            except Exception as error:
                raise ValueError(f"{file}: damaged: {error}") from None
            files |= {name: handle.get_slice(name) for name in handle.keys()}
        if not files:
            pattern = os.path.join(glob.escape(self.path), "pytorch_model*.bin")
            for file in sorted(glob.glob(pattern)):
                files |= map_pt(file)
        if not files:
            none = "no model*.safetensors or pytorch_model*.bin beside config.json"
            raise ValueError(f"{self.path}: {none}")
        return files

    def _shape_of(self, name: str, _) -> tuple | None:
        weight = self.files.get(hf_name(name))
        if weight is None or isinstance(weight, Tensor):
            return None if weight is None else weight.shape
        if weight.get_dtype() not in SAFETENSORS_DTYPES:
            kind = f"{hf_name(name)} is of {weight.get_dtype()}"
            raise ValueError(f"{self.path}: {kind}; floats of 16 to 64 bits are read")
        return tuple(weight.get_shape())

    def rows(self, name: str, rows: slice) -> Tensor:
        weight = self.files[hf_name(name)]
        if not has_rotated_heads(name):
            return weight[rows.start : rows.stop]
        # Read whole heads, put them into our order, and keep what was asked for.
        size = self.args.head_dim
        start = rows.start // size * size
        stop = math.ceil(rows.stop / size) * size
        return interleave(weight[start:stop], size)[rows.start - start : rows.stop - start]
