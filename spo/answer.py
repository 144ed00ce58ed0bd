"""What an OpenAI-compatible server has answered: a reply, or an error in its own words.

Servers and gateways say errors in several ways: as a status, as {"error": ...} under status 200, as
a page, as the finish_reason of an empty reply.
"""

import contextlib
import ipaddress
import json
import re
import urllib.parse
from dataclasses import dataclass

import requests
import urllib3

LONGEST_WORDS = 240  # characters of a server's text that are shown
# What a server may write of a field that it does not take, and the flag for that.
HINTS = {
    "max_completion_tokens": "--judge_token_field=max_completion_tokens may be what it wants",
    "enable_thinking": """--judge_extra='{"enable_thinking": false}' may be what it wants""",
    "temperature": "--judge_temperature=none leaves that field out",
}


@dataclass
class Answer:
    """
    status  of HTTP; of an error that came under status 200, the error's own; 0: no answer came
    reply   of a completion: {"text", "finish_reason", "model", "usage"}; None of an error
    words   the server's, of an error; in a line
    free    nothing can have been billed: it says that it has done nothing
    """

    status: int
    reply: dict | None = None
    words: str = ""
    free: bool = False

    def __str__(self) -> str:
        return (
            f"it answered {self.status}: {self.words or 'nothing'}" if self.status else self.words
        )

    @property
    def is_lost(self) -> bool:
        """May the work have been done, or does the server fail at it? Not if it is overloaded."""
        return self.status >= 500 and self.status != 503 or (self.status == 0 and not self.free)

    @property
    def is_quota(self) -> bool:
        """Is the account's money used up? Waiting does not help then."""
        return self.status == 402 or (self.status == 429 and "insufficient_quota" in self.words)


class HalfAnswer(Exception):
    """An answer under status 200 that is no whole JSON of a completion or an error; its words."""


def read_answer(status: int, body: str) -> Answer:
    """Read a status and a body. HalfAnswer for a 200 that says nothing that can be read."""
    if status // 100 == 2 and status != 200:
        raise HalfAnswer(f"status {status}")
    if status != 200:
        free = status < 500 or status == 503
        return Answer(status, words=words_of(body), free=free)
    try:
        answer = json.loads(body)
        whole = isinstance(answer, dict) and (
            isinstance(answer.get("choices"), list) or answer.get("error")
        )
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise HalfAnswer(words_of(body)) from None
    if answer.get("error"):
        return Answer(code_of(answer["error"]), words=words_of(body), free=True)
    text = reason = error = None
    more = {}
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        choice = answer["choices"][0]
        reason, error = choice.get("finish_reason"), choice.get("error")
        text = choice["message"].get("content")
        if isinstance(text, list):  # the parts of a message
            text = "".join(part["text"] for part in text if "text" in part)
        message = choice["message"]
        if message.get("reasoning_content") or message.get("reasoning"):
            more = {"reasoned": True}
        if isinstance(message.get("refusal"), str) and not text:
            reason, more = "refused", {"said": words_of(message["refusal"])}
    if error or reason == "error":  # the provider's fault, and not the model's reply
        said = words_of(json.dumps({"error": error})) if error else "the provider failed"
        return Answer(code_of(error, 502), words=said, free=True)
    text = text if isinstance(text, str) else None
    reply = {"text": text, "finish_reason": str(reason), "model": str(answer.get("model"))}
    return Answer(200, reply | {"usage": token_counts(answer.get("usage"))} | more)


def code_of(error, default: int = 400) -> int:
    """Return the status that an error object names."""
    for name in ("code", "status"):
        code = error.get(name) if isinstance(error, dict) else None
        if str(code).isdecimal() and 400 <= int(code) < 600:
            return int(code)
        if isinstance(code, str) and ("rate_limit" in code or code == "insufficient_quota"):
            return 429
    return default


def words_of(body: str) -> str:
    """Return what a body says, in a line: an error's message and its code, or a page's text."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(body)
        error = content.get("error") or content if isinstance(content, dict) else content
        if isinstance(error, dict):
            said = error.get("message") or error.get("detail") or json.dumps(error)
            code = error.get("code")
            error = f"{said} ({code})" if isinstance(code, str) else said
        body = error if isinstance(error, str) else json.dumps(error)
    if "<html" in body.lower() or "<!doctype" in body.lower():
        body = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", body)
    return " ".join(body.split())


def shorten(words: str) -> str:
    return words if len(words) <= LONGEST_WORDS else f"{words[:LONGEST_WORDS]}..."


def hint_for(words: str) -> str:
    """Return the flag for what a server does not take, "" if none is known."""
    return next((f"; {hint}" for word, hint in HINTS.items() if word in words), "")


def token_counts(usage) -> dict[str, int] | None:
    """What a server says that a request took, if it is believable."""
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    believable = all(type(count) is int and 0 <= count < 10**9 for count in counts)
    return dict(zip(names, counts, strict=True)) if believable else None


def proxy_before(url: str) -> str:
    """Say that a proxy stands before a server on this machine or network; "" if none does."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        is_near = ipaddress.ip_address(host).is_private
    except ValueError:  # a name
        is_near = "." not in host or host.endswith(".local")
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    if not (is_near and proxy):
        return ""
    scheme = urllib.parse.urlsplit(url).scheme.upper()
    proxy_host = urllib.parse.urlsplit(proxy).hostname
    return f" ({scheme}_PROXY puts {proxy_host} before it; NO_PROXY={host} goes past it)"


def never_sent(error: Exception) -> bool:
    """Was there no connection at all, so that nothing can have been billed?"""
    kinds = requests.exceptions
    if isinstance(error, kinds.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" in str(error) or "WRONG_VERSION_NUMBER" in str(error)
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(reason, urllib3.exceptions.NewConnectionError) or isinstance(
        error,
        (
            kinds.ConnectTimeout,
            kinds.ProxyError,
            kinds.InvalidURL,
            kinds.InvalidSchema,
            kinds.InvalidJSONError,
        ),
    )
