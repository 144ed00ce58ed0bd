"""A chat endpoint that can be trusted overnight: it tries again, keeps a journal and a budget.

For any OpenAI-compatible `/v1/chat/completions`. Knows nothing of stories: it is given a key and a
prompt, and returns a reply. What goes wrong is one of four things:

    refused   408, 409, 429, 503, no connection: nothing was done. It is sent again after a pause,
              which Retry-After can set.
    lost      no answer in time, a broken connection, half an answer, any other 5xx: it is sent
              again, too. But the work may have been done and billed ("uncertain"), so what it can
              have cost counts as spent.
    stopped   401, 402, 404 and the like, an exhausted quota: no further request, and one line that
              says why, in the server's words.
    unusable  an answer that does not say what was asked for: journaled like any other. Its asker
              decides. So is a refusal that is about this one request: 400, 403, 413, 422, or a
              failure that comes again and again, while another request is answered.
"""

import base64
import contextlib
import email.utils
import math
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator

import requests

from spo.answer import (
    Answer,
    HalfAnswer,
    hint_for,
    never_sent,
    proxy_before,
    read_answer,
    shorten,
)
from spo.chat_flags import OPENAI, ChatFlags, base_url_of, check_flags, extra_fields
from spo.journal import Journal

ABOUT_THE_REQUEST = (400, 403, 413, 422)  # or about all of them: that is tried out
TRIES_IN_VAIN = 5  # until it is tried out whether a failure is this request's
TRIES_OF_THE_HARMLESS = 3
LONGEST_HOLD = 3600.0  # seconds
OVERHEAD_TOKENS = 64  # what a chat template adds to a prompt, at most
SECONDS_IN_FLIGHT = 5.0  # for requests that are on their way when another ends the run
LARGEST_BODY = 2**24  # bytes of an answer, unpacked


class Stopped(ValueError):
    """Asking again would not help: a wrong key, an exhausted quota, a request that the server does
    not accept.
    """


class BudgetSpent(Stopped):
    """The next request could pass --max_usd."""


