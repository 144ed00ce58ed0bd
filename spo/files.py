"""Files on disk: written whole or not at all; JSON read with the place of what is wrong; locks."""

import codecs
import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has none: two runs in one folder are not noticed there
    fcntl = None

SURROGATE = re.compile("[\ud800-\udfff]")
# What a folder's model, tokens and tokenizer are in; a README beside them is no input.
MODEL_FILES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".model", ".jinja")

# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str, size: int = 0, checked: bool = False) -> Iterator[str]:
    """Yield a temporary name to write to. The file gets its own name when it is on the disk.

    A reader finds the old file or the new one, and never half of one. What is no regular file, such
    as /dev/stdout, is written to as it is.

    size     bytes that it will take, for the message of a full disk; 0: not known
    checked  write path.sha256 beside it, which check_sha256 reads
    OSError, naming `path`, if it cannot be written.
    """
    is_device = path.startswith("/dev/")  # /dev/stdout may be a link to a regular file
    if is_device or (os.path.exists(path) and not os.path.isfile(path)):
        with named_errors(path, size):
            yield path
        return
    remove(*leftovers_of(path))
    temporary, digest = f"{path}.tmp{os.getpid()}", f"{path}.sha256"
    try:
        with named_errors(path, size, temporary):
            yield temporary
            flush(temporary)
            if checked:
                remove(digest)  # a kill between the two leaves a file without a hash
            os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    if checked:
        write_text(digest, f"{file_sha256(path)}  {os.path.basename(path)}\n")


@contextlib.contextmanager
def atomic_write(path: str, size: int = 0, checked: bool = False) -> Iterator[IO[bytes]]:
    """Open a binary file for writing, as atomic_path does."""
    with atomic_path(path, size, checked) as temporary, open(temporary, "wb") as f:
        yield f
        f.flush()


