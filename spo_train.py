"""Align a Llama by Soft Preference Optimization, or by any other objective of losses.py.

    python spo_train.py --loss=spo_rank          # no --data: builds the offline demo and trains on it
    python spo_train.py --loss=dpo --init_from=stories260K.bin --tokenizer=tok512.model --data=pairs.jsonl --out_dir=out

Algorithm 1 of the SPO paper: each step takes a batch of ranked groups and descends

    mean(preference loss) + beta * mean(token-wise KL to the reference on samples of the policy itself)

where the samples are drawn anew every kl_interval steps. A run leaves ckpt.pt (latest), best.pt (highest
win-rate), model.bin (best, for run.c), log.jsonl, config.json and the stories of each evaluation in out_dir.
"""

import copy
import dataclasses
import functools
import glob
import inspect
import json
import math
import os
import random
import shutil
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint as checkpoints
import parallel
import plan
import tinystories_data as data
from checkpoint import Checkpoint, PtFile
from config import flag, parse, run
from evaluation import ONLINE, Evaluation, Verdict, report
from groups import Batch, EncodedGroup, encode_groups, micro_batches, read_groups, require
from folders import fill, on_meta, open_folder
from judge import JudgeFlags, OfflineJudge, make_judge
from losses import LOSSES, REGULARIZERS, clamped, importance, sequence_logps, token_kl
from model import ModelArgs, Transformer
from parallel import World, full, whole
from pretokenize import TokenWindows
from sampling import sample
from tokenizer import Tokenizer, load_tokenizer

SHAPE_FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")
ONLINE_FLAGS = ("kl_interval", "kl_batch_size")


@dataclass
class TrainConfig(JudgeFlags):
    loss: str = flag("spo_rank", "the objective, a name in losses.LOSSES", choices=list(LOSSES))
    regularizer: str = flag("", "what beta weighs, for a loss with no beta of its own; none: the loss's default",
                            choices=["", *REGULARIZERS])
    alpha: float | None = flag(None, "spo*: softmax exponent; cpo: weight of the likelihood; rdpo: of the length")
    beta: float | None = flag(None, "strength of the reference, or weight of the regularizer (spo*: 0.1)")
    gamma: float | None = flag(None, "spo, spo_bon, spo_rank: exponent in the weight mu; simpo: margin")
    eta: float | None = flag(None, "spo_rank: stage k weighs eta^k")
    tau: float | None = flag(None, "ipo: its margin is 1/(2 tau)")
    lambda_d: float | None = flag(None, "kto: weight of the chosen")
    lambda_u: float | None = flag(None, "kto: weight of the rejected")
    norm: str | None = flag(None, "ipo: log-ratios of whole responses or per token", choices=["sum", "mean"])
    nll: str | None = flag(None, "cpo: likelihood of whole responses or per token", choices=["sum", "mean"])
    data: str = flag("", "ranked groups (JSONL); none: the offline demo")
    init_from: str = flag("", "policy and reference to start from: a .pt, a llama2.c .bin, a folder of Meta or Hugging Face, "
                          "or `scratch`")
    tokenizer: str = flag("", "sentencepiece model; none: tokenizer.model beside init_from")
    out_dir: str = flag("out", "where the run's files go")
    dim: int = flag(288, "width, with --init_from=scratch")
    n_layers: int = flag(6, "layers, with --init_from=scratch")
    n_heads: int = flag(6, "attention heads, with --init_from=scratch")
    n_kv_heads: int | None = flag(None, "key-value heads, with --init_from=scratch; none: n_heads")
    max_seq_len: int = flag(256, "context, with --init_from=scratch")
    batch_size: int = flag(32, "groups per optimizer step")
    micro_batch_size: int | None = flag(None, "groups per forward pass: memory, never the result; none: what fits")
    max_iters: int | None = flag(None, "optimizer steps; none: 80 for the demo, one epoch of other data")
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW")
    warmup_iters: int = flag(5, "steps of linear warm-up")
    decay_lr: bool = flag(True, "cosine decay of the learning rate to 0 at max_iters")
    weight_decay: float = flag(0.0, "AdamW's, on matrices")
    adam_beta1: float = flag(0.95, "AdamW's; gradients of preferences are mostly noise, so the mean is a long one")
    adam_beta2: float = flag(0.99, "AdamW's")
    grad_clip: float = flag(1.0, "gradient norm to clip at; 0: no clipping")
    kl_interval: int = flag(8, "steps between fresh samples of the policy (T in the paper)")
    kl_batch_size: int = flag(32, "how many samples")
    max_new_tokens: int = flag(256, "longest sampled story, in tokens")
    eval_interval: int = flag(20, "steps between evaluations")
    eval_stories: int = flag(128, "stories judged at an evaluation, twice as many fresh ones at the end; 0: none")
    baseline: str = flag("", "stories to win against (JSONL); none: the reference's own")
    report: bool = flag(True, "end with a table on fresh stories: before, best and last")
    keep_checkpoints: bool = flag(False, "keep the weights of every evaluation, as step_N.pt")
    log_interval: int = flag(5, "steps between log lines")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")
    dtype: str = flag("float32", "what layers compute in; weights, sums and optimizer stay float32",
                      choices=["float32", "bfloat16"])
    activation_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, same result")
    seed: int = flag(1337, "of the data order, of every sample, and of the weights from scratch")
    plan: int | None = flag(None, "only print what each of so many processes needs of memory, and whether it fits", alone=1)
    resume: str = flag("", "go on from the newest state in out_dir, or from STATE; auto: from the newest whole one, if any",
                       alone="newest")


