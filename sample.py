"""Checkpoint -> stories, or the answers to a file of prompts.

    python sample.py --checkpoint=out/best.pt --prompt="Once upon a time" --num_samples=3
    python sample.py --checkpoint=stories260K.bin --tokenizer=tok512.model --temperature=0
    python sample.py --checkpoint=out/best.pt --out=stories.jsonl              # printed, and kept
    python sample.py --checkpoint=out/best.pt --compare=stories260K.bin        # side by side
    python sample.py --checkpoint=out/best.pt --prompts=prompts.jsonl --out=outputs.json

The last one answers a file of prompts; alpaca_eval reads a .json.
"""

import spo  # isort: skip  # noqa: F401  (sets OpenMP's waiting; must precede torch)


import json
import textwrap
from dataclasses import dataclass

from model import Transformer
from spo import checkpoint, fast, parallel
from spo.config import flag, main_program, parse
from spo.evaluation import printable, side_by_side
from spo.files import check_output, place, write_jsonl, write_text
from spo.generate import SamplingFlags, prompts_that_fit, sample_batches, story_records
from spo.records import read_prompts
from spo.tokenizer import Tokenizer, load_tokenizer


@dataclass
class SampleConfig(SamplingFlags):
    checkpoint: str = flag("out/best.pt", "a .pt, a llama2.c .bin, or a folder of weights")
    prompt: str = flag("", "how the stories begin")
    num_samples: int = flag(1, "how many stories, or answers to each prompt", least=1)
    seed: int = flag(1337, "story i draws from the stream of (seed, i)", least=0)
    compare: str = flag("", "another model: its stories of the same seeds, side by side")
    out: str = flag(
        "", "write them to this JSONL file, too; or, with --prompts, to this .json for alpaca_eval"
    )

    def check(self) -> None:
        if self.prompt and self.prompts:
            raise ValueError("--prompt: --prompts brings its own")
        if self.prompts and not self.out:
            raise ValueError("--prompts: needs --out, the file for the answers")
        if self.compare and (self.prompts or self.out):
            raise ValueError("--compare: prints two models' stories; leave out --prompts and --out")
        if self.out.endswith(".json") and not self.prompts:
            answers = "a .json is for the answers to --prompts; name a .jsonl for stories"
            raise ValueError(f"--out={self.out}: {answers}")
        if self.out.endswith(".json") and self.num_samples > 1:
            one = "alpaca_eval takes one answer to an instruction; name a .jsonl for several"
            raise ValueError(f"--num_samples={self.num_samples}: {one}")


def main(argv: list[str]) -> None:
    config = parse(SampleConfig, argv, "sample.py", "Sample stories from a checkpoint.")
    config.check()
    if config.out:
        check_output("--out", config.out, config.checkpoint, config.tokenizer, config.prompts)
    asked, places = [{"prompt": config.prompt}], ["--prompt"]
    if config.prompts:
        lines, asked = zip(*read_prompts(config.prompts), strict=True)
        places = [place(config.prompts, line) for line in lines]
    device = parallel.pick_device(config.device)
    fast.enable_fast_matmul(device)
    model, tokenizer = load(config, config.checkpoint, device)
    fitting = prompts_that_fit([r["prompt"] for r in asked], places, tokenizer, model)
    asked = [asked[i] for i in fitting for _ in range(config.num_samples)]
    prompts = [record["prompt"] for record in asked]
    stories = stories_of(config, config.checkpoint, model, tokenizer, prompts)
    if config.compare:
        others = stories_of(config, config.compare, *load(config, config.compare, device), prompts)
        for pair in zip(stories, others, strict=True):
            texts = tuple(story["prompt"] + story["text"] for story in pair)
            print(side_by_side(*texts, (config.checkpoint, config.compare)), end="\n\n")
    elif not config.prompts:
        for story in stories:
            paragraphs = printable(story["prompt"] + story["text"]).split("\n")
            print("\n".join(textwrap.fill(paragraph, 100) for paragraph in paragraphs), end="\n\n")
    if config.out.endswith(".json"):
        outputs = alpaca_eval_outputs(asked, stories)
        write_text(config.out, json.dumps(outputs, ensure_ascii=False, indent=1))
    elif config.out:
        write_jsonl(config.out, stories)
    if config.out:
        kind = "answers" if config.prompts else "stories"
        cut = sum(not story["finished"] for story in stories)
        written = f"{len(stories)} {kind}, {cut} cut at {config.max_new_tokens} tokens"
        print(f"{config.out}: {written}")


def load(config: SampleConfig, path: str, device: str) -> tuple[Transformer, Tokenizer]:
    model = checkpoint.load(path, device, config)
    return model, load_tokenizer(config.tokenizer, path, model)


def stories_of(
    config: SampleConfig, path: str, model: Transformer, tokenizer: Tokenizer, prompts: list[str]
) -> list[dict]:
    """Return a checkpoint's stories, one for each prompt, as records."""
    encoded = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    label = "sampling" if config.prompts else None
    batches = sample_batches(
        model, encoded, config.seed, config.max_new_tokens, flags=config, label=label
    )
    samples = [group for batch in batches for group in batch]
    origin = {"seed": config.seed, "checkpoint": path}
    return story_records(samples, prompts, tokenizer, model.eos_ids, **origin)


def alpaca_eval_outputs(asked: list[dict], stories: list[dict]) -> list[dict]:
    """Return the records that the alpaca_eval package reads as a model's outputs."""
    outputs = []
    for record, story in zip(asked, stories, strict=True):
        outputs.append(
            {
                "instruction": record.get("instruction", record["prompt"]),
                "output": story["text"].strip(),
                "generator": story["checkpoint"],
                "dataset": record.get("dataset", ""),
            }
        )
    return outputs


if __name__ == "__main__":
    main_program(main)
