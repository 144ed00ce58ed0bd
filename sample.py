"""Checkpoint -> stories, or the answers to a file of prompts.

python sample.py --checkpoint=out/best.pt --prompt="Once upon a time" --num_samples=3 --out=stories.jsonl
python sample.py --checkpoint=stories260K.bin --tokenizer=tok512.model --temperature=0
python sample.py --checkpoint=out/best.pt --prompts=prompts.jsonl --out=outputs.json      # what alpaca_eval reads
"""

import json
import textwrap
from dataclasses import dataclass

from spo import checkpoint as checkpoints
from spo import machine
from spo.config import flag, parse, run
from spo.files import read_jsonl, write_jsonl, write_text
from spo.groups import parse_prompt
from spo.sampling import sample_batches, story_records
from spo.tokenizer import load_tokenizer


@dataclass
class SampleConfig:
    checkpoint: str = flag("out/best.pt", "a .pt or a llama2.c .bin")
    tokenizer: str = flag("", "sentencepiece model; none: tokenizer.model beside the checkpoint")
    prompt: str = flag("", "how the stories begin")
    prompts: str = flag("", "a JSONL file with a prompt in each line, to answer each")
    num_samples: int = flag(1, "how many stories, or answers to each prompt")
    batch_size: int = flag(64, "how many at once")
    max_new_tokens: int = flag(256, "longest story, in tokens")
    temperature: float = flag(1.0, "softmax temperature; 0 takes the likeliest token")
    top_k: int | None = flag(None, "sample among the k likeliest tokens only")
    top_p: float | None = flag(
        None, "sample among the likeliest tokens of this total probability only"
    )
    seed: int = flag(1337, "story i draws from the stream of (seed, i)")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")
    out: str = flag(
        "",
        "write them to this JSONL file, too; or, with --prompts, to this .json file for alpaca_eval",
    )


def main(argv: list[str]) -> None:
    config = parse(SampleConfig, argv, "sample.py", "Sample stories from a checkpoint.")
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError(
            f"--num_samples={config.num_samples}, --batch_size={config.batch_size}: must be 1 or more"
        )
    if config.prompt and config.prompts:
        raise ValueError("--prompt: --prompts brings its own")
    if config.out.endswith(".json") and not config.prompts:
        raise ValueError(
            f"--out={config.out}: a .json is for the answers to --prompts; name a .jsonl for stories"
        )
    if config.prompts and not config.out:
        raise ValueError("--prompts: needs --out, the file for the answers")
    device = machine.pick_device(config.device)
    machine.fast_products(device)
    checkpoint = checkpoints.load(config.checkpoint, device)
    tokenizer = load_tokenizer(
        config.tokenizer, config.checkpoint, checkpoint.model.args.vocab_size
    )
    asked = [{"prompt": config.prompt}]
    if config.prompts:
        asked = [
            record | {"prompt": parse_prompt(record, f"{config.prompts} line {i}")}
            for i, record in read_jsonl(config.prompts)
        ]
    asked = [record for record in asked for _ in range(config.num_samples)]
    samples = sample_batches(
        checkpoint,
        [tokenizer.encode(record["prompt"], bos=True) for record in asked],
        config.seed,
        config.max_new_tokens,
        batch_size=config.batch_size,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        progress="sampling" if config.prompts else None,
    )
    prompts = [record["prompt"] for record in asked]
    groups = [group for batch in samples for group in batch]
    stories = story_records(
        groups,
        prompts,
        tokenizer,
        checkpoint.eos_id,
        seed=config.seed,
        checkpoint=config.checkpoint,
    )
    for story in stories if not config.prompts else []:
        paragraphs = (story["prompt"] + story["text"]).split("\n")
        print("\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs), end="\n\n")
    if config.out.endswith(".json"):
        outputs = [
            {
                "instruction": record.get("instruction", record["prompt"]),
                "output": story["text"].strip(),
                "generator": config.checkpoint,
                "dataset": record.get("dataset", ""),
            }
            for record, story in zip(asked, stories)
        ]
        write_text(config.out, json.dumps(outputs, ensure_ascii=False, indent=1))
    elif config.out:
        write_jsonl(config.out, stories)
    if config.out:
        print(
            f"{config.out}: {len(stories)} {'answers' if config.prompts else 'stories'}, "
            f"{sum(not s['finished'] for s in stories)} cut at {config.max_new_tokens} tokens"
        )


if __name__ == "__main__":
    run(main)