# --- what the flags mean -------------------------------------------------------------------------


def reads(*functions: Callable) -> set[str]:
    """The argument names of some losses and regularizers: the tensors and numbers they want."""
    return {name for function in functions for name in inspect.signature(function).parameters}


def settings_of(loss: Callable) -> dict[str, float | str]:
    """What a loss is tuned with (numbers, and words such as norm), and the defaults."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, float | str)}


def call(function: Callable, values: dict):
    """function(**those of values that it reads); what it reads and values lacks keeps its default."""
    return function(**{name: values[name] for name in reads(function) if name in values})


@dataclass
class Objective:
    """mean(loss) + beta * mean(regularizer), and what the loss is tuned with."""

    loss: Callable[..., Tensor]
    regularizer: Callable[..., Tensor]
    settings: dict[str, float | str | bool]
    beta: float

    def __post_init__(self):
        self.reads = reads(self.loss, self.regularizer)
        # does the regularizer read samples of the policy (and not the dataset)?
        self.online = "online_kl" in self.reads
        self.needs_reference = bool(self.reads & {"reference_logps", "response_kl", "online_kl"})

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name != "centered")
        weighed = f" + {self.beta:g} * {self.regularizer.__name__}" if self.beta else ""
        return f"{self.loss.__name__}({settings}){weighed}"

    def start(self, n: int) -> float | None:
        """The preference loss at step 0 for groups of n, where the formula alone tells it."""
        return call(self.loss.start, self.settings | {"n": n}) if self.loss.start else None


def objective_of(config: TrainConfig) -> Objective:
    """ValueError, naming the flag, for a setting that the loss does not take or cannot work with."""
    loss = LOSSES[config.loss]
    defaults, name = settings_of(loss), config.regularizer or loss.regularizer
    own_beta = "beta" in defaults
    if own_beta and name != "none":
        raise ValueError(f"--regularizer={name}: the beta of {config.loss} is its own; leave the regularizer out")
    takes = set(defaults) | ({"beta"} if name != "none" else set())
    every_setting = {"beta"}.union(*map(settings_of, LOSSES.values()))
    settings = {n: getattr(config, n) for n in sorted(every_setting) if getattr(config, n) is not None}
    for n, value in settings.items():
        if n not in takes:
            listed = ", ".join(f"--{n}" for n in sorted(takes)) or "no settings"
            raise ValueError(f"--{n}: {config.loss} with regularizer {name} does not take it; it takes {listed}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0 and (value > 0 or n != "tau")):
            raise ValueError(f"--{n}={value}: must be finite and {'above 0' if n == 'tau' else 'not negative'}")
    beta = 0.0 if own_beta or name == "none" else settings.pop("beta", 0.1)
    settings = defaults | settings
    if "centered" in reads(loss):
        settings["centered"] = True  # the same gradient; the value is 0 at equal log-probs
    objective = Objective(loss, REGULARIZERS[name], settings, beta)
    for flag_name in () if objective.online else ONLINE_FLAGS:
        if getattr(config, flag_name) != getattr(TrainConfig(), flag_name):
            raise ValueError(f"--{flag_name}: {config.loss} with regularizer {name} draws no samples of the policy")
    return objective


def check_config(config: TrainConfig, world: World) -> None:
    """ValueError, naming the flag, for what no run can work with."""
    positive = ("plan", "batch_size", "max_iters", "kl_interval", "kl_batch_size", "max_new_tokens", "eval_interval",
                "log_interval", "micro_batch_size", *SHAPE_FLAGS)
    for name in positive:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value}: must be 1 or more")
    for name in ("learning_rate", "warmup_iters", "weight_decay", "grad_clip", "eval_stories", "seed"):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name}={value}: must be finite and not negative")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}: must be in [0, 1)")
    for name in SHAPE_FLAGS if config.init_from != "scratch" else ():
        if getattr(config, name) != getattr(TrainConfig(), name):
            raise ValueError(f"--{name}: the shape comes with --init_from={config.init_from or 'the demo'}; "
                             "give it with --init_from=scratch only")
    for name in ("init_from", "tokenizer"):
        if not config.data and getattr(config, name):
            raise ValueError(f"--{name}: needs --data as well; without --data the demo brings its own model")
    if config.data and not config.init_from:
        raise ValueError("--data: needs --init_from, the model to align (a .pt, a llama2.c .bin, or `scratch`)")
    for name in ("batch_size", "kl_batch_size"):
        if getattr(config, name) % world.size:
            raise ValueError(f"--{name}={getattr(config, name)}: must be a multiple of the number of processes, {world.size}")
    if config.judge != "offline" and config.eval_stories == 0:
        raise ValueError(f"--judge={config.judge}: nothing is judged with --eval_stories=0; leave it out")
    if config.baseline and (config.eval_stories == 0 or config.init_from == "scratch"):
        raise ValueError("--baseline: nothing is judged with --eval_stories=0 or --init_from=scratch; leave it out")
    if config.init_from == "scratch" and not config.tokenizer:
        raise ValueError("--init_from=scratch: needs --tokenizer")


# --- the pieces of a step ------------------------------------------------------------------------


def policy_at_start(config: TrainConfig, world: World):
    """(the policy at step 0: a checkpoint's, or fresh weights; its tokenizer; where its weights are still to be read from,
    or None). Its config is this run's, and the terminator's id.
    """
    if config.init_from == "scratch":
        tokenizer = Tokenizer(config.tokenizer)
        shape = {name: getattr(config, name) for name in SHAPE_FLAGS}
        model = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, multiple_of=32, **shape))
        model.init_weights(torch.Generator().manual_seed(config.seed))
        eos_id = tokenizer.bos_id  # as in llama2.c's TinyStories: the next story's BOS ends a story
    elif (source := source_of(config.init_from, world.size if config.plan is None else 2)) is not None:  # a plan loads nothing
        tokenizer = load_tokenizer(config.tokenizer, config.init_from, source.args.vocab_size)
        return Checkpoint(on_meta(source), dataclasses.asdict(config) | {"eos_id": source.eos_id}), tokenizer, source
    else:
        loaded = checkpoints.load(config.init_from)
        model, eos_id = loaded.model, loaded.eos_id
        tokenizer = load_tokenizer(config.tokenizer, config.init_from, model.args.vocab_size)
    return Checkpoint(model.to(world.device), dataclasses.asdict(config) | {"eos_id": eos_id}), tokenizer, None


def source_of(path: str, processes: int):
    """Weights that every process is to read its rows of, once it knows which; None: they are loaded whole.

    Those of a tied classifier are: such models are small, and no module may lose what ties it.
    """
    if processes == 1 or not (os.path.isdir(path) or path.endswith(".pt")):
        return None
    source = open_folder(path) if os.path.isdir(path) else PtFile(path)
    return None if source.tied else source


def load_sharded(path: str, world: World) -> Checkpoint:
    """A `.pt`, sharded over the processes if there are several."""
    source = source_of(path, world.size)
    if source is None:
        return checkpoints.load(path, world.device)
    checkpoint = Checkpoint(on_meta(source), source.config, source.step)
    parallel.shard(checkpoint.model, world)
    fill(checkpoint.model.to_empty(device=world.device), source, world.rank, world.size)
    return checkpoint


def make_optimizer(config: TrainConfig, model: Transformer) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over warmup_iters steps, then a cosine to 0 at max_iters (or constant)."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if not config.decay_lr:
        return config.learning_rate
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@functools.lru_cache(maxsize=2)
def order_of_epoch(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def groups_of_step(groups: Sequence[EncodedGroup], batch_size: int, step: int, seed: int) -> list[EncodedGroup]:
    """The batch of a step: epochs are permutations seeded by (seed, epoch), read one after the other."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, len(groups))
        chosen.append(groups[order_of_epoch(len(groups), seed + epoch)[i]])
    return chosen


