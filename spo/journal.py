"""What an API was asked and what came back, kept so that no reply is asked for, or paid, twice."""

import json
import math
import os
import threading

from spo.files import append_to, lock, named_errors


class Journal:
    """An append-only JSONL file of what was asked and what came back; flushed to the disk before it
    counts.

        {"id": 7, "asked": KEY, "usd": the most that it can cost}
        {"id": 7, "key": KEY, "reply": {...}, "usd": what it cost}     or     {"id": 7, "refused":
        429}

    An "asked" without a second line was lost, in a kill perhaps: it may be billed, so its bound
    counts as spent. A line that is damaged, or whose values are of another type, is skipped and
    counted; the first one tells whether the file is a journal.
    """

    def __init__(self, path: str):
        """Opens or creates the file.

        ValueError if it is another run's at the moment, or no journal.
        """
        self.path, self.lock = path, threading.Lock()
        self.replies: dict[str, list[dict]] = {}  # key -> its replies, in order
        self.open_asks: dict[int, float] = {}  # id -> bound, of what has no second line
        self.paid, self.next_id, self.skipped = 0.0, 0, 0
        if os.path.dirname(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        self.file = lock(path, f"--journal={path}")
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                self.note(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                if number == 1:  # another file altogether
                    self.refuse(number)
                self.skipped += 1  # a damaged line, of many that were paid for
        if whole < len(
            content
        ):  # a kill while the last line was written; or another file altogether
            start = b'{"id": '
            if not (content[whole:].startswith(start) or start.startswith(content[whole:])):
                self.refuse(content.count(b"\n") + 1)
            self.file.truncate(whole)

    def refuse(self, number: int) -> None:
        self.file.close()
        raise ValueError(
            f"{self.path} line {number}: not a line of a journal; give another --journal"
        )

    def note(self, line: dict) -> None:
        number, usd = int(line["id"]), float(line.get("usd", 0))
        if not 0 <= usd < math.inf:
            raise ValueError("usd is no price")
        if "reply" in line:
            check_reply(line["reply"])
        self.next_id = max(self.next_id, number + 1)
        if "asked" in line:
            self.open_asks[number] = usd
            return
        self.open_asks.pop(number, None)
        if "reply" in line:
            self.paid += usd
            self.replies.setdefault(str(line["key"]), []).append(line["reply"])

    def append(self, line: dict) -> None:
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with self.lock:
            with named_errors(self.path, len(data)):
                append_to(self.file, data)
            self.note(line)

    def ask(self, key: str, usd: float) -> int:
        with self.lock:
            number, self.next_id = self.next_id, self.next_id + 1
        self.append({"id": number, "asked": key, "usd": usd})
        return number

    @property
    def spent(self) -> float:
        """US dollars: what the replies cost, and the bounds of what is on its way or was lost."""
        with self.lock:
            return self.paid + sum(self.open_asks.values())


def check_reply(reply: dict) -> None:
    """KeyError or TypeError for a reply that lacks something, or has it in another type."""
    kinds = {"text": str | None, "finish_reason": str | None, "fence": str}
    more = {"max_tokens": int, "sent": int, "usage": dict | None, "said": str}
    for name, kind in (kinds | {name: more[name] for name in more if name in reply}).items():
        if not isinstance(reply[name], kind):
            raise TypeError(name)