class Chat:
    """One model behind one endpoint. Threads may call `complete` at the same time."""

    def __init__(self, model: str, flags: ChatFlags, harmless: str = ""):
        """ValueError for flags that cannot work, or a journal that cannot be used.

        harmless  a prompt that nobody refuses for its content or its length: is it answered, a
                  refusal was about the request that got it

        The key is read from OPENAI_API_KEY here, goes into one header, and is cut out of whatever
        the server says.
        """
        check_flags(flags)
        self.model, self.flags = model, flags
        self.base_url, self.extra = base_url_of(flags), extra_fields(flags)
        self.url = self.base_url.rstrip("/") + "/chat/completions"
        self.harmless = harmless
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not all("!" <= c <= "~" for c in self.key):
            raise ValueError("OPENAI_API_KEY: holds a space or another character that no key has")
        self.journal = Journal(flags.journal)
        self.settled = threading.Condition()  # notified when a request has ended
        self.stop = threading.Event()  # set: what is on its way may end, and nothing is sent again
        self.in_flight, self.lost, self.hold_until, self.failure = 0, 0, 0.0, ""
        self.answered = self.untold = 0  # replies in this process; those without a usage
        self.trying = threading.Lock()  # whether a refusal was about one request
        self.harmless_sent = -math.inf  # when the last harmless one that was answered was sent
        self.threads = threading.local()

    def require_key(self) -> None:
        """ValueError where the endpoint is OpenAI's and there is no key; another server may need
        none.
        """
        if not self.key and self.base_url == OPENAI:
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
        "usage", "max_tokens", "sent"} and `extra`. Of a refusal that is about this request alone
        the finish_reason is "refused", and "said" has the server's words.

        Raises Stopped (BudgetSpent among them) for what asking again cannot help, ConnectionError
        when judge_retries failures came one after the other.
        """
        tries, answered = self.flags.judge_retries + 1, self.answered
        for attempt in range(1, tries + 1):
            answer = self.attempt(key, prompt, attempt - 1, extra)
            if answer.reply is not None:
                return answer.reply
            self.stop_if_hopeless(answer)
            refused = answer.status in ABOUT_THE_REQUEST
            # A rate limit or an overload is the server's, unless others get through.
            in_vain = attempt in (TRIES_IN_VAIN, tries) if answer.is_lost else attempt == tries
            in_vain = in_vain and (answer.is_lost or self.answered > answered)
            if (refused or in_vain) and self.others_are_answered():
                return self.note_refusal(key, prompt, answer, extra)
            if refused:
                raise Stopped(self.in_words(answer))
        raise ConnectionError(
            f"{self.where}: {tries} failures one after the other, the last: {answer}; "
            f"what was answered is in {self.journal.path}, run the same command again"
        )

    def attempt(self, key: str, prompt: str, number: int, extra: dict) -> Answer:
        """Send a request once; return what came of it. A reply is in the journal then."""
        self.pause(number)
        bound = self.bound(prompt)
        number, answer = self.reserve(key, bound), Answer(0)
        try:
            status, headers, body = self.post(prompt)
            answer = read_answer(status, body)
            answer.words = shorten(self.redact(answer.words))
            if answer.reply is not None:
                usd = self.cost(answer.reply["usage"], bound)
                self.untold += answer.reply["usage"] is None
                limits = {"max_tokens": self.flags.judge_max_tokens, "sent": len(prompt)}
                answer.reply = self.redacted(answer.reply) | limits | extra
                self.journal.append({"id": number, "key": key, "usd": usd, "reply": answer.reply})
                self.answered += 1
            else:
                self.close_or_lose(number, answer)
                self.hold(headers.get("Retry-After", ""), answer)
        except HalfAnswer as error:
            said = shorten(self.redact(str(error))) or "nothing"
            answer = Answer(0, words=f"half an answer: {said}")
            self.close_or_lose(number, answer)
        except requests.RequestException as error:
            answer = Answer(0, words=type(error).__name__, free=never_sent(error))
            if isinstance(error, requests.ReadTimeout):
                waited = f"no answer in {self.flags.judge_timeout:g} s"
                answer.words = f"{waited}: fewer --workers or a longer --judge_timeout may help"
            self.close_or_lose(number, answer)
            if answer.free:
                self.stop_if_misconfigured(error)
        finally:
            self.failure = "" if answer.reply else str(answer)
            with self.settled:
                self.in_flight -= 1
                self.settled.notify_all()
        return answer

    def close_or_lose(self, number: int, answer: Answer) -> None:
        """Journal that a request cost nothing; or leave it open: it may have been billed."""
        if answer.free:
            self.journal.append({"id": number, "refused": answer.status})
        else:
            self.lost += 1

    def others_are_answered(self) -> bool:
        """Tell whether a refusal is about one request: is a harmless one answered after it?

        One is sent for all who ask at the same time. What was answered before says nothing: the
        server may have turned to refusing everything.
        """
        if not self.harmless:
            return False
        refused = time.monotonic()
        with self.trying:
            for number in range(TRIES_OF_THE_HARMLESS):
                if self.harmless_sent > refused or self.stop.is_set():
                    break
                sent = time.monotonic()
                answer = self.attempt("harmless", self.harmless, number, {"fence": ""})
                if answer.reply is not None:
                    self.harmless_sent = sent
                elif answer.status in ABOUT_THE_REQUEST:
                    break
            return self.harmless_sent > refused

    def note_refusal(self, key: str, prompt: str, answer: Answer, extra: dict) -> dict:
        """Journal, as an unusable reply, that a request is refused."""
        reply = {"text": None, "finish_reason": "refused", "said": str(answer)}
        reply |= {"model": self.model, "usage": None, "sent": len(prompt)} | extra
        number = self.journal.ask(key, 0.0)
        self.journal.append({"id": number, "key": key, "usd": 0.0, "reply": reply})
        return reply

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
            self.flags.judge_token_field: self.flags.judge_max_tokens,
        }
        if self.flags.judge_temperature is not None:
            message["temperature"] = self.flags.judge_temperature
        with self.threads.session.post(
            self.url,
            json=message | self.extra,
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
                        raise HalfAnswer(f"more than {LARGEST_BODY:,} bytes")
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

    def redacted(self, reply: dict) -> dict:
        """A reply without the key, however JSON had spelled it."""
        return {k: self.redact(v) if isinstance(v, str) else v for k, v in reply.items()}

    def cost(self, usage: dict[str, int] | None, bound: float) -> float:
        """US dollars by the server's count of tokens; the bound where it tells none."""
        if usage is None:
            return bound
        return self.price(usage["prompt_tokens"], usage["completion_tokens"])

    @property
    def where(self) -> str:
        return f"{self.base_url}{proxy_before(self.url)}"

    def in_words(self, answer: Answer) -> str:
        """What a server has answered that ends the run: the status, what to look at, its words."""
        hint = "it does not accept this request"
        if answer.status in (401, 403):
            hint = "the key in OPENAI_API_KEY is missing, wrong, or not allowed to use "
            hint += f"{self.model}, or this request is not"
        elif answer.is_quota:
            hint = "the account's quota is used up; add credit and run the same command again"
        elif answer.status in (301, 302, 307, 308, 404, 405):
            hint = "is --base_url right, and --judge a model that it serves?"
        if not self.base_url.rstrip("/").endswith("/v1"):
            hint += " (most are at .../v1)"
        said = f"it says: {answer.words or 'nothing'}{hint_for(answer.words)}"
        return f"{self.where}: answered {answer.status}: {hint}; {said}"

    def stop_if_hopeless(self, answer: Answer) -> None:
        """Stopped for an answer that no request gets another than."""
        again = answer.status in (0, 408, 409, 429, *ABOUT_THE_REQUEST) or answer.status >= 500
        if answer.is_quota or not again:
            raise Stopped(self.in_words(answer))

    def stop_if_misconfigured(self, error: Exception) -> None:
        """Stopped for a connection that cannot be made with these flags."""
        said = str(error)
        if isinstance(error, requests.exceptions.SSLError):
            raise Stopped(f"{self.where}: no secure connection: {self.redact(said)[-160:]}")
        if not isinstance(error, requests.ConnectionError):
            raise Stopped(f"{self.where}: cannot be asked: {self.redact(said)[:160]}")

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

    def hold(self, retry_after: str, answer: Answer) -> None:
        """Retry-After, in seconds or as a date: no thread sends anything before.

        Stopped if that is more than an hour.
        """
        seconds = 0.0
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if re.fullmatch(r"[\d.]+", retry_after.strip()):
                seconds = float(retry_after)
            else:
                date = email.utils.parsedate_to_datetime(retry_after)
                seconds = date.timestamp() - time.time()
        if seconds > LONGEST_HOLD:
            wait = f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
            then = f"run the same command again then: what was answered is in {self.journal.path}"
            raise Stopped(f"{self.where}: {answer}; it asks to wait {wait}; {then}")
        self.hold_until = max(self.hold_until, time.monotonic() + seconds)

    @property
    def status(self) -> str:
        """For a progress bar: the cost so far, and what it is waiting for, if it is."""
        waiting = self.hold_until - time.monotonic()
        trouble = f", trying again ({self.failure})" if self.failure else ""
        if waiting > 1:
            trouble = f", waiting {waiting:.0f} s (rate limit)"
        return f"${self.journal.spent:.2f}{trouble}"


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