def tensors_of(batch: Batch, wanted: set[str], policy: Transformer, reference: Transformer | None) -> dict[str, Tensor]:
    """The (B, n) tensors that losses and regularizers read of a batch, those of `wanted` at least."""
    logits = policy(batch.tokens)
    tensors = {"policy_logps": sequence_logps(logits, batch.tokens, batch.mask), "lengths": batch.lengths}
    if wanted & {"reference_logps", "response_kl"}:
        with torch.no_grad():
            reference_logits = reference(batch.tokens)
        tensors["reference_logps"] = sequence_logps(reference_logits, batch.tokens, batch.mask)
        if "response_kl" in wanted:
            tensors["response_kl"] = token_kl(logits, reference_logits, batch.mask)
    return {name: tensor.view(-1, batch.n) for name, tensor in tensors.items()}


def batch_statistic(
    objective: Objective, policy: Transformer, reference, batches: list[Batch], world: World
) -> dict[str, Tensor]:
    """The mean over the whole batch that the loss asks for, before any gradient: {its name: value}.

    With one micro-batch the loss computes it itself; at gamma = 0 SPO's weight is 1 whatever the mean.
    """
    alone = len(batches) == 1 and world.size == 1
    if objective.loss.statistic is None or alone or objective.settings.get("gamma") == 0:
        return {}
    name, statistic = objective.loss.statistic
    values = []
    with torch.no_grad():
        for batch in batches:
            if "policy_logps" in reads(statistic):
                tensors = tensors_of(batch, reads(statistic), policy, reference)
            else:
                tensors = {"lengths": batch.lengths}  # known without a pass over the batch
            values.append(call(statistic, tensors | objective.settings))
    mine = torch.cat(values)
    return {name: world.total(mine.sum(0)) / (len(mine) * world.size)}


