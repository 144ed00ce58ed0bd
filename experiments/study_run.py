"""One run of experiments/study.py: what it is trained on, its training, its evaluations."""

import copy
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import spo  # isort: skip  # noqa: F401  (sets OpenMP's waiting; must precede torch)

import numpy as np
import torch

import spo_train
from judge import OfflineJudge
from losses import LOSSES
from spo import checkpoint, fast, head, offline_judge, order, parallel
from spo.evaluation import Evaluation
from spo.groups import EncodedGroup, encode_groups, micro_batches
from spo.records import read_groups, read_stories
from spo.reference import PolicySamples, compute_logps
from spo.tokenizer import load_tokenizer

CHECKPOINTS = (0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 120, 160)  # steps, up to a run's last
GROUPS_PER_STEP = 16
FEWEST_GROUPS = 8
FRESH_GROUPS = 256  # the last of the file, never trained on, for the slope of Theorem 1
MOST_NATS = 4.0  # a run ends at its first evaluation past this KL, where nothing is read any more
ADAM_EPS = 1e-8
STEPS_BETWEEN_MOMENTS = 4  # at which the gradients of all objectives are taken


@dataclass(frozen=True)
class Run:
    """A training run: all that can differ between two of them.

    settings    of the loss, as "alpha=0.1 beta=0.01"; "": its defaults
    noise       the share of rankings that are shuffled, or of pairs that are flipped
    labels      "judge"; "adjacent": a group's three pairs of neighbours in its ranking;
                "bradley_terry": of two stories of a group, the first with probability
                sigmoid(its score - the other's)
    num_groups  how many groups there are, used again in every epoch; 0: all
    to_the_end  train all of the steps, however far the policy goes
    """

    loss: str
    seed: int
    learning_rate: float
    settings: str = ""
    regularizer: str = ""
    noise: float = 0.0
    labels: str = "judge"
    num_groups: int = 0
    steps: int = 40
    kl_interval: int = 8
    kl_batch_size: int = 32
    to_the_end: bool = False

    @property
    def checkpoints(self) -> list[int]:
        """Return the steps after which it is evaluated: the last one is one of them."""
        return sorted({step for step in CHECKPOINTS if step < self.steps} | {self.steps})

    def config(self) -> spo_train.TrainConfig:
        """Return the trainer's flags of this run."""
        pairs = (setting.split("=") for setting in self.settings.split())
        given = {name: float(value) for name, value in pairs}
        online = spo_train.TrainConfig(self.loss, regularizer=self.regularizer).objective().online
        if online:
            given |= {"kl_interval": self.kl_interval, "kl_batch_size": self.kl_batch_size}
        return spo_train.TrainConfig(
            loss=self.loss,
            regularizer=self.regularizer,
            batch_size=GROUPS_PER_STEP,
            max_iters=self.steps,
            learning_rate=self.learning_rate,
            seed=self.seed,
            **given,
        )


@dataclass(frozen=True)
class Cosines:
    """How much the preference losses' gradients are alike, at step 0 and after `steps` of dpo_rank.

    SPO's KL on samples is not a part of them. Every loss keeps its own second moments, as AdamW
    does, of its gradients (unclipped) at every fourth step until then.
    """

    seed: int
    learning_rate: float
    losses: tuple[str, ...]
    steps: int = 20


