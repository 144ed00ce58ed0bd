"""Llama weights as Meta and Hugging Face publish them: folders, read row by row from mapped files; and the latter written.

No file is ever read whole: a process takes the rows of its shard. Hugging Face lays out the rows of wq and wk for another
spelling of the rotary embedding, so they are put in order on the way in and out.
"""

import contextlib
import glob
import json
import os

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import ModelArgs, Transformer, rope_tables
from spo.files import read_json_object

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


def hf_name(name: str) -> str:
    """layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    if not name.startswith("layers."):
        return HF_NAMES[name.removesuffix(".weight")] + ".weight"
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{HF_NAMES[rest.removesuffix('.weight')]}.weight"


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads, (rows, D), from Hugging Face's order (first halves, then second) to (0, 1), (2, 3), ..."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def halve(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


class MetaFolder:
    """params.json and consolidated.*.pth, the parts of Meta's model parallelism."""

    def __init__(self, path: str):
        self.path = path
        params = read_json_object(os.path.join(path, "params.json"))
        if params.get("use_scaled_rope"):
            raise ValueError(
                f"{path}: use_scaled_rope: this model has no scaled rotary embedding (Llama 3.1 and later)"
            )
        self.parts = [
            map_pt(file)
            for file in sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
        ]
        if not self.parts:
            raise ValueError(f"{path}: no consolidated.*.pth beside params.json")
        try:
            dim, hidden = (
                params["dim"],
                sum(len(part["layers.0.feed_forward.w1.weight"]) for part in self.parts),
            )
            embeddings = [part["tok_embeddings.weight"] for part in self.parts]
            split = (
                embeddings[0].shape[1] == dim and len(self.parts) > 1
            )  # Llama 3 splits the vocabulary, Llama 2 the width
            vocab_size = sum(map(len, embeddings)) if split else len(embeddings[0])
            self.args = ModelArgs(
                dim=dim,
                n_layers=params["n_layers"],
                n_heads=params["n_heads"],
                n_kv_heads=params.get("n_kv_heads"),
                vocab_size=vocab_size,
                hidden_dim=hidden,
                norm_eps=params["norm_eps"],
                rope_theta=float(params.get("rope_theta", 10000.0)),
                max_seq_len=params.get("max_seq_len", 4096),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: params.json or the weights lack {error}") from None
        self.tied, self.eos_id = (
            False,
            2 if vocab_size < 128_000 else 128_001,
        )  # Llama 2's, Llama 3's

    def rows(self, name: str, rows: slice, shape: tuple[int, ...]) -> Tensor:
        parts = [part[name] for part in self.parts if name in part]
        if len(parts) != len(self.parts):
            raise ValueError(f"{self.path}: has no {name}")
        if parts[0].shape == shape:
            return parts[0][rows]
        if (
            sum(map(len, parts)) == shape[0] and parts[0].shape[1:] == shape[1:]
        ):  # the parts are blocks of rows
            cut, start = [], 0
            for part in parts:
                cut.append(part[max(0, rows.start - start) : max(0, rows.stop - start)])
                start += len(part)
            return torch.cat(cut)
        return torch.cat([part[rows] for part in parts], dim=1)  # of columns


class HuggingFaceFolder:
    """config.json and model*.safetensors or pytorch_model*.bin, in one file or several with an index."""

    def __init__(self, path: str):
        self.path, config = path, read_json_object(os.path.join(path, "config.json"))
        scaling = config.get("rope_scaling") or {}
        parameters = config.get("rope_parameters") or {}
        if scaling or parameters.get("rope_type", "default") != "default":
            raise ValueError(
                f"{path}: rope_scaling {scaling or parameters}: this model has no scaled rotary embedding"
            )
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise ValueError(f"{path}: {name}: this model has no biases")
        if (
            config.get("model_type", "llama") != "llama"
            or config.get("hidden_act", "silu") != "silu"
        ):
            raise ValueError(
                f"{path}: a {config.get('model_type')} with {config.get('hidden_act')}: only Llama is read"
            )
        try:
            self.args = ModelArgs(
                dim=config["hidden_size"],
                n_layers=config["num_hidden_layers"],
                n_heads=config["num_attention_heads"],
                n_kv_heads=config.get("num_key_value_heads"),
                vocab_size=config["vocab_size"],
                hidden_dim=config["intermediate_size"],
                norm_eps=config["rms_norm_eps"],
                rope_theta=float(config.get("rope_theta") or parameters.get("rope_theta", 10000.0)),
                max_seq_len=config["max_position_embeddings"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: config.json lacks {error}") from None
        if config.get("head_dim") not in (None, self.args.head_dim):
            raise ValueError(
                f"{path}: head_dim {config['head_dim']} is not hidden_size / num_attention_heads"
            )
        self.tied = bool(config.get("tie_word_embeddings", False))
        eos = config.get("eos_token_id", 2)
        self.eos_id = eos[0] if isinstance(eos, list) else eos
        self.files = {}
        for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))):
            try:
                handle = safe_open(file, "pt")
            except Exception as error:
                raise ValueError(f"{file}: damaged: {error}") from None
            self.files |= {name: handle.get_slice(name) for name in handle.keys()}
        for file in (
            sorted(glob.glob(os.path.join(glob.escape(path), "pytorch_model*.bin")))
            if not self.files
            else []
        ):
            self.files |= map_pt(file)
        if not self.files:
            raise ValueError(
                f"{path}: no model*.safetensors or pytorch_model*.bin beside config.json"
            )

    def rows(self, name: str, rows: slice, shape: tuple[int, ...]) -> Tensor:
        weight = self.files.get(hf_name(name))
        if weight is None:
            raise ValueError(f"{self.path}: has no {hf_name(name)}")
        if not name.endswith(("wq.weight", "wk.weight")):
            return weight[rows.start : rows.stop]
        size = self.args.head_dim  # whole heads, in our order; then what was asked for of them
        start, stop = rows.start // size * size, -(-rows.stop // size) * size
        return interleave(weight[start:stop], size)[rows.start - start : rows.stop - start]


