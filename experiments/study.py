"""Train every objective on the same groups, with replicate seeds: the runs behind docs/findings.md.

    python experiments/study.py --minutes=100

A run takes up to 40 steps of 16 groups, with evaluations at steps 0, 1, 2, 3, 5, 8, 12, 18, 27 and
40. It ends at the first one past 4 nats, and becomes one line of experiments/study.jsonl: its
settings and, of every evaluation, the scores of 256 stories, the win-rate against a pool of 4,096,
KL, entropy and diversity. A run that has its line is not run again, so that the same command
continues a study that was stopped at any point. The questions are those of experiments/claims.md,
in their order. For a seed, all objectives see the same groups in the same order, and their stories
come from the same random streams.
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import matched_kl
import study_run
from study_run import Cosines, Run, as_dict

import tinystories_data as stories
from spo import files, parallel
from spo.config import counted, flag, main_program, parse, refuse_if
from tinystories_data import demo_checkpoint

ROWS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "study.jsonl")
LOSSES = ("spo_rank", "spo_bon", "spo", "dpo", "dpo_rank", "ipo", "kto", "simpo", "best_sft")
RATES = dict.fromkeys(LOSSES, (5e-5, 1e-4))  # learning rates that each objective is tried with
RATES["best_sft"] = (1e-4, 4e-4)  # at 5e-5 it moves by half a nat in 40 steps
CHOOSING_NATS = 2.0  # the better rate has the higher win-rate at this KL, on half of the stories
NOISE_FLOOR_SEEDS = 8
EQUAL_KL_SEEDS = 6  # of E1: over seeds, a win-rate at 4 nats has a deviation of 3.6 points
LONG = 160  # steps


@dataclass
class StudyConfig:
    minutes: float = flag(100.0, "how long new runs may take, all together", above=0)
    seeds: int = flag(3, "of a contrast; E0 has 8, E1 at least 6", least=1)
    only: str = flag("", "questions to run, such as E1,E4; default: all, in order")
    jobs: int = flag(2, "runs at a time, each on its share of the cores", least=1)
    init_from: str = flag("", "the reference; default: stories260K, else the demo's")
    tokenizer: str = flag("", "its tokenizer; default: tokenizer.model beside it")
    num_groups: int = flag(4096, "groups of four stories to draw", least=16)
    pool: int = flag(4096, "stories of the reference to win against", least=64)
    stories: int = flag(256, "stories at an evaluation", least=2)
    max_new_tokens: int = flag(256, "longest story, in tokens", least=1)
    steps: int = flag(40, "of a run, where the question does not say otherwise", least=1)
    folder: str = flag(os.path.join("out", "study"), "where stories and groups are kept")
    rows: str = flag(ROWS, "where a run becomes a line")


# --- what is run ---------------------------------------------------------------------------------


def questions(
    rows: Sequence[dict], seeds: int = 3, steps: int = 40
) -> dict[str, list[Run | Cosines]]:
    """Return the jobs of every question, in the order in which they are run.

    A learning rate is chosen by rows; where they are missing still, the question has no jobs yet.
    """
    jobs: dict[str, list[Run | Cosines]] = {}
    jobs["E6 gradients"] = [Cosines(seed, 1e-4, LOSSES) for seed in range(seeds)]
    jobs["learning rates"] = [Run(loss, 0, r, steps=steps) for loss in LOSSES for r in RATES[loss]]
    rates = {loss: chosen_rate(rows, loss, steps) for loss in LOSSES}
    rates |= dict.fromkeys(("cdpo", "dpo_robust"), rates["dpo"])
    rates["spo_basic"] = rates["spo"]

    def runs(loss: str, count: int = seeds, **more) -> list[Run]:
        spec = {"steps": steps} | more
        known = range(count) if rates[loss] else ()
        return [Run(loss, seed, rates[loss], **spec) for seed in known]

    def by_seed(*lists: list[Run]) -> list[Run]:
        return sorted((run for some in lists for run in some), key=lambda run: run.seed)

    floor = rates["dpo_rank"]
    jobs["E0 noise floor"] = [
        Run("dpo_rank", seed, floor, steps=steps) for seed in range(NOISE_FLOOR_SEEDS) if floor
    ]
    jobs["E1 equal KL"] = by_seed(*(runs(loss, max(seeds, EQUAL_KL_SEEDS)) for loss in LOSSES))
    alphas = ("alpha=0", "alpha=0.1", "alpha=1")
    jobs["E4 softness"] = by_seed(
        *(runs("spo_rank", settings=alpha) for alpha in alphas),
        *(runs("spo", settings=alpha) for alpha in alphas),
        *(runs("spo_rank", settings=s, regularizer="none") for s in ("alpha=0.001", *alphas[1:])),
        *(runs("dpo", settings=beta) for beta in ("beta=0.01", "beta=1")),
    )
    truth = {"regularizer": "none", "labels": "bradley_terry", "to_the_end": True}
    jobs["E4 Theorem 1"] = by_seed(
        *(runs("spo_basic", settings=f"alpha={alpha}", **truth) for alpha in ("0.1", "1"))
    )

    claimed_alphas = ("alpha=0.1", "alpha=1")
    jobs["E4 six seeds"] = by_seed(
        *(runs("spo_rank", max(seeds, EQUAL_KL_SEEDS), settings=alpha) for alpha in claimed_alphas)
    )

    def noisy(loss: str, noise: float) -> list[Run]:
        is_robust = loss in ("dpo_robust", "cdpo")
        settings = f"label_smoothing={noise:g}" if is_robust else ""
        return runs(loss, noise=noise, settings=settings)

    claimed = ("dpo", "spo", "dpo_robust")
    others = ("cdpo", "dpo_rank", "spo_rank", "kto", "ipo", "best_sft")
    jobs["E2 label noise"] = [
        *by_seed(*(noisy(loss, 0.4) for loss in claimed)),
        *by_seed(*(noisy(loss, 0.4) for loss in others)),
        *by_seed(*(noisy(loss, 0.2) for loss in (*claimed, *others))),
    ]
    rankings = ("spo_rank", "dpo_rank", "spo", "dpo")
    jobs["E3 data size"] = [
        *runs("dpo", labels="adjacent"),
        *by_seed(
            *(runs(loss, num_groups=n) for n in (64, 256) for loss in rankings),
            *(runs(loss, num_groups=n, steps=n // 16) for n in (256, 2560) for loss in rankings),
        ),
    ]
    jobs["E5 mu and samples"] = [
        *runs("spo_rank", settings="gamma=0"),
        *by_seed(
            runs("spo_rank", settings="gamma=1"),
            *(runs("spo_rank", kl_interval=interval) for interval in (1, 40)),
            *(runs("spo_rank", kl_batch_size=size) for size in (8, 128)),
        ),
    ]
    long = {"steps": LONG, "to_the_end": True}
    jobs["E7 longer"] = by_seed(runs("spo_rank", **long), runs("dpo_rank", **long))
    return jobs


def chosen_rate(rows: Sequence[dict], loss: str, steps: int = 40) -> float | None:
    """Return the learning rate whose run of seed 0 is better on the first half of its stories.

    None while a run is missing. A run that does not reach the KL at which they are compared cannot
    be chosen; if none does, it is the largest.
    """
    known = {key_of(row): row for row in rows}
    pool = next((row["scores"] for row in rows if "pool" in row), None)
    runs = [known.get(key(Run(loss, 0, rate, steps=steps))) for rate in RATES[loss]]
    if pool is None or None in runs:
        return None
    rates = [matched_kl.win_rate_at(row, pool, CHOOSING_NATS, half=0) for row in runs]
    found = [
        (value, rate) for value, rate in zip(rates, RATES[loss], strict=True) if value is not None
    ]
    return max(found)[1] if found else max(RATES[loss])


def key(job: Run | Cosines) -> str:
    return json.dumps(as_dict(job), sort_keys=True)


def key_of(row: dict) -> str:
    """Return the key of the job that a row is of."""
    return json.dumps(row.get("run") or row.get("cosines") or row.get("pool"), sort_keys=True)


# --- its rows ------------------------------------------------------------------------------------


class Rows:
    """study.jsonl: a line for each run that has ended, of one reference and one set of groups."""

    def __init__(self, path: str, world: dict):
        """Open or create the file.

        world  what all the runs share. ValueError if the file is of another one, or
               if another process writes it
        """
        self.path = path
        self.handle = files.lock(path, f"--rows={path}")
        self.handle.seek(0)
        content = self.handle.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            print(f"{path}: its last line is cut, by a kill perhaps; that run is run again")
            self.handle.truncate(whole)
        self.rows = read_rows(path)
        if not self.rows:
            self.add({"world": world})
        elif self.rows[0].get("world") != world:
            other = "of another model or of other flags; give another --rows"
            raise ValueError(f"--rows={path}: its runs are {other}")

    def add(self, row: dict) -> None:
        data = (json.dumps(row) + "\n").encode()
        with files.named_errors(self.path, len(data)):
            files.append_to(self.handle, data)
        self.rows.append(row)


def read_rows(path: str) -> list[dict]:
    """Return the lines of a study; ValueError, naming the line, for what is not one."""
    rows = [row for _, row in files.read_jsonl(path)]
    for number, row in enumerate(rows, start=1):
        kinds = [kind for kind in ("world", "pool", "run", "cosines") if kind in row]
        if len(kinds) != 1 or (kinds == ["world"]) != (number == 1):
            raise ValueError(f"{path} line {number}: not a line of a study")
    return rows


# --- the study -----------------------------------------------------------------------------------


def inputs_of(config: StudyConfig) -> tuple[str, str]:
    """Return the model to start from, and its tokenizer."""
    if config.init_from:
        return config.init_from, config.tokenizer
    given = os.environ.get("SPO_DATA", "data")
    candidates = [
        (os.path.join(given, "stories260K.bin"), os.path.join(given, "tok512.model")),
        (os.path.join("data", "stories260K", "stories260K.bin"), ""),
        (demo_checkpoint(), ""),
    ]
    for model, tokenizer in candidates:
        if os.path.isfile(model):
            beside = os.path.join(os.path.dirname(model), "tokenizer.model")
            return model, tokenizer or (beside if os.path.isfile(beside) else "")
    make = "`python tinystories_data.py download --model=stories260K` or the demo"
    raise ValueError(f"--init_from: there is no model here yet; make one with {make}")


def identity_of(config: StudyConfig, model: str, tokenizer: str) -> dict:
    """Return what the groups and the pool depend on: files by their SHA-256, and flags.

    Not the stories themselves: another processor rounds otherwise, and draws a few others. A study
    may go on there, since the pool's scores are in its file, and a seed's runs stay comparable.
    """
    inputs = {"model": model, "tokenizer": tokenizer}
    identity = {name: files.inputs_sha256(path) if path else "" for name, path in inputs.items()}
    flags = ("num_groups", "pool", "max_new_tokens")
    return identity | {name: getattr(config, name) for name in flags}


def make_world(config: StudyConfig, model: str, tokenizer: str) -> None:
    """Draw and rank what the folder lacks; ValueError if it is of another model or other flags."""
    os.makedirs(config.folder, exist_ok=True)
    identity, path = (
        identity_of(config, model, tokenizer),
        os.path.join(config.folder, "world.json"),
    )
    if not os.path.isfile(path):
        files.write_text(path, json.dumps(identity, indent=1))
    elif files.read_json_object(path) != identity:
        other = "its stories are of another model or of other flags"
        raise ValueError(f"--folder={config.folder}: {other}")
    drawn = os.path.join(config.folder, "stories.jsonl")
    ranked = os.path.join(config.folder, "ranked.jsonl")
    pool = os.path.join(config.folder, "pool.jsonl")
    for path, count, seed in ((drawn, 4 * config.num_groups, 0), (pool, config.pool, 1)):
        if not os.path.isfile(path):
            source = {"checkpoint": model, "tokenizer": tokenizer, "seed": seed}
            source |= {"num_stories": count, "max_new_tokens": config.max_new_tokens}
            stories.generate(stories.GenerateConfig(**source, out=path))
    if not os.path.isfile(ranked):
        stories.rank(stories.RankConfig(stories=drawn, out=ranked, group_size=4))


class Workers:
    """Processes that do jobs, each on its share of the cores; and how long a job should take."""

    def __init__(self, config: StudyConfig, world: tuple[str, str, str]):
        self.count = config.jobs
        self.threads = max(1, (os.cpu_count() or 1) // config.jobs)
        self.world = (*world, config.stories, config.max_new_tokens)
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None
        self.times: dict[str, float] = {}  # seconds of a step, of the KL, of an evaluation
        self.foreseen, self.taken = 1.0, 1.0  # seconds of all jobs that have ended

    def start(self, rows: "Rows") -> None:
        """Start them, unless they run, and measure the machine with all of them at work."""
        if self.pool:
            return
        os.environ["OMP_NUM_THREADS"] = str(self.threads)  # read by the workers as they start
        self.pool = concurrent.futures.ProcessPoolExecutor(
            self.count,
            multiprocessing.get_context("spawn"),
            initializer=study_run.begin,
            initargs=(self.threads, *self.world),
        )
        if not any("pool" in row for row in rows.rows):
            rows.add(self.pool.submit(study_run.pool_row).result())
        measured = list(self.pool.map(study_run.measure, range(self.count)))
        self.times = {name: max(m[name] for m in measured) for name in measured[0]}
        shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.times.items())
        print(
            f"{self.count} at a time, {counted(self.threads, 'thread')} each: {shown}", flush=True
        )

    def seconds(self, job: Run | Cosines) -> float:
        """Return how long a job should take: by its parts, and by how long others really took."""
        ranking, pair = self.times["spo_rank"], self.times["spo_basic"]
        if isinstance(job, Cosines):
            each = sum(pair if study_run.is_pairwise(loss) else ranking for loss in LOSSES)
            return 8 * each + job.steps * ranking
        step = pair if study_run.is_pairwise(job.loss) else ranking
        step *= 3 if job.labels == "adjacent" else 1
        if job.config().objective().online:
            step += job.kl_batch_size / 32 * self.times["kl"]
        parts = job.steps * step + len(job.checkpoints) * self.times["evaluation"]
        return parts * self.taken / self.foreseen

    def run(self, jobs: Sequence[Run | Cosines]) -> Iterator[dict]:
        """Yield the rows of jobs as they end."""
        futures = {self.pool.submit(study_run.work, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            parts = self.seconds(futures[future]) * self.foreseen / self.taken
            self.foreseen += parts
            self.taken += row["seconds"]
            yield row


def study(config: StudyConfig, world: tuple[str, str, str], rows: Rows) -> None:
    """Run what is missing, question by question, until the time is spent."""
    deadline = time.monotonic() + 60 * config.minutes
    wanted = list(filter(None, config.only.split(",")))
    names = [name.split()[0] for name in questions([])]
    for name in wanted:
        refuse_if(name not in names, f"--only={name}: no such question; there are {set(names)}")
    workers = Workers(config, world)
    most = study_run.groups_to_train_on(config.num_groups)
    try:
        for name in questions(rows.rows, config.seeds, config.steps):
            if not wanted or name.split()[0] in wanted:
                # Asked for anew: by now, the rows may say which learning rates are better.
                jobs = questions(rows.rows, config.seeds, config.steps)[name]
                answer(name, jobs, rows, workers, deadline, most)
    except BrokenProcessPool:
        why = "for the reason above, or killed for its memory"
        raise ValueError(f"a worker ended {why}; the same command continues") from None
    finally:
        if workers.pool:
            workers.pool.shutdown(cancel_futures=True)


def answer(
    name: str, jobs: list[Run | Cosines], rows: Rows, workers: Workers, deadline: float, most: int
) -> None:
    """Run the jobs of a question that are missing and fit into the time; say what is left out.

    most  how many groups there are to train on
    """
    done = set(map(key_of, rows.rows))
    missing = [job for job in jobs if key(job) not in done]
    large = [job for job in missing if isinstance(job, Run) and job.num_groups > most]
    if large:
        missing = [job for job in missing if job not in large]
        print(f"{name}: {counted(len(large), 'run')} left out, of more than {most:,} groups")
    print(
        f"{name}: {len(jobs) - len(missing)} of {counted(len(jobs), 'run')} are there", flush=True
    )
    if not missing:
        return
    workers.start(rows)
    left = deadline - time.monotonic()
    needed = list(itertools.accumulate(workers.seconds(job) / workers.count for job in missing))
    fitting = [job for job, end in zip(missing, needed, strict=True) if end <= left]
    if fitting:
        minutes = round(needed[len(fitting) - 1] / 60)
        about = f"about {counted(minutes, 'minute')}"
        print(f"    {counted(len(fitting), 'run')} in {about}", flush=True)
    for row in workers.run(fitting):
        rows.add(row)
        print(f"    {described(row)}", flush=True)
    if len(fitting) < len(missing):
        runs = counted(len(missing) - len(fitting), "run")
        minutes = counted(round(needed[-1] / 60), "minute")
        print(f"    {runs} left out; all missing ones take {minutes}, see --minutes", flush=True)


def described(row: dict) -> str:
    job = row.get("run") or row["cosines"]
    settings = " ".join(f"{k}={v}" for k, v in job.items() if k != "losses")
    end = ""
    if row.get("checkpoints"):
        last = row["checkpoints"][-1]
        end = f": {last['win_rate']:.1%} at {last['kl']:.1f} nats"
    return f"{settings}{end}, {row['seconds']:.0f} s {row.get('failure', '')}"


def main(argv: list[str]) -> None:
    config = parse(StudyConfig, argv, "study.py", "Every objective, with replicate seeds.")
    parallel.start("cpu", "float32")
    model, tokenizer = inputs_of(config)
    identity = identity_of(config, model, tokenizer)
    rows = Rows(config.rows, identity | {"stories": config.stories})
    make_world(config, model, tokenizer)
    study(config, (model, tokenizer, config.folder), rows)
    runs = sum("run" in row for row in rows.rows)
    print(f"{config.rows}: {counted(runs, 'run')}; now `python experiments/findings.py`")


if __name__ == "__main__":
    main_program(main)