def preference_backward(
    objective: Objective, policy, reference, batches: list[Batch], world: World = World()
) -> dict[str, Tensor]:
    """Adds the gradient of the mean preference loss to the policy, and that of a regularizer on the dataset.

    Returns what is logged, as means over the groups of all processes, which have equally many. margin and accuracy compare column 0 with the others: by log-ratio
    where a reference is read, and by log-prob where it is not.
    """
    count = sum(len(batch.lengths) for batch in batches) * world.size
    statistics = batch_statistic(objective, policy, reference, batches, world)
    means: dict[str, Tensor] = {}
    for batch in batches:
        tensors = tensors_of(batch, objective.reads, policy, reference)
        values = call(objective.loss, tensors | statistics | objective.settings)
        logps = tensors["policy_logps"].detach()
        logged = {"loss": values.detach(), "logps/chosen": logps[:, 0]}
        if batch.n > 1:
            compared = logps - tensors["reference_logps"] if "reference_logps" in tensors else logps
            gaps = compared[:, :1] - compared[:, 1:]
            logged |= {"logps/rejected": logps[:, 1:].mean(1), "margin": gaps.mean(1),
                       "accuracy": (gaps > 0).float().mean(1)}
        if objective.beta and not objective.online:
            regularizer = call(objective.regularizer, tensors)
            values = values + objective.beta * regularizer
            logged["regularizer"] = regularizer.detach()
            if objective.regularizer is importance:
                logged["clamped"] = clamped(logps, tensors["reference_logps"]) * float(count)  # a count, not a mean
        (values.sum() * world.size / count).backward()  # several processes: FSDP takes the mean over them
        for name, value in logged.items():
            means[name] = means.get(name, 0) + value.sum() / count
    return {name: world.total(value) for name, value in means.items()}


@dataclass
class OnlineSamples:
    """Samples of the policy, and the reference's logits of them: both stay for kl_interval steps.

    samples  those of all processes; batches and logits are of this process's share
    """

    samples: list[EncodedGroup]
    batches: list[Batch]
    reference_logits: list[Tensor]


def draw_online(
    config: TrainConfig, policy: Checkpoint, reference: Transformer, prompts: list[list[int]], step: int,
    world: World = World(),
) -> OnlineSamples:
    """Whole samples of the policy: temperature 1, no truncation, eval mode (Eq. 15 is about the policy itself)."""
    policy.model.eval()
    chosen = random.Random(config.seed + step).choices(prompts, k=config.kl_batch_size)
    with whole(policy.model):
        mine = sample(policy, chosen, (config.seed, ONLINE, step), config.max_new_tokens, part=world.share(len(chosen)))
    return online_of(config, [group for part in world.gather(mine) for group in part], reference, world)


