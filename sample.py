"""Checkpoint -> stories.

    python sample.py --checkpoint=out/best.pt --prompt="Once upon a time" --num_samples=3 --out=stories.jsonl
    python sample.py --checkpoint=stories260K.bin --tokenizer=tok512.model --temperature=0
"""

import textwrap
from dataclasses import dataclass

import checkpoint as checkpoints
from config import flag, parse, run
from model import generate
from tokenizer import load_tokenizer


@dataclass
class SampleConfig:
    checkpoint: str = flag("out/best.pt", "a .pt or a llama2.c .bin")
    tokenizer: str = flag("", "sentencepiece model; none: tokenizer.model beside the checkpoint")
    prompt: str = flag("", "how the stories begin")
    num_samples: int = flag(1, "how many stories")
    max_new_tokens: int = flag(256, "longest story, in tokens")
    temperature: float = flag(1.0, "softmax temperature; 0 takes the likeliest token")
    top_k: int | None = flag(None, "sample among the k likeliest tokens only")
    top_p: float | None = flag(None, "sample among the likeliest tokens of this total probability only")
    seed: int = flag(1337, "story i draws from the stream of (seed, i)")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")
    out: str = flag("", "write the stories to this JSONL file, too")


def main(argv: list[str]) -> None:
    config = parse(SampleConfig, argv, "sample.py", "Sample stories from a checkpoint.")
    if config.num_samples < 1:
        raise ValueError(f"--num_samples={config.num_samples}: must be 1 or more")
    checkpoint = checkpoints.load(config.checkpoint, checkpoints.pick_device(config.device))
    tokenizer = load_tokenizer(config.tokenizer, config.checkpoint, checkpoint.model.args.vocab_size)
    prompt = tokenizer.encode(config.prompt, bos=True)
    samples = generate(
        checkpoint.model, [prompt] * config.num_samples, config.max_new_tokens, config.temperature,
        config.top_k, config.top_p, stop_ids=[checkpoint.eos_id], seed=config.seed,
    )
    records = []
    for index, ids in enumerate(samples):
        finished = ids[-1] == checkpoint.eos_id
        ids = ids[:-1] if finished else ids
        # the whole is decoded at once: whether a space follows the prompt is in its first new token
        paragraphs = tokenizer.decode(prompt + ids).split("\n")
        print("\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs), end="\n\n")
        records.append({"prompt": config.prompt, "text": tokenizer.decode_after(prompt, ids), "seed": config.seed,
                        "index": index, "checkpoint": config.checkpoint, "finished": finished})
    if config.out:
        checkpoints.write_jsonl(config.out, records)
        print(f"{config.out}: {len(records)} stories")


if __name__ == "__main__":
    run(main)
