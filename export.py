"""Checkpoint -> llama2.c's binary (version 0, 1 or 2), or back to a .pt (version -1), with the tokenizer beside it.

    python export.py model.bin --checkpoint=out/best.pt --version=0       # run.c
    python export.py model_q80.bin --checkpoint=out/best.pt --version=2   # runq.c
    python export.py stories.pt --checkpoint=stories260K.bin --version=-1
"""

import os
from dataclasses import dataclass

import checkpoint as checkpoints
from checkpoint import largest_group_size
from config import flag, parse, run
from tokenizer import load_tokenizer


@dataclass
class ExportConfig:
    filepath: str = flag(None, "the file to write", positional=True)
    checkpoint: str = flag("", "the model: a .pt or a llama2.c .bin")
    version: int = flag(0, "0: float32, for run.c; 1: float32, new header; 2: int8, for runq.c; -1: a .pt",
                        choices=[0, 1, 2, -1])
    group_size: int | None = flag(None, "version 2: weights per scale; none: 64, or what divides dim and hidden_dim")
    tokenizer: str = flag("", "sentencepiece model; none: tokenizer.model beside the checkpoint, if there is one")


def main(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, "export.py", "Write a checkpoint in llama2.c's formats.")
    if config.group_size is not None and config.version != 2:
        raise ValueError(f"--group_size: version {config.version} has no groups; it goes with --version=2")
    checkpoint = checkpoints.load(config.checkpoint)
    args = checkpoint.model.args
    folder = os.path.dirname(config.filepath)
    if folder and not os.path.isdir(folder):
        raise ValueError(f"{config.filepath}: no such folder as {folder}; make it first")
    tokenizer = None
    if config.tokenizer or os.path.isfile(os.path.join(os.path.dirname(config.checkpoint), "tokenizer.model")):
        tokenizer = load_tokenizer(config.tokenizer, config.checkpoint, args.vocab_size)

    if config.version == -1:
        checkpoints.save_pt(config.filepath, checkpoint)
    else:
        checkpoints.save_llama2c(config.filepath, checkpoint.model, config.version, config.group_size)
    print(f"{config.filepath}: version {config.version}, {os.path.getsize(config.filepath):,} bytes")
    if config.version == 2 and config.group_size is None and largest_group_size(args) < 64:
        print(f"  groups of {largest_group_size(args)}: 64 does not divide dim {args.dim} and "
              f"hidden_dim {args.hidden_dim}")
    if tokenizer is None:
        print("  no tokenizer beside the checkpoint; give --tokenizer to have tokenizer.bin written as well")
        return
    checkpoints.copy_tokenizer(tokenizer, folder)
    print("  beside it: tokenizer.bin, which run.c reads, and tokenizer.model, which our own scripts read")


if __name__ == "__main__":
    run(main)