def online_of(config: TrainConfig, samples: list[EncodedGroup], reference: Transformer, world: World) -> OnlineSamples:
    mine = samples[world.share(len(samples))]
    batches = micro_batches(mine, config.micro_batch_size, reference.args.vocab_size, world.device, world.most)
    with torch.no_grad():
        return OnlineSamples(samples, batches, [reference(batch.tokens) for batch in batches])


def regularizer_backward(
    objective: Objective, policy: Transformer, online: OnlineSamples, world: World = World()
) -> dict[str, Tensor]:
    """Adds the gradient of beta * mean(regularizer) on the online samples; returns the mean KL, in nats."""
    count = len(online.samples)
    kl = 0.0
    for batch, reference_logits in zip(online.batches, online.reference_logits):
        online_kl = token_kl(policy(batch.tokens), reference_logits, batch.mask)
        (objective.beta * objective.regularizer(online_kl).sum() * world.size / count).backward()
        kl += online_kl.detach().sum() / count
    return {"kl": world.total(kl)}


def gradient_step(
    config: TrainConfig, objective: Objective, policy: Transformer, reference: Transformer | None,
    groups: list[EncodedGroup], online: OnlineSamples | None, optimizer: torch.optim.Optimizer, step: int,
    world: World = World(),
) -> dict[str, float]:
    """One optimizer step on the groups of all processes; returns what is logged. ValueError if it would not be finite."""
    started = time.perf_counter()
    policy.train()
    mine = groups[world.rank :: world.size]
    batches = micro_batches(mine, config.micro_batch_size, policy.args.vocab_size, world.device, world.most)
    logged = preference_backward(objective, policy, reference, batches, world)
    if online is not None:
        logged |= regularizer_backward(objective, policy, online, world)
    logged["grad_norm"] = full(torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip or math.inf))
    logged = {name: float(value) for name, value in logged.items()}
    if not (math.isfinite(logged["loss"]) and math.isfinite(logged["grad_norm"])):
        raise ValueError(
            f"step {step}: loss is {logged['loss']}, grad norm {logged['grad_norm']}; ckpt.pt holds the last "
            f"evaluation. Try --learning_rate={config.learning_rate / 4:g}; the batch holds lines "
            f"{sorted(group.line for group in groups)} of {config.data}"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(response) for group in groups for response in group.responses)
    return logged | {"lr": learning_rate(config, step), "tokens_per_second": tokens / (time.perf_counter() - started)}


# --- the run -------------------------------------------------------------------------------------


def demo(loss: str, device: str) -> tuple[str, str]:
    """Build what is missing of the offline demo; returns its dataset for a loss, and its reference model.

    Text and tokenizer, a reference model trained on them by this very loop, groups of its stories, ranked.
    """
    data.demo_text()
    tokenizer, folder = os.path.join(data.DEMO_DIR, "tokenizer.model"), os.path.join(data.DEMO_DIR, "reference")
    reference = os.path.join(folder, "ckpt.pt")
    if not os.path.isdir(folder):
        print("demo: training a reference model on the stories of a small grammar", flush=True)
        train(TrainConfig(
            loss="sft", data=os.path.join(data.DEMO_DIR, data.DEMO_FILES["text"]), init_from="scratch",
            tokenizer=tokenizer, out_dir=f"{folder}.tmp", dim=96, n_layers=3, n_heads=3, max_seq_len=256,
            batch_size=16, max_iters=700, learning_rate=3e-3, warmup_iters=20, weight_decay=0.1, log_interval=100,
            adam_beta1=0.9, adam_beta2=0.95, eval_interval=700, eval_stories=0,
        ), World(device=device))
        os.rename(f"{folder}.tmp", folder)
    checkpoint = checkpoints.load(reference, device)
    data.demo_groups(checkpoint, load_tokenizer(tokenizer, reference, checkpoint.model.args.vocab_size))
    return os.path.join(data.DEMO_DIR, data.DEMO_FILES[LOSSES[loss].data]), reference


