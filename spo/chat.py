"""A chat endpoint that can be trusted overnight: it tries again, keeps a journal and a budget.

For any OpenAI-compatible `/v1/chat/completions`. Knows nothing of stories: it is given a key and a
prompt, and returns a reply. What goes wrong is one of four things:

    refused   408, 409, 429, 503, no connection: nothing was done. It is sent again after a pause,
              which Retry-After can set.
    lost      no answer in time, a broken connection, half an answer, any other 5xx: it is sent
              again, too. But the work may have been done and billed ("uncertain"), so what it can
              have cost counts as spent.
    stopped   any other status (401, 403, 400 ...), an exhausted quota: no further request, and one
              line that says why.
    unusable  an answer that does not say what was asked for: journaled like any other. Its asker
              decides.
"""

import base64
import contextlib
import email.utils
import json
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import requests
import urllib3

from spo.config import check_bounds, flag
from spo.journal import Journal

OPENAI = "https://api.openai.com/v1"
OVERHEAD_TOKENS = 64  # what a chat template adds to a prompt, at most
SECONDS_IN_FLIGHT = 5.0  # for requests that are on their way when another ends the run
LARGEST_BODY = 2**24  # bytes of an answer, unpacked


@dataclass
class ChatFlags:
    base_url: str = flag(OPENAI, "the API, up to and with /v1", free=True, heading="judge's API")
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
    judge_temperature: float = flag(0.0, "the API judge's sampling temperature", least=0, most=1e9)
    judge_max_tokens: int = flag(2048, "the longest reply, in tokens", least=1, most=10**7)
    judge_token_field: str = flag(
        "max_tokens",
        "what the API calls that limit",
        choices=["max_tokens", "max_completion_tokens"],
    )
    usd_per_million_in: float = flag(0.0, "price of a million prompt tokens", least=0, most=1e9)
    usd_per_million_out: float = flag(0.0, "price of a million reply tokens", least=0, most=1e9)
    max_usd: float | None = flag(
        None,
        "stop before the request that could pass this, counting what the journal holds",
        least=0,
        most=1e9,
        free=True,
    )


class Stopped(ValueError):
    """Asking again would not help: a wrong key, an exhausted quota, a request that the server does
    not accept.
    """


class BudgetSpent(Stopped):
    """The next request could pass --max_usd."""


def check_flags(flags: ChatFlags) -> None:
    """ValueError, naming the flag, for what cannot work."""
    check_bounds(flags)
    if flags.max_usd is not None and not (flags.usd_per_million_in and flags.usd_per_million_out):
        prices = "--usd_per_million_in and --usd_per_million_out, the prices of this model"
        raise ValueError(f"--max_usd: needs {prices}")
    try:
        url = urllib.parse.urlsplit(flags.base_url)
        is_http = url.scheme in ("http", "https") and bool(url.hostname)
        good = is_http and not (url.port == 0 or url.query or url.fragment)
    except ValueError:  # a port that is none
        good = False
    if not good or "@" in flags.base_url:
        such = f"something like {OPENAI} or http://localhost:8000/v1"
        raise ValueError(f"--base_url: expected {such}, without password or query")


