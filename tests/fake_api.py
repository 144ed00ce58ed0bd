"""An OpenAI-compatible chat server on localhost: honest, and faulty on demand.

    python tests/fake_api.py --port=8000 --faults=0.1

Then give --judge=fake --base_url=http://localhost:8000/v1.
"""

import argparse
import email.utils
import itertools
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from judge import digest, ordinal
from spo import offline_judge

REFUSED = ["429", "429 seconds", "429 date", "503", "408", "409"]
LOST = [
    "500",
    "504",
    "stall",
    "dribble",
    "reset before",
    "reset after",
    "cut body",
    "cut json",
    "web page",
]
UNUSABLE = [
    "empty",
    "null",
    "no choices",
    "kelvin",
    "refusal",
    "length",
    "filter",
    "twice",
    "too few",
    "no conclusion",
    "other fence",
    "choice of two",
]
FINE = ["prose", "quotes", "markdown", "parts"]
STOPS = ["400", "401", "402", "403", "404", "302", "quota"]


def stories_of(prompt: str) -> tuple[list[str], str]:
    """What a reader of the prompt takes for its stories, and the fence."""
    fence = re.findall(r"<conclusion ([0-9a-f]{8})>", prompt)[-1]
    return re.findall(
        rf"<story [A-Z] {fence}>\n(.*?)\n</story [A-Z] {fence}>", prompt, re.DOTALL
    ), fence


def conclusion(ranking: list[int], fence: str) -> str:
    lines = [f"{ordinal(k)}: {chr(65 + i)}" for k, i in enumerate(ranking, start=1)]
    return "\n".join([f"<conclusion {fence}>", *lines, f"</conclusion {fence}>"])


