"""The folder of a run: its log, its best checkpoint, and the state that --resume continues from.

A state is a folder of safetensors (weights and optimizer, written by torch.distributed.checkpoint:
each process writes its part, and any number of processes can read it) with a state.json and the
SHA-256 of every file. Nothing in it can run code.
"""

import contextlib
import dataclasses
import glob
import json
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from model import Transformer
from spo import checkpoint, parallel
from spo.config import flags_of, refuse_if
from spo.files import (
    file_sha256,
    flush,
    read_json_object,
    read_jsonl,
    write_jsonl,
    write_text,
)
from spo.groups import EncodedGroup
from spo.tokenizer import Tokenizer, copy_tokenizer

STATES_KEPT = 2
FILES_OF_A_RUN = (
    "run.json",
    "ckpt.pt",
    "best.pt",
    "model.bin",
    "log.jsonl",
    "config.json",
    "tokenizer.model",
    "tokenizer.bin",
    "step_*.pt",
    "stories/*.jsonl",
)


def identity(config, files: list[str]) -> dict:
    """Return what makes a run this run: its flags, but for free ones, and the files it reads."""
    values = dataclasses.asdict(config)
    flags = {name: values[name] for name, flag in flags_of(config).items() if not flag.free}
    return {"flags": flags, "files": {path: file_sha256(path) for path in files}}


def is_inside(path: str, folder: str) -> bool:
    """Tell whether a path is a folder, or lies in it."""
    real = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), real]) == real


def description_of_run(folder: str) -> str | None:
    """Return "2026-11-27 10:47, 96 steps" of a folder that a run of ours wrote; None of any other.

    run.json marks it; earlier versions wrote none, but config.json and log.jsonl.
    """
    try:
        if os.path.isfile(os.path.join(folder, "run.json")):
            marked = read_json_object(os.path.join(folder, "run.json"))
            if marked.get("run_of") != "spo_train.py":
                return None
            began = str(marked.get("began"))
        else:
            config = read_json_object(os.path.join(folder, "config.json"))
            log = os.path.join(folder, "log.jsonl")
            if not {"loss", "learning_rate", "out_dir"} <= config.keys():
                return None
            began = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(log)))
    except (OSError, ValueError):
        return None
    steps = 0
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no log yet, or one that a kill cut
        for _, entry in read_jsonl(os.path.join(folder, "log.jsonl")):
            steps = max(steps, entry["step"])
    return f"{began}, {steps} steps"


