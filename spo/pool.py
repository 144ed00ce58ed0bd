"""The reference's stories that every story of the policy is judged against, drawn once and kept."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence

from spo import parallel
from spo.files import inputs_sha256, jsonl_line, write_text

FEWEST = 8  # stories of a pool to each prompt: with fewer, stories are compared one to one


def key_of(config, tokenizer_path: str, prompts: Sequence[str]) -> dict:
    """Return what the stories of a pool depend on.

    config  of a run: init_from, eval_pool, max_new_tokens, seed and dtype are read here
    """
    return {
        "weights": inputs_sha256(config.init_from),
        "tokenizer": inputs_sha256(tokenizer_path),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "stories": config.eval_pool,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "dtype": config.dtype,
        "rope_factor": config.rope_factor,
    }


def keep(
    config,
    tokenizer_path: str,
    folder: str,
    prompts: Sequence[str],
    draw: Callable[[], list[str]],
) -> list[str]:
    """Return the stories of folder/pool-KEY.jsonl; or draw them, and keep them there. Collective.

    A file that is damaged, or of another key, is drawn anew.
    """

    def read() -> tuple[str, dict, list[str] | None]:
        key = key_of(config, tokenizer_path, prompts)
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        path = os.path.join(folder, f"pool-{digest}.jsonl")
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            with open(path, encoding="utf-8") as f:
                header, *records = [json.loads(line) for line in f]
            texts = [record["text"] for record in records]
            if header == key | {"sha256": sha256_of(texts)}:
                return path, key, texts
        return path, key, None

    path, key, texts = parallel.on_rank_0(read)
    if texts is None:
        texts = draw()
        lines = [key | {"sha256": sha256_of(texts)}, *({"text": text} for text in texts)]
        parallel.on_rank_0(lambda: write_text(path, "".join(map(jsonl_line, lines))))
    return texts


def sha256_of(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
