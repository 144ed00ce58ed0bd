"""Stories of a model: sampled in batches, each from a random stream of its own, and kept so that a kill loses none."""

import json
import os
from collections.abc import Iterator

from tqdm import tqdm

from model import generate
from spo.checkpoint import Checkpoint
from spo.files import write_jsonl
from spo.groups import EncodedGroup
from spo.tokenizer import Tokenizer


def sample_batches(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    seed: int | tuple[int, ...],
    max_new_tokens: int = 256,
    *,
    batch_size: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    first: int = 0,
    progress: str | None = None,
) -> Iterator[list[EncodedGroup]]:
    """One response of the model to each prompt from `first` on, with its terminator if it ended, as groups of one.

    Response i draws from the stream of (seed, i), whatever the batch size and whatever was sampled before.
    progress  the label of a progress bar; None: no bar
    returns   an iterator over batches
    """
    total = len(prompts)
    with tqdm(
        total=total,
        initial=first,
        desc=progress,
        unit="story",
        disable=progress is None,
        leave=False,
    ) as bar:
        for start in range(first, total, batch_size):
            batch = prompts[start : start + batch_size]
            responses = generate(
                checkpoint.model,
                batch,
                max_new_tokens,
                temperature,
                top_k,
                top_p,
                stop_ids=[checkpoint.eos_id],
                seed=seed,
                first_row=start,
            )
            yield [
                EncodedGroup(p, [r], start + i) for i, (p, r) in enumerate(zip(batch, responses))
            ]
            bar.update(len(batch))


def sample(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    seed: int | tuple[int, ...],
    max_new_tokens: int = 256,
    progress: str | None = None,
    part: slice = slice(0, None),
) -> list[EncodedGroup]:
    """All of `sample_batches`, or a part of them, from the model as it is: temperature 1, no truncation."""
    batches = sample_batches(
        checkpoint, prompts[: part.stop], seed, max_new_tokens, first=part.start, progress=progress
    )
    return [group for batch in batches for group in batch]


def spread(prompts: list, count: int) -> list:
    """`count` prompts: each of them in a block of (nearly) equal length, so that neighbours can be ranked together."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


def story_records(
    samples: list[EncodedGroup], prompts: list[str], tokenizer: Tokenizer, eos_id: int, **extra
) -> list[dict]:
    """Samples -> records {"prompt", "text", "finished", "index"} and `extra` (seed, checkpoint).

    "text" is what the model wrote behind the prompt, its leading space included; "finished" is False where it was cut
    at the length limit.
    """
    records = []
    for prompt, group in zip(prompts, samples):
        ids, finished = group.responses[0], group.responses[0][-1] == eos_id
        text = tokenizer.decode_after(group.prompt, ids[:-1] if finished else ids)
        records.append(
            {"prompt": prompt, "text": text, "finished": finished, "index": group.line} | extra
        )
    return records


class StoriesOnTheWay:
    """OUT.part: the settings of a generate command in the first line, then its stories, batch by batch.

    What a kill leaves is gone on with by the same command, and by no other.
    """

    def __init__(self, out: str, settings: dict):
        """ValueError if the file is of other settings."""
        self.path, self.records, self.settings = f"{out}.part", [], {"settings": settings}
        if not os.path.isfile(self.path):
            return
        with open(self.path, "rb") as f:
            lines = f.read().split(b"\n")[:-1]  # what has no newline was cut by a kill
        try:
            former, *self.records = map(json.loads, lines) if lines else [self.settings]
            differing = [f"--{k}" for k, v in settings.items() if former["settings"].get(k) != v]
            for record in self.records:
                record["finished"], record["text"]  # raises if that is no story
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{self.path}: damaged; remove it, or give another --out") from None
        if differing and self.records:
            raise ValueError(
                f"{self.path}: was begun with another {', '.join(differing)}; remove it, or give another "
                "--out"
            )

    def go_on(self, batch_size: int) -> int:
        """Rewrites the file up to its last whole batch; returns the number of the next story."""
        self.records = self.records[: len(self.records) // batch_size * batch_size]
        write_jsonl(self.path, [self.settings, *self.records])
        return len(self.records)

    def add(self, records: list[dict]) -> None:
        with open(self.path, "ab") as f:
            f.write(
                "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode("utf-8")
            )
            f.flush()
            os.fsync(f.fileno())
        self.records += records
