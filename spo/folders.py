"""The weights of folders as Meta and Hugging Face publish them, read row by row from mapped files.

They have the interface that spo/checkpoint.py describes. No file is ever read whole.
"""

import glob
import math
import os
import re
import zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from model import ModelArgs
from spo.files import check_sha256, read_json_object
from spo.templates import read_template
from spo.weights import check_shapes, check_tensor, make_args, shapes_of, token_ids

LLAMA3_1 = {  # what every model of Llama 3.1 and 3.2 has, but for its factor
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
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


def what_is_wrong(path: str) -> str:
    """Say why a file of tensors cannot be read."""
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, and not the file; fetch it with `git lfs pull`"
    return "damaged, or not a file of tensors"


def map_pt(path: str) -> dict[str, Tensor]:
    """Return the tensors of a .pth or .bin, mapped: the disk is read where they are used.

    Files of torch before 1.6 are no zip, and are read whole.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:  # what a damaged file raises depends on which byte is wrong
        raise ValueError(f"{path}: {what_is_wrong(path)}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: not a file of tensors by name")
    return {str(name): check_tensor(path, name, tensor) for name, tensor in tensors.items()}


class MetaFolder:
    """params.json and consolidated.*.pth, the parts of Meta's model parallelism."""

    step = 0
    config: dict = {}
    evaluation: dict = {}
    tied = False

    def __init__(self, path: str, rope_factor: float | None = None):
        """rope_factor: what use_scaled_rope in params.json does not say."""
        self.path = path
        self.rope_factor = rope_factor
        params = read_json_object(os.path.join(path, "params.json"))
        scaled = bool(params.get("use_scaled_rope"))
        if scaled != bool(rope_factor):
            says = f"params.json says use_scaled_rope {str(scaled).lower()}"
            mend = "give --rope_factor: 8 for Llama 3.1, 32 for 3.2" if scaled else "leave it out"
            raise ValueError(f"{path}: {says}; {mend}")
        files = sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
        self.parts = [map_pt(file) for file in files]
        if not self.parts:
            raise ValueError(f"{path}: no consolidated.*.pth beside params.json")
        try:
            self.args = self._args(params)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: params.json or the weights lack {error}") from None
        self.eos_ids = (2 if self.args.vocab_size < 128_000 else 128_001,)  # Llama 2's, Llama 3's
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
            rope_scaling=LLAMA3_1 | {"factor": self.rope_factor} if self.rope_factor else None,
            max_seq_len=params.get("max_seq_len") or self._context(params),
        )

    def _context(self, params: dict) -> int:
        """Return what Meta's code has where params.json names none: Llama 2's, 3's or 3.1's."""
        if self.rope_factor:
            return 131_072
        return 8192 if params.get("rope_theta", 10000.0) >= 500_000 else 4096

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


def open_safetensors(path: str) -> dict:
    """Return the slices of a mapped file by name. ValueError, naming it, if it is damaged."""
    check_sha256(path)
    try:
        handle = safe_open(path, "pt")
        return {name: handle.get_slice(name) for name in handle.keys()}
    except Exception as error:
        wrong = what_is_wrong(path)
        reason = f"damaged: {error}" if wrong.startswith("damaged") else wrong
        raise ValueError(f"{path}: {reason}") from None


def token_ids_or_none(path: str, value, args: ModelArgs) -> tuple[int, ...]:
    return () if value is None else token_ids(path, "eos_token_id", value, args)