class World:
    """What all runs of a process share: the reference, the groups, the pool, what is known of them.

    folder          holds ranked.jsonl and pool.jsonl
    stories         at an evaluation
    max_new_tokens  of a story
    ValueError if too few groups can be used
    """

    def __init__(
        self, init_from: str, tokenizer: str, folder: str, stories: int, max_new_tokens: int
    ):
        fast.enable_fast_matmul("cpu", "float32")
        self.reference = checkpoint.load(init_from).requires_grad_(False)
        self.tokenizer = load_tokenizer(tokenizer, init_from, self.reference)
        ranked = read_groups(os.path.join(folder, "ranked.jsonl"))
        context = self.reference.args.max_seq_len
        self.groups, drops = encode_groups(ranked, self.tokenizer, self.reference.eos_ids, context)
        reasons = ", ".join(f"{len(lines)} {reason}" for reason, lines in drops.items())
        usable = f"{folder}: {len(self.groups)} of {len(ranked)} groups can be used ({reasons})"
        if len(self.groups) < FEWEST_GROUPS:
            raise ValueError(f"{usable}; draw more, --num_groups")
        if drops:
            print(usable, flush=True)
        self.texts = {group.line: group for group in ranked}
        self.prompts = sorted({group.prompt for group in ranked})
        pool = read_stories(os.path.join(folder, "pool.jsonl"))
        self.pool = [record["prompt"] + record["text"] for record in pool]
        self.stories, self.max_new_tokens = stories, max_new_tokens
        self.count = groups_to_train_on(len(self.groups))
        self.logps: dict[int, tuple[float, ...]] = {}  # of the reference, by a group's number
        self.starts: dict[int, dict] = {}  # the evaluation at step 0, by seed

    @functools.lru_cache(maxsize=4)  # noqa: B019  (there is one world a process)
    def evaluation(self, seed: int) -> Evaluation:
        return Evaluation(
            self.reference,
            self.tokenizer,
            self.prompts,
            self.stories,
            judge=OfflineJudge(),
            seed=seed,
            max_new_tokens=self.max_new_tokens,
            pool_size=len(self.pool),
            keep_pool=lambda prompts, draw: self.pool,
        )

    def scores(self, index: int) -> list[float]:
        """Return the judge's scores of a group's responses, best first."""
        group = self.texts[self.groups[index].line]
        return [offline_judge.score(group.prompt + response) for response in group.responses]

    def batch(self, run: Run, step: int) -> list[EncodedGroup]:
        """Return the groups of a step, their responses ordered as the run's labels say."""
        size = run.num_groups or self.count
        places = order.batch_indices(size, GROUPS_PER_STEP, step, run.seed)
        indices = [order.permutation(self.count, run.seed)[place] for place in places]
        if "reference_logps" in run.config().objective().reads:
            self.read_by_reference(indices)
        return [chosen for i in indices for chosen in self.labelled(run, i)]

    def read_by_reference(self, indices: Sequence[int]) -> None:
        missing = sorted(set(indices) - set(self.logps))
        if missing:
            logps = compute_logps([self.groups[i] for i in missing], self.reference)
            self.logps |= dict(zip(missing, logps, strict=True))

    def labelled(self, run: Run, index: int) -> list[EncodedGroup]:
        """Return what a run is told of a group: itself, a pair of it, or three."""
        group, logps = self.groups[index], self.logps.get(index)
        chosen = []
        for places in orders(run, index, functools.partial(self.scores, index)):
            responses = [group.responses[place] for place in places]
            known = tuple(logps[place] for place in places) if logps else None
            chosen.append(dataclasses.replace(group, responses=responses, reference_logps=known))
        return chosen


