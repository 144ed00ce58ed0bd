"""Why an API judge's replies could not be used, how many, and what may help."""

import sys
import textwrap
from collections import Counter
from collections.abc import Callable

from spo.chat_flags import ChatFlags

CHARACTERS_PER_TOKEN = 7  # a prompt with more of them, by the server's count, was cut ...
SHORTEST_CONTEXT = 256  # ... if that count can be a context; some servers do not count at all
MOST = 50  # replies without one that is usable, and no more are asked for
NAMED = 10  # invalid groups
HELP = {  # how a reason begins -> what may help
    "cut": "--judge_max_tokens={four_times}",
    "empty": "a thinking model that was cut, or its server keeps the answer back",
    "refused": "see {journal}; --judge_attempts={more} asks for those again",
    "prompt cut": "the server's context is too short for these stories",
    "": "--judge_attempts={more} asks for those again",
}


def why_unusable(reply: dict) -> str:
    """Say why a reply cannot be read; "" if it can. Of a refusal: "refused: " and the words."""
    reason = reply["finish_reason"]
    if reason == "refused":
        return f"refused: {reply.get('said', 'no reason given')}"
    if reason == "content_filter":
        return "stopped by a content filter"
    if reason == "length":
        return f"cut at {reply.get('max_tokens', 0):,} tokens"
    if not (reply["text"] or "").strip():
        return "empty" + (", the text is in reasoning_content" if reply.get("reasoned") else "")
    counted = (reply.get("usage") or {}).get("prompt_tokens", 0)
    if SHORTEST_CONTEXT <= counted < reply.get("sent", 0) / CHARACTERS_PER_TOKEN:
        return f"prompt cut by the server to {counted:,} tokens"
    return ""


def advice(reasons: list[str], usable: int, flags: ChatFlags, attempts: int) -> str:
    """Return "8 of 8 cut at 2,048 tokens (--judge_max_tokens=8192)", and so on for every reason.

    reasons  why each invalid question is; usable: how many questions were answered
    """
    values = {"four_times": 4 * flags.judge_max_tokens, "journal": flags.journal}
    total, parts = len(reasons) + usable, []
    for reason, count in Counter(reason.split(": ")[0] for reason in reasons).most_common():
        may_help = next(text for begins, text in HELP.items() if reason.startswith(begins))
        may_help = may_help.format(more=attempts + 2, **values)
        parts.append(f"{count} of {total} {reason} ({may_help})")
    return "; ".join(parts)


def name_invalid(groups: list[list[str]], results: list, why: Callable) -> None:
    """Name on stderr the first groups without a valid result, and why(group)."""
    invalid = [i for i, result in enumerate(results) if not result.valid]
    for i in invalid[:NAMED]:
        begins = textwrap.shorten(groups[i][0], 50, placeholder="...")
        line = f'invalid: group {i + 1}, "{begins}": {why(groups[i])}'
        print(line, file=sys.stderr, flush=True)
    if len(invalid) > NAMED:
        print(f"{len(invalid)} groups are invalid in all", file=sys.stderr, flush=True)