class HuggingFaceFolder:
    """config.json and model*.safetensors or pytorch_model*.bin, in one file or several with an
    index.
    """

    step = 0
    config: dict = {}
    evaluation: dict = {}

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
        self.eos_ids = self._eos_ids(config)
        self.files = self._open_files()
        check_shapes(path, self.args, self.tied, self._shape_of, hf_name)
        self._refuse_what_is_left_over()

    def _refuse_what_the_model_lacks(self, config: dict) -> None:
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "quantised")
            raise ValueError(f"{self.path}: quantization_config ({method}): only floats are read")
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise ValueError(f"{self.path}: {name}: this model has no biases")
        kind, activation = config.get("model_type", "llama"), config.get("hidden_act", "silu")
        if kind != "llama" or activation != "silu":
            raise ValueError(f"{self.path}: a {kind} with {activation}: only Llama is read")

    def _args(self, config: dict) -> ModelArgs:
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
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
            rope_scaling=self._scaling(parameters),
            max_seq_len=config["max_position_embeddings"],
        )

    def _scaling(self, parameters: dict) -> dict | None:
        """Return Llama 3.1's scaling of the rotary embedding, None where nothing is scaled."""
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind == "default" or (kind == "linear" and parameters.get("factor") == 1):
            return None
        if kind != "llama3":
            lacks = "only Llama 3.1's scaled rotary embedding (llama3) is known"
            raise ValueError(f"{self.path}: rope_scaling {parameters}: {lacks}")
        return {name: parameters[name] for name in LLAMA3_SCALING}

    def _eos_ids(self, config: dict) -> tuple[int, ...]:
        """Return every terminator that config.json and generation_config.json name.

        Where both name none it is tokenizer_config.json's, and else 2, as in transformers.
        """
        ids = token_ids_or_none(self.path, config.get("eos_token_id"), self.args)
        generation = os.path.join(self.path, "generation_config.json")
        if os.path.isfile(generation):
            more = read_json_object(generation).get("eos_token_id")
            ids += token_ids_or_none(generation, more, self.args)
        default = None if "eos_token_id" in config else 2  # null says that there is none
        if not ids:
            named = self._eos_of_tokenizer()
            ids = token_ids_or_none(self.path, default if named is None else named, self.args)
        if not ids:
            raise ValueError(f"{self.path}: config.json has no eos_token_id, which ends a response")
        return tuple(dict.fromkeys(ids))  # each once, in their order

    def _eos_of_tokenizer(self) -> int | None:
        """Return the id of tokenizer_config.json's eos_token; None where no file says it."""
        path = os.path.join(self.path, "tokenizer_config.json")
        if not os.path.isfile(path):
            return None
        config = read_json_object(path)
        eos = read_template(path)[1].get("eos_token")
        try:
            added = [t | {"id": int(i)} for i, t in config.get("added_tokens_decoder", {}).items()]
            if os.path.isfile(other := os.path.join(self.path, "tokenizer.json")):
                added += read_json_object(other).get("added_tokens", [])
            return next((t["id"] for t in added if t["content"] == eos), None)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{self.path}: its added tokens have no content and id") from None

    def _open_files(self) -> dict:
        """Return {published name: a slice of its mapped file}.

        The files are those that an index names; else model.safetensors, or a whole set of parts.
        """
        for stem, ending, opened in (
            ("model", "safetensors", open_safetensors),
            ("pytorch_model", "bin", map_pt),
        ):
            names = self._names_of_files(stem, ending)
            if names:
                tensors: dict = {}
                for name in names:
                    tensors |= opened(os.path.join(self.path, name))
                return tensors
        none = (
            "no model.safetensors or pytorch_model.bin, and no index of parts, beside config.json"
        )
        raise ValueError(f"{self.path}: {none}")

    def _names_of_files(self, stem: str, ending: str) -> list[str]:
        index = os.path.join(self.path, f"{stem}.{ending}.index.json")
        if os.path.isfile(index):
            places = read_json_object(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
                raise ValueError(f"{index}: has no weight_map of weights to files")
            names = sorted(set(places.values()))
            for name in names:
                if os.path.basename(name) != name:
                    raise ValueError(f"{index}: {name!r} is no file of this folder")
                if not os.path.isfile(os.path.join(self.path, name)):
                    raise ValueError(f"{index}: names {name}, which is not there; download it")
            return names
        if os.path.isfile(os.path.join(self.path, f"{stem}.{ending}")):
            return [f"{stem}.{ending}"]
        pattern = re.compile(rf"{stem}-(\d+)-of-(\d+)\.{ending}")
        parts = sorted(filter(None, map(pattern.fullmatch, os.listdir(self.path))), key=str)
        if parts and {int(part[1]) for part in parts} == set(range(1, int(parts[0][2]) + 1)):
            return sorted(part[0] for part in parts)
        if parts:
            some = f"has {len(parts)} of {int(parts[0][2])} parts and no index"
            raise ValueError(f"{self.path}: {some}; download the rest")
        return []

    def _refuse_what_is_left_over(self) -> None:
        """ValueError for a tensor that is no part of this model: a scale, an adapter, a bias."""
        known = {hf_name(name) for name, _ in shapes_of(self.args, tied=False)}
        for name in self.files:
            if name not in known and not name.endswith("rotary_emb.inv_freq"):
                unknown = f"{name} is no part of a Llama in floats"
                raise ValueError(f"{self.path}: {unknown}; is it quantised, or an adapter?")

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
