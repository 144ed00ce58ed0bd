"""Checkpoint -> llama2.c's binary (version 0, 1 or 2), Hugging Face's folder (version -1), or a .pt, with the tokenizer.

python export.py model.bin --checkpoint=out/best.pt --version=0       # run.c
python export.py model_q80.bin --checkpoint=out/best.pt --version=2   # runq.c
python export.py hf_model --checkpoint=out/best.pt --version=-1       # a folder for transformers
python export.py stories.pt --checkpoint=stories260K.bin              # a name that ends in .pt
python export.py model.bin --hf=llama-2-7b-hf                         # or --meta-llama=llama-2-7b
"""

import os
from dataclasses import dataclass

from spo import checkpoint as checkpoints
from spo.checkpoint import largest_group_size
from spo.config import flag, parse, run
from spo.folders import save_hf
from spo.tokenizer import load_tokenizer, tokenizer_path


@dataclass
class ExportConfig:
    filepath: str = flag(None, "the file, or with version -1 the folder, to write", positional=True)
    checkpoint: str = flag("", "the model: a .pt or a llama2.c .bin")
    meta_llama: str = flag("", "the model: Meta's folder")
    hf: str = flag("", "the model: Hugging Face's folder")
    version: int = flag(
        0,
        "0: float32, for run.c; 1: float32, new header; 2: int8, for runq.c; -1: Hugging Face's folder",
        choices=[0, 1, 2, -1],
    )
    group_size: int | None = flag(
        None, "version 2: weights per scale; none: 64, or what divides dim and hidden_dim"
    )
    tokenizer: str = flag(
        "", "sentencepiece model; none: tokenizer.model beside the checkpoint, if there is one"
    )


def main(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, "export.py", "Write a checkpoint in llama2.c's formats.")
    if config.group_size is not None and config.version != 2:
        raise ValueError(
            f"--group_size: version {config.version} has no groups; it goes with --version=2"
        )
    sources = [path for path in (config.checkpoint, config.meta_llama, config.hf) if path]
    if len(sources) != 1:
        raise ValueError("give the model to write: one of --checkpoint, --meta-llama and --hf")
    checkpoint = checkpoints.load(sources[0])
    args, model = checkpoint.model.args, checkpoint.model
    folder = config.filepath if config.version == -1 else os.path.dirname(config.filepath)
    above = os.path.dirname(folder.rstrip("/")) if config.version == -1 else folder
    if above and not os.path.isdir(above):
        raise ValueError(f"{config.filepath}: no such folder as {above}; make it first")
    tokenizer = None
    if config.tokenizer or os.path.isfile(tokenizer_path(sources[0])):
        tokenizer = load_tokenizer(config.tokenizer, sources[0], args.vocab_size)

    if config.filepath.endswith(".pt"):
        checkpoints.save_pt(config.filepath, checkpoint)
        print(f"{config.filepath}: {os.path.getsize(config.filepath):,} bytes")
    elif config.version == -1:
        save_hf(config.filepath, model, tokenizer.bos_id if tokenizer else 1, checkpoint.eos_id)
        print(f"{config.filepath}: config.json, model.safetensors")
    else:
        checkpoints.save_llama2c(config.filepath, model, config.version, config.group_size)
        print(
            f"{config.filepath}: version {config.version}, {os.path.getsize(config.filepath):,} bytes"
        )
    if config.version == 2 and config.group_size is None and largest_group_size(args) < 64:
        print(
            f"  groups of {largest_group_size(args)}: 64 does not divide dim {args.dim} and "
            f"hidden_dim {args.hidden_dim}"
        )
    if tokenizer is None:
        print("  no tokenizer beside the checkpoint; give --tokenizer to have it written as well")
        return
    checkpoints.copy_tokenizer(
        tokenizer, os.path.dirname(config.filepath) if config.filepath.endswith(".pt") else folder
    )
    print(
        "  beside it: tokenizer.model, which our own scripts read"
        + ("" if tokenizer.kind == "tiktoken" else ", and tokenizer.bin, which run.c reads")
    )


if __name__ == "__main__":
    run(main)
