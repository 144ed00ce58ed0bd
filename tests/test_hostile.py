"""A campaign against what is read and written: damage, lying headers, full disks.

A few of each run with the suite, hundreds with `-m slow`.
"""

import dataclasses
import json
import os
import random
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, plain_tiny, random_groups, tiny
from safetensors.torch import load_file, save_file
from test_checkpoint import hf_folder, meta_folder

import export
from spo import checkpoint, state
from spo.groups import TokenWindows
from spo.reference import ReferenceCache

few_or_many = pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])


def numbers_of(path: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).state_dict()


# --- damage of equal length ----------------------------------------------------------------------


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A flipped bit, or a block of zeros."""
    changed, place = bytearray(content), rng.randrange(len(content))
    if rng.random() < 0.5:
        changed[place] ^= 1 << rng.randrange(8)
    else:
        size = min(4096, len(content) - place)
        changed[place : place + size] = bytes(size)
    return bytes(changed)


def ours(folder) -> dict:
    """{file: a reader of its numbers} of every format of weights and numbers that we write."""
    model = tiny(vocab_size=512, dim=64, hidden_dim=128)
    checkpoint.save_pt(str(folder / "m.pt"), model, 3)
    for version in (0, 1, 2):
        export.save_llama2c(str(folder / f"v{version}.bin"), model, version)
    export.save_hf(str(folder / "hf"), model, 1)
    (folder / "data.jsonl").write_text("{}\n")
    groups = random_groups(200, 2)
    cache = ReferenceCache(str(folder / "data.jsonl"), groups, str(folder / "m.pt"), "float32")
    cache.write(torch.arange(400, dtype=torch.float64).reshape(200, 2))
    weights = {"model.a": torch.randn(40, 40)}
    os.makedirs(folder / "state")
    state.save_state(str(folder / "state"), 1, weights, {"identity": {}})
    os.makedirs(folder / "tokens")
    from spo.files import atomic_write

    with atomic_write(str(folder / "tokens" / "data00.bin"), checked=True) as f:
        f.write(np.arange(4000, dtype=np.uint16).tobytes())

    def read_state(_) -> dict:
        (path,) = state.states_in(str(folder / "state"))
        if state.damage(path):
            raise ValueError(f"{path}: damaged")
        loaded = {"model.a": torch.zeros(40, 40)}
        state.load_state(path, loaded)
        return loaded

    def read_tokens(path: str) -> dict:
        windows = TokenWindows(path, 100, 2**16)
        return {str(i): torch.tensor(windows[i].responses[0]) for i in range(len(windows))}

    def read_cache(_) -> dict:
        logps = cache.read()
        if logps.isnan().all():
            raise ValueError(f"{cache.path}: computed anew")
        return {"logps": logps}

    (shard,) = [n for n in os.listdir(folder / "state/step_00000001") if n.endswith(".safetensors")]
    return {
        "m.pt": numbers_of,
        "v0.bin": numbers_of,
        "v1.bin": numbers_of,
        "v2.bin": numbers_of,
        "hf/model.safetensors": lambda path: numbers_of(os.path.dirname(path)),
        os.path.relpath(cache.path, folder): read_cache,
        f"state/step_00000001/{shard}": read_state,
        "state/step_00000001/state.json": read_state,
        "tokens/data00.bin": read_tokens,
    }


@few_or_many
def test_damage_to_our_files_is_refused_or_changes_nothing(tmp_path, count, capsys):
    readers, rng = ours(tmp_path), random.Random(count)
    refused = 0
    for i in range(count):
        name, read = list(readers.items())[i % len(readers)]
        path = tmp_path / name
        good, numbers = path.read_bytes(), read(str(path))
        path.write_bytes(damaged(good, rng))
        try:
            found = read(str(path))
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
        else:
            assert found.keys() == numbers.keys()
            assert all(torch.equal(found[k], numbers[k]) for k in numbers), (name, i)
        path.write_bytes(good)
    with capsys.disabled():
        print(f"\n{count} damaged files of ours: {refused} refused, the others read the same")
    assert refused > count / 2


@few_or_many
def test_damage_to_the_files_of_others_is_refused_or_finite(tmp_path, count, capsys):
    model = plain_tiny(vocab_size=512)
    meta_folder(tmp_path / "meta", model)
    hf_folder(tmp_path / "hf", model)
    hf_folder(tmp_path / "bin", model, kind="bin")
    for version in (0, 1, 2):
        export.save_llama2c(str(tmp_path / f"v{version}.bin"), model, version, group_size=16)
        os.remove(tmp_path / f"v{version}.bin.sha256")
    names = ["v0.bin", "v1.bin", "v2.bin", "meta/params.json", "meta/consolidated.00.pth"]
    names += ["hf/config.json", "hf/model-00001-of-00001.safetensors"]
    names += ["bin/pytorch_model-00001-of-00001.bin"]
    rng, refused = random.Random(count), 0
    for i in range(count):
        path = tmp_path / names[i % len(names)]
        good = path.read_bytes()
        path.write_bytes(damaged(good, rng))
        source = path if path.parent == tmp_path else path.parent
        try:
            found = numbers_of(str(source))
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
        else:
            assert all(weight.isfinite().all() for weight in found.values()), (path, i)
        path.write_bytes(good)
    with capsys.disabled():
        print(f"\n{count} damaged files of others: {refused} refused, the others finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["m.pt", "m.bin", "hf", "meta"])
def test_nothing_that_is_not_finite_is_loaded(tmp_path, kind, value):
    model, path = plain_tiny(vocab_size=512), tmp_path / kind
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[3, 4] = value
    if kind == "hf":
        hf_folder(path, model)
    elif kind == "meta":
        meta_folder(path, model)
    elif kind == "m.pt":
        checkpoint.save_pt(str(path), model)
    else:
        export.save_llama2c(str(path), model)
    with pytest.raises(ValueError, match=f"{path}: layers.1.feed_forward.w2.weight holds NaN or"):
        checkpoint.load(str(path))


# --- headers that lie ----------------------------------------------------------------------------

LIES = [0, -1, 1, 3, 10**9, 2**31, 2**62, 2**63, 10**30, 1.5, 1e300, None, True, "8", [], {}, [8]]
LIES += [float("nan"), float("inf"), "NaN", 2**24, 7, 10**6]


def lying_json(path, rng: random.Random) -> str:
    """A number of a JSON header replaced."""
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content))
    content[name] = rng.choice(LIES)
    path.write_text(json.dumps(content))
    return f"{name}={content[name]!r}"


def lying_bin(path, rng: random.Random) -> str:
    content, place = bytearray(path.read_bytes()), 4 * rng.randrange(10)
    value = rng.choice([0, -1, 1, 2, 2**24, 2**31 - 1, -(2**31), 1000])
    content[place : place + 4] = struct.pack("<i", value)
    path.write_bytes(content)
    return f"{place}: {value}"


def lying_pt(path, rng: random.Random) -> str:
    entries = torch.load(path, weights_only=True)
    if rng.random() < 0.5:
        name = rng.choice([f.name for f in dataclasses.fields(plain_tiny().args)])
        entries["model_args"][name] = rng.choice(LIES)
        torch.save(entries, path)
        return f"{name}={entries['model_args'][name]!r}"
    return lying_tensor(entries["model"], rng, lambda: torch.save(entries, path))


def lying_pth(path, rng: random.Random) -> str:
    tensors = torch.load(path, weights_only=True)
    return lying_tensor(tensors, rng, lambda: torch.save(tensors, path))


def lying_tensor(tensors: dict, rng: random.Random, save) -> str:
    name = rng.choice(sorted(tensors))
    weight = tensors[name]
    lies = {
        "flat": lambda: weight.flatten(),
        "sparse": lambda: weight.to_sparse(),
        "whole": lambda: weight.int(),
        "complex": lambda: weight.to(torch.complex64),
        "int8": lambda: weight.to(torch.int8),
        "no number": lambda: weight.flatten()[0],
        "empty": lambda: weight[:0],
        "wide": lambda: torch.zeros(1).expand(10**6, 10**6),
        "expanded": lambda: torch.zeros(1).expand(weight.shape),
        "text": lambda: "text",
        "quantised": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    }
    kind = rng.choice(sorted(lies))
    tensors[name] = lies[kind]()
    save()
    return f"{name} {kind}"


def lying_safetensors(path, rng: random.Random) -> str:
    if rng.random() < 0.5:
        tensors = load_file(path)
        name, kind = rng.choice(sorted(tensors)), rng.choice(["flat", "whole", "gone", "F8"])
        if kind == "gone":
            del tensors[name]
        elif kind == "flat":
            tensors[name] = tensors[name].flatten()
        else:
            dtype = torch.int32 if kind == "whole" else torch.float8_e4m3fn
            tensors[name] = tensors[name].to(dtype)
        save_file(tensors, path)
        return f"{name} {kind}"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = rng.choice(sorted(header))
    header[name]["shape"] = [rng.choice([0, 1, 2**40, 2**63, 10**9]), 4]
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])
    return f"{name} {header[name]['shape']}"


def tell_lies(folder: str, count: int) -> None:
    """Run in a process that may take 2 GB: prints the refusals, and the slowest of them."""
    import pathlib
    import resource
    import time

    room = pathlib.Path(folder)
    model = plain_tiny(vocab_size=512)
    meta_folder(room / "meta", model)
    hf_folder(room / "hf", model)
    hf_folder(room / "pth", model, kind="bin")
    checkpoint.save_pt(str(room / "m.pt"), model)
    for version in (0, 1, 2):
        export.save_llama2c(str(room / f"v{version}.bin"), model, version, group_size=16)
        os.remove(room / f"v{version}.bin.sha256")
    liars = [
        ("meta/params.json", lying_json),
        ("hf/config.json", lying_json),
        ("m.pt", lying_pt),
        ("v0.bin", lying_bin),
        ("v1.bin", lying_bin),
        ("v2.bin", lying_bin),
        ("meta/consolidated.00.pth", lying_pth),
        ("pth/pytorch_model-00001-of-00001.bin", lying_pth),
        ("hf/model-00001-of-00001.safetensors", lying_safetensors),
    ]
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9, used + 2 * 10**9))
    rng, refused, slowest = random.Random(count), 0, 0.0
    for i in range(count):
        name, lie = liars[i % len(liars)]
        path = room / name
        good = path.read_bytes()
        told = lie(path, rng)
        started = time.monotonic()
        try:
            numbers_of(str(path if path.parent == room else path.parent))
        except ValueError as error:
            refused += 1
            if folder not in str(error):
                raise AssertionError(f"{name}, {told}: names no file: {error}") from error
        except BaseException as error:
            raise AssertionError(f"{name}, {told}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.monotonic() - started)
        path.write_bytes(good)
    print(f"{count} lying headers: {refused} refused, the slowest in {slowest:.2f} s")


@few_or_many
def test_headers_that_lie_are_refused_in_words(tmp_path, count, capsys):
    code = f"import test_hostile; test_hostile.tell_lies({str(tmp_path)!r}, {count})"
    paths = os.pathsep.join([ROOT, os.path.join(ROOT, "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with capsys.disabled():
        print(f"\n{done.stdout.strip()}")


# --- full disks ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many kilobytes; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes: int) -> str:
        subprocess.run(["umount", str(place)], capture_output=True)
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("a file system can only be mounted by root")
        return str(place)

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


def writers(disk: str, start: str, tokenizer: str, data: str) -> list[list[str]]:
    model = [f"--checkpoint={start}", f"--tokenizer={tokenizer}"]
    stories = [*model, "--max_new_tokens=32", f"--out={disk}/stories.jsonl"]
    small = [
        "--batch_size=4",
        "--max_iters=4",
        "--eval_interval=2",
        "--eval_stories=4",
        "--eval_pool=8",
    ]
    run = [*small, "--max_new_tokens=16", f"--init_from={start}", f"--tokenizer={tokenizer}"]
    return [
        ["export.py", f"{disk}/m.bin", *model],
        ["export.py", f"{disk}/q.bin", *model, "--version=2"],
        ["export.py", f"{disk}/m.pt", *model],
        ["export.py", f"{disk}/hf", *model, "--version=-1"],
        ["sample.py", *stories, "--num_samples=64"],
        ["tinystories_data.py", "generate", *stories, "--num_stories=64"],
        ["tinystories_data.py", "pairs", f"--data={data}", f"--out={disk}/p.jsonl", "--pairs=all"],
        ["spo_train.py", "--loss=dpo_rank", f"--data={data}", f"--out_dir={disk}/out", *run],
    ]


def check_full_disk(words: list[str], disk: str) -> bool:
    """Run a command; if it fails, it is one line that names a file, and no file is half there."""
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, words[0]), *words[1:]], capture_output=True, text=True
    )
    if done.returncode == 0:
        return True
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert f"{disk}/" in last and "No space left on device: " in last and " free" in last, last
    assert ".tmp" not in last
    left = [os.path.join(f, name) for f, _, names in os.walk(disk) for name in names]
    assert not [path for path in left if ".tmp" in path]
    for path in left:
        if path.endswith((".pt", ".bin")) and not path.endswith("tokenizer.bin"):
            checkpoint.load(path)
        if path.endswith(".jsonl"):
            with open(path, encoding="utf-8") as f:
                assert [json.loads(line) for line in f]
    return False


@pytest.mark.parametrize("kilobytes", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_nothing_is_half_written(
    workshop, tokenizer, small_disk, tmp_path, kilobytes
):
    sizes = [kilobytes] if kilobytes == 24 else [4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128]
    sizes += [] if kilobytes == 24 else [160, 200, 240, 300, 400, 600, 900, 1300]
    start, data = str(tmp_path / "start.pt"), str(tmp_path / "ranked.jsonl")
    all_whole = []
    for size in sizes:
        for i in (3, 7) if kilobytes == 24 else range(8):
            disk = small_disk(size)
            words = writers(disk, start, tokenizer.path, data)[i]
            all_whole.append(check_full_disk(words, disk))
    assert not all(all_whole)


def test_a_good_file_stays_when_the_disk_is_full(workshop, tokenizer, small_disk, tmp_path):
    disk = small_disk(180)
    words = ["--checkpoint=start.pt", f"--tokenizer={tokenizer.path}"]
    export.main([f"{disk}/m.bin", *words])
    before = numbers_of(f"{disk}/m.bin")
    with open(f"{disk}/filler", "wb") as f:
        f.write(bytes(shutil.disk_usage(disk).free))
    with pytest.raises(OSError, match="No space left on device: .* needed, .* free"):
        export.main([f"{disk}/m.bin", *words])
    after = numbers_of(f"{disk}/m.bin")
    assert all(torch.equal(after[name], before[name]) for name in before)
