"""How many tokens a prompt has, for what it will cost."""

import math
from collections.abc import Callable


def token_counter(model: str) -> tuple[Callable[[str], int], str]:
    """Return how to count a prompt's tokens, and the words for it: tiktoken, or bytes/4."""
    try:
        import tiktoken

        try:
            encoding = tiktoken.encoding_for_model(model)
        except KeyError:
            encoding = tiktoken.get_encoding("o200k_base")
        return (
            lambda text: len(encoding.encode(text, disallowed_special=())),
            f"by {encoding.name}",
        )
    except Exception:  # no tiktoken, no network, a proxy's page in place of the table
        return (
            lambda text: math.ceil(len(text.encode("utf-8", "replace")) / 4),
            "bytes/4, because tiktoken's table could not be loaded",
        )