class Chat:
    """One model behind one endpoint. Threads may call `complete` at the same time."""

    def __init__(self, model: str, flags: ChatFlags):
        """ValueError for flags that cannot work, or a journal that cannot be used.

        The key is read from OPENAI_API_KEY here, goes into one header, and is cut out of whatever
        the server says.
        """
        check_flags(flags)
        self.model, self.flags = model, flags
        self.url = flags.base_url.rstrip("/") + "/chat/completions"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not all("!" <= c <= "~" for c in self.key):
            raise ValueError("OPENAI_API_KEY: holds a space or another character that no key has")
        self.journal = Journal(flags.journal)
        self.settled = threading.Condition()  # notified when a request has ended
        self.stop = threading.Event()  # set: what is on its way may end, and nothing is sent again
        self.in_flight, self.lost, self.hold_until, self.failure = 0, 0, 0.0, ""
        self.threads = threading.local()

    def require_key(self) -> None:
        """ValueError where the endpoint is OpenAI's and there is no key; another server may need
        none.
        """
        if not self.key and self.flags.base_url == OPENAI:
            raise ValueError(
                "OPENAI_API_KEY is not set. Export it, or name a server that needs none "
                "(--base_url=http://localhost:8000/v1), or use --judge=offline"
            )

    def bound(self, prompt: str) -> float:
        """US dollars that a request can cost at most: a token is a byte or more."""
        tokens = len(prompt.encode("utf-8", "replace")) + OVERHEAD_TOKENS
        return self.price(tokens, self.flags.judge_max_tokens)

    def price(self, tokens_in: float, tokens_out: float) -> float:
        return (
            tokens_in * self.flags.usd_per_million_in + tokens_out * self.flags.usd_per_million_out
        ) / 1e6

    def complete(self, key: str, prompt: str, **extra) -> dict:
        """The reply to a prompt, journaled under the key: {"text", "finish_reason", "model",
        "usage"} and `extra`.

        Raises Stopped (BudgetSpent among them) for what asking again cannot help, ConnectionError
        when judge_retries failures came one after the other.
        """
        failure = ""
        for attempt in range(self.flags.judge_retries + 1):
            self.pause(attempt)
            number = self.reserve(key, self.bound(prompt))
            try:
                status, headers, body = self.post(prompt)
                if status == 200:
                    reply = self.read_reply(body)
                    usd = self.cost(reply["usage"], self.bound(prompt))
                    reply["max_tokens"] = self.flags.judge_max_tokens
                    line = {"id": number, "key": key, "usd": usd, "reply": reply | extra}
                    self.journal.append(line)
                    failure = ""
                    return line["reply"]
                if status < 500 or status == 503:
                    self.journal.append({"id": number, "refused": status})
                else:
                    self.lost += 1
                self.stop_if_hopeless(status, body)
                failure = f"it answered {status}"
                self.hold(headers.get("Retry-After", ""))
            except (requests.RequestException, TruncatedReply) as error:
                failure = type(error).__name__
                if never_sent(error):
                    self.journal.append({"id": number, "refused": 0})
                    self.stop_if_misconfigured(error)
                else:
                    self.lost += (
                        1  # its line "asked" stays open: the work may have been done, and billed
                    )
            finally:
                self.failure = failure
                with self.settled:
                    self.in_flight -= 1
                    self.settled.notify_all()
        raise ConnectionError(
            f"{self.flags.base_url}: {self.flags.judge_retries + 1} failures one after the other, "
            "the last: "
            f"{failure}; what was answered is in {self.journal.path}, run the same command again"
        )

    def reserve(self, key: str, usd: float) -> int:
        """Journals that a request is on its way.

        BudgetSpent if its bound could pass max_usd, whatever others cost.
        """
        with self.settled:
            while self.flags.max_usd is not None and self.journal.spent + usd > self.flags.max_usd:
                if self.in_flight == 0:
                    raise BudgetSpent(
                        f"--max_usd={self.flags.max_usd:g}: ${self.journal.spent:.4f} may be "
                        f"spent, the next request could cost ${usd:.4f}; what was answered is in "
                        f"{self.journal.path}: raise it and run the command again"
                    )
                self.settled.wait()
            self.in_flight += 1
            return self.journal.ask(key, usd)

    def post(self, prompt: str) -> tuple[int, dict, str]:
        """One HTTP request -> status, headers, body; a body that dribbles does not extend
        judge_timeout.
        """
        if not hasattr(self.threads, "session"):
            self.threads.session = requests.Session()
            self.threads.session.auth = self.authorize
        seconds, started = self.flags.judge_timeout, time.monotonic()
        message = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.flags.judge_temperature,
            self.flags.judge_token_field: self.flags.judge_max_tokens,
        }
        with self.threads.session.post(
            self.url,
            json=message,
            timeout=(min(10.0, seconds), seconds),
            stream=True,
            allow_redirects=False,
        ) as response:
            left = seconds - (time.monotonic() - started)
            deadline = threading.Timer(max(0.0, left), shut, [response])
            deadline.daemon = True
            deadline.start()
            try:
                body = b""
                for chunk in response.iter_content(2**16):
                    body += chunk
                    if len(body) > LARGEST_BODY:
                        raise TruncatedReply
            finally:
                deadline.cancel()
            return response.status_code, response.headers, body.decode("utf-8", "replace")

    def authorize(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def redact(self, text: str) -> str:
        """The text without the key, should a server echo it; a short key (`none`, `EMPTY`) is no
        secret.
        """
        if len(self.key) < 12:
            return text
        encoded = base64.b64encode(self.key.encode()).decode().rstrip("=")
        for secret in (self.key, urllib.parse.quote(self.key, safe=""), encoded, self.key[:8]):
            text = text.replace(secret, "[key]")
        return text

    def read_reply(self, body: str) -> dict:
        """A whole JSON answer -> a reply, without text if that is not where it should be; else
        TruncatedReply.
        """
        try:
            answer = json.loads(body)
            choices = answer["choices"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise TruncatedReply from None
        text = reason = None
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            choice = choices[0]
            reason, text = choice.get("finish_reason"), choice["message"].get("content")
            if isinstance(text, list):  # the parts of a message
                text = "".join(part["text"] for part in text if "text" in part)
        return {
            "text": self.redact(text) if isinstance(text, str) else None,
            "finish_reason": self.redact(str(reason)),
            "model": self.redact(str(answer.get("model"))),
            "usage": token_counts(answer.get("usage")),
        }

    def cost(self, usage: dict[str, int] | None, bound: float) -> float:
        """US dollars by the server's count of tokens; the bound where it tells none."""
        if usage is None:
            return bound
        return self.price(usage["prompt_tokens"], usage["completion_tokens"])

    def stop_if_hopeless(self, status: int, body: str) -> None:
        """Stopped for an answer that asking again does not change."""
        where = f"{self.flags.base_url}: answered {status}"
        if status in (401, 403):
            raise Stopped(
                f"{where}: the key in OPENAI_API_KEY is missing, wrong, "
                f"or not allowed to use {self.model}"
            )
        if status == 402 or (status == 429 and "insufficient_quota" in body):
            raise Stopped(
                f"{where}: the account's quota is used up; "
                "add credit and run the same command again"
            )
        if status in (408, 409, 429) or status >= 500:
            return
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            body = str(json.loads(body)["error"]["message"])
        said = " ".join(self.redact(body).split())[:200]
        hint = (
            "is --base_url right, and --judge a model that it serves?"
            if status in (301, 302, 307, 308, 404, 405)
            else "it does not accept this request"
        )
        raise Stopped(f"{where}: {hint}; it says: {said or 'nothing'}")

    def stop_if_misconfigured(self, error: Exception) -> None:
        """Stopped for a connection that cannot be made with these flags."""
        said = str(error)
        if isinstance(error, requests.exceptions.SSLError):
            raise Stopped(
                f"{self.flags.base_url}: no secure connection: {self.redact(said)[-160:]}"
            )
        if not isinstance(error, requests.ConnectionError):
            raise Stopped(f"{self.flags.base_url}: cannot be asked: {self.redact(said)[:160]}")

    def pause(self, attempt: int) -> None:
        """Exponential back-off with jitter, and whatever the server asked everyone to wait.

        Stopped if the run is.
        """
        seconds = 0.5 * 2 ** min(attempt, 7) * random.uniform(0.5, 1.0) if attempt else 0.0
        until = time.monotonic() + seconds
        while (
            left := max(until, self.hold_until) - time.monotonic()
        ) > 0 and not self.stop.is_set():
            time.sleep(min(left, 1.0))
        if self.stop.is_set():
            raise Stopped("the run has been stopped")

    def hold(self, retry_after: str) -> None:
        """Retry-After, in seconds or as a date: no thread sends anything before."""
        seconds = 0.0
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if re.fullmatch(r"[\d.]+", retry_after.strip()):
                seconds = float(retry_after)
            else:
                date = email.utils.parsedate_to_datetime(retry_after)
                seconds = date.timestamp() - time.time()
        self.hold_until = max(self.hold_until, time.monotonic() + min(seconds, 3600.0))

    @property
    def status(self) -> str:
        """For a progress bar: the cost so far, and what it is waiting for, if it is."""
        waiting = self.hold_until - time.monotonic()
        trouble = f", trying again ({self.failure})" if self.failure else ""
        if waiting > 1:
            trouble = f", waiting {waiting:.0f} s (rate limit)"
        return f"${self.journal.spent:.2f}{trouble}"


class TruncatedReply(Exception):
    """An answer with status 200 that is not the whole JSON of a completion."""


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


def token_counts(usage) -> dict[str, int] | None:
    """What a server says that a request took, if it is believable."""
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    believable = all(type(count) is int and 0 <= count < 10**9 for count in counts)
    return dict(zip(names, counts, strict=True)) if believable else None


def shut(response: requests.Response) -> None:
    """End a response that another thread is reading; nothing, if it has ended by itself."""
    with contextlib.suppress(Exception):
        response.raw.shutdown()


def as_done(
    function: Callable,
    items: Iterable,
    workers: int,
    stop: threading.Event,
    on_wait: Callable = lambda: None,
    patience: float = SECONDS_IN_FLIGHT,
) -> Iterator:
    """(index, function(item)) of every item, as they are done, by threads; the first exception ends
    it all.

    stop      set when it ends: no further item is begun, and `function` may look at it, too
    on_wait   called about once a second while nothing is done
    patience  seconds that an exception in one thread waits for what the others have begun
    The threads are daemons: Ctrl-C does not wait for a slow server.
    """
    tasks, results = queue.SimpleQueue(), queue.SimpleQueue()
    for task in enumerate(items):
        tasks.put(task)
    count = tasks.qsize()
    stop.clear()

    def work() -> None:
        while not stop.is_set():
            try:
                index, item = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((index, function(item), None))
            except BaseException as error:  # it is raised where the results are read
                results.put((index, None, error))
                stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, count))]
    for thread in threads:
        thread.start()
    try:
        while count:
            try:
                index, result, error = results.get(timeout=1.0)
            except queue.Empty:
                on_wait()
                continue
            if error is not None:
                deadline = time.monotonic() + patience
                for thread in threads:
                    thread.join(max(0.0, deadline - time.monotonic()))
                raise error
            count -= 1
            yield index, result
    finally:
        stop.set()
