"""Checkpoint -> llama2.c's binary, Hugging Face's folder, or a .pt; with the tokenizer.

python export.py model.bin --checkpoint=out/best.pt --version=0       # run.c
python export.py model_q80.bin --checkpoint=out/best.pt --version=2   # runq.c
python export.py hf_model --checkpoint=out/best.pt --version=-1       # for transformers
python export.py stories.pt --checkpoint=stories260K.bin              # a name that ends in .pt
python export.py model.bin --hf=llama-2-7b-hf                         # or --meta-llama=llama-2-7b
"""

import spo  # isort: skip  # noqa: F401  (sets OpenMP's waiting; must precede torch)


import json
import math
import os
import struct
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from model import ModelArgs, Transformer
from spo import checkpoint
from spo.card import model_card
from spo.checkpoint import HEADER_FIELDS, MAGIC, llama2c_layout, llama2c_size
from spo.config import flag, main_program, parse
from spo.files import atomic_path, atomic_write, check_output, file_sha256, write_text
from spo.folders import has_rotated_heads, hf_name
from spo.hf_tokenizer import tokenizer_json
from spo.templates import read_template
from spo.tokenizer import (
    Tokenizer,
    copy_tokenizer,
    files_of_tokenizer,
    find_tokenizer,
    load_tokenizer,
)

OTHERS_ENDINGS = {
    ".gguf": "is llama.cpp's format; write a folder (--version=-1), and convert it with its "
    "convert_hf_to_gguf.py",
    ".safetensors": "is written as a folder: give its name, and --version=-1",
    ".pth": "is Meta's format, which is not written; give a .pt, or a folder with --version=-1",
}
LARGEST_GROUP = 64  # weights that share a scale in version 2

# --- llama2.c ------------------------------------------------------------------------------------


def save_llama2c(
    path: str, model: Transformer, version: int = 0, group_size: int | None = None
) -> None:
    """Write llama2.c's binary, one tensor at a time, atomically; the model is left as it is.

    version     0: what run.c reads; 1: the same after a proper header; 2: int8, what runq.c reads
    group_size  of version 2; None: the largest that fits. ValueError if it does not divide every
                row
    """
    args = model.args
    refuse_what_run_c_lacks(args, path)
    if version == 2:
        group_size = group_size or largest_group_size(args)
        check_group_size(args, group_size)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    layout = llama2c_layout(args, model.tied, version)
    size = 256 + sum(llama2c_size(shape, version, group_size) for _, shape in layout)
    with atomic_write(path, size, checked=True) as f:
        f.write(llama2c_header(args, model.tied, version, group_size))
        for name, shape in layout:
            if version == 2 and len(shape) == 2:
                for array in quantize(tensors[name], group_size):
                    f.write(array)  # tofile() would lose the error of a full disk
            else:
                f.write(as_numpy(tensors[name]))


def refuse_what_run_c_lacks(args: ModelArgs, path: str) -> None:
    """ValueError if run.c would compute another model: its header has no place for the theta."""
    if args.rope_theta != 10000.0 or args.rope_scaling:
        theta = f"this model's rotary embedding has theta {args.rope_theta:g}"
        theta += " and a scaling" if args.rope_scaling else ""
        other = "write a Hugging Face folder (--version=-1) or a .pt"
        raise ValueError(f"{path}: run.c knows theta 10000 only, and {theta}; {other}")


def llama2c_header(args: ModelArgs, tied: bool, version: int, group_size: int | None) -> bytes:
    numbers = [getattr(args, name) for name in HEADER_FIELDS]
    if version == 0:
        vocab_size = args.vocab_size if tied else -args.vocab_size
        return struct.pack("<7i", *numbers[:5], vocab_size, args.max_seq_len)
    header = struct.pack("<Ii7iB", MAGIC, version, *numbers, tied)
    if version == 2:
        header += struct.pack("<i", group_size)
    return header.ljust(256, b"\0")


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


def largest_group_size(args: ModelArgs) -> int:
    """Return the largest power of two up to 64 that divides every row, as runq.c needs."""
    return math.gcd(LARGEST_GROUP, math.gcd(args.dim, args.hidden_dim))


