"""The folder of a run: its log, its best checkpoint, and the state that --resume continues from.

run.json marks a folder as a run of ours, and is locked while a process works there: nothing else is
ever replaced, and no two runs mix.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from model import Transformer
from spo import checkpoint, parallel
from spo.config import counted, flags_of, refuse_if
from spo.files import (
    append,
    flush,
    inputs_sha256,
    link,
    lock,
    named_errors,
    read_json_object,
    read_jsonl,
    remove,
    this_process,
    write_jsonl,
    write_text,
)
from spo.groups import EncodedGroup
from spo.plot import draw_curves
from spo.progress import progress
from spo.state import (
    find_state,
    load_state,
    read_metadata,
    save_state,
    states_in,
    tensors_of,
)
from spo.templates import read_template
from spo.tokenizer import Tokenizer, copy_tokenizer

SECONDS_FOR_A_DYING_RUN = 30  # a resumed or restarted run may overlap the one it continues
MOST_BYTES_IN_FLOAT32 = 2e9  # of a checkpoint; a larger one is of the run's dtype
NATS_OF_DIVERGENCE = 300  # that a response's log-prob falls in a run that forgets how to write
RUN_OF = {"run_of": "spo_train.py"}  # what run.json says of a folder that is ours
FILES_OF_A_RUN = (
    "ckpt.pt",
    "best.pt",
    "model.bin",
    "model.bin.sha256",
    "log.jsonl",
    "curves.png",
    "pool-*.jsonl",
    "config.json",
    "tokenizer.model",
    "tokenizer.model.sha256",
    "tokenizer.bin",
    "tokenizer.json",
    "tokenizer.json.sha256",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "step_*.pt",
    "stories/*.jsonl",
)


def identity(config, tokenizer: Tokenizer) -> dict:
    """Return what makes a run this run: its flags, but for free ones, and what its inputs hold.

    A path may be spelled, and a file may be called, as one likes.
    """
    values = dataclasses.asdict(config) | {"tokenizer": tokenizer.path}
    declared = flags_of(config).items()
    paths = {name: values[name] for name, flag in declared if flag.path}
    read = {name: path for name, path in paths.items() if os.path.exists(path)}
    inputs = {name: inputs_sha256(path) for name, path in read.items()}
    template, _ = read_template(tokenizer.path)
    if template:  # messages are read by it
        inputs["tokenizer"] += f" {hashlib.sha256(template.encode()).hexdigest()}"
    flags = {k: values[k] for k, flag in declared if not (flag.free or flag.path)}
    return {"flags": flags, "inputs": inputs}


def is_inside(path: str, folder: str) -> bool:
    """Tell whether a path is a folder, or lies in it."""
    real = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), real]) == real


def description_of_run(folder: str) -> str | None:
    """Return "2026-11-27 10:47, 96 steps" of a folder that a run of ours wrote; None of any other.

    run.json marks it; earlier versions wrote none, but config.json and log.jsonl.
    """
    try:
        mark, flags = os.path.join(folder, "run.json"), os.path.join(folder, "config.json")
        if os.path.isfile(mark) and os.path.getsize(mark):
            marked = read_json_object(mark)
            if marked.get("run_of") != RUN_OF["run_of"]:
                return None
            began = str(marked.get("began"))
        else:
            if not {"loss", "learning_rate", "out_dir"} <= read_json_object(flags).keys():
                return None
            began = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(flags)))
    except (OSError, ValueError):
        return None
    steps = 0
    with contextlib.suppress(ValueError, KeyError, TypeError):  # no log yet, or one that a kill cut
        for _, entry in read_jsonl(os.path.join(folder, "log.jsonl")):
            steps = max(steps, entry["step"] + ("loss" in entry))  # a step that was taken
    return f"{began}, {steps} steps"


class RunFolder:
    """Where a run writes, and how far it has come."""

    def __init__(self, config, tokenizer: Tokenizer):
        """Find the state that --resume means, or make the folder of a new run. Collective.

        config  the run's flags: out_dir, resume and the inputs are read here, and all are kept
        ValueError if another run is at work there, if the state is of another run, if a new run
        would replace what it reads or what is no run, or if the processes read different things.
        """
        self.config = config
        self.max_iters = config.max_iters
        self.identity = identity(config, tokenizer)
        parallel.refuse_differences(self.identity)
        self.first_step = 0
        self.evaluated = -1  # the last step that was evaluated
        self.best_rate = -1.0
        self.kl = 0.0  # at the last evaluation
        self.kl_rounding: float | None = None  # of reference.kl_of_rounding, once it is known
        self.best_step = self.saved_step = 0  # of best.pt, and of the newest state
        self.samples: list[EncodedGroup] | None = None  # the policy's, from the state
        self.stopped = False
        self._sigterm = threading.Event()
        self._bar: tqdm | None = None
        self._said: set[str] = set()
        self._first_chosen: float | None = None
        self.state = parallel.on_rank_0(lambda: self._open(tokenizer))

    def path(self, *names: str) -> str:
        return os.path.join(self.config.out_dir, *names)

    # --- beginning -------------------------------------------------------------------------------

    def _open(self, tokenizer: Tokenizer) -> str | None:
        """Lock out_dir, and make it this run's; return the state to resume, None: a new run."""
        config, out = self.config, f"--out_dir={self.config.out_dir}"
        refuse_if(not config.out_dir, "--out_dir=: is empty; name a folder")
        if os.path.isdir(config.init_from) and is_inside(config.out_dir, config.init_from):
            raise ValueError(f"{out}: lies in --init_from; choose another --out_dir")
        is_new = not os.path.isdir(config.out_dir)
        try:
            os.makedirs(config.out_dir, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{out}: cannot be made: {error.strerror}") from None
        continues = config.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        wait = SECONDS_FOR_A_DYING_RUN if continues else 0
        mark = lock(self.path("run.json"), out, wait, again=True)
        try:
            state = self._state_to_resume() if config.resume else None
            if state is None:
                self._refuse_what_is_no_run(tokenizer)
            began = time.strftime("%Y-%m-%d %H:%M")
            if state is not None:
                began = (description_of_run(config.out_dir) or began).split(",")[0]
            with named_errors(self.path("run.json")):
                mark.truncate(0)
                mark.write(json.dumps(RUN_OF | {"began": began} | this_process()).encode())
        except BaseException:
            if os.path.getsize(self.path("run.json")) == 0:  # it was not there
                remove(self.path("run.json"))
            mark.close()
            if is_new:
                os.rmdir(config.out_dir)
            raise
        self._lock = mark
        self._remove_leftovers()
        if state is None:
            self._new_run(tokenizer)
        return state

    def _files_there(self, suffix: str = "") -> list[str]:
        folder = glob.escape(self.config.out_dir)
        patterns = [os.path.join(folder, name + suffix) for name in FILES_OF_A_RUN]
        return [path for pattern in patterns for path in glob.glob(pattern)]

    def _refuse_what_is_no_run(self, tokenizer: Tokenizer) -> None:
        """ValueError if a new run would replace what is no earlier run, or what it reads."""
        config, choose = self.config, "choose another --out_dir"
        former = self._files_there()
        if os.path.getsize(self.path("run.json")):
            former.append(self.path("run.json"))
        if os.path.isdir(self.path("state")):
            former.append(self.path("state"))
        if not former:
            return
        inputs = [config.init_from, tokenizer.path, config.data, config.baseline, config.prompt]
        read_here = {os.path.realpath(path) for path in inputs if path}
        for path in former:
            if os.path.realpath(path) in read_here:
                reads = f"this run reads {path}, and would replace what is in that folder"
                raise ValueError(f"--out_dir={config.out_dir}: {reads}; {choose}")
        earlier = description_of_run(config.out_dir)
        not_ours = f"holds {former[0]}, which a run would replace, and is no folder of a run"
        refuse_if(earlier is None, f"--out_dir={config.out_dir}: {not_ours}; {choose}")
        print(f"{config.out_dir}: replacing the run of {earlier}", flush=True)

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of runs that were killed here."""
        remove(*self._files_there(".tmp*"))
        for path in glob.glob(os.path.join(glob.escape(self.path("state")), "step_*.tmp")):
            shutil.rmtree(path)

    def _new_run(self, tokenizer: Tokenizer) -> None:
        """Remove what an earlier run left, and write what a run begins with."""
        remove(*self._files_there())
        shutil.rmtree(self.path("state"), ignore_errors=True)
        os.makedirs(self.path("stories"), exist_ok=True)
        os.makedirs(self.path("state"), exist_ok=True)
        write_text(self.path("config.json"), json.dumps(dataclasses.asdict(self.config), indent=1))
        copy_tokenizer(tokenizer, self.config.out_dir)

    def _state_to_resume(self) -> str | None:
        """Return the state that --resume means, if it is one of this very run.

        ValueError, naming the flag, if not.
        """
        out = self.config.out_dir
        if description_of_run(out) is not None and not states_in(self.path("state")):
            if self._had_a_state():
                lost = "its states are gone, and starting anew would replace its ckpt.pt"
                raise ValueError(f"--resume: {out}: {lost}; name another --out_dir to keep it")
            print(f"{out}: the run ended before its first state; it begins anew")
            return None
        path = find_state(self.path("state"), self.config.resume)
        if path is None:
            return None
        metadata = read_metadata(path)
        former = metadata["identity"]
        self._refuse_other_flags(former["flags"], path)
        inputs, former_inputs = self.identity["inputs"], former.get("inputs", {})
        for name in {**inputs, **former_inputs}:
            if former_inputs.get(name) != inputs.get(name):
                value = getattr(self.config, name) or "(the default)"
                changed = "has changed since the run began; it cannot be resumed"
                raise ValueError(f"--{name}={value}: {changed}")
        step = metadata["step"]
        if self.max_iters < step:
            mend = f"give {step} to end it there, with its final table, or more to continue"
            raise ValueError(f"--max_iters={self.max_iters}: {path} is of step {step}; {mend}")
        return path

    def _had_a_state(self) -> bool:
        """Tell whether the run here, which has no state, got so far that it had one.

        The first one is written after the ckpt.pt of the first evaluation. ValueError if the run is
        one of other flags.
        """
        latest = self.path("ckpt.pt")
        step = checkpoint.open_weights(latest).step if os.path.isfile(latest) else 0
        if step > self.config.eval_interval or (step > 0 and not os.path.isdir(self.path("state"))):
            return True
        if os.path.isfile(flags := self.path("config.json")):
            self._refuse_other_flags(read_json_object(flags), flags)
        return False

    def _refuse_other_flags(self, former: dict, where: str) -> None:
        """ValueError, naming the flag, if a run had others. It may be extended, and be closed."""
        for name, value in self.identity["flags"].items():
            before = former.get(name)
            if before != value and name != "max_iters":
                mend = "resume it with the same flags, or start anew in another --out_dir"
                raise ValueError(f"--{name}={value}: {where} is of a run with {before}; {mend}")

    def start(self, policy: Transformer, optimizer: torch.optim.Optimizer, weights) -> None:
        """Load the state, if there is one. Collective. weights: where the policy came from."""
        self.policy = policy
        self.optimizer = optimizer
        self.weights = weights
        if self.state is not None:
            self._load_state(self.state)

    def _load_state(self, path: str) -> None:
        metadata = read_metadata(path)
        self.first_step = self.saved_step = metadata["step"]
        self.best_rate, self.best_step = metadata["best_rate"], metadata.get("best_step", 0)
        self.evaluated, self.kl = metadata["evaluated"], metadata.get("kl", 0.0)
        self.kl_rounding = metadata.get("kl_rounding")
        load_state(path, tensors_of(self.policy, self.optimizer))
        if metadata["online"] is not None:
            self.samples = [EncodedGroup(*group) for group in metadata["online"]]
        if parallel.rank() == 0:
            with open(self.path("log.jsonl"), "ab") as log:
                log.truncate(metadata["log_bytes"])  # what was logged later is computed again
        parallel.print0(f"resumed from {path}, step {self.first_step}")
        before = metadata["identity"]["flags"]["max_iters"]
        if before != self.max_iters:
            schedule = "; the learning rate follows the new schedule from here on"
            changes = schedule if self.config.decay_lr else ""
            parallel.print0(f"--max_iters was {before} and is {self.max_iters}{changes}")

    # --- while it runs ---------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps from the first to max_iters, under a progress bar; listen to SIGTERM."""
        hidden = parallel.rank() > 0
        total, loss = self.max_iters, self.config.loss
        bar = progress(total, loss, "steps", initial=self.first_step, disable=hidden)
        with bar, self._listening():
            self._bar = bar
            if self.config.judged:
                self.say("look at the win-rates below; the loss of one step is mostly noise")
            for step in range(self.first_step, self.max_iters + 1):
                parallel.note_place(f"step {step}")
                yield step
                if step < self.max_iters:
                    bar.update()
        self._bar = None

    def say(self, text: str) -> None:
        """Print a text once, above the progress bar."""
        if parallel.rank() == 0:
            self._bar.write(text)
            sys.stdout.flush()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Let SIGTERM ask for a stop while the loop runs, and Ctrl-C say how to continue.

        Afterwards they do what they did before.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        sigterm = signal.signal(signal.SIGTERM, lambda *_: self._sigterm.set())
        sigint = signal.getsignal(signal.SIGINT)
        if sigint is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, sigterm)
            signal.signal(signal.SIGINT, sigint)

    def _interrupt(self, *_) -> None:
        step, hints = self.saved_step, []
        resume = "" if self.config.resume == "auto" else " with --resume"
        if step == 0:
            hints.append(f"the same command{resume} begins anew: there is no state yet")
        elif os.path.isdir(self.path("state", f"step_{step:08d}")):
            hints.append(f"the same command{resume} continues at step {step}")
            if self.config.judged:
                hints[0] += f", and with --resume --max_iters={step} ends there with its table"
        if os.path.isfile(self.path("best.pt")):
            start = "" if self.best_step else ", the model you started from"
            of_step = f"is the best so far, of step {self.best_step}{start}"
            hints.append(f"{self.path('best.pt')} {of_step}")
        raise KeyboardInterrupt("; ".join(hints))

    def stop_requested(self) -> bool:
        """Tell whether any process was sent SIGTERM. Collective."""
        return bool(parallel.all_reduce_max(int(self._sigterm.is_set())))

    def passes_stop_kl(self, step: int) -> bool:
        """Tell whether --stop_kl ends the run at the evaluation of this step."""
        limit = self.config.stop_kl
        if limit is None or self.evaluated != step or self.kl <= limit:
            return False
        if self.kl <= (self.kl_rounding or 0.0):
            if "noise" not in self._said:
                self._said.add("noise")
                noise = f"a KL of {self.kl:.2g}: bfloat16 alone shows {self.kl_rounding:.2g}"
                self.say(f"step {step}: --stop_kl={limit:g} does not act on {noise}")
            return False
        self.say(f"step {step}: KL {self.kl:.2f} nats is past --stop_kl={limit:g}; the run ends")
        return True

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
            append(self.path("log.jsonl"), (json.dumps({"step": step} | values) + "\n").encode())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record and print the metrics of a step, every log_interval steps and at the last."""
        self._say_if_it_diverges(step, metrics)
        if step % self.config.log_interval == 0 or step == self.max_iters - 1:
            self.record(step, metrics)
            texts = {name: f"{name} {value:.4g}" for name, value in metrics.items()}
            if "kl" in texts and self.kl_rounding is not None:
                texts["kl"] += f" (bfloat16 alone shows {self.kl_rounding:.2g})"
            shown = ", ".join(texts.values())
            self.say(f"step {step}: {shown}")

    def _say_if_it_diverges(self, step: int, metrics: dict[str, float]) -> None:
        """Say, once each, that nothing is learned, or that the policy forgets its responses."""
        lower = f"a lower --learning_rate than {self.config.learning_rate:g} may help"
        if metrics["grad_norm"] == 0 and "zero" not in self._said:
            self._said.add("zero")
            self.say(f"step {step}: the gradient is exactly 0, so nothing is learned; {lower}")
        chosen = metrics.get("logps/chosen")
        if chosen is None:
            return
        self._first_chosen = self._first_chosen or chosen
        fallen = self._first_chosen - chosen
        if fallen > NATS_OF_DIVERGENCE and "fallen" not in self._said:
            self._said.add("fallen")
            forgets = f"the chosen responses' log-prob has fallen by {fallen:.0f} nats"
            self.say(f"step {step}: {forgets}: the policy diverges; {lower}")

    def save_dtype(self) -> str:
        """Return the dtype of ckpt.pt and best.pt: float32, but of a large model the run's."""
        if self.config.save_dtype:
            return self.config.save_dtype
        numbers = sum(weight.numel() for weight in self.policy.parameters())
        return "float32" if 4 * numbers <= MOST_BYTES_IN_FLOAT32 else self.config.dtype

    def say_what_is_lost(self, step: int) -> None:
        """Say how much of what was learned a checkpoint in bfloat16 has lost. Collective.

        A learning rate of 1e-6 moves nearly all weights by less than bfloat16 can tell apart.
        """
        dtype = self.save_dtype()
        if dtype == "float32" or self.weights is None or step == 0:
            return
        kept = checkpoint.movement_kept(self.policy, self.weights, dtype)
        changes = f"ckpt.pt is {dtype} and keeps {kept:.1%} of the weights' changes"
        self.say(f"step {step}: {changes}; --save_dtype=float32 keeps all")

    def save_checkpoint(self, name: str, model: Transformer, step: int, **more) -> None:
        """Write a .pt into the folder; more: as in checkpoint.save_pt."""
        config = dataclasses.asdict(self.config)
        checkpoint.save_pt(self.path(name), model, step, config, **more)

    def save_evaluation(
        self, step: int, model: Transformer, verdict, improved: bool, save_llama2c: Callable
    ) -> None:
        """Write ckpt.pt, the stories of a judged model, and best.pt and model.bin if it improved.

        save_llama2c  writes model.bin, of a path and a model
        """
        more: dict = {}
        if verdict is not None:
            numbers = {k.removeprefix("eval/"): v for k, v in verdict.logged("eval").items()}
            more = {"win_rate": verdict.rate, "evaluation": numbers}
            write_jsonl(self.path("stories", f"step_{step:06d}.jsonl"), verdict.stories)
        self.save_checkpoint("ckpt.pt", model, step, **more)
        # What is of the same step is the same file: a large model is written once.
        if self.config.keep_checkpoints:
            link(self.path("ckpt.pt"), self.path(f"step_{step:06d}.pt"))
        if verdict is not None and improved:
            link(self.path("ckpt.pt"), self.path("best.pt"))
            self.best_step = step
        if improved:
            try:
                save_llama2c(self.path("model.bin"), model)
            except ValueError as error:  # run.c could not compute this model
                if "model.bin" not in self._said:
                    self._said.add("model.bin")
                    self.say(f"left out: {error}")

    def save_state(self, step: int, samples: list[EncodedGroup] | None) -> None:
        """Keep everything that the steps from this one on depend on. Collective."""
        log = self.path("log.jsonl")
        groups = [dataclasses.astuple(group) for group in samples] if samples else None
        if parallel.rank() == 0 and os.path.exists(log):
            flush(log)
        metadata = {
            "identity": self.identity,
            "best_rate": self.best_rate,
            "best_step": self.best_step,
            "kl": self.kl,
            "kl_rounding": self.kl_rounding,
            "evaluated": self.evaluated,
            "log_bytes": os.path.getsize(log) if os.path.exists(log) else 0,
            "online": groups,
        }
        tensors = tensors_of(self.policy, self.optimizer)
        save_state(self.path("state"), step, tensors, metadata)
        self.saved_step = step

    def end(self) -> bool:
        """Draw the curves, let others into the folder; return whether the run came to its end."""
        if parallel.rank() == 0:
            if self.config.curves and self.config.judged and not self.stopped:
                with contextlib.suppress(ValueError):  # no win-rate could be trusted
                    draw_curves([self.config.out_dir], self.path("curves.png"))
            self._lock.close()
        if not self.config.judged and not self.stopped and self.config.report:
            steps = counted(self.max_iters, "step")
            latest = self.path("ckpt.pt")
            unjudged = "nothing was judged, so there is no best.pt"
            tell = f"`python sample.py --checkpoint={latest}`"
            parallel.print0(f"{latest}: the model after {steps}; {unjudged}; {tell}")
        return not self.stopped
