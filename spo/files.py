"""Files on disk: written whole or not at all; JSON read with the place of what is wrong."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import IO


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yield a temporary name to write to. The file gets its own name when it is on the disk.

    A reader finds the old file or the new one, and never half of one. What is no regular file, such
    as /dev/stdout, is written to as it is.
    """
    is_device = path.startswith("/dev/")  # /dev/stdout may be a link to a regular file
    if is_device or (os.path.exists(path) and not os.path.isfile(path)):
        yield path
        return
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Open a binary file for writing, as atomic_path does."""
    with atomic_path(path) as temporary, open(temporary, "wb") as f:
        yield f
        f.flush()


def check_output(flag: str, out: str, *inputs: str) -> None:
    """ValueError, naming the flag, if `out` cannot be written, or is a file that is read.

    Called before the work, so that nothing is computed and then lost. An empty name is no input.
    """
    given = f"{flag}={out}" if flag else out
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"{given}: there is no folder {folder}; make it first")
    if os.path.isdir(out):
        raise ValueError(f"{given}: is a folder; name a file")
    if not os.access(out if os.path.exists(out) else folder, os.W_OK):
        raise ValueError(f"{given}: may not be written; choose another place")
    for path in inputs:
        if path and os.path.realpath(path) == os.path.realpath(out):
            raise ValueError(f"{given}: is read, too, and would be replaced; choose another name")


def write_text(path: str, text: str) -> None:
    """Write a text in UTF-8, atomically."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8"))


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """Write one record a line, atomically."""
    write_text(path, "".join(jsonl_line(record) for record in records))


def jsonl_line(record: dict) -> str:
    """{"text": "é"} -> '{"text": "é"}\\n'"""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_jsonl(path: str) -> list[tuple[int, dict]]:
    """Return (line number, object) of every line; blank lines are passed over.

    ValueError, naming file and line, for what is not JSON in UTF-8.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    records = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    records.append((number, json.loads(line.decode("utf-8"))))
                except (ValueError, RecursionError):  # JSON's and UTF-8's errors are ValueErrors
                    reason = "not a line of JSON in UTF-8"
                    raise ValueError(f"{path} line {number}: {reason}") from None
    return records


def read_json(path: str):
    """Return the content of a JSON file. ValueError, naming the file, if it is none."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON in UTF-8") from None


def read_json_object(path: str) -> dict:
    """Return the object of a JSON file. ValueError, naming the file, if it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def is_unicode(text: str) -> bool:
    """Tell whether UTF-8 can hold a text: JSON can spell half a surrogate pair, which it cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_sha256(path: str) -> str:
    """Return the SHA-256 of a file; of a folder, that of the hashes of its files."""
    if not os.path.isdir(path):
        return file_sha256(path)
    files = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    hashes = "".join(file_sha256(file) for file in files if os.path.isfile(file))
    return hashlib.sha256(hashes.encode()).hexdigest()


def flush(path: str) -> None:
    """Wait until a file is on the disk; for a folder, until the names in it are."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