def load_groups(config: TrainConfig, need: str, tokenizer: Tokenizer, policy: Checkpoint, say: Callable[[str], None]):
    """(encoded groups, the different prompts) of the dataset. ValueError if it does not suit the loss."""
    if os.path.isdir(config.data) or config.data.endswith(".bin"):
        if need != "text":
            raise ValueError(f"--data={config.data}: token files are text for --loss=sft; {config.loss} needs groups "
                             "(JSONL)")
        return TokenWindows(config.data, policy.model.args.max_seq_len, policy.model.args.vocab_size), [""]
    groups = read_groups(config.data)
    require(groups, need, config.data, config.loss)
    encoded, drops = encode_groups(groups, tokenizer, policy.eos_id, policy.model.args.max_seq_len)
    for reason, lines in drops.items():
        say(f"{config.data}: {len(lines)} of {len(groups)} groups dropped, {reason} (first in line {lines[0]})")
    if not encoded:
        raise ValueError(f"{config.data}: none of its {len(groups)} groups can be used: {', '.join(drops)}")
    used = {group.line for group in encoded}
    return encoded, sorted({group.prompt for group in groups if group.line in used})


def in_run(config: TrainConfig, name: str) -> str:
    return os.path.join(config.out_dir, name)


def new_run(config: TrainConfig, policy: Checkpoint, tokenizer: Tokenizer) -> None:
    """Make out_dir the folder of this run: what an earlier run left there is removed."""
    files = ("ckpt.pt", "best.pt", "model.bin", "log.jsonl", "config.json", "tokenizer.model", "tokenizer.bin")
    former = [in_run(config, name) for name in files]
    former += glob.glob(in_run(config, "step_*.pt")) + glob.glob(in_run(config, "stories/*.jsonl"))
    inputs = {os.path.realpath(p) for p in (config.init_from, tokenizer.path, config.data, config.baseline) if p}
    for path in former:
        if os.path.realpath(path) in inputs:
            raise ValueError(f"--out_dir={config.out_dir}: this run reads {path}, and would replace what is in "
                             "that folder; choose another --out_dir")
    for path in filter(os.path.exists, former):
        os.remove(path)
    shutil.rmtree(in_run(config, "state"), ignore_errors=True)
    for folder in ("stories", "state"):
        os.makedirs(in_run(config, folder), exist_ok=True)
    checkpoints.write_text(in_run(config, "config.json"), json.dumps(policy.config, indent=1))
    checkpoints.copy_tokenizer(tokenizer, config.out_dir)


# What a resumed run may change: what it costs and shows, and nothing of what it computes.
FREE = {"resume", "device", "micro_batch_size", "activation_checkpointing", "log_interval", "report", "keep_checkpoints", "workers", "max_usd", "base_url",
        "journal", "judge_timeout", "judge_retries", "judge_attempts"}