def check_group_size(args: ModelArgs, group_size: int) -> None:
    for name in ("dim", "hidden_dim"):
        if group_size < 1 or getattr(args, name) % group_size:
            does_not = f"does not divide {name} {getattr(args, name)}"
            fits = largest_group_size(args)
            raise ValueError(f"--group_size={group_size} {does_not}; {fits} fits")


def quantize(weight: Tensor, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Round symmetrically to int8: values (numel,) and scales (numel / group_size,) float32.

    A group [-1, 0.5] has the scale 1/127 and the values [-127, 64].
    """
    groups = as_numpy(weight).reshape(-1, group_size)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    divisors = np.where(scales == 0, 1, scales)[:, None]
    values = np.rint(groups / divisors).astype(np.int8)
    return values.reshape(-1), scales.astype(np.float32)


# --- Hugging Face --------------------------------------------------------------------------------


def halve(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of whole heads to Hugging Face's order: the inverse of folders.interleave."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def save_hf(path: str, model: Transformer, bos_id: int) -> None:
    """Write a folder that transformers loads: config.json and model.safetensors."""
    args = model.args
    os.makedirs(path, exist_ok=True)
    tensors = {}
    for name, weight in model.named_parameters():
        weight = weight.detach().cpu()
        if has_rotated_heads(name):
            weight = halve(weight, args.head_dim)
        tensors[hf_name(name)] = weight.contiguous()
    size = sum(tensor.nbytes for tensor in tensors.values())
    weights = os.path.join(path, "model.safetensors")
    with atomic_path(weights, size, checked=True) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
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
        "eos_token_id": model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids),
        "torch_dtype": "float32",
    }
    if args.rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3"} | args.rope_scaling
    write_text(os.path.join(path, "config.json"), json.dumps(config, indent=1))
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    write_text(os.path.join(path, "generation_config.json"), json.dumps(generation, indent=1))
    os.chmod(weights, 0o644)  # safetensors makes it its owner's alone


def save_card(path: str, weights) -> None:
    """Write README.md, what the checkpoint knows of itself; one that is there already stays."""
    out = os.path.join(path, "README.md")
    if not os.path.isfile(out):
        name = os.path.basename(os.path.abspath(path))
        digest = file_sha256(os.path.join(path, "model.safetensors"))
        card = model_card(name, weights.config, weights.step, weights.evaluation, digest)
        write_text(out, card)


def save_hf_tokenizer(path: str, tokenizer: Tokenizer, eos_id: int) -> None:
    """Write what AutoTokenizer reads: a tokenizer.json with the same ids, and the special tokens.

    A tokenizer.json that the model came with is there already, with the files beside it.
    """
    if tokenizer.kind != "sentencepiece":
        print(f"  beside it: the {tokenizer.kind} tokenizer as it came")
        return
    content = tokenizer_json(tokenizer)
    if content is not None:
        text = json.dumps(content, ensure_ascii=False)
        write_text(os.path.join(path, "tokenizer.json"), text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if content else "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.model.id_to_piece(tokenizer.bos_id),
        "eos_token": tokenizer.model.id_to_piece(eos_id),
        "unk_token": tokenizer.model.id_to_piece(tokenizer.model.unk_id()),
        "clean_up_tokenization_spaces": False,
    }
    template, tokens = read_template(tokenizer.path)
    if template:  # it writes its tokens by the names that the model came with
        names = {name: token for name, token in tokens.items() if token in tokenizer.special}
        config |= names | {"chat_template": template}
    write_text(os.path.join(path, "tokenizer_config.json"), json.dumps(config, indent=1))
    written = "tokenizer.json, tokenizer_config.json" if content else "tokenizer_config.json"
    print(f"  beside it: {written} for transformers, tokenizer.model for our own scripts")


# --- the command ---------------------------------------------------------------------------------


@dataclass
class ExportConfig(checkpoint.WeightsFlags):
    filepath: str = flag(
        "", "the file, or with version -1 the folder, to write", positional=True, required=True
    )
    checkpoint: str = flag("", "the model: a .pt or a llama2.c .bin")
    meta_llama: str = flag("", "the model: Meta's folder")
    hf: str = flag("", "the model: Hugging Face's folder")
    version: int = flag(
        0,
        "0: float32, for run.c; 1: the same, new header; 2: int8, for runq.c; -1: Hugging Face's",
        choices=[0, 1, 2, -1],
    )
    group_size: int | None = flag(
        None, "version 2: weights per scale; default: 64, or what divides dim and hidden_dim"
    )
    tokenizer: str = flag(
        "", "sentencepiece model; default: tokenizer.model beside the checkpoint, if there is one"
    )


def main(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, "export.py", "Write a checkpoint in llama2.c's formats.")
    if config.group_size is not None and config.version != 2:
        no_groups = f"version {config.version} has no groups; it goes with --version=2"
        raise ValueError(f"--group_size: {no_groups}")
    ending = os.path.splitext(config.filepath)[1]
    if ending in OTHERS_ENDINGS and config.version != -1:
        raise ValueError(f"{config.filepath}: {OTHERS_ENDINGS[ending]}")
    sources = [path for path in (config.checkpoint, config.meta_llama, config.hf) if path]
    if len(sources) != 1:
        raise ValueError("give the model to write: one of --checkpoint, --meta-llama and --hf")
    weights = checkpoint.open_weights(sources[0], config)
    is_folder = config.version == -1 and not config.filepath.endswith(".pt")
    folder = config.filepath if is_folder else os.path.dirname(config.filepath)
    if is_folder:
        check_folder(config.filepath, sources[0])
    else:
        check_output("", config.filepath, sources[0], config.tokenizer)
    tokenizer = None
    if config.tokenizer or find_tokenizer(sources[0]):
        tokenizer = load_tokenizer(config.tokenizer, sources[0], weights)
        # A folder for transformers has a tokenizer_config.json of its own, with the template in it.
        beside = not is_folder or tokenizer.kind != "sentencepiece"
        files_of_tokenizer(tokenizer, folder, beside)  # refuses another model's, before the work
    write_model(config, weights, tokenizer)
    if tokenizer is None:
        print("  no tokenizer beside the checkpoint; give --tokenizer to have it written as well")
        return
    copy_tokenizer(tokenizer, folder, beside)
    if is_folder:
        save_hf_tokenizer(folder, tokenizer, weights.eos_ids[0])
        return
    for_run_c = "" if tokenizer.kind == "tiktoken" else ", and tokenizer.bin, which run.c reads"
    print(f"  beside it: tokenizer.model, which our own scripts read{for_run_c}")


def check_folder(path: str, source: str) -> None:
    """ValueError if a Hugging Face folder cannot be made there, or is the one that is read."""
    path = path.rstrip("/")
    above = os.path.dirname(path)
    if above and not os.path.isdir(above):
        raise ValueError(f"{path}: there is no folder {above}; make it first")
    if os.path.isfile(path):
        raise ValueError(f"{path}: is a file; name a folder")
    if os.path.realpath(path) == os.path.realpath(source):
        raise ValueError(f"{path}: is read, too, and would be replaced; choose another name")


def write_model(config: ExportConfig, weights, tokenizer: Tokenizer | None) -> None:
    path = config.filepath
    model = checkpoint.load(weights.path, flags=config)
    if path.endswith(".pt"):
        checkpoint.save_pt(path, model, weights.step, weights.config)
        print(f"{path}: {os.path.getsize(path):,} bytes")
        return
    if config.version == -1:
        save_hf(path, model, tokenizer.bos_id if tokenizer else 1)
        save_card(path, weights)
        print(f"{path}: config.json, model.safetensors, README.md")
        return
    save_llama2c(path, model, config.version, config.group_size)
    print(f"{path}: version {config.version}, {os.path.getsize(path):,} bytes")
    args = model.args
    if args.norm_eps != 1e-5:
        print(f"  run.c computes with a norm_eps of 1e-5, this model has {args.norm_eps:g}")
    if config.version == 2 and config.group_size is None and largest_group_size(args) < 64:
        shape = f"dim {args.dim} and hidden_dim {args.hidden_dim}"
        print(f"  groups of {largest_group_size(args)}: 64 does not divide both {shape}")


if __name__ == "__main__":
    main_program(main)