def open_folder(path: str) -> MetaFolder | HuggingFaceFolder:
    """ValueError, naming the folder, if it is none of the two or has what this model lacks."""
    if os.path.isfile(os.path.join(path, "params.json")):
        return MetaFolder(path)
    if os.path.isfile(os.path.join(path, "config.json")):
        return HuggingFaceFolder(path)
    raise ValueError(
        f"{path}: neither Meta's folder (params.json) nor Hugging Face's (config.json)"
    )


def map_pt(path: str) -> dict[str, Tensor]:
    """The tensors of a .pth or .bin, mapped: the disk is read where they are used."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what a damaged file raises depends on which byte is wrong
        raise ValueError(f"{path}: damaged, or not a file of tensors") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: not a file of tensors by name")
    return tensors


@torch.no_grad()
def fill(
    model: Transformer, folder: MetaFolder | HuggingFaceFolder, rank: int = 0, size: int = 1
) -> None:
    """Give a model its weights, and its tables. Sharded over `size` processes: to this one its rows."""
    for name, weight in model.named_parameters():
        shape = tuple(weight.shape)
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        start = (
            0 if len(local) == shape[0] else min(rank * -(-shape[0] // size), shape[0])
        )  # as FSDP2 deals rows out
        rows = folder.rows(name, slice(start, start + len(local)), shape)
        if tuple(rows.shape) != tuple(local.shape):
            raise ValueError(
                f"{folder.path}: {name} is of shape {tuple(rows.shape)}, expected {tuple(local.shape)}"
            )
        local.copy_(rows)
    for buffer, table in zip((model.freqs_cos, model.freqs_sin), rope_tables(model.args)):
        buffer.copy_(table)


def on_meta(folder: MetaFolder | HuggingFaceFolder) -> Transformer:
    """The folder's model without weights, and without memory."""
    with torch.device("meta"):
        return Transformer(folder.args, folder.tied)


def load_folder(path: str) -> tuple[Transformer, int]:
    """(the whole model of a folder, in float32; the id that ends its responses)"""
    folder = open_folder(path)
    model = Transformer(folder.args, folder.tied)
    fill(model, folder)
    return model, folder.eos_id


def save_hf(path: str, model: Transformer, bos_id: int, eos_id: int) -> None:
    """A folder that transformers loads: config.json and model.safetensors."""
    args = model.args
    os.makedirs(path, exist_ok=True)
    tensors = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().cpu()
        tensors[hf_name(name)] = (
            halve(weight, args.head_dim) if name.endswith(("wq.weight", "wk.weight")) else weight
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
        "tie_word_embeddings": model.tied,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": "float32",
    }
    for name in ("model.safetensors", "config.json"):
        temporary = os.path.join(path, f"{name}.tmp")
        try:
            if name == "config.json":
                with open(temporary, "w", encoding="utf-8") as f:
                    json.dump(config, f, indent=1)
            else:
                save_file(
                    {key: weight.contiguous() for key, weight in tensors.items()},
                    temporary,
                    {"format": "pt"},
                )
            os.replace(temporary, os.path.join(path, name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