def identity(config: TrainConfig) -> dict:
    """What makes a run this run: its flags, and the SHA-256 of the files that it reads."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    files = [path for path in (config.data, config.init_from, config.baseline) if os.path.isfile(path)]
    return {"flags": flags, "files": {path: parallel.sha256_of(path) for path in files}}


def state_to_resume(config: TrainConfig) -> str | None:
    """The state that --resume means, if it is one of this very run. ValueError, naming the flag, if it is not."""
    path = parallel.find_state(in_run(config, "state"), config.resume)
    if path is None:
        return None
    former, now = parallel.facts_of(path)["identity"], identity(config)
    for name, value in now["flags"].items():
        if former["flags"].get(name) != value:
            raise ValueError(f"--{name}={value}: {path} is of a run with {former['flags'].get(name)}; resume it with the "
                             "same flags, or start anew in another --out_dir")
    for name, digest in now["files"].items():
        if former["files"].get(name) != digest:
            raise ValueError(f"{name}: has changed since the run began; it cannot be resumed")
    return path


def describe(
    config: TrainConfig, objective: Objective, policy: Checkpoint, groups: Sequence[EncodedGroup], device: str
) -> str:
    n = len(groups[0].responses)
    parameters = sum(p.numel() for p in policy.model.parameters())
    some = [groups[i] for i in range(min(1000, len(groups)))]
    tokens = sum(len(r) for g in some for r in g.responses) / len(some) * config.batch_size
    start = objective.start(n)
    known = "" if start is None else f", which is {start:.4f} while the policy equals the reference"
    return (f"{parameters:,} parameters on {device}; {len(groups)} groups of {n} in {config.data}; "
            f"{config.max_iters} steps of {tokens:,.0f} tokens\nobjective: {objective}{known}")


def load_of(config: TrainConfig, objective: Objective, policy: Checkpoint, groups: Sequence[EncodedGroup]) -> plan.Load:
    """What --plan is to reckon with."""
    mine, vocab_size = max(1, config.batch_size // config.plan), policy.model.args.vocab_size
    some = [groups[i] for i in range(min(1000, len(groups)))]
    longest = max(some, key=lambda group: max(map(len, group.responses)))
    batch = micro_batches([longest] * mine, config.micro_batch_size, vocab_size, "cpu")[0]
    return plan.Load(
        processes=config.plan, dtype=config.dtype, reference=objective.needs_reference,
        online=config.kl_batch_size if objective.online else 0, eval_stories=config.eval_stories,
        sequences=len(batch.tokens), longest=batch.tokens.shape[1], new_tokens=config.max_new_tokens,
        activation_checkpointing=config.activation_checkpointing,
    )


def gathered(policy: Checkpoint, world: World) -> Checkpoint | None:
    """The policy with all its weights, on the CPU of the first process; the others get None. All have to ask."""
    weights = {}
    for name, weight in policy.model.state_dict().items():
        whole_weight = full(weight.detach())  # one at a time
        if world.rank == 0:
            weights[name] = whole_weight.cpu()
    if world.rank > 0:
        return None
    return dataclasses.replace(policy, model=checkpoints.build("the policy", policy.model.args, weights))


def save(config: TrainConfig, policy: Checkpoint, verdict: Verdict | None, best: float, world: World) -> float:
    """The files of an evaluation (verdict None: of a model that nobody judges); returns the best win-rate so far."""
    improved = verdict is None or verdict.rate > best
    policy = gathered(policy, world) if parallel.is_sharded(policy.model) else policy
    if world.rank == 0:
        checkpoints.save_pt(in_run(config, "ckpt.pt"), policy)
        if config.keep_checkpoints:
            checkpoints.save_pt(in_run(config, f"step_{policy.step:06d}.pt"), policy)
        if verdict is not None:
            checkpoints.write_jsonl(in_run(config, f"stories/step_{policy.step:06d}.jsonl"), verdict.stories)
        if verdict is not None and improved:
            checkpoints.save_pt(in_run(config, "best.pt"), policy, win_rate=verdict.rate)
        if improved:
            checkpoints.save_llama2c(in_run(config, "model.bin"), policy.model)
    return verdict.rate if verdict is not None and improved else best


def train(config: TrainConfig, world: World) -> None:
    check_config(config, world)
    objective = objective_of(config)
    if not config.data:
        groups_file, reference = world.from_first(lambda: demo(config.loss, world.device))
        steps = config.max_iters or 80
        config = dataclasses.replace(config, data=groups_file, init_from=reference, max_iters=steps)
    policy, tokenizer, source = policy_at_start(config, world)
    groups, prompts = load_groups(config, objective.loss.data, tokenizer, policy, world.say)
    if config.max_iters is None:  # one epoch: the least that uses every group
        config = dataclasses.replace(config, max_iters=math.ceil(len(groups) / config.batch_size))
    policy.config |= dataclasses.asdict(config)
    prompt_ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]

    # A model from scratch has no reference worth beating: it is trained, and judged by nobody.
    judged = config.eval_stories > 0 and config.init_from != "scratch"
    start = copy.deepcopy(policy) if judged or objective.needs_reference else None
    reference = start.model.requires_grad_(False) if objective.needs_reference else None
    evaluation = Evaluation(
        start, tokenizer, prompts, config.eval_stories, judge=make_judge(config) if world.rank == 0 else OfflineJudge(),
        seed=config.seed, max_new_tokens=config.max_new_tokens, baseline=config.baseline, world=world,
    ) if judged else None
    if config.plan is not None:
        world.say(plan.report(policy.model.args, policy.model.tied, load_of(config, objective, policy, groups), world.device))
        return
    world.say(describe(config, objective, policy, groups, world.device))
    state = world.from_first(lambda: state_to_resume(config)) if config.resume else None
    if state is None:
        world.from_first(lambda: new_run(config, policy, tokenizer))
    for model in (policy.model, start.model) if start else (policy.model,):
        parallel.shard(model, world)
        if source is not None:
            fill(model.to_empty(device=world.device), source, world.rank, world.size)
    if config.activation_checkpointing:
        parallel.checkpoint_activations(policy.model)
    optimizer = make_optimizer(config, policy.model)
    run = Run(config, objective, policy, reference, evaluation, optimizer, world, prompt_ids)
    if state is not None:
        run.restore(state)
    run.loop(groups)
    if judged and config.report and not run.stopped:
        if run.best_rate < 0:
            raise ValueError("the judge gave no win-rate that can be trusted, so there is no best.pt; see ckpt.pt")
        best = load_sharded(in_run(config, "best.pt"), world)
        report(evaluation, {"before": start, "best": best, "last": policy}, run.record)
        world.say(f"\n{config.out_dir}: best.pt, ckpt.pt, model.bin; sample with "
                  f"`python sample.py --checkpoint={in_run(config, 'best.pt')}`")


@dataclass
class Run:
    """A run under way: what it works with, and what changes from step to step."""

    config: TrainConfig
    objective: Objective
    policy: Checkpoint
    reference: Transformer | None
    evaluation: Evaluation | None
    optimizer: torch.optim.Optimizer
    world: World
    prompts: list[list[int]]
    first: int = 0  # the step to begin with
    evaluated: int = -1  # the last step that was evaluated
    best_rate: float = -1.0
    online: OnlineSamples | None = None
    stopped: bool = False

    def record(self, step: int, values: dict[str, float]) -> None:
        if self.world.rank == 0:
            with open(in_run(self.config, "log.jsonl"), "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step} | values) + "\n")

    def keep(self) -> None:
        """The state after policy.step steps, to go on from."""
        log = in_run(self.config, "log.jsonl")
        facts = {
            "identity": identity(self.config), "best_rate": self.best_rate, "evaluated": self.evaluated,
            "log_bytes": os.path.getsize(log) if os.path.exists(log) else 0,
            "online": [dataclasses.astuple(group) for group in self.online.samples] if self.online else None,
        }
        tensors = parallel.tensors_of_run(self.policy.model, self.optimizer)
        parallel.save_state(in_run(self.config, "state"), self.policy.step, tensors, facts, self.world)

    def restore(self, path: str) -> None:
        facts = parallel.facts_of(path)
        self.first = self.policy.step = facts["step"]
        self.best_rate, self.evaluated = facts["best_rate"], facts["evaluated"]
        parallel.load_state(path, parallel.tensors_of_run(self.policy.model, self.optimizer), self.world)
        if facts["online"] is not None:
            samples = [EncodedGroup(*group) for group in facts["online"]]
            self.online = online_of(self.config, samples, self.reference, self.world)
        if self.world.rank == 0:
            with open(in_run(self.config, "log.jsonl"), "ab") as log:
                log.truncate(facts["log_bytes"])  # what was logged after the state is computed again
        self.world.say(f"resumed from {path}, step {self.first}")

    def evaluate(self, say: Callable[[str], None]) -> None:
        """Judge the policy, if it is judged, and keep it."""
        step, evaluation = self.policy.step, self.evaluation
        verdict = evaluation.evaluate(self.policy, "select") if evaluation else None
        self.best_rate = save(self.config, self.policy, verdict, self.best_rate, self.world)
        if verdict is not None:
            self.record(step, verdict.logged("eval"))
            say(f"step {step}: win-rate over {evaluation.name} {verdict}\n"
                f"    {textwrap.shorten(verdict.stories[0]['text'], 300)}")
        self.evaluated = step
        self.keep()

    def loop(self, groups: Sequence[EncodedGroup]) -> None:
        """Algorithm 1, from the first step to max_iters; SIGTERM keeps the state and ends it."""
        config, world, policy = self.config, self.world, self.policy
        terminated = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: terminated.set())
        bar = tqdm(total=config.max_iters, initial=self.first, desc=config.loss, unit="step", disable=world.rank > 0)

        def say(text: str) -> None:
            if world.rank == 0:
                bar.write(text)

        with bar:
            for step in range(self.first, config.max_iters + 1):
                policy.step = step
                if world.most(int(terminated.is_set())):
                    if step > self.first:
                        self.keep()
                    self.stopped = True
                    say(f"stopped by SIGTERM before step {step}; the same command with --resume goes on")
                    return
                if (step % config.eval_interval == 0 or step == config.max_iters) and self.evaluated != step:
                    self.evaluate(say)
                if step == config.max_iters:
                    return
                if self.objective.online and step % config.kl_interval == 0:
                    self.online = draw_online(config, policy, self.reference, self.prompts, step, world)
                chosen = groups_of_step(groups, config.batch_size, step, config.seed)
                logged = gradient_step(config, self.objective, policy.model, self.reference, chosen, self.online,
                                       self.optimizer, step, world)
                if step % config.log_interval == 0 or step == config.max_iters - 1:
                    self.record(step, logged)
                    say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in logged.items()))
                bar.update()


def main(argv: list[str]) -> None:
    config = parse(TrainConfig, argv, "spo_train.py", "Align a Llama by Soft Preference Optimization.")
    world = parallel.start(checkpoints.pick_device(config.device), config.dtype)
    train(config, world)
    parallel.end()


if __name__ == "__main__":
    run(main)
