"""Pins agree wherever they stand; the house has its rooms, and each knows what it may."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

NOT_IN_THE_HOUSE = {"tests", "experiments"}


def read(name: str) -> str:
    return Path(ROOT, name).read_text(encoding="utf-8")


def pins(text: str) -> dict[str, str]:
    """name==version of every line, in lower case"""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text.lower(), re.MULTILINE))


def test_pyproject_has_the_pins_of_the_requirements():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert pins("\n".join(project["dependencies"])) == pins(read("requirements.txt"))
    assert project["requires-python"] == ">=3.11"


def test_the_lock_has_the_same_pins_and_a_hash_for_everything():
    lock = read("requirements.lock")
    locked = pins(lock)
    assert pins(read("requirements.txt")).items() <= locked.items()
    entries = re.split(r"^(?=[a-z0-9][^\n]*==)", lock, flags=re.MULTILINE)
    entries = [entry for entry in entries if "==" in entry.split("\n")[0]]
    assert len(entries) == len(locked) > 30
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "http" not in lock and "index" not in lock


def imports_of(path: Path) -> set[str]:
    """The project's modules that a file imports: "losses", "spo.groups" ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "spo":
            found |= {f"spo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    roots = {path.stem for path in Path(ROOT).glob("*.py")}
    return {name for name in found if name in roots or name.split(".")[0] == "spo"}


def test_spo_imports_of_the_root_only_model_and_losses():
    for path in Path(ROOT, "spo").glob("*.py"):
        roots = {name for name in imports_of(path) if not name.startswith("spo")}
        assert roots <= {"model", "losses"}, path


@pytest.mark.parametrize(
    "path,allowed",
    [
        ("losses.py", set()),
        ("model.py", set()),
        ("spo/files.py", set()),
        ("spo/config.py", set()),
        ("spo/fast.py", {"model", "spo.fast_block", "spo.parallel"}),
        ("spo/fast_block.py", {"model"}),
        ("spo/parallel.py", {"model"}),
    ],
)
def test_rooms_that_must_not_know_the_others_do_not(path, allowed):
    assert imports_of(Path(ROOT, path)) <= allowed


def test_nothing_imports_the_trainer_or_the_sampler():
    for path in [*Path(ROOT).glob("*.py"), *Path(ROOT, "spo").glob("*.py")]:
        assert not imports_of(path) & {"spo_train", "sample"}, path


def test_the_root_holds_the_scripts_and_nothing_else():
    scripts = {path.stem for path in Path(ROOT).glob("*.py")}
    assert scripts == {
        "spo_train",
        "losses",
        "model",
        "tinystories_data",
        "judge",
        "sample",
        "export",
        "alpaca_data",
    }
