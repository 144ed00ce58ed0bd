"""Several processes equal one; a run that was killed equals one that was not."""

import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    FILES,
    ONE_THREAD,
    ROOT,
    assert_close_runs,
    assert_same_runs,
    command,
    log_of,
    random_groups,
    run,
    tiny,
    weights_of,
    write,
)
from safetensors import safe_open

from losses import LOSSES, REGULARIZERS, token_kl
from spo import checkpoint, parallel, state
from spo.groups import make_batch
from spo.reference import kl_of_rounding


@pytest.fixture
def flags(workshop, tokenizer, tmp_path):
    """The flags of a small run in the workshop's folder; pairs have prompts, so that prompts and
    lengths are uneven.
    """
    prompts = ["", "the owl", "found a golden key under", "an"]
    lines = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    write(tmp_path / "ranked.jsonl", *(r | {"prompt": prompts[i % 4]} for i, r in enumerate(lines)))

    def make(loss: str, out_dir: str, *others: str) -> list[str]:
        file = FILES[LOSSES[loss].data]
        return [
            f"--loss={loss}",
            "--init_from=start.pt",
            f"--tokenizer={tokenizer.path}",
            f"--data={file}.jsonl",
            "--max_iters=10",
            "--batch_size=4",
            "--eval_interval=3",
            "--eval_stories=4",
            "--eval_pool=32",
            "--judge=offline",
            "--max_new_tokens=16",
            "--log_interval=1",
            "--learning_rate=1e-3",
            "--warmup_iters=1",
            "--report=false",
            "--curves=false",
            f"--out_dir={out_dir}",
            *others,
        ]

    return make


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["spo_rank", pytest.param("kto", marks=pytest.mark.slow)])
def test_two_processes_equal_one(flags, loss):
    """SPO with its samples, weights and KL; KTO with its batch statistic: the first steps to
    rounding.
    """
    extra = [] if loss == "kto" else ["--kl_batch_size=6", "--kl_interval=2"]
    run(1, flags(loss, "one", "--max_iters=4", *extra))
    run(2, flags(loss, "two", "--max_iters=4", *extra))
    assert_close_runs("one", "two", 2e-4)
    run(2, flags(loss, "small", "--max_iters=4", "--micro_batch_size=1", *extra))
    assert_close_runs("two", "small", 2e-4)
    one, two = (
        [json.loads(line)["text"] for line in open(f"{f}/stories/step_000000.jsonl")]
        for f in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize("which", [[], pytest.param(["all"], marks=pytest.mark.slow)])
def test_every_objective_has_one_gradient_whatever_the_layout(which):
    """All losses and regularizers, SPO with its online samples: 2 processes x 2 (all: 1, 2 or 4)
    groups a micro-batch against 1 x 8.
    """
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        os.path.join(ROOT, "tests", "layouts.py"),
        *which,
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "returned a view" not in done.stderr  # torch's warning, of each process
    errors = json.loads(done.stdout.splitlines()[-1])
    cases = len(LOSSES) + len(REGULARIZERS)
    assert len(errors) == (2 * 3 * cases if which else cases) + 2
    for case, error in errors.items():
        assert error < (1e-12 if "float64" in case else 1e-5), case


def test_activation_checkpointing_changes_nothing(workshop):
    workshop("spo_rank")
    plain, weights = log_of("out"), weights_of("out")
    workshop("spo_rank", "--activation_checkpointing")
    assert log_of("out") == plain
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of("out").items())


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bfloat16_is_close_to_float32_and_its_kl_begins_at_0(flags, processes):
    """Policy and reference compute alike."""
    run(1, flags("spo_rank", "exact", "--max_iters=4"))
    run(processes, flags("spo_rank", "low", "--max_iters=4", "--dtype=bfloat16"))
    first, exact = log_of("low")[1], log_of("exact")[1]
    assert first["step"] == 0 and first["kl"] == 0
    assert first["logps/chosen"] == pytest.approx(exact["logps/chosen"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_bfloat16_run_goes_on_from_its_state(flags, processes):
    """Weights and optimizer stay float32."""
    run(processes, flags("spo_rank", "low", "--max_iters=4", "--dtype=bfloat16"))
    killed_at(
        processes,
        flags("spo_rank", "again", "--max_iters=4", "--dtype=bfloat16"),
        3,
        random.Random(0),
    )
    run(processes, flags("spo_rank", "again", "--max_iters=4", "--dtype=bfloat16", "--resume=auto"))
    assert_same_runs("low", "again")


def test_moved_by_rounding_moves_a_quarter_of_the_weights_and_puts_them_back():
    """Weights of a run lie anywhere, published ones are bfloat16 numbers: as many move of both."""
    for published in (False, True):
        model = tiny(dim=64, hidden_dim=96)
        if published:
            model.load_state_dict({n: w.bfloat16().float() for n, w in model.state_dict().items()})
        with torch.no_grad():
            model.tok_embeddings.weight[0] = 0.0  # as of a token that is padding
        before = copy.deepcopy(model.state_dict())
        with parallel.moved_by_rounding(model, seed=7):
            moved = copy.deepcopy(model.state_dict())
        weight, other = before["tok_embeddings.weight"], moved["tok_embeddings.weight"]
        neighbours = (weight.bfloat16() != other.bfloat16()).float().mean()
        assert 0.2 < neighbours < 0.3, published
        assert torch.equal(other[0], weight[0])
        half_a_unit = torch.exp2(torch.floor(torch.log2(weight.abs())) - 8)
        assert ((other - weight).abs() <= (2 if published else 1) * half_a_unit * 1.0001).all()
        assert all(torch.equal(w, model.state_dict()[name]) for name, w in before.items())


def test_what_rounding_shows_includes_the_classifier(monkeypatch):
    """The gathered weights of a sharded model are one memory, whatever is gathered into it."""

    @contextlib.contextmanager
    def only_the_classifier_moves(model, seed):
        weight = parallel.local(model.output.weight).detach()
        weight *= 1.25
        yield
        weight /= 1.25

    monkeypatch.setattr(parallel, "moved_by_rounding", only_the_classifier_moves)
    parallel.start("cpu", "bfloat16")
    try:
        model, groups = tiny(tied=False), random_groups(4, 1)
        plain = tiny(tied=False).to(torch.bfloat16)
        parallel.shard(model, "bfloat16")
        found = kl_of_rounding(model, groups, 0)
        del model
    finally:
        parallel.end()
    expected = 0.0
    with torch.no_grad():
        for group in groups:
            batch = make_batch([group])
            logits = plain.hidden(batch.tokens).float() @ plain.output.weight.float().t()
            moved = plain.hidden(batch.tokens).float() @ (1.25 * plain.output.weight.float()).t()
            expected += float(token_kl(moved, logits, batch.mask).sum()) / len(groups)
    assert found == pytest.approx(expected, rel=0.05) and found > 0.1


@pytest.mark.parametrize("stories", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_bfloat16_run_says_what_its_rounding_alone_would_show_and_does_not_stop_on_it(
    flags, stories
):
    """A policy that hardly moves, with a limit far below what bfloat16 can tell from 0."""
    more = [
        "--max_iters=4",
        "--dtype=bfloat16",
        f"--eval_stories={stories}",
        "--learning_rate=5e-5",
    ]
    limit = "--stop_kl=1e-9"
    words = flags("spo_rank", "out", *more, *([limit] if stories else []))
    if not stories:
        words = [word for word in words if not word.startswith("--eval_pool")]
    printed = run(1, words)
    assert "(bfloat16 alone shows 0.0" in printed and log_of("out")[-1]["step"] >= 3
    noise = {entry["eval/kl_rounding"] for entry in log_of("out") if "eval/kl_rounding" in entry}
    assert len(noise) == (1 if stories else 0) and all(value > 0 for value in noise)
    if stories:
        assert "--stop_kl=1e-09 does not act on a KL of" in printed
        run(1, flags("spo_rank", "exact", "--max_iters=4"))
        assert not any("eval/kl_rounding" in entry for entry in log_of("exact"))


def test_what_a_bfloat16_run_learned_is_in_its_checkpoints(flags):
    """At a learning rate of 1e-6 nearly nothing would be left in bfloat16, and that is said."""
    more = ["--max_iters=4", "--dtype=bfloat16", "--eval_interval=4", "--learning_rate=1e-6"]
    assert "--save_dtype" not in run(1, flags("dpo_rank", "out", *more))
    (path,) = state.states_in("out/state")
    saved, start = weights_of("out"), checkpoint.load("start.pt").state_dict()
    with safe_open(f"{path}/part-00001-of-00001.safetensors", "pt") as f:
        learned = {name: f.get_tensor(f"model.{name}") for name in saved if name != "output.weight"}
    assert all(torch.equal(saved[name], weight) for name, weight in learned.items())
    assert not torch.equal(saved["norm.weight"], start["norm.weight"])
    printed = run(1, flags("dpo_rank", "low", *more, "--save_dtype=bfloat16"))
    share = re.search(r"step 4: ckpt.pt is bfloat16 and keeps (.*)% of the weights' ch", printed)
    assert float(share[1]) < 5


@pytest.mark.parametrize("stories", [1, 3])
def test_two_processes_judge_any_number_of_stories(flags, stories):
    """Uneven shares, and none for one of the two: the evaluations are those of one process."""
    more = ["--max_iters=2", "--eval_interval=2", f"--eval_stories={stories}"]
    run(1, flags("dpo_rank", "one", *more))
    run(2, flags("dpo_rank", "two", *more))
    assert_close_runs("one", "two", 2e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_and_dealt_parts_are_all_of_the_things(monkeypatch, size):
    things, shares, dealt = list(range(10)), [], []
    monkeypatch.setattr(parallel, "world_size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares += things[parallel.share(10)]
        dealt.append(parallel.deal(things))
    assert shares == things == parallel.undeal(dealt)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


# --- kill and resume -----------------------------------------------------------------------------


def killed_at(processes: int, flags: list[str], after_lines: int, rng: random.Random) -> None:
    """Starts the run and kills all of it (-9) when its log has so many lines, or a moment later."""
    folder = next(f.split("=")[1] for f in flags if f.startswith("--out_dir"))
    process = subprocess.Popen(
        command(processes, *flags),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | ONE_THREAD,
        start_new_session=True,
    )
    log = f"{folder}/log.jsonl"
    while process.poll() is None:
        if os.path.exists(log) and open(log, "rb").read().count(b"\n") >= after_lines:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_campaign(flags, loss: str, processes: int, kills: int) -> None:
    rng = random.Random(kills)
    run(processes, flags(loss, "unbroken"))
    lines = len(log_of("unbroken"))
    for _ in range(kills):
        killed_at(processes, flags(loss, "killed", "--resume=auto"), rng.randrange(1, lines), rng)
        assert not os.path.exists("killed/state") or [
            state.damage(p) for p in state.states_in("killed/state")
        ].count(None) == len(state.states_in("killed/state"))
    run(processes, flags(loss, "killed", "--resume=auto"))
    assert_same_runs("unbroken", "killed")


@pytest.mark.parametrize(
    "loss,processes", [("spo_rank", 1), pytest.param("spo_rank", 2, marks=pytest.mark.slow)]
)
def test_a_killed_run_ends_as_an_unbroken_one(flags, loss, processes):
    kill_campaign(flags, loss, processes, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("loss", ["spo_rank", "spo", "dpo", "kto", "best_sft", "simpo", "sdpo_bon"])
def test_runs_killed_again_and_again_end_as_unbroken_ones(flags, loss, processes):
    kill_campaign(flags, loss, processes, kills=3)


def test_a_resumed_run_may_have_another_number_of_processes(flags):
    """1 -> 2 -> 1, extended each time: the same batches and, to rounding, the same losses."""
    steady = "--decay_lr=false"
    run(1, flags("spo_rank", "one", steady, "--max_iters=9"))
    run(1, flags("spo_rank", "moved", steady, "--max_iters=3"))
    run(2, flags("spo_rank", "moved", steady, "--max_iters=6", "--resume"))
    run(1, flags("spo_rank", "moved", steady, "--max_iters=9", "--resume"))
    assert_close_runs("one", "moved", 5e-3)


def test_sigterm_keeps_the_state_and_exits_0(flags):
    long = ["--max_iters=24", "--eval_interval=24"]
    run(1, flags("spo_rank", "unbroken", *long))
    process = subprocess.Popen(
        command(1, *flags("spo_rank", "out", *long)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ONE_THREAD,
    )
    while not os.path.exists("out/log.jsonl") or len(log_of("out")) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "stopped by SIGTERM before step" in printed
    run(1, flags("spo_rank", "out", *long, "--resume"))
    assert_same_runs("unbroken", "out")


@pytest.mark.slow
def test_torchrun_recovers_from_a_lost_worker(flags):
    """--max-restarts, and --resume=auto: the run ends as an unbroken one."""
    run(2, flags("spo_rank", "unbroken"))
    words = command(2, *flags("spo_rank", "out", "--resume=auto"))
    words.insert(words.index("--standalone"), "--max-restarts=3")
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_THREAD,
    )
    while not os.path.exists("out/log.jsonl") or len(log_of("out")) < 7:
        time.sleep(0.005)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    assert_same_runs("unbroken", "out")


# --- states that cannot be used ------------------------------------------------------------------


def spoil(path: str, how: str) -> None:
    (name,) = [n for n in os.listdir(path) if n.endswith(".safetensors")]
    file = os.path.join(path, name)
    content = bytearray(open(file, "rb").read())
    if how == "flip":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        del content[len(content) // 2 :]
    elif how == "zeros":
        content[:] = bytes(len(content))
    elif how == "gone":
        os.remove(file)
        return
    open(file, "wb").write(content)


@pytest.mark.parametrize("how", ["flip", "cut", "zeros", "gone"])
def test_a_damaged_state_is_refused_by_name_and_the_one_before_it_offered(workshop, capsys, how):
    workshop("dpo_rank", "--max_iters=8")
    older, newer = state.states_in("out/state")
    unbroken = weights_of("out")
    spoil(newer, how)
    with pytest.raises(ValueError, match=f"{newer}: damaged: .*; use --resume={older}"):
        workshop("dpo_rank", "--max_iters=8", "--resume")
    workshop("dpo_rank", "--max_iters=8", "--resume=auto")
    assert (
        f"{newer}: damaged" in (printed := capsys.readouterr().out)
        and f"resumed from {older}, step 4" in printed
    )
    assert all(torch.equal(weight, weights_of("out")[name]) for name, weight in unbroken.items())


def test_only_the_very_run_is_resumed(workshop, tmp_path):
    with pytest.raises(ValueError, match="--resume: there is no state of a run in out/state"):
        workshop("dpo_rank", "--resume")
    workshop("dpo_rank", "--resume=auto")  # nothing there: a new run
    with pytest.raises(
        ValueError, match=r"--learning_rate=0.1: out/state/step_00000008 is of a run with 0.0003"
    ):
        workshop("dpo_rank", "--learning_rate=0.1", "--resume")
    with pytest.raises(
        ValueError,
        match="--resume=elsewhere: is no state of this run; there are out/state/step_00000004, ",
    ):
        workshop("dpo_rank", "--resume=elsewhere")
    workshop("dpo_rank", "--resume=out/state/step_00000004", "--micro_batch_size=1")
    text = (tmp_path / "ranked.jsonl").read_text()
    (tmp_path / "ranked.jsonl").write_text(text.replace("owl", "cat"))
    with pytest.raises(ValueError, match="ranked.jsonl: has changed since the run began"):
        workshop("dpo_rank", "--resume")


def test_a_new_run_leaves_no_state_of_the_former(workshop):
    workshop("dpo_rank")
    workshop("dpo_rank", "--max_iters=2")
    assert [os.path.basename(p) for p in state.states_in("out/state")] == ["step_00000002"]


def test_a_run_that_ended_before_its_first_state_begins_anew_and_says_so(
    workshop, capsys, monkeypatch
):
    """At step 0 nothing is kept: its state would be as large as the run, and hold no work."""
    workshop("dpo_rank", "--max_iters=4", "--out_dir=unbroken")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("spo_train.optimizer_step", interrupted)
        workshop("dpo_rank", "--max_iters=4")
    assert state.states_in("out/state") == [] and os.path.isfile("out/ckpt.pt")
    capsys.readouterr()
    workshop("dpo_rank", "--max_iters=4", "--resume")
    printed = capsys.readouterr().out
    assert "out: the run ended before its first state; it begins anew" in printed
    assert_same_runs("unbroken", "out")
    os.makedirs("empty")
    with pytest.raises(ValueError, match="there is no state of a run in empty/state"):
        workshop("dpo_rank", "--resume", "--out_dir=empty")


def test_a_run_that_got_further_is_never_begun_anew(workshop):
    """Somebody removed its states to make room. And a run of other flags is another run."""
    workshop("dpo_rank", "--max_iters=4")
    weights = weights_of("out")
    shutil.rmtree("out/state")
    for resume in ("--resume", "--resume=auto"):
        with pytest.raises(ValueError, match="--resume: out: its states are gone, and starting an"):
            workshop("dpo_rank", "--max_iters=8", resume)
    assert all(torch.equal(weight, weights_of("out")[name]) for name, weight in weights.items())
    workshop("dpo_rank", "--max_iters=1", "--eval_interval=4", "--eval_stories=0")
    os.remove("out/ckpt.pt")
    shutil.rmtree("out/state")
    with pytest.raises(ValueError, match="--learning_rate=0.1: out/config.json is of a run with 0"):
        workshop("dpo_rank", "--max_iters=1", "--resume", "--learning_rate=0.1")


def test_a_state_of_an_earlier_version_is_refused_in_words(workshop):
    workshop("dpo_rank", "--max_iters=2")
    (path,) = state.states_in("out/state")
    (part,) = [name for name in os.listdir(path) if name.startswith("part-")]
    os.rename(f"{path}/{part}", f"{path}/shard-00001-model-00001-of-00001.safetensors")
    sums = open(f"{path}/SHA256SUMS").read()
    open(f"{path}/SHA256SUMS", "w").write(sums.replace(part, "shard-00001-model-00001-of-00001"))
    with pytest.raises(ValueError, match="written by an earlier version, .*start anew without"):
        workshop("dpo_rank", "--max_iters=2", "--resume")


SAVES_30M = """
import sys, torch
import spo
from spo import state
from model import ModelArgs, Transformer

def peak():  # resident at most since the last reset, in bytes
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.manual_seed(0)
model = Transformer(ModelArgs(dim=512, n_layers=6, n_heads=8, vocab_size=16384, hidden_dim=1408))
optimizer = torch.optim.AdamW(model.parameters())
tensors = state.tensors_of(model, optimizer)
for tensor in tensors.values():
    tensor.add_(1.0)  # its memory is there from now on
state.save_state(sys.argv[1], 1, {"small": torch.zeros(8)}, {})  # what the first call imports
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = peak()
state.save_state(sys.argv[1], 2, tensors, {})
largest = max(tensor.nbytes for tensor in tensors.values())
print(peak() - before, largest, sum(tensor.numel() for tensor in tensors.values()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no /proc to read peaks in")
def test_saving_a_state_takes_at_most_the_memory_of_its_largest_tensor(tmp_path):
    """30M weights with two moments each: 3 times 115 MB, the largest tensor 34 MB."""
    words = [sys.executable, "-c", SAVES_30M, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    more, largest, numbers = map(int, done.stdout.split())
    assert more <= largest < 4 * numbers / 9


def test_a_process_that_cannot_write_its_part_ends_all_in_one_line(flags, monkeypatch, tmp_path):
    (tmp_path / "full.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {ROOT!r})\n"
        "import spo_train\n"
        "from spo import parallel, state\n"
        "from spo.config import main_program\n"
        "write = state.write_tensors\n"
        "def full(path, tensors):\n"
        "    if parallel.rank() == 1:\n"
        "        raise OSError(28, 'No space left on device', path)\n"
        "    return write(path, tensors)\n"
        "state.write_tensors = full\n"
        "main_program(spo_train.main)\n"
    )
    words = command(2, *flags("dpo_rank", "out", "--eval_stories=0"))
    words = [str(tmp_path / "full.py") if word.endswith("spo_train.py") else word for word in words]
    words = [word for word in words if not word.startswith("--eval_pool")]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | ONE_THREAD)
    assert done.returncode != 0
    assert "out/state/step_00000003: No space left on device" in done.stderr
    assert os.listdir("out/state") == []


def test_a_state_holds_nothing_that_could_run_code(workshop):
    workshop("spo_rank", "--max_iters=2")
    path = state.states_in("out/state")[-1]
    assert {os.path.splitext(name)[1] for name in os.listdir(path)} == {".safetensors", ".json", ""}
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=path).returncode == 0


def test_a_full_disk_leaves_the_former_state(workshop, monkeypatch):
    workshop("dpo_rank", "--max_iters=8")
    before = {p: state.damage(p) for p in state.states_in("out/state")}
    shutil.rmtree("out/state/step_00000008")

    def full(*_):
        raise OSError(28, "No space left on device", "out/state")

    with monkeypatch.context() as broken:
        broken.setattr(state, "flush", full)
        with pytest.raises(OSError, match="No space left"):
            workshop("dpo_rank", "--max_iters=8", "--resume")
    assert [state.damage(p) for p in state.states_in("out/state")] == [None]
    workshop("dpo_rank", "--max_iters=8", "--resume")
    assert {p: state.damage(p) for p in state.states_in("out/state")} == before
    assert not [name for name in os.listdir("out/state") if name.endswith(".tmp")]