class RunFolder:
    """Where a run writes, and how far it has come."""

    def __init__(self, config, tokenizer: Tokenizer):
        """Find the state that --resume means, or make the folder of a new run. Collective.

        config  the run's flags: out_dir, resume, init_from, data, baseline are read here, and all
                are kept
        ValueError if the state is of another run, or if a new run would replace what it reads.
        """
        self.config = config
        self.max_iters = config.max_iters
        inputs = [config.data, config.init_from, config.baseline]
        self.identity = identity(config, [path for path in inputs if os.path.isfile(path)])
        self.first_step = 0
        self.evaluated = -1  # the last step that was evaluated
        self.best_rate = -1.0
        self.samples: list[EncodedGroup] | None = None  # the policy's, from the state
        self.stopped = False
        self._sigterm = threading.Event()
        self._bar: tqdm | None = None
        self.state = parallel.on_rank_0(self._state_to_resume) if config.resume else None
        if self.state is None:
            parallel.on_rank_0(lambda: self._new_run(tokenizer))

    def path(self, *names: str) -> str:
        return os.path.join(self.config.out_dir, *names)

    # --- beginning -------------------------------------------------------------------------------

    def _new_run(self, tokenizer: Tokenizer) -> None:
        """Make out_dir the folder of this run: what an earlier run left there is removed.

        ValueError if something there would be replaced that is no earlier run, or that is read.
        """
        config = self.config
        patterns = [os.path.join(glob.escape(config.out_dir), name) for name in FILES_OF_A_RUN]
        former = [path for pattern in patterns for path in glob.glob(pattern)]
        if os.path.isdir(self.path("state")):
            former.append(self.path("state"))
        choose = "choose another --out_dir"
        refuse_if(not config.out_dir, "--out_dir=: is empty; name a folder")
        if os.path.isdir(config.init_from) and is_inside(config.out_dir, config.init_from):
            raise ValueError(f"--out_dir={config.out_dir}: lies in --init_from; {choose}")
        inputs = [config.init_from, tokenizer.path, config.data, config.baseline]
        read_here = {os.path.realpath(path) for path in inputs if path}
        for path in former:
            if os.path.realpath(path) in read_here:
                reads = f"this run reads {path}, and would replace what is in that folder"
                raise ValueError(f"--out_dir={config.out_dir}: {reads}; {choose}")
        if former:
            earlier = description_of_run(config.out_dir)
            not_ours = f"holds {former[0]}, which a run would replace, and is no folder of a run"
            refuse_if(earlier is None, f"--out_dir={config.out_dir}: {not_ours}; {choose}")
            print(f"{config.out_dir}: replacing the run of {earlier}", flush=True)
        for path in former:
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        os.makedirs(self.path("stories"), exist_ok=True)
        os.makedirs(self.path("state"), exist_ok=True)
        began = {"run_of": "spo_train.py", "began": time.strftime("%Y-%m-%d %H:%M")}
        write_text(self.path("run.json"), json.dumps(began))
        write_text(self.path("config.json"), json.dumps(dataclasses.asdict(config), indent=1))
        copy_tokenizer(tokenizer, config.out_dir)

    def _state_to_resume(self) -> str | None:
        """Return the state that --resume means, if it is one of this very run.

        ValueError, naming the flag, if not.
        """
        path = find_state(self.path("state"), self.config.resume)
        if path is None:
            return None
        former = read_metadata(path)["identity"]
        for name, value in self.identity["flags"].items():
            before = former["flags"].get(name)
            if before != value:
                mend = "resume it with the same flags, or start anew in another --out_dir"
                raise ValueError(f"--{name}={value}: {path} is of a run with {before}; {mend}")
        for name, digest in self.identity["files"].items():
            if former["files"].get(name) != digest:
                raise ValueError(f"{name}: has changed since the run began; it cannot be resumed")
        return path

    def start(self, policy: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Load the state, if there is one. Collective."""
        self.policy = policy
        self.optimizer = optimizer
        if self.state is not None:
            self._load_state(self.state)

    def _load_state(self, path: str) -> None:
        metadata = read_metadata(path)
        self.first_step = metadata["step"]
        self.best_rate = metadata["best_rate"]
        self.evaluated = metadata["evaluated"]
        load_state(path, tensors_of(self.policy, self.optimizer))
        if metadata["online"] is not None:
            self.samples = [EncodedGroup(*group) for group in metadata["online"]]
        if parallel.rank() == 0:
            with open(self.path("log.jsonl"), "ab") as log:
                log.truncate(metadata["log_bytes"])  # what was logged later is computed again
        parallel.print0(f"resumed from {path}, step {self.first_step}")

    # --- while it runs ---------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps from the first to max_iters, under a progress bar; listen to SIGTERM."""
        hidden = parallel.rank() > 0
        total, loss = self.max_iters, self.config.loss
        bar = tqdm(total=total, initial=self.first_step, desc=loss, unit="step", disable=hidden)
        with bar, self._listening():
            self._bar = bar
            for step in range(self.first_step, self.max_iters + 1):
                yield step
                if step < self.max_iters:
                    bar.update()
        self._bar = None

    def say(self, text: str) -> None:
        """Print a text once, above the progress bar."""
        if parallel.rank() == 0:
            self._bar.write(text)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Let SIGTERM ask for a stop while the loop runs; afterwards it does what it did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._sigterm.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop_requested(self) -> bool:
        """Tell whether any process was sent SIGTERM. Collective."""
        return bool(parallel.all_reduce_max(int(self._sigterm.is_set())))

    def stop(self, step: int, samples: list[EncodedGroup] | None) -> None:
        """Keep the state before this step, and end the run early. Collective."""
        if step > self.first_step:
            self.save_state(step, samples)
        self.stopped = True
        command = "the same command" if self.config.resume == "auto" else "it with --resume"
        self.say(f"stopped by SIGTERM before step {step}; run {command} to continue")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append a line to log.jsonl."""
        if parallel.rank() == 0:
            with open(self.path("log.jsonl"), "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step} | values) + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record and print the metrics of a step, every log_interval steps and at the last."""
        if step % self.config.log_interval == 0 or step == self.max_iters - 1:
            self.record(step, metrics)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.say(f"step {step}: {shown}")

    def save_checkpoint(self, name: str, model: Transformer, step: int, **more) -> None:
        """Write a .pt into the folder; more: as in checkpoint.save_pt."""
        config = dataclasses.asdict(self.config)
        checkpoint.save_pt(self.path(name), model, step, config, **more)

    def save_evaluation(self, step: int, model: Transformer, verdict, improved: bool) -> None:
        """Write ckpt.pt; of a model that is judged the stories, too, and best.pt if it improved."""
        self.save_checkpoint("ckpt.pt", model, step)
        if self.config.keep_checkpoints:
            self.save_checkpoint(f"step_{step:06d}.pt", model, step)
        if verdict is not None:
            write_jsonl(self.path("stories", f"step_{step:06d}.jsonl"), verdict.stories)
            if improved:
                self.save_checkpoint("best.pt", model, step, win_rate=verdict.rate)

    def save_state(self, step: int, samples: list[EncodedGroup] | None) -> None:
        """Keep everything that the steps from this one on depend on. Collective."""
        log = self.path("log.jsonl")
        groups = [dataclasses.astuple(group) for group in samples] if samples else None
        metadata = {
            "identity": self.identity,
            "best_rate": self.best_rate,
            "evaluated": self.evaluated,
            "log_bytes": os.path.getsize(log) if os.path.exists(log) else 0,
            "online": groups,
        }
        tensors = tensors_of(self.policy, self.optimizer)
        save_state(self.path("state"), step, tensors, metadata)


# --- states on disk ------------------------------------------------------------------------------


def tensors_of(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and moments by name, as they are in memory: what is saved, and loaded into."""
    tensors = {}
    for name, weight in model.named_parameters():
        if not optimizer.state[weight]:  # before the first step
            optimizer.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        tensors[f"model.{name}"] = weight.detach()
        for key, value in optimizer.state[weight].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def save_state(folder: str, step: int, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write folder/step_N, under that name when all of it is on the disk. Collective.

    metadata  what JSON can hold, the same in every process
    """
    path = os.path.join(folder, f"step_{step:08d}")
    temporary = f"{path}.tmp"
    if parallel.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    parallel.all_gather(None)  # all wait for the folder
    with distributed_checkpoint() as dcp:
        writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=parallel.world_size() == 1)
    if parallel.rank() == 0:
        with open(os.path.join(temporary, "state.json"), "w", encoding="utf-8") as f:
            json.dump(metadata | {"step": step}, f)
        names = sorted(os.listdir(temporary))
        hashes = {name: file_sha256(os.path.join(temporary, name)) for name in names}
        with open(os.path.join(temporary, "SHA256SUMS"), "w", encoding="utf-8") as f:
            f.writelines(f"{digest}  {name}\n" for name, digest in hashes.items())
        for name in [*names, "SHA256SUMS", "."]:
            flush(os.path.join(temporary, name))
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
        flush(folder)
        for old in states_in(folder)[:-STATES_KEPT]:
            shutil.rmtree(old)
    parallel.all_gather(None)


def states_in(folder: str) -> list[str]:
    """Return the states of a run, oldest first."""
    paths = glob.glob(os.path.join(glob.escape(folder), "step_*"))
    return sorted(path for path in paths if not path.endswith(".tmp"))


def find_state(folder: str, which: str) -> str | None:
    """Return the state to continue from. which: "newest", "auto", or a path.

    newest  ValueError if there is none, or if it is damaged, naming the one before it
    auto    the newest that is whole; None if there is none
    """
    states = states_in(folder)
    if which == "auto":
        for path in reversed(states):
            reason = damage(path)
            if reason is None:
                return path
            print(f"{path}: {reason}; passed over", flush=True)
        return None
    if which == "newest" and not states:
        mend = "start it without --resume, or with --resume=auto"
        raise ValueError(f"--resume: there is no state of a run in {folder}; {mend}")
    path = states[-1] if which == "newest" else which.rstrip("/")
    if os.path.realpath(path) not in map(os.path.realpath, states):
        there = ", ".join(states) or "none"
        raise ValueError(f"--resume={path}: is no state of this run; there are {there}")
    reason = damage(path)
    if reason is not None:
        others = [other for other in states if other != path and damage(other) is None]
        offer = f"--resume={others[-1]}" if others else "start anew without --resume"
        raise ValueError(f"{path}: {reason}; use {offer}")
    return path


def damage(path: str) -> str | None:
    """Say what is wrong with a state, by the SHA-256 of its files; None: nothing."""
    try:
        with open(os.path.join(path, "SHA256SUMS"), encoding="utf-8") as f:
            expected = dict(reversed(line.rstrip("\n").split("  ", 1)) for line in f)
    except (OSError, ValueError):
        return "damaged: its SHA256SUMS cannot be read"
    if "state.json" not in expected or set(expected) | {"SHA256SUMS"} != set(os.listdir(path)):
        return "damaged: its files are not those of SHA256SUMS"
    for name, digest in expected.items():
        if file_sha256(os.path.join(path, name)) != digest:
            return f"damaged: {name} has another SHA-256 than when it was written"
    return None


def read_metadata(path: str) -> dict:
    with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
        return json.load(f)


def load_state(path: str, tensors: dict[str, Tensor]) -> None:
    """Read a state into tensors of the same names, on any number of processes. Collective."""
    with distributed_checkpoint() as dcp:
        reader = dcp.HuggingFaceStorageReader(path)
        dcp.load(tensors, storage_reader=reader, no_dist=parallel.world_size() == 1)


@contextlib.contextmanager
def distributed_checkpoint() -> Iterator:
    """torch.distributed.checkpoint, without its warning that there is but one process."""
    # Imported here because it takes as long as everything else together, even for --help.
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield dcp
