"""The flags of a chat endpoint, and what they have to be."""

import json
import os
import urllib.parse
from dataclasses import dataclass

from spo.config import check_bounds, flag

OPENAI = "https://api.openai.com/v1"


@dataclass
class ChatFlags:
    base_url: str = flag(
        "",
        f"the API, up to and with /v1; default: OPENAI_BASE_URL, or {OPENAI}",
        free=True,
        heading="judge's API",
    )
    journal: str = flag(
        "journal.jsonl",
        "every reply of the API judge, so that none is asked for, or paid, twice",
        free=True,
    )
    workers: int = flag(8, "requests to the API judge at a time", least=1, most=1000, free=True)
    judge_timeout: float = flag(120.0, "seconds for one request", above=0, most=86400, free=True)
    judge_retries: int = flag(
        10,
        "how often a request is sent again when the network or the server fails",
        least=0,
        most=10**9,
        free=True,
    )
    judge_temperature: float | None = flag(
        0.0, "the API judge's sampling temperature; none: leave the field out", least=0, most=1e9
    )
    judge_max_tokens: int = flag(2048, "the longest reply, in tokens", least=1, most=10**7)
    judge_token_field: str = flag(
        "max_tokens",
        "what the API calls that limit",
        choices=["max_tokens", "max_completion_tokens"],
    )
    judge_extra: str = flag("", "JSON of further fields, such as '{\"enable_thinking\": false}'")
    usd_per_million_in: float = flag(0.0, "price of a million prompt tokens", least=0, most=1e9)
    usd_per_million_out: float = flag(0.0, "price of a million reply tokens", least=0, most=1e9)
    max_usd: float | None = flag(
        None,
        "stop before the request that could pass this, counting what the journal holds",
        least=0,
        most=1e9,
        free=True,
    )


def base_url_of(flags: ChatFlags) -> str:
    """Return --base_url, or what OPENAI_BASE_URL says, or OpenAI's."""
    return flags.base_url or os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI


def extra_fields(flags: ChatFlags) -> dict:
    """Return the object of --judge_extra. ValueError if it is none, or sets what a flag sets."""
    try:
        fields = json.loads(flags.judge_extra or "{}")
    except (ValueError, RecursionError):
        fields = None
    wanted = """expected a JSON object such as '{"enable_thinking": false}'"""
    if not isinstance(fields, dict):
        raise ValueError(f"--judge_extra={flags.judge_extra}: {wanted}")
    own = ("model", "messages", "temperature", flags.judge_token_field, "stream", "n")
    for name in own:
        if name in fields:
            raise ValueError(f"--judge_extra: {name!r} cannot be set there")
    return fields


def check_flags(flags: ChatFlags) -> None:
    """ValueError, naming the flag, for what cannot work."""
    check_bounds(flags)
    extra_fields(flags)
    base_url = base_url_of(flags)
    if flags.max_usd is not None and not (flags.usd_per_million_in and flags.usd_per_million_out):
        prices = "--usd_per_million_in and --usd_per_million_out, the prices of this model"
        raise ValueError(f"--max_usd: needs {prices}")
    try:
        url = urllib.parse.urlsplit(base_url)
        is_http = url.scheme in ("http", "https") and bool(url.hostname)
        good = is_http and not (url.port == 0 or url.query or url.fragment)
    except ValueError:  # a port that is none
        good = False
    if not good or "@" in base_url:
        such = f"something like {OPENAI} or http://localhost:8000/v1"
        source = "--base_url" if flags.base_url else "OPENAI_BASE_URL"
        raise ValueError(f"{source}: expected {such}, without password or query")