class LocalServer(ThreadingHTTPServer):
    """A server on localhost that runs while it is entered."""

    daemon_threads, request_queue_size = True, 128

    def __enter__(self):
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class FakeApi(LocalServer):
    """`faults` names what happens to each request in turn, then all is well. Counts what it was
    asked and what it did.

    A question never gets two unusable replies, and never four failures one after the other: it can
    be answered.
    """

    def __init__(
        self,
        faults=(),
        port: int = 0,
        score=offline_judge.score,
        stall: float = 30.0,
        patience: bool = True,
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.score, self.stall, self.patience = iter(faults), score, stall, patience
        self.lock = threading.Lock()
        self.asked, self.unusable, self.failures, self.done = (
            Counter(),
            Counter(),
            Counter(),
            Counter(),
        )
        self.refuses = lambda stories: ""  # "400" and so on: of these stories, always
        self.headers: list[str] = []
        self.bodies: list[dict] = []
        self.usage = None  # instead of what a request took
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fault_for(self, question: str) -> str:
        with self.lock:
            self.asked[question] += 1
            fault = next(self.faults, "")
            if fault in UNUSABLE:
                if self.patience and self.unusable[question]:
                    fault = ""
                self.unusable[question] += fault in UNUSABLE
            if fault in REFUSED + LOST:
                self.failures[question] += 1
                if self.patience and self.failures[question] % 4 == 0:
                    fault = ""
            self.done[fault] += 1
            return fault

    def reply(self, fault: str, stories: list[str], fence: str) -> tuple[str | list | None, str]:
        """(content, finish_reason)"""
        ranking = sorted(range(len(stories)), key=lambda i: -self.score(stories[i]))
        right = conclusion(ranking, fence)
        thoughts = "Story A opens well. Story B is plain.\n\n"
        return {
            "": (thoughts + right, "stop"),
            "prose": (
                f"{thoughts}1st: B, I thought at first.\n\n{right}\n\nI hope that this helps.",
                "stop",
            ),
            "quotes": ("\n\n".join(f"It says: {s}" for s in stories) + "\n\n" + right, "stop"),
            "markdown": (thoughts + re.sub(r"(\w+): (\w)\n", r"**\1: \2**\n", right), "stop"),
            "kelvin": (thoughts + right.replace("1st: ", "1st: \u212a or "), "stop"),
            "parts": (
                [{"type": "text", "text": thoughts}, {"type": "text", "text": right}],
                "stop",
            ),
            "empty": ("", "stop"),
            "no choices": ("", "stop"),
            "null": (None, "stop"),
            "refusal": ("I cannot rank these stories.", "stop"),
            "length": (thoughts + right, "length"),
            "filter": (None, "content_filter"),
            "twice": (thoughts + conclusion([*ranking[:-1], ranking[0]], fence), "stop"),
            "too few": (thoughts + conclusion(ranking[:-1], fence), "stop"),
            "no conclusion": (thoughts + "The best is A, the worst is B.", "stop"),
            "other fence": (thoughts + conclusion(ranking[::-1], "0" * 8), "stop"),
            "provider": ("", "error"),
            "thinking": (None, "length"),
            "choice of two": (thoughts + right.replace("1st: ", "1st: A or "), "stop"),
        }[fault]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeApi

    def log_message(self, *_):
        pass

    def send(
        self, status: int, body: str, headers: dict | None = None, length: int | None = None
    ) -> None:
        content = body.encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )  # RST, not FIN
        self.close_connection = True
        self.connection.close()

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stories, fence = stories_of(request["messages"][0]["content"])
        server.headers.append(str(self.headers))
        server.bodies.append(request)
        authorization = self.headers.get("Authorization", "")
        fault = server.fault_for(digest(*stories))
        if refusal := server.refuses(stories):
            error = {"error": {"message": "this input was flagged", "code": "content_filter"}}
            return self.send(int(refusal), json.dumps(error))
        if fault.startswith("error "):  # under status 200, of a code: "error 429"
            error = {"message": "the upstream provider says no", "code": int(fault.split()[1])}
            return self.send(200, json.dumps({"error": error}))
        if fault == "day":
            error = {"error": {"message": "too many tokens per day"}}
            return self.send(429, json.dumps(error), {"Retry-After": "86280"})
        if fault == "reset before":
            return self.reset()
        if fault == "stall":
            time.sleep(server.stall)
            return self.reset()
        if fault.startswith("429"):
            after = {
                "429 seconds": "1",
                "429 date": email.utils.formatdate(time.time() + 1, usegmt=True),
            }.get(fault)
            return self.send(
                429,
                json.dumps({"error": {"message": f"slow down, {authorization}"}}),
                {"Retry-After": after} if after else {},
            )
        if fault == "quota":
            return self.send(429, json.dumps({"error": {"code": "insufficient_quota"}}))
        if fault == "302":
            return self.send(302, "", {"Location": "http://127.0.0.1:1/elsewhere"})
        if fault.isdigit():
            return self.send(
                int(fault), json.dumps({"error": {"message": f"bad key: {authorization}"}})
            )
        if fault == "web page":
            return self.send(200, "<html>Please log in</html>")
        broken = fault in LOST
        content, reason = server.reply("" if broken else fault, stories, fence)
        tokens = max(100 * len(stories), len(request["messages"][0]["content"]) // 6)
        usage = server.usage or {"prompt_tokens": tokens, "completion_tokens": 200}
        answer = json.dumps(
            {
                "model": f"{request['model']}-2026-01-01",
                "usage": usage,
                "object": "chat.completion",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": reason,
                        "message": {"role": "assistant", "content": content},
                    }
                ],
            }
        )
        if fault == "reset after":
            return self.reset()
        if fault == "no choices":
            return self.send(200, json.dumps({"usage": usage, "choices": []}))
        if fault == "cut json":
            return self.send(200, answer[: len(answer) // 2])
        if fault == "cut body":
            self.send(200, answer[: len(answer) // 2], length=len(answer))
            return self.reset()
        if fault == "dribble":
            self.send(200, answer[:1], length=len(answer))
            for character in answer[1:]:
                time.sleep(0.2)  # minutes for a whole answer
                self.wfile.write(character.encode())
            return None
        return self.send(200, answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--faults", type=float, default=0.0, help="the share of requests that something happens to"
    )
    given, rng = parser.parse_args(), random.Random(0)
    all_faults = REFUSED + LOST + UNUSABLE + FINE
    faults = (
        rng.choice(all_faults) if rng.random() < given.faults else "" for _ in itertools.count()
    )
    with FakeApi(faults, port=given.port, stall=5.0) as api:
        print(f"--judge=fake --base_url={api.url}", flush=True)
        threading.Event().wait()