def link(source: str, path: str) -> None:
    """Give a file a second name, in the place of what has it; or copy it, where that cannot be."""
    temporary = f"{path}.tmp{os.getpid()}"
    remove(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        with named_errors(path, os.path.getsize(source), temporary):
            shutil.copyfile(source, temporary)
            flush(temporary)
    os.replace(temporary, path)
    remove(temporary)  # it is still there if both were one file already


def remove(*paths: str) -> None:
    """Remove files, those that are there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def leftovers_of(path: str) -> list[str]:
    """Return the temporary files of a path whose processes were killed."""
    found = glob.glob(f"{glob.escape(path)}.tmp*")
    return [name for name in found if not is_alive(name.removeprefix(f"{path}.tmp"))]


def is_alive(pid: str) -> bool:
    """Tell whether a process may be running here; a name that ends in no number is nobody's."""
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def named_errors(path: str, size: int = 0, temporary: str = "") -> Iterator[None]:
    """Make an OSError that says `path` of what goes wrong while it is written.

    A full disk says what is needed and what is free, whichever library met it.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        number = system_error(error)
        if number is None:
            raise
        raise OSError(number, _in_words(number, path, size, temporary), path) from None


def system_error(error: BaseException | None) -> int | None:
    """Return the operating system's number of what went wrong, at the bottom of an exception.

    torch and safetensors wrap it, each in its own way.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if spelled := re.search(r"os error (\d+)", str(error)):  # safetensors
            return int(spelled[1])
        error = error.__cause__ or error.__context__
    return None


def _in_words(number: int, path: str, size: int, temporary: str) -> str:
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return os.strerror(number)
    folder = os.path.dirname(path) or "."
    inside = glob.glob(os.path.join(glob.escape(temporary), "*"))  # of a state, which is a folder
    files = [name for name in [temporary, *inside] if os.path.isfile(name)]
    written = sum(map(os.path.getsize, files))
    needed = f"{size:,} bytes" if size else f"more than {written:,} bytes"
    free = shutil.disk_usage(folder).free + written
    return f"No space left on device: {needed} needed, {free:,} free"


def append(path: str, data: bytes, durable: bool = False) -> None:
    """Append to a file: all of it, or nothing. durable: and wait until it is on the disk."""
    with named_errors(path, len(data)), open(path, "ab", buffering=0) as f:
        append_to(f, data, durable)


def append_to(f: IO[bytes], data: bytes, durable: bool = True) -> None:
    """Do what `append` says, with an unbuffered file that is open."""
    before = f.seek(0, os.SEEK_END)
    try:
        left = memoryview(data)
        while left:
            left = left[f.write(left) :]
        if durable:
            os.fsync(f.fileno())
    except BaseException:
        f.truncate(before)
        raise


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
    data = text.encode("utf-8")
    with atomic_write(path, len(data)) as f:
        f.write(data)


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """Write one record a line, atomically."""
    write_text(path, "".join(jsonl_line(record) for record in records))


def jsonl_line(record: dict) -> str:
    """{"text": "é"} -> '{"text": "é"}\\n'"""
    return json.dumps(record, ensure_ascii=False) + "\n"


# --- reading -------------------------------------------------------------------------------------


class BadRecords:
    """Records of a file that cannot be used: the first ends the reading, or all are left out.

    skip  leave them out, and name them in `report`; None: the command has no flag for that
    """

    NAMED = 10

    def __init__(self, skip: bool | None = None):
        self.skip = skip
        self.reasons: list[str] = []

    def add(self, reason: str, first: bool = False) -> None:
        """ValueError with the reason, which begins with file and line, unless they are skipped.

        first  the file held nothing good before it: then all of it may be of another kind
        """
        if not self.skip:
            mend = "" if self.skip is None or first else "; --skip_bad leaves such records out"
            raise ValueError(f"{reason}{mend}")
        self.reasons.append(reason)

    @property
    def report(self) -> str:
        """Return the first ten and how many there are, a line each; "" if there are none."""
        if not self.reasons:
            return ""
        more = len(self.reasons) - self.NAMED
        count = f"{len(self.reasons)} left out by --skip_bad"
        count += f", {more} of them not shown" if more > 0 else ""
        return "\n".join([*self.reasons[: self.NAMED], count])

    def refuse_nothing_left(self, path: str, what: str) -> None:
        """ValueError: there is nothing good in a file."""
        why = f"; the first: {self.reasons[0]}" if self.reasons else ""
        raise ValueError(f"{path}: holds no {what}{why}")


def numbered(path: str, number: int) -> str:
    """Return "line 3", or "record 3" of a .json: where a record of read_jsonl stands."""
    return f"{'record' if path.endswith('.json') else 'line'} {number}"


def place(path: str, number: int) -> str:
    """Return "data.jsonl line 3", or "data.json record 3"."""
    return f"{path} {numbered(path, number)}"


def read_jsonl(path: str, bad: BadRecords | None = None) -> list[tuple[int, dict]]:
    """Return (number, object) of every line; blank lines are passed over. Or of a list's items.

    bad  gets what is not JSON in UTF-8, named by file and line; None: it is a ValueError
    """
    bad = bad or BadRecords()
    if not os.path.isfile(path):
        raise ValueError(f"{path}: {'is a folder' if os.path.isdir(path) else 'no such file'}")
    records = []
    with open(path, "rb") as f:
        if f.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            with contextlib.suppress(ValueError):  # else it is lines, the first of them a list
                return list(enumerate(read_json(path), start=1))
        f.seek(0)
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    # Windows' editors put a byte-order mark in front of the first line.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    records.append((number, json.loads(text)))
                except (ValueError, RecursionError):  # JSON's and UTF-8's errors are ValueErrors
                    reason = "not a line of JSON in UTF-8"
                    bad.add(f"{place(path, number)}: {reason}", first=not records)
    return records


def read_json(path: str):
    """Return the content of a JSON file. ValueError, naming the file, if it is none."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # Windows' editors put a mark in front
            return json.load(f)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not JSON in UTF-8") from None


def read_json_object(path: str) -> dict:
    """Return the object of a JSON file. ValueError, naming the file, if it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def text_fault(text) -> str:
    """Say why something is no text that can be read; "" if it is one.

    JSON can spell half a surrogate pair, which UTF-8 cannot hold.
    """
    if not isinstance(text, str):
        return "is missing" if text is None else f"is not a text: {json.dumps(text)[:40]}"
    half = SURROGATE.search(text)
    return f"holds \\u{ord(half[0]):x}, half of a surrogate pair and no character" if half else ""


# --- hashes --------------------------------------------------------------------------------------


def short_sha256(content: bytes) -> bytes:
    """Return the first 16 hexadecimal digits of the SHA-256 of a content."""
    return hashlib.sha256(content).hexdigest()[:16].encode()


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def inputs_sha256(path: str) -> str:
    """Return the SHA-256 of a file; of a folder, that of the hashes of the files a model is in."""
    if not os.path.isdir(path):
        return file_sha256(path)
    names = [name for name in sorted(os.listdir(path)) if name.endswith(MODEL_FILES)]
    hashes = [f"{name} {file_sha256(os.path.join(path, name))}\n" for name in names]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def check_sha256(path: str) -> None:
    """ValueError if path.sha256 is there, and was written for another content of the file."""
    digest = f"{path}.sha256"
    if not os.path.isfile(digest):
        return
    with open(digest, "rb") as f:
        expected = f.read(64).decode("ascii", "replace")
    if file_sha256(path) != expected:
        damaged = "damaged, or not the file that its .sha256 was written for"
        raise ValueError(f"{path}: {damaged}; if it is meant, remove {digest}")


def flush(path: str) -> None:
    """Wait until a file is on the disk; for a folder, until the names in it are."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- locks ---------------------------------------------------------------------------------------

_held: dict[str, IO[bytes]] = {}  # by real path: what this process has locked


def lock(path: str, flag: str, wait: float = 0.0, again: bool = False) -> IO[bytes]:
    """Open or create a file and hold it for this process, until it is closed or the process ends.

    flag   begins the messages: the flag, or the file, that the user knows
    wait   how many seconds to wait for the process that holds it; what for is printed
    again  this very process may hold it already, after work that failed
    ValueError, naming that process, if it holds it still. Where there are no locks, that is said.
    """
    real = os.path.realpath(path)
    mine = _held.get(real)
    if again and mine is not None and not mine.closed and _is_file_at(mine, path):
        return mine
    deadline, waited = time.monotonic() + wait, False
    while True:
        with named_errors(path):
            handle = open(path, "a+b", buffering=0)
        if _try_to_lock(handle, path) and _is_file_at(handle, path):
            _held[real] = handle
            return handle
        holder = _holder(handle)
        handle.close()
        if time.monotonic() >= deadline:
            raise ValueError(f"{flag}: is in use by {holder}; wait for it, or choose another")
        if not waited:
            print(f"{flag}: waiting for {holder}", flush=True)
            waited = True
        time.sleep(0.1)


def this_process() -> dict:
    """Return what a locked file says of its holder."""
    here = f"process {os.getpid()} on {socket.gethostname()}"
    return {"held_by": f"{here} since {time.strftime('%Y-%m-%d %H:%M:%S')}"}


def _holder(handle: IO[bytes]) -> str:
    handle.seek(0)
    try:
        return json.loads(handle.read(4096))["held_by"]
    except (ValueError, LookupError, TypeError):
        return "another process"


def _try_to_lock(handle: IO[bytes], path: str) -> bool:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        _say_that_there_are_no_locks(os.path.dirname(path) or ".")
    return True


@functools.cache  # once
def _say_that_there_are_no_locks(folder: str) -> None:
    print(f"{folder}: has no file locks; start nothing else that writes there", flush=True)


def _is_file_at(handle: IO[bytes], path: str) -> bool:
    """Tell whether an open file still has its name, and was not removed or replaced."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _forget_locks() -> None:
    """Close, in a forked child, what its parent holds: the lock would outlive the parent."""
    for handle in _held.values():
        handle.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
