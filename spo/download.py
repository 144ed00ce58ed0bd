"""Files from the network: the whole file with the right hash, or nothing under its name."""

import os
import re
import shutil
import tarfile
import time
import zlib
from typing import IO

import requests

from spo.files import append_to, file_sha256, lock, named_errors, remove
from spo.progress import progress

ATTEMPTS = 6
SECONDS = (10, 60)  # to connect, and of silence
LARGEST = 100 * 10**9  # bytes of a file; nothing that is fetched here has a hundredth of that


class Interrupted(Exception):
    """What came is not the whole file; the next attempt continues from there, or starts again."""


def fetch(url: str, path: str, sha256: str = "") -> None:
    """Download url to path, by way of path.part, from where an earlier attempt stopped if the
    server can do that.

    sha256  what the file must have; "": what the server announces, as the Hugging Face hub does
            (X-Linked-ETag); "unchecked": nothing
    Raises ValueError for what trying again cannot help (no such file, a web page in its place, a
    wrong hash, no hash at all), ConnectionError after ATTEMPTS failures. What stands at path
    already is kept if its hash is right.
    """
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}|unchecked|", sha256):
        raise ValueError(f"--sha256={sha256}: expected 64 hexadecimal digits, or `unchecked`")
    if sha256 not in ("", "unchecked") and os.path.isfile(path) and file_sha256(path) == sha256:
        print(f"{path}: there already")
        return
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    failure = ""
    for attempt in range(ATTEMPTS):
        pause = min(30.0, 2.0**attempt - 1) * 0.5
        if attempt:
            print(f"{failure}; attempt {attempt + 1} of {ATTEMPTS} in {pause:.0f} s", flush=True)
        time.sleep(pause)
        try:
            return fetch_once(url, path, sha256)
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema,
        ):
            raise ValueError(f"{url}: not an address; is --hub_url right?") from None
        except (requests.RequestException, Interrupted) as error:
            failure = str(error) if isinstance(error, Interrupted) else type(error).__name__
    raise ConnectionError(
        f"{url}: {ATTEMPTS} attempts failed, the last: {failure}; run the same command to continue"
    )


def fetch_once(url: str, path: str, sha256: str) -> None:
    part = f"{path}.part"
    with lock(part, path, again=True) as f:  # two downloads of a file do not mix
        try:
            _fetch_to(f, url, path, sha256)
        finally:
            if os.path.isfile(part) and os.path.getsize(part) == 0:
                os.remove(part)


def _fetch_to(f: IO[bytes], url: str, path: str, sha256: str) -> None:
    part, have = f.name, os.path.getsize(f.name)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=SECONDS) as response:
        length = length_of(url, response, part, have)
        expected = sha256 or announced_sha256(response)
        if not expected:
            raise ValueError(
                f"{url}: the server announces no SHA-256 to check the file by; "
                "give --sha256=HEX, or "
                "--sha256=unchecked to take what comes"
            )
        if os.path.isfile(path):
            if expected in ("unchecked", file_sha256(path)):
                print(f"{path}: there already")
                return
            raise ValueError(
                f"{path}: there already, with another SHA-256 than {expected}; remove it first"
            )
        resumed = response.status_code in (206, 416)  # 416: all of it is there already
        if not resumed:
            f.truncate(0)
        start = have if resumed else 0
        bar = progress(length, os.path.basename(path), "bytes", initial=start, unit_scale=True)
        with bar, named_errors(path, length or 0, part):
            for chunk in response.iter_content(2**16) if response.status_code != 416 else ():
                append_to(f, chunk, durable=False)
                bar.update(len(chunk))
                if f.tell() > LARGEST:
                    remove(part)
                    raise ValueError(f"{url}: sends more than {LARGEST:,} bytes; not kept")
            os.fsync(f.fileno())
    size = os.path.getsize(part)
    if length is not None and size != length:
        if size > length:
            os.remove(part)
        raise Interrupted(f"{size} of {length} bytes")
    if expected not in ("unchecked", found := file_sha256(part)):
        os.remove(part)
        if resumed:  # the part may have been of another version of the file
            raise Interrupted("the pieces do not fit together")
        raise ValueError(f"{url}: its SHA-256 is {found}, expected {expected}; not kept")
    os.replace(part, path)
    print(
        f"{path}: {size:,} bytes"
        + (", SHA-256 not checked" if expected == "unchecked" else ", SHA-256 as expected")
    )


def length_of(url: str, response: requests.Response, part: str, have: int) -> int | None:
    """The whole file's length by the response's headers, None if they do not tell.

    Refuses what is not the file.
    """
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status == 416:  # nothing is missing, or the part is longer than the file
        if response.headers.get("Content-Range") == f"bytes */{have}":
            return have
        remove(part)
        raise Interrupted("the server has no more than we have")
    if status in (408, 429) or status >= 500:
        raise Interrupted(f"it answered {status}")
    if status not in (200, 206):
        raise ValueError(f"{url}: answered {status}; is the address right?")
    if "text/html" in kind:
        raise ValueError(
            f"{url}: is a web page and not the file; "
            "is the address right, or is there a log-in page between?"
        )
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(
            f"{url}: came in an encoding ({response.headers['Content-Encoding']}) "
            "that was not asked for"
        )
    if status == 206:
        spelled = re.fullmatch(
            r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "")
        )
        if (
            not spelled
            or not have
            or int(spelled[1]) != have
            or int(spelled[2]) + 1 != int(spelled[3])
        ):
            remove(part)
            raise Interrupted("it sent another range than the one asked for")
        return int(spelled[3])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def announced_sha256(response: requests.Response) -> str:
    """The hash that the hub sends, with its redirect to where the bytes are."""
    for answer in [*response.history, response]:
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if re.fullmatch("[0-9a-f]{64}", tag):
            return tag
    return ""


def extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: str) -> None:
    """Extract a file or a folder. TarError for one that would lie outside.

    Python before 3.11.4 has no filter that refuses it.
    """
    if hasattr(tarfile, "data_filter"):
        tar.extract(member, folder, filter="data")
        return
    root = os.path.realpath(folder)
    member.name = member.name.lstrip("/")  # as the filter does
    target = os.path.realpath(os.path.join(root, member.name))
    if os.path.commonpath([root, target]) != root:
        raise tarfile.TarError(f"{member.name!r} would be extracted outside")
    tar.extract(member, folder)


def unpack(archive: str, folder: str, max_bytes: int) -> None:
    """A .tar(.gz) of files and folders -> folder, whole or not at all.

    ValueError for members that are anything else (links, devices), that would lie outside, or of
    more than max_bytes.
    """
    temporary, size = f"{folder}.tmp", 0
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise ValueError(
                        f"{archive}: {member.name!r} is neither a file nor a folder; "
                        "nothing was unpacked"
                    )
                size += member.size
                if size > max_bytes:
                    raise ValueError(
                        f"{archive}: unpacks to more than {max_bytes:,} bytes; nothing was unpacked"
                    )
                extract(tar, member, temporary)
        os.replace(temporary, folder)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged or unsafe ({error}); nothing was unpacked") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
