"""Downloads from a server that truncates, lies, ignores ranges and sends web pages; archives that
try to escape.
"""

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from http.server import BaseHTTPRequestHandler

import pytest
from fake_api import LocalServer
from helpers import ROOT

import tinystories_data as data
from spo import download
from spo.download import fetch
from spo.files import lock

CONTENT = random.Random(0).randbytes(200_000)
RIGHT = hashlib.sha256(CONTENT).hexdigest()
RECOVERS = ["truncate", "503", "429", "reset"]  # trying again helps
REFUSED = ["404", "web page", "wrong bytes", "gzip", "no hash"]  # it does not


class FakeHub(LocalServer):
    """Serves `content` under every path, `faults` first; announces its SHA-256 as the Hugging Face
    hub does.
    """

    def __init__(self, faults=(), ranges: str = "honest", content: bytes = CONTENT):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.ranges, self.content = iter(faults), ranges, content
        self.sent, self.asked = Counter(), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_):
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        if not self.path.startswith(
            "/bytes"
        ):  # the hub redirects to where the bytes are, and announces the hash
            fault = next(server.faults, "")
            server.asked.append((self.path, fault, asked))
            self.send_response(302)
            if fault != "no hash":
                self.send_header("X-Linked-ETag", f'"{hashlib.sha256(server.content).hexdigest()}"')
            self.send_header("Location", f"/bytes?{fault.replace(' ', '_')}")
            self.end_headers()
            return
        fault, content, status = self.path.partition("?")[2].replace("_", " "), server.content, 200
        headers = {"Content-Type": "application/octet-stream"}
        if asked and server.ranges != "ignored":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            status = 206
            shift = 7 if server.ranges == "lies" else 0
            headers["Content-Range"] = f"bytes {start + shift}-{len(content) - 1}/{len(content)}"
            content = (
                content[start:] if server.ranges != "other bytes" else b"x" * (len(content) - start)
            )
        if fault.isdigit():
            return self.answer(int(fault), {}, b"")
        if fault == "web page":
            return self.answer(
                200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Log in, please</html>"
            )
        if fault == "gzip":
            return self.answer(200, headers | {"Content-Encoding": "gzip"}, b"\x1f\x8b")
        if fault == "wrong bytes":
            content = content[:-1] + b"?"
        headers["Content-Length"] = str(len(content))
        self.answer(
            status,
            headers,
            content[: len(content) // 2] if fault in ("truncate", "reset") else content,
        )

    def answer(self, status: int, headers: dict, body: bytes) -> None:
        self.server.sent[status] += len(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("spo.download.time.sleep", lambda seconds: None)


def assert_nothing_half(path) -> None:
    """Under its name there is the whole file, or none."""
    assert not path.exists() or path.read_bytes() == CONTENT


@pytest.mark.parametrize("fault", RECOVERS)
def test_what_trying_again_can_help_ends_with_the_whole_file(tmp_path, fault):
    path = tmp_path / "file"
    with FakeHub([fault, fault, ""]) as hub:
        download.fetch(f"{hub.url}/file", str(path))
        assert path.read_bytes() == CONTENT and len(hub.asked) == 3
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("fault", REFUSED)
def test_what_trying_again_cannot_help_is_refused_at_once(tmp_path, fault):
    with FakeHub([fault] * 9) as hub, pytest.raises(ValueError, match=hub.url):
        download.fetch(f"{hub.url}/file", str(tmp_path / "file"))
    assert len(hub.asked) == 1 and os.listdir(tmp_path) in ([], ["file.part"])


def test_a_download_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "file"
    with FakeHub() as hub:
        (tmp_path / "file.part").write_bytes(CONTENT[:150_000])
        download.fetch(f"{hub.url}/file", str(path), RIGHT)
        assert (
            path.read_bytes() == CONTENT
            and hub.sent == {206: 50_000}
            and hub.asked[0][2] == "bytes=150000-"
        )


def test_a_416_to_a_first_request_is_one_more_failure(tmp_path):
    with FakeHub(["416"]) as hub:
        fetch(f"{hub.url}/m.bin", str(tmp_path / "m.bin"))
    assert (tmp_path / "m.bin").read_bytes() == CONTENT
    assert_nothing_half(tmp_path / "m.bin")


def test_a_download_without_end_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("spo.download.LARGEST", 1000)
    with FakeHub() as hub, pytest.raises(ValueError, match="sends more than 1,000 bytes"):
        fetch(f"{hub.url}/m.bin", str(tmp_path / "m.bin"))
    assert os.listdir(tmp_path) == []


def test_two_downloads_of_a_file_do_not_mix(tmp_path):
    with FakeHub() as hub, lock(str(tmp_path / "m.bin.part"), "here") as held:
        held.write(CONTENT[:100])
        with pytest.raises(ValueError, match="m.bin: is in use by"):
            fetch_in_another_process(f"{hub.url}/m.bin", str(tmp_path / "m.bin"))
    assert (tmp_path / "m.bin.part").read_bytes() == CONTENT[:100]


def fetch_in_another_process(url: str, path: str) -> None:
    code = f"from spo.download import fetch; fetch({url!r}, {path!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("ranges", ["ignored", "lies", "other bytes"])
@pytest.mark.parametrize("part", [CONTENT[:100], CONTENT, CONTENT + b"more", b"of another version"])
def test_a_part_is_only_gone_on_with_where_it_fits(tmp_path, ranges, part):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(part)
    with FakeHub(ranges=ranges) as hub:
        download.fetch(f"{hub.url}/file", str(path))
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]


def test_a_server_that_is_gone_leaves_the_part_for_later(tmp_path):
    with (
        FakeHub(["truncate", *["503"] * 9]) as hub,
        pytest.raises(ConnectionError, match="6 attempts failed, the last: it "),
    ):
        download.fetch(f"{hub.url}/file", str(tmp_path / "file"))
    part = (tmp_path / "file.part").read_bytes()
    assert len(part) >= 2**16 and CONTENT.startswith(part)


def test_what_is_there_is_kept_if_it_is_right_and_never_overwritten(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with FakeHub() as hub:
        download.fetch(f"{hub.url}/file", str(path))
        assert path.read_bytes() == CONTENT
        path.write_bytes(b"mine")
        with pytest.raises(ValueError, match="there already, with another SHA-256"):
            download.fetch(f"{hub.url}/file", str(path))
    assert path.read_bytes() == b"mine"


def test_no_hash_is_no_download_unless_told_so(tmp_path):
    with FakeHub(["no hash"] * 3) as hub:
        with pytest.raises(ValueError, match="announces no SHA-256"):
            download.fetch(f"{hub.url}/file", str(tmp_path / "file"))
        with pytest.raises(ValueError, match="its SHA-256 is"):
            download.fetch(f"{hub.url}/file", str(tmp_path / "file"), "0" * 64)
        download.fetch(f"{hub.url}/file", str(tmp_path / "file"), "unchecked")
    assert_nothing_half(tmp_path / "file")


def test_a_hash_is_checked_before_anything_is_sent_and_read_in_capitals_too(tmp_path):
    path = tmp_path / "file"
    with FakeHub() as hub:
        with pytest.raises(ValueError, match="--sha256=oops: expected 64"):
            download.fetch(f"{hub.url}/file", str(path), "oops")
        download.fetch(f"{hub.url}/file", str(path), RIGHT.upper())
        download.fetch(f"{hub.url}/file", str(path), RIGHT)  # there already, and known to be right
        assert len(hub.asked) == 1
    with pytest.raises(ValueError, match="huggingface/file: not an address; is --hub_url right"):
        download.fetch("huggingface/file", str(tmp_path / "other"))


def test_a_whole_part_is_not_fetched_again(tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    with FakeHub() as hub:
        download.fetch(f"{hub.url}/file", str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == CONTENT and sum(hub.sent.values()) == 0


def campaign(tmp_path, runs: int) -> None:
    rng, right = random.Random(0), 0
    for run in range(runs):
        path = tmp_path / f"file{run}"
        if rng.random() < 0.3:
            (tmp_path / f"file{run}.part").write_bytes(
                rng.choice([CONTENT[: rng.randrange(200_000)], b"other bytes"])
            )
        faults = [rng.choice([*RECOVERS, *RECOVERS, *REFUSED, "", "", ""]) for _ in range(8)]
        with FakeHub(
            faults, rng.choice(["honest", "honest", "ignored", "lies", "other bytes"])
        ) as hub:
            try:
                download.fetch(f"{hub.url}/file", str(path))
                right += 1
                assert path.exists()
            except (ValueError, ConnectionError):
                assert not path.exists()
        assert_nothing_half(path)
    assert runs // 4 < right < runs


def test_twenty_random_downloads_are_right_or_refused(tmp_path):
    campaign(tmp_path, 20)


@pytest.mark.slow
def test_two_hundred_random_downloads_are_right_or_refused(tmp_path):
    campaign(tmp_path, 200)


# --- archives ------------------------------------------------------------------------------------


def archive(path, *members: tarfile.TarInfo, size: int = 4) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            if member.isreg():
                member.size = member.size or size
            tar.addfile(member, io.BytesIO(b"\0" * member.size))
    return str(path)


def member(name: str, kind=tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    "bad,message",
    [
        (member("../outside"), "unsafe"),
        (member("a/../../outside"), "unsafe"),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "neither a file nor a folder"),
        (member("link", tarfile.SYMTYPE, ".."), "neither a file nor a folder"),
        (member("link", tarfile.LNKTYPE, "../outside"), "neither a file nor a folder"),
        (member("device", tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("pipe", tarfile.FIFOTYPE), "neither"),
        (member("big", size=2_000_000), "more than 1,000,000 bytes"),
    ],
)
def test_an_archive_that_would_escape_or_burst_leaves_nothing(tmp_path, bad, message):
    inside = tmp_path / "here"
    inside.mkdir()
    (tmp_path / "outside").write_text("mine")
    path = archive(inside / "a.tar.gz", member("data00.json"), bad)
    with pytest.raises(ValueError, match=message):
        download.unpack(path, str(inside / "text"), 1_000_000)
    assert os.listdir(inside) == ["a.tar.gz"] and (tmp_path / "outside").read_text() == "mine"


def test_an_absolute_path_lands_inside(tmp_path):
    download.unpack(
        archive(tmp_path / "a.tar.gz", member("/data00.json")), str(tmp_path / "text"), 1000
    )
    assert os.listdir(tmp_path / "text") == ["data00.json"]


def test_a_damaged_archive_leaves_nothing_and_a_half_unpacked_folder_is_redone(tmp_path):
    path = archive(
        tmp_path / "a.tar.gz", member("data00.json"), member("data01.json", size=100_000)
    )
    whole = (tmp_path / "a.tar.gz").read_bytes()
    os.makedirs(tmp_path / "text.tmp")
    (tmp_path / "text.tmp" / "half.json").write_text("[")
    for damaged in (whole[:100], whole[: len(whole) // 2], b"not an archive", b""):
        (tmp_path / "a.tar.gz").write_bytes(damaged)
        with pytest.raises((ValueError, OSError)):
            download.unpack(path, str(tmp_path / "text"), 10**6)
        assert os.listdir(tmp_path) == ["a.tar.gz"]
    (tmp_path / "a.tar.gz").write_bytes(whole)
    download.unpack(path, str(tmp_path / "text"), 10**6)
    assert sorted(os.listdir(tmp_path / "text")) == ["data00.json", "data01.json"]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_fetches_the_text_by_way_of_its_archive(tmp_path, capsys):
    archive(tmp_path / "a.tar.gz", member("data00.json"), member("data01.json"))
    content = (tmp_path / "a.tar.gz").read_bytes()
    with FakeHub(["truncate"], content=content) as hub:
        command = ["download", f"--hub_url={hub.url}", f"--data_dir={tmp_path / 'data'}"]
        data.main(command)
        data.main(command)  # it is there
    assert (
        hub.asked[0][0]
        == "/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
    )
    assert len(hub.asked) == 2 and os.listdir(tmp_path / "data") == ["TinyStories_all_data"]
    assert "TinyStories_all_data: 2 shards" in capsys.readouterr().out


def test_the_command_fetches_a_model_and_its_tokenizer(tmp_path, spo_data, capsys):
    """From a mirror that holds the real files; the hashes of this model and of its tokenizer are
    known beforehand.
    """
    files = {
        name: open(f"{spo_data}/{name}", "rb").read()
        for name in ("stories260K.bin", "tok512.model", "tokenizer.model")
    }

    class Mirror(FakeHub):
        @property
        def content(self):
            return files[self.asked[-1][0].rsplit("/")[-1]] if self.asked else b""

        @content.setter
        def content(self, _):
            pass

    with Mirror() as hub:
        common = [
            f"--hub_url={hub.url}",
            f"--data_dir={tmp_path}",
            f"--tokenizer_url={hub.url}/tokenizer.model",
        ]
        data.main(["download", "--model=260K", *common])
        assert sorted(os.listdir(tmp_path / "stories260K")) == [
            "stories260K.bin",
            "tokenizer.model",
        ]
        files["stories15M.pt"] = b"stands for a checkpoint; its hash is announced"
        data.main(["download", "--model=stories15M", *common])
        assert (tmp_path / "stories15M" / "stories15M.pt").read_bytes() == files["stories15M.pt"]
        assert [path for path, *_ in hub.asked] == [
            "/karpathy/tinyllamas/resolve/main/stories260K/stories260K.bin",
            "/karpathy/tinyllamas/resolve/main/stories260K/tok512.model",
            "/karpathy/tinyllamas/resolve/main/stories15M.pt",
            "/tokenizer.model",
        ]
        files["stories260K.bin"] = b"damaged"
        with pytest.raises(ValueError, match="its SHA-256 is"):
            data.main(
                ["download", "--model=stories260K", *common[:1], f"--data_dir={tmp_path / 'b'}"]
            )
    with pytest.raises(
        ValueError, match="--model=1B: there are stories260K, stories15M, stories42M, stories110M"
    ):
        data.main(["download", "--model=1B"])
    assert "sample.py --checkpoint=" in capsys.readouterr().out
