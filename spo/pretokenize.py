"""Text -> a tokenizer, and -> token files, as llama2.c has them.

A token file is the stream of all stories of a shard in uint16, BOS before each: llama2.c's format.
"""

import glob
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import sentencepiece

from spo.files import atomic_write, place, read_json, read_jsonl, text_fault
from spo.groups import token_files
from spo.progress import progress
from spo.records import parse_group
from spo.tokenizer import Tokenizer, copy_tokenizer

RESERVED = "\u2585"  # sentencepiece passes over every line that holds it


def train_tokenizer(text_file: str, vocab_size: int, prefix: str) -> None:
    """Train a BPE sentencepiece model with llama2.c's settings."""
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=text_file,
            model_prefix=prefix,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            input_format="text",
            num_threads=1,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_surface=r" \342\201\207 ",
            normalization_rule_name="identity",
            max_sentence_length=10**9,  # bytes; longer lines than 4,192 are left out by default
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"--vocab_size={vocab_size}: sentencepiece cannot make it of this text: {error}"
        ) from None


def shards_of(path: str) -> list[str]:
    """A text file (.json, .jsonl or .txt), or those of a folder. ValueError if there are none."""
    shards = sorted(
        glob.glob(os.path.join(path, "*.json")) + glob.glob(os.path.join(path, "*.jsonl"))
    ) or [path]
    if not os.path.isfile(shards[0]):
        raise ValueError(
            f"{path}: no .json or .jsonl file; "
            "python tinystories_data.py download fetches TinyStories"
        )
    return shards


def stories_of(shard: str) -> Iterator[str]:
    """Yield the texts of a shard: our JSONL, a .json or a .txt as TinyStories is published."""
    if shard.endswith(".txt"):
        yield from stories_of_text(shard)
        return
    if shard.endswith(".jsonl"):
        for number, record in read_jsonl(shard):
            yield parse_group(record, f"{shard} line {number}", number).responses[0].strip()
        return
    records = read_json(shard)
    if not isinstance(records, list):
        raise ValueError(f"{shard}: not a list of records; JSON Lines are named .jsonl")
    for number, record in enumerate(records, start=1):
        record = record if isinstance(record, dict) else {}
        story = record.get("story", record.get("text"))
        if fault := text_fault(story):
            raise ValueError(f'{place(shard, number)}: its "story" (or "text") {fault}')
        yield story.strip()


def stories_of_text(path: str) -> Iterator[str]:
    """Yield the stories of a text file, between lines of <|endoftext|>."""
    with open(path, encoding="utf-8-sig") as f:
        try:
            stories = f.read().split("<|endoftext|>")
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a text in UTF-8") from None
    if len(stories) < 2:
        wanted = "a .txt has stories with <|endoftext|> between them"
        raise ValueError(f'{path}: {wanted}; or name a .jsonl with {{"text": "..."}} in each line')
    yield from filter(None, map(str.strip, stories))


def make_vocab(data: str, vocab_size: int, out: str, num_shards: int) -> None:
    """A tokenizer of vocab_size pieces on the first num_shards shards -> out, a .model file."""
    prefix = f"{out}.tmp{os.getpid()}"
    text, made, reserved = f"{prefix}.txt", f"{prefix}.model", 0
    try:
        with open(text, "w", encoding="utf-8") as f:
            shards = shards_of(data)[:num_shards]
            for story in itertools.chain.from_iterable(map(stories_of, shards)):
                f.write(story.replace(RESERVED, " ") + "\n")
                reserved += RESERVED in story
        if reserved:
            print(f"{reserved} stories hold U+2585, which sentencepiece reserves: it is left out")
        train_tokenizer(text, vocab_size, prefix)
        os.replace(made, out)
    finally:
        for leftover in (text, made, f"{prefix}.vocab"):
            if os.path.exists(leftover):
                os.remove(leftover)


def pretokenize_shard(shard: str, tokenizer_path: str, out: str) -> int:
    """One shard -> its token file; returns how many tokens. Runs in a worker process."""
    tokenizer = Tokenizer(tokenizer_path)
    stories = [
        np.array(tokenizer.encode(story, bos=True), dtype=np.uint16) for story in stories_of(shard)
    ]
    if not stories:
        raise ValueError(f"{shard}: holds no stories")
    content = np.concatenate(stories).tobytes()
    with atomic_write(out, len(content), checked=True) as f:
        f.write(content)
    return sum(map(len, stories))


def make_token_files(data: str, tokenizer_path: str, folder: str, workers: int) -> int:
    """Turn every shard of data into a .bin in folder; return how many tokens they hold.

    workers  processes. What goes wrong in one ends all, with the shard's name
    """
    tokenizer = Tokenizer(tokenizer_path)
    if tokenizer.vocab_size > 2**16:
        raise ValueError(
            f"{tokenizer_path}: {tokenizer.vocab_size} pieces do not fit the uint16 of a token file"
        )
    outs = {}
    for shard in shards_of(data):
        out = os.path.join(folder, os.path.splitext(os.path.basename(shard))[0] + ".bin")
        if out in outs:
            raise ValueError(
                f"{shard}: {outs[out]} has the same name, and both would become {out}; rename one"
            )
        outs[out] = shard
    for other in set(token_files(folder)) - set(outs):
        raise ValueError(
            f"{other}: is of another text, and sft would read both; "
            "remove it, or give another --data_dir"
        )
    os.makedirs(folder, exist_ok=True)
    copy_tokenizer(tokenizer, folder)
    tokens = 0
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(pretokenize_shard, shard, tokenizer_path, out)
            for out, shard in outs.items()
        ]
        try:
            with progress(len(jobs), "pretokenize", "shards") as bar:
                for job in as_completed(jobs):
                    tokens += job.result()
                    bar.update()
        except BrokenProcessPool:
            fewer = max(1, workers // 2)
            raise ValueError(
                f"a worker was killed, for want of memory perhaps; try --workers={fewer}"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return tokens
