"""A run owns its folder: one at a time, extended and closed, and told apart from other runs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ONE_THREAD, ROOT, command, log_of, run, write
from safetensors.torch import load_file, save_file

import export
import sample
import spo_train
import tinystories_data as data
from spo import checkpoint, files, parallel
from spo import run as run_folder
from spo.files import lock
from spo.tokenizer import Tokenizer

HOLD = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from spo.files import lock, this_process
handle = lock({path!r}, "here")
handle.truncate(0)
handle.write(json.dumps(this_process()).encode())
print("held", flush=True)
{then}
"""


def holder(path: str, then: str = "time.sleep(600)") -> subprocess.Popen:
    """A process that holds a lock."""
    code = HOLD.format(root=ROOT, path=path, then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


# --- locks ---------------------------------------------------------------------------------------


def test_the_second_is_told_who_the_first_is(tmp_path):
    path = str(tmp_path / "run.json")
    first = holder(path)
    here = rf"--out_dir=out: is in use by process {first.pid} on .* since \d{{4}}-\d\d-\d\d "
    with pytest.raises(ValueError, match=here):
        lock(path, "--out_dir=out")
    first.kill()
    first.wait()
    lock(path, "--out_dir=out").close()  # a lock ends with its process


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    path = str(tmp_path / "run.json")
    then = "child = os.fork()\nif child == 0: time.sleep(60)\nprint(child, flush=True)\n"
    first = holder(path, then)
    child = int(first.stdout.readline())
    first.wait()
    os.kill(child, 0)  # it is alive
    lock(path, "here").close()
    os.kill(child, signal.SIGKILL)


def test_a_run_that_ends_in_time_is_waited_for(tmp_path, capsys):
    path = str(tmp_path / "run.json")
    first = holder(path, "time.sleep(1)")
    lock(path, "--out_dir=out", wait=60).close()
    waited = f"--out_dir=out: waiting for process {first.pid} on "
    assert capsys.readouterr().out.startswith(waited)
    first.wait()


def test_a_file_that_was_replaced_is_not_the_locked_one(tmp_path):
    path = str(tmp_path / "a.lock")
    first = lock(path, "here")
    os.remove(path)
    second = lock(path, "here")
    with pytest.raises(ValueError, match="in use by another process"):
        lock(path, "here")
    first.close()
    second.close()


def test_where_there_are_no_locks_that_is_said_once(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", none)
    for name in ("a", "b"):
        lock(str(tmp_path / name), "here").close()
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: has no file locks; start nothing else that writes there"
    ]


def long_run(tokenizer, eval_interval: int) -> list[str]:
    """The flags of a run in the workshop's folder that does not end by itself in time."""
    model = ["--loss=dpo_rank", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    judged = ["--eval_stories=4", "--eval_pool=0", "--max_new_tokens=16", "--curves=false"]
    steps = ["--data=ranked.jsonl", "--batch_size=4", "--max_iters=4000", "--log_interval=1"]
    return [*model, *judged, *steps, f"--eval_interval={eval_interval}", "--out_dir=out"]


def test_two_runs_at_once_do_not_mix(workshop, tokenizer):
    """The second is refused by name; the first ends as it would alone."""
    flags = long_run(tokenizer, 1000)
    first = subprocess.Popen(
        command(1, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not os.path.exists("out/log.jsonl"):
        time.sleep(0.01)
    config = open("out/config.json").read()
    second = subprocess.run(command(1, *flags, "--seed=1"), capture_output=True, text=True)
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert f"--out_dir=out: is in use by process {first.pid} on " in second.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    assert open("out/config.json").read() == config
    steps = [entry["step"] for entry in log_of("out")]
    assert steps[1:] == sorted(set(steps))  # step 0 is there twice: evaluated, and trained


def test_a_foreign_folder_stays_as_it_was(workshop):
    os.makedirs("out/state")
    with open("out/best.pt", "w") as f:
        f.write("mine")
    with pytest.raises(ValueError, match="is no folder of a run"):
        workshop("dpo_rank")
    assert sorted(os.listdir("out")) == ["best.pt", "state"]
    with pytest.raises(ValueError, match="there is no state of a run"):
        workshop("dpo_rank", "--out_dir=new", "--resume")
    assert not os.path.exists("new")


@pytest.mark.parametrize("resume", [False, True])
def test_what_killed_runs_left_is_cleared(workshop, resume):
    workshop("dpo_rank", "--max_iters=4")
    left = ["ckpt.pt.tmp99999999", "best.pt.tmp1", "stories/step_000004.jsonl.tmp7"]
    left += ["model.bin.tmp12", "log.jsonl.tmp12"]
    for name in left:
        with open(f"out/{name}", "w") as f:
            f.write("half")
    os.makedirs("out/state/step_00000009.tmp")
    with open("out/mine.pt.tmp1", "w") as f:
        f.write("no file of a run")
    workshop("dpo_rank", "--max_iters=6", *(["--resume"] if resume else []))
    there = [os.path.join(f, name) for f, _, names in os.walk("out") for name in names]
    assert [path for path in there if ".tmp" in path] == ["out/mine.pt.tmp1"]
    assert not os.path.exists("out/state/step_00000009.tmp")


def test_a_writer_clears_what_a_killed_one_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive, other = tmp_path / f"a.jsonl.tmp{os.getppid()}", tmp_path / "a.jsonl.tmpX"
    for path in (tmp_path / f"a.jsonl.tmp{dead.pid}", alive, other):
        path.write_text("half")
    files.write_jsonl(str(tmp_path / "a.jsonl"), [{}])
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", alive.name, other.name}


def test_two_generate_commands_do_not_share_a_file(workshop, tokenizer, tmp_path):
    first = holder("s.jsonl.part")
    words = ["generate", "--checkpoint=start.pt", f"--tokenizer={tokenizer.path}"]
    with pytest.raises(ValueError, match=f"--out=s.jsonl: is in use by process {first.pid}"):
        data.main([*words, "--out=s.jsonl", "--num_stories=2"])
    first.kill()
    first.wait()


# --- extended, closed, resumed -------------------------------------------------------------------


def test_a_run_may_be_extended_and_says_what_changes(workshop, capsys):
    workshop("dpo_rank", "--max_iters=4")
    workshop("dpo_rank", "--max_iters=8", "--resume")
    printed = capsys.readouterr().out
    assert "--max_iters was 4 and is 8; the learning rate follows the new schedule" in printed
    steps = [entry["step"] for entry in log_of("out") if "loss" in entry]
    assert steps == list(range(8))
    assert checkpoint.open_weights("out/ckpt.pt").step == 8


def test_a_run_can_be_closed_where_it_is(workshop, capsys):
    """Its final table, at the step of its newest state; and no earlier."""
    workshop("dpo_rank", "--max_iters=8", "--report=false")
    shutil.rmtree("out/state/step_00000008")
    with pytest.raises(ValueError, match="--max_iters=2: .* is of step 4; give 4 to end it there"):
        workshop("dpo_rank", "--max_iters=2", "--resume")
    capsys.readouterr()
    workshop("dpo_rank", "--max_iters=4", "--resume")
    printed = capsys.readouterr().out
    assert "last (step 4)" in printed and "best.pt, ckpt.pt, model.bin" in printed


def test_ctrl_c_says_how_to_go_on(workshop, tokenizer):
    flags = long_run(tokenizer, 2)
    words = command(1, *flags)
    process = subprocess.Popen(
        # a shell's background job ignores Ctrl-C, and so would its children
        [sys.executable, "-c", f"import os, signal; signal.signal(2, signal.default_int_handler); "
         f"os.execv({words[0]!r}, {words!r})"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD,
    )  # fmt: skip
    while not os.path.exists("out/log.jsonl") or len(log_of("out")) < 9:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    step = int(last.split("with --resume continues at step ")[1].split(",")[0])
    assert os.path.isdir(f"out/state/step_{step:08d}")
    assert f"and with --resume --max_iters={step} ends there with its table" in last
    assert "out/best.pt is the best so far, of step " in last
    assert "last (step" in run(1, [*flags, "--resume", f"--max_iters={step}"])


@pytest.mark.parametrize("spelling", ["./ranked.jsonl", "link.jsonl", "copy.jsonl"])
def test_another_spelling_of_the_same_input_is_the_same_run(workshop, spelling):
    os.symlink("ranked.jsonl", "link.jsonl")
    shutil.copy("ranked.jsonl", "copy.jsonl")
    workshop("dpo_rank", "--max_iters=4")
    workshop("dpo_rank", "--resume", "--max_iters=4", f"--data={spelling}", "--out_dir=./out")


def another(tokenizer, path: str) -> str:
    """A tokenizer of as many pieces, that is another."""
    content = bytearray(open(tokenizer.path, "rb").read())
    place = content.rindex(b"the")
    content[place : place + 3] = b"eth"
    open(path, "wb").write(content)
    return path


@pytest.mark.parametrize(
    "what", ["data", "tokenizer", "baseline", "init_from", "init_from, one weight", "prompt"]
)
def test_every_input_belongs_to_a_run(workshop, tokenizer, tmp_path, what, monkeypatch):
    export.main(["model", "--checkpoint=start.pt", "--version=-1"])
    stories = [{"prompt": "", "text": f"The owl sang {i} songs."} for i in range(12)]
    write(tmp_path / "baseline.jsonl", *stories)
    shutil.copy(tokenizer.path, "tok.model")
    (tmp_path / "prompt.txt").write_text("{stories}{conclusion}")
    flags = ["--init_from=model", "--tokenizer=tok.model", "--baseline=baseline.jsonl"]
    flags += ["--max_iters=4", "--report=false"]
    if what == "prompt":  # only an API judge takes one
        monkeypatch.setattr(spo_train, "make_judge", lambda _: spo_train.OfflineJudge())
        flags.append("--prompt=prompt.txt")
    workshop("dpo_rank", *flags)
    workshop("dpo_rank", *flags, "--resume")
    if what == "data":
        lines = (tmp_path / "ranked.jsonl").read_text().replace("owl", "cat")
        (tmp_path / "ranked.jsonl").write_text(lines)
    elif what == "tokenizer":
        another(tokenizer, "tok.model")
    elif what == "baseline":
        write(tmp_path / "baseline.jsonl", *reversed(stories))
    elif what == "prompt":
        (tmp_path / "prompt.txt").write_text("{stories} {conclusion}")
    elif what == "init_from, one weight":
        what = "init_from"
        weights = load_file("model/model.safetensors")
        weights["model.norm.weight"][3] += 1e-3
        save_file(weights, "model/model.safetensors", {"format": "pt"})
        os.remove("model/model.safetensors.sha256")
    else:
        config = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps(config | {"rope_theta": 9.0}))
    with pytest.raises(ValueError, match=f"--{what}=.*: has changed since the run began"):
        workshop("dpo_rank", *flags, "--resume")


def test_an_input_that_is_left_out_is_missed(workshop, tmp_path):
    stories = [{"prompt": "", "text": f"The owl sang {i} songs."} for i in range(12)]
    write(tmp_path / "baseline.jsonl", *stories)
    flags = ["--max_iters=4", "--report=false"]
    workshop("dpo_rank", *flags, "--baseline=baseline.jsonl", "--eval_stories=4")
    with pytest.raises(ValueError, match=r"--baseline=\(the default\): has changed since"):
        workshop("dpo_rank", *flags, "--eval_stories=4", "--eval_pool=1024", "--resume")


def test_a_note_beside_the_model_is_no_input(workshop):
    export.main(["model", "--checkpoint=start.pt", "--version=-1"])
    workshop("dpo_rank", "--init_from=model", "--max_iters=4")
    with open("model/README.md", "w") as f:
        f.write("a note")
    workshop("dpo_rank", "--init_from=model", "--max_iters=4", "--resume")


# --- what a run keeps ----------------------------------------------------------------------------


def test_a_policy_that_is_not_finite_is_neither_judged_nor_kept(workshop, monkeypatch):
    """As an optimizer's step can leave it: the last good checkpoint stays."""
    step = spo_train.optimizer_step

    def spoil(optimizer, lr):
        done = step(optimizer, lr)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0][5] = float("nan")
        return done

    for flags in ([], ["--eval_stories=0"]):
        shutil.rmtree("out", ignore_errors=True)
        with monkeypatch.context() as patched:
            patched.setattr(spo_train, "optimizer_step", spoil)
            with pytest.raises(ValueError, match="step 1: .* not finite; ckpt.pt holds the last"):
                workshop("dpo_rank", "--eval_interval=1", *flags)
        assert checkpoint.open_weights("out/ckpt.pt").step == 0
        checkpoint.load("out/ckpt.pt")


def test_a_log_line_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "log.jsonl")
    files.append(path, b'{"step": 0}\n')
    write_some = iter([4, OSError(28, "No space left on device")])

    class Full:
        def __init__(self, f):
            self.f = f

        def __getattr__(self, name):
            return getattr(self.f, name)

        def write(self, content):
            what = next(write_some)
            if isinstance(what, OSError):
                raise what
            return self.f.write(content[:what])

    with open(path, "ab", buffering=0) as f, pytest.raises(OSError):
        files.append_to(Full(f), b'{"step": 1}\n')
    assert open(path).read() == '{"step": 0}\n'


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_odd_numbers_of_processes_train(workshop, tokenizer, processes):
    """A loss without samples needs no multiple for them, and any number of stories is judged."""
    size = f"--batch_size={2 * processes}"
    flags = ["--loss=dpo_rank", "--init_from=start.pt", f"--tokenizer={tokenizer.path}", size]
    flags += [
        "--data=ranked.jsonl",
        "--max_iters=2",
        "--eval_interval=2",
        "--eval_stories=4",
        "--eval_pool=16",
    ]
    flags += ["--max_new_tokens=16", "--warmup_iters=1", "--report=false"]
    run(processes, [*flags, "--out_dir=many"])
    run(1, [*flags, "--out_dir=one"])
    for one, many in zip(log_of("one"), log_of("many"), strict=True):
        for name in one.keys() - {"padding"}:
            assert many[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), name


def failing(flags: list[str], seconds: int | None = None) -> tuple[int, str]:
    environment = os.environ | ONE_THREAD | ({"SPO_TIMEOUT_MINUTES": "0.1"} if seconds else {})
    done = subprocess.run(command(2, *flags), capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def test_when_one_process_fails_one_line_says_why(workshop, tokenizer, tmp_path):
    """In torchrun's last words, once; nobody prints a traceback."""
    flags = ["--loss=dpo_rank", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    code, errors = failing([*flags, "--data=ranked.jsonl", "--batch_size=3"])
    line = "--batch_size=3: 2 processes cannot share it evenly; 2 or 4 would do"
    assert code != 0 and errors.count(line) == 1
    assert line in errors.strip().splitlines()[-2]
    assert errors.count("Traceback") == 1  # torchrun's own


def test_processes_that_read_different_things_are_told_apart(monkeypatch):
    mine = {"flags": {"seed": 1}, "inputs": {"data": "aa"}}
    for kind, name, words in (
        ("flags", "seed", "was started with another --seed"),
        ("inputs", "data", "reads another --data"),
    ):
        other = mine | {kind: {name: "else"}}
        monkeypatch.setattr(parallel, "all_gather", lambda _, other=other: [mine, mine, other])
        with pytest.raises(ValueError, match=f"rank 2 {words} than rank 0"):
            parallel.refuse_differences(mine)
    monkeypatch.setattr(parallel, "all_gather", lambda _: [mine, mine])
    parallel.refuse_differences(mine)


RANKED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
sys.argv = ["spo_train.py"] + [word.replace("RANK", os.environ["RANK"]) for word in sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def torchrun(folder, *flags: str, **environment: str) -> subprocess.Popen:
    """Two processes, each with its own number in the place of RANK."""
    script = os.path.join(ROOT, "spo_train.py")
    (folder / "ranked.py").write_text(RANKED.format(root=ROOT, script=script))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranked.py"]
    return subprocess.Popen(
        [sys.executable, *launch, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_THREAD | environment,
    )


@pytest.mark.parametrize("how", ["fewer", pytest.param("missing", marks=pytest.mark.slow)])
def test_a_rank_that_reads_something_else_ends_the_run(workshop, tokenizer, tmp_path, how):
    lines = (tmp_path / "ranked.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_text("".join(lines))
    if how == "fewer":
        (tmp_path / "1.jsonl").write_text("".join(lines[:-1]))
    flags = ["--loss=dpo_rank", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    process = torchrun(tmp_path, *flags, "--data=RANK.jsonl", "--max_iters=2", "--eval_stories=0")
    errors = process.communicate()[1]
    line = "rank 1 reads another --data than rank 0" if how == "fewer" else "1.jsonl: no such file"
    assert process.returncode != 0 and errors.count(line) == 1, errors[-3000:]
    assert line in errors.strip().splitlines()[-2]
    assert not os.path.exists("out/log.jsonl")


@pytest.mark.slow
def test_a_rank_that_is_stopped_but_alive_is_named(workshop, tokenizer, tmp_path):
    flags = ["--loss=dpo_rank", "--init_from=start.pt", f"--tokenizer={tokenizer.path}"]
    flags += ["--data=ranked.jsonl", "--max_iters=100000", "--eval_stories=0", "--batch_size=4"]
    process = torchrun(tmp_path, *flags, "--log_interval=1", SPO_TIMEOUT_MINUTES="0.2")
    while not os.path.exists("out/log.jsonl") or len(log_of("out")) < 3:
        time.sleep(0.01)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = {}
    for pid in map(int, found.stdout.split()):
        with open(f"/proc/{pid}/environ", "rb") as f:
            ranks[1 if b"\0RANK=1\0" in f.read() else 0] = pid
    os.kill(ranks[1], signal.SIGSTOP)
    while files.is_alive(str(ranks[0])):
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGKILL)  # torchrun would wait 30 s for it
    errors = process.communicate()[1]
    said = "rank 1 did not answer within 0.2 minutes; rank 0 waits for it at step "
    assert errors.count(said) == 1, errors[-3000:]
    assert said in errors.strip().splitlines()[-2]


# --- the demo ------------------------------------------------------------------------------------


def test_a_folder_that_is_no_demo_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("data/demo")
    with open("data/demo/notes.txt", "w") as f:
        f.write("mine")
    with pytest.raises(ValueError, match="data/demo: holds notes.txt, and no recipe.json"):
        spo_train.main(["--max_iters=1"])
    assert open("data/demo/notes.txt").read() == "mine"


def test_a_second_builder_waits_for_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.makedirs("data")
    first = holder("data/demo.lock", "time.sleep(1)")
    monkeypatch.setattr(data, "demo_text", lambda: None)
    monkeypatch.setattr(data, "demo_reference", lambda *_: False)
    config = spo_train.TrainConfig(device="cpu", dtype="float32")
    assert data.build_demo(config, None) is None
    assert f"data/demo: waiting for process {first.pid} on " in capsys.readouterr().out
    first.wait()


def test_constants_of_waiting():
    """Minutes for a process that does not answer; half a minute for a run that dies."""
    assert parallel.timeout().total_seconds() == 600
    assert run_folder.SECONDS_FOR_A_DYING_RUN == 30


# --- before the loop -----------------------------------------------------------------------------

BEFORE_THE_LOOP = """
import sys, time
import spo_train
from spo.config import main_program

def load_policy(config):
    print("reading", flush=True)
    time.sleep(600)

spo_train.load_policy = load_policy
main_program(spo_train.main)
"""


def test_sigterm_before_the_loop_ends_a_run_in_one_line(workshop, tokenizer):
    words = ["--loss=dpo_rank", "--data=ranked.jsonl", "--init_from=start.pt"]
    process = subprocess.Popen(
        [sys.executable, "-c", BEFORE_THE_LOOP, *words, f"--tokenizer={tokenizer.path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": ROOT},
    )
    for line in process.stdout:
        if line == "reading\n":
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143
    assert errors.strip() == "stopped by SIGTERM; what was finished is kept"
    assert not os.path.exists("out")


POOL = """
import concurrent.futures, multiprocessing, os, signal, time
from spo.config import main_program

def main(_):
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        pid = pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # the pool was faster
            pass
        print("its worker ended")
        os._exit(0)

import sys
sys.argv = ["x"]
main_program(main)
"""


def test_a_pools_worker_ends_at_sigterm_and_does_not_take_it_for_a_result():
    environment = os.environ | {"PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", POOL], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "its worker ended\n", done.stderr


def test_a_learning_rate_beyond_float32_is_one_line(workshop):
    with pytest.raises(ValueError, match=r"--learning_rate=1e\+39: must be finite, .* most 1e\+30"):
        workshop("dpo_rank", "--learning_rate=1e39")


def test_a_flipped_bit_in_a_runs_tokenizer_is_refused(workshop):
    workshop("dpo_rank", "--max_iters=1", "--eval_stories=0")
    path = "out/tokenizer.model"
    content = open(path, "rb").read()
    rng = random.Random(0)
    for _ in range(60):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        open(path, "wb").write(flipped)
        with pytest.raises(ValueError, match="out/tokenizer.model: damaged, or not the file that"):
            Tokenizer(path)
    open(path, "wb").write(content)
    assert Tokenizer(path).vocab_size == 512


# --- who judges ----------------------------------------------------------------------------------

NO_JUDGE = ["--init_from=start.pt", "--max_iters=4", "--batch_size=4", "--eval_interval=2"]


def with_prompts(tmp_path) -> None:
    lines = [json.loads(line) for line in open("pair.jsonl", encoding="utf-8")]
    write(tmp_path / "asked.jsonl", *(line | {"prompt": "where is the owl?"} for line in lines))


def test_data_with_prompts_are_judged_only_if_somebody_is_asked(
    workshop, tokenizer, tmp_path, capsys
):
    """The offline judge rates stories for children: by it an untrained chat model would be best."""
    with_prompts(tmp_path)
    flags = [*NO_JUDGE, f"--tokenizer={tokenizer.path}", "--data=asked.jsonl"]
    spo_train.main(["--loss=dpo", *flags])
    printed = capsys.readouterr().out
    assert "nothing is judged, and there will be no best.pt: these data have prompts" in printed
    assert "look at the win-rates" not in printed and "win-rate over" not in printed
    last = printed.strip().splitlines()[-1]
    latest = "out/ckpt.pt: the model after 4 steps; nothing was judged, so there is no best.pt"
    assert last == f"{latest}; `python sample.py --checkpoint=out/ckpt.pt`"
    with pytest.raises(ValueError, match="^out: is the folder of a run; name ckpt.pt in it"):
        sample.main(["--checkpoint=out"])
    with pytest.raises(ValueError, match="--plan: needs --data and --init_from"):
        spo_train.main(["--plan=4", "--gpu_gib=80"])
    assert os.path.isfile("out/ckpt.pt") and os.path.isfile("out/model.bin")
    assert not os.path.exists("out/best.pt") and os.listdir("out/stories") == []
    with pytest.raises(
        ValueError, match="a run that judges nothing has no best.pt; out/ckpt.pt is"
    ):
        sample.main(["--checkpoint=out/best.pt"])
    for flag in ("--stop_kl=1", "--eval_pool=8", "--eval_stories=4", "--baseline=pair.jsonl"):
        name = flag.split("=")[0]
        with pytest.raises(
            ValueError, match=f"^{name}: nothing is judged, nor evaluated, with --judge=none"
        ):
            spo_train.main(["--loss=dpo", *flags, flag, "--out_dir=other"])
    assert not os.path.exists("other")
    spo_train.main(["--loss=dpo", *flags, "--judge=offline", "--eval_stories=4", "--eval_pool=8"])
    assert os.path.isfile("out/best.pt")


def test_messages_without_a_prompt_are_no_stories_either(workshop, tokenizer, tmp_path, capsys):
    chat = [{"role": "user", "content": "an owl?"}, {"role": "assistant", "content": "it sang"}]
    write(tmp_path / "chat.jsonl", *[{"messages": chat}] * 4)
    flags = [*NO_JUDGE, f"--tokenizer={tokenizer.path}", "--data=chat.jsonl"]
    spo_train.main(["--loss=sft", *flags])
    assert "nothing is judged" in capsys.readouterr().out and not os.path.exists("out/best.pt")


def test_a_best_checkpoint_of_step_0_is_said_to_be_that(workshop, capsys):
    workshop("dpo_rank", "--learning_rate=0")
    printed = capsys.readouterr().out
    assert "best (step 0)" in printed and "wins" not in printed  # it is compared with itself
    assert "nothing got better: best.pt and model.bin are the model you started from" in printed
    assert "`python sample.py --checkpoint=out/ckpt.pt`" in printed