def groups_to_train_on(count: int) -> int:
    """Return how many of all groups are not kept fresh."""
    return count - min(FRESH_GROUPS, count // 4)


def orders(run: Run, index: int, scores: Callable[[], list[float]]) -> list[tuple[int, ...]]:
    """Return the places, in a true ranking of four, of what is taken for best, second and so on.

    scores  of the group, asked for where the labels are drawn from them
    The same group gets the same noise in all runs of a seed.
    """
    rng = random.Random(f"{run.seed} {index}")
    is_wrong = rng.random() < run.noise
    if run.labels == "adjacent":
        return [(0, 1), (1, 2), (2, 3)]
    if run.labels == "bradley_terry":
        a, b = rng.sample(range(4), 2)
        first_wins = rng.random() < 1 / (1 + math.exp(scores()[b] - scores()[a]))
        return [(a, b) if first_wins else (b, a)]
    if is_pairwise(run.loss):
        return [(3, 0) if is_wrong else (0, 3)]
    ranking = [0, 1, 2, 3]
    if is_wrong:
        rng.shuffle(ranking)
    return [tuple(ranking)]


# --- a run ---------------------------------------------------------------------------------------


def train(world: World, run: Run) -> dict:
    """Train and evaluate; return the row: the run, its checkpoints, why it ended if it failed."""
    started = time.monotonic()
    config = dataclasses.replace(run.config(), max_new_tokens=world.max_new_tokens)
    objective = config.objective()
    policy = trainable(world)
    optimizer = spo_train.make_optimizer(config, policy)
    prompts = [world.tokenizer.encode(prompt, bos=True) for prompt in world.prompts]
    samples = PolicySamples.of(None, world.reference, None)
    row: dict = {"run": as_dict(run), "checkpoints": []}
    for step in range(run.steps + 1):
        if step in run.checkpoints:
            try:
                row["checkpoints"].append(evaluate(world, run, policy, step))
            except ValueError as error:  # the KL is not finite: that is a result, too
                row["failure"] = str(error)
                break
            is_far = row["checkpoints"][-1]["kl"] > MOST_NATS
            if step == run.steps or (is_far and not run.to_the_end):
                break
        if objective.online and step % config.kl_interval == 0:
            samples = spo_train.draw_samples(config, policy, world.reference, prompts, step)
        batch = world.batch(run, step)
        spo_train.preference_gradient(objective, policy, world.reference, batch, None)
        if objective.online:
            spo_train.kl_gradient(objective.beta, policy, samples)
        parallel.clip_gradient(policy, config.grad_clip)
        spo_train.optimizer_step(optimizer, spo_train.learning_rate(config, step))
    return row | {"seconds": round(time.monotonic() - started, 1)}


def trainable(world: World):
    policy = copy.deepcopy(world.reference)
    return policy.requires_grad_(True)


def evaluate(world: World, run: Run, policy, step: int) -> dict:
    """Return a checkpoint: what the evaluation logs, and the scores in hundredths."""
    if step == 0 and run.seed in world.starts:
        known = dict(world.starts[run.seed])
    else:
        verdict = world.evaluation(run.seed).evaluate(policy, step, "select")
        texts = [record["prompt"] + record["text"] for record in verdict.stories]
        known = {k.partition("/")[2]: round(v, 5) for k, v in verdict.logged("eval").items()}
        known = {"step": step} | known | {"scores": hundredths(map(offline_judge.score, texts))}
        if step == 0:
            world.starts[run.seed] = dict(known)
    if run.labels == "bradley_terry":
        known |= theorem_slope(world, run, policy)
    return known


def hundredths(scores) -> list[int]:
    return [round(100 * score) for score in scores]


def as_dict(job: Run | Cosines) -> dict:
    """Return a job as its row names it: its kind, and the values that are not a default."""
    values = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    defaults = {field.name: field.default for field in dataclasses.fields(job)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def is_pairwise(loss: str) -> bool:
    return LOSSES[loss].data == "pair"


@torch.no_grad()
def theorem_slope(world: World, run: Run, policy) -> dict[str, float]:
    """Regress alpha * (difference of log-probs) on (difference of rewards), over fresh pairs.

    At the minimum, Theorem 1 says, they are equal, since softmax(r / alpha) has
    alpha (log p_i - log p_j) = r_i - r_j. The reward is the judge's score: the labels were drawn
    from Bradley-Terry of it. The pairs are all six of every fresh group.

    Returns the slope of the line through 0, its R^2, and the root mean square of the difference.
    """
    alpha = run.config().objective().settings["alpha"]
    groups = {world.groups[i].line: i for i in range(world.count, len(world.groups))}
    fresh = [world.groups[i] for i in groups.values()]
    fresh.sort(key=lambda group: group.longest)  # the order of micro_batches
    logps: list[list[float]] = []
    for batch in micro_batches(fresh, None, policy):
        logps += head.sequence_logps(policy, batch).double().tolist()
    scores = [world.scores(groups[group.line]) for group in fresh]
    x, y = differences(scores), alpha * differences(logps)
    slope = float(x @ y / (x @ x))
    r2 = 1 - float(np.square(y - slope * x).sum() / np.square(y).sum())
    error = float(np.sqrt(np.square(y - x).mean()))
    return {"slope": round(slope, 5), "r2": round(r2, 5), "error": round(error, 5)}


def differences(values: list[list[float]]) -> np.ndarray:
    """values=[[3, 1, 0, 0]] -> [2, 3, 3, 1, 1, 0]: every pair of a row."""
    pairs = list(itertools.combinations(range(4), 2))
    return np.array([[row[i] - row[j] for i, j in pairs] for row in values]).ravel()


# --- cosines of gradients ------------------------------------------------------------------------


def cosines(world: World, job: Cosines) -> dict:
    """Return the row of a Cosines: at each of two steps, before and after AdamW's scaling, the
    cosines of all objectives on one batch, and of each with itself on the next batch.
    """
    started = time.monotonic()
    policy = trainable(world)
    runs = {loss: Run(loss, job.seed, job.learning_rate) for loss in job.losses}
    path = Run("dpo_rank", job.seed, job.learning_rate)
    optimizer = spo_train.make_optimizer(path.config(), policy)
    moments = {loss: SecondMoment(path.config().adam_beta2) for loss in job.losses}
    steps = []
    for step in range(job.steps + 1):
        if step % STEPS_BETWEEN_MOMENTS == 0:
            gradients = {loss: gradient_of(world, run, policy, step) for loss, run in runs.items()}
            if step in (0, job.steps):
                other = {loss: gradient_of(world, runs[loss], policy, step + 1) for loss in runs}
                steps.append({"step": step} | compared(gradients, other, moments))
            for loss, gradient in gradients.items():
                moments[loss].add(gradient)
        add_gradient(world, path, policy, step)
        parallel.clip_gradient(policy, path.config().grad_clip)
        spo_train.optimizer_step(optimizer, spo_train.learning_rate(path.config(), step))
    seconds = round(time.monotonic() - started, 1)
    return {"cosines": as_dict(job), "steps": steps, "seconds": seconds}


class SecondMoment:
    """AdamW's running mean of squared gradients, and the scaling that it makes of it."""

    def __init__(self, beta2: float):
        self.beta2, self.value, self.count = beta2, 0.0, 0

    def add(self, gradient: torch.Tensor) -> None:
        self.value = self.beta2 * self.value + (1 - self.beta2) * gradient.square()
        self.count += 1

    def scaled(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient as AdamW would scale it if it were the next one."""
        value = self.beta2 * self.value + (1 - self.beta2) * gradient.square()
        corrected = value / (1 - self.beta2 ** (self.count + 1))
        return gradient / (corrected.sqrt() + ADAM_EPS)


def gradient_of(world: World, run: Run, policy, step: int) -> torch.Tensor:
    """Return the gradient of a preference loss on the batch of a step, all parameters in a row."""
    add_gradient(world, run, policy, step)
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]).double()
    policy.zero_grad(set_to_none=True)
    return gradient


def add_gradient(world: World, run: Run, policy, step: int) -> None:
    batch = world.batch(run, step)
    spo_train.preference_gradient(run.config().objective(), policy, world.reference, batch, None)


def compared(gradients: dict, other: dict, moments: dict[str, SecondMoment]) -> dict:
    """Return matrices of cosines in the order of the losses, and each loss on two batches."""
    scaled = {loss: moments[loss].scaled(g) for loss, g in gradients.items()}
    other_scaled = {loss: moments[loss].scaled(g) for loss, g in other.items()}
    result = {}
    for name, ours, theirs in (("raw", gradients, other), ("scaled", scaled, other_scaled)):
        rows = [[cosine(a, b) for b in ours.values()] for a in ours.values()]
        result[name] = rows
        result[f"{name}_two_batches"] = [cosine(ours[loss], theirs[loss]) for loss in ours]
    return result


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return round(float(a @ b / (a.norm() * b.norm())), 5)


# --- in a worker ---------------------------------------------------------------------------------

_world: World | None = None


def begin(threads: int, *world) -> None:
    """Make this process's world. The process ends with the one that started it."""
    global _world
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of Ctrl-C, only the parent speaks
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _world = World(*world)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work(job: Run | Cosines) -> dict:
    return cosines(_world, job) if isinstance(job, Cosines) else train(_world, job)


def measure(_) -> dict[str, float]:
    """Return how long a step on rankings, one on pairs, the KL, and an evaluation take, in
    seconds.
    """
    run = {loss: Run(loss, 0, 0.0, steps=1) for loss in ("spo_rank", "spo_basic")}
    policy = trainable(_world)
    times = {}
    for loss in run:
        for _ in range(2):  # the first one meets new shapes
            started = time.monotonic()
            gradient_of(_world, run[loss], policy, 0)
            times[loss] = time.monotonic() - started
    evaluate(_world, run["spo_rank"], policy, 0)  # scores the pool
    started = time.monotonic()
    evaluate(_world, run["spo_rank"], policy, 1)
    times["evaluation"] = time.monotonic() - started
    prompts = [_world.tokenizer.encode(prompt, bos=True) for prompt in _world.prompts]
    config = run["spo_rank"].config()
    config = dataclasses.replace(config, max_new_tokens=_world.max_new_tokens)
    samples = spo_train.draw_samples(config, policy, _world.reference, prompts, 0)
    started = time.monotonic()
    spo_train.kl_gradient(0.0, policy, samples)
    return times | {"kl": time.monotonic() - started}


def pool_row() -> dict:
    """Return the row of the pool: the judge's scores, in hundredths."""
    scores = hundredths(map(offline_judge.score, _world.pool))
    return {"pool": len(_world.pool), "scores": scores}
