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
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint as checkpoints
import tinystories_data as data
from checkpoint import Checkpoint
from config import flag, parse, run
from evaluation import ONLINE, Evaluation, Verdict, report
from groups import Batch, EncodedGroup, encode_groups, micro_batches, read_groups, require
from judge import JudgeFlags, make_judge
from losses import LOSSES, REGULARIZERS, clamped, importance, sequence_logps, token_kl
from model import ModelArgs, Transformer
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
    init_from: str = flag("", "policy and reference to start from: a .pt, a llama2.c .bin, or `scratch`")
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
    seed: int = flag(1337, "of the data order, of every sample, and of the weights from scratch")


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


def check_config(config: TrainConfig) -> None:
    """ValueError, naming the flag, for what no run can work with."""
    positive = ("batch_size", "max_iters", "kl_interval", "kl_batch_size", "max_new_tokens", "eval_interval",
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
    if config.judge != "offline" and config.eval_stories == 0:
        raise ValueError(f"--judge={config.judge}: nothing is judged with --eval_stories=0; leave it out")
    if config.baseline and (config.eval_stories == 0 or config.init_from == "scratch"):
        raise ValueError("--baseline: nothing is judged with --eval_stories=0 or --init_from=scratch; leave it out")
    if config.init_from == "scratch" and not config.tokenizer:
        raise ValueError("--init_from=scratch: needs --tokenizer")


# --- the pieces of a step ------------------------------------------------------------------------


def policy_at_start(config: TrainConfig, device: str) -> tuple[Checkpoint, Tokenizer]:
    """The policy at step 0: a checkpoint's, or fresh weights. Its config is this run's, and the terminator's id."""
    if config.init_from == "scratch":
        tokenizer = Tokenizer(config.tokenizer)
        shape = {name: getattr(config, name) for name in SHAPE_FLAGS}
        model = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, multiple_of=32, **shape))
        model.init_weights(torch.Generator().manual_seed(config.seed))
        eos_id = tokenizer.bos_id  # as in llama2.c's TinyStories: the next story's BOS ends a story
    else:
        loaded = checkpoints.load(config.init_from)
        model, eos_id = loaded.model, loaded.eos_id
        tokenizer = load_tokenizer(config.tokenizer, config.init_from, model.args.vocab_size)
    return Checkpoint(model.to(device), dataclasses.asdict(config) | {"eos_id": eos_id}), tokenizer


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


def batch_statistic(objective: Objective, policy: Transformer, reference, batches: list[Batch]) -> dict[str, Tensor]:
    """The mean over the whole batch that the loss asks for, before any gradient: {its name: value}.

    With one micro-batch the loss computes it itself; at gamma = 0 SPO's weight is 1 whatever the mean.
    """
    if objective.loss.statistic is None or len(batches) == 1 or objective.settings.get("gamma") == 0:
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
    return {name: torch.cat(values).mean(0)}


def preference_backward(objective: Objective, policy, reference, batches: list[Batch]) -> dict[str, Tensor]:
    """Adds the gradient of the mean preference loss to the policy, and that of a regularizer on the dataset.

    Returns what is logged, as means over groups. margin and accuracy compare column 0 with the others: by log-ratio
    where a reference is read, and by log-prob where it is not.
    """
    count = sum(len(batch.lengths) for batch in batches)
    statistics = batch_statistic(objective, policy, reference, batches)
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
        (values.sum() / count).backward()
        for name, value in logged.items():
            means[name] = means.get(name, 0) + value.sum() / count
    return means


@dataclass
class OnlineSamples:
    """Samples of the policy, and the reference's logits of them: both stay for kl_interval steps."""

    batches: list[Batch]
    reference_logits: list[Tensor]


def draw_online(
    config: TrainConfig, policy: Checkpoint, reference: Transformer, prompts: list[list[int]], step: int
) -> OnlineSamples:
    """Whole samples of the policy: temperature 1, no truncation, eval mode (Eq. 15 is about the policy itself)."""
    policy.model.eval()
    chosen = random.Random(config.seed + step).choices(prompts, k=config.kl_batch_size)
    samples = sample(policy, chosen, (config.seed, ONLINE, step), config.max_new_tokens)
    batches = micro_batches(samples, config.micro_batch_size, policy.model.args.vocab_size, policy.model.device)
    with torch.no_grad():
        return OnlineSamples(batches, [reference(batch.tokens) for batch in batches])


def regularizer_backward(objective: Objective, policy: Transformer, online: OnlineSamples) -> dict[str, Tensor]:
    """Adds the gradient of beta * mean(regularizer) on the online samples; returns the mean KL, in nats."""
    count = sum(len(batch.tokens) for batch in online.batches)
    kl = 0.0
    for batch, reference_logits in zip(online.batches, online.reference_logits):
        online_kl = token_kl(policy(batch.tokens), reference_logits, batch.mask)
        (objective.beta * objective.regularizer(online_kl).sum() / count).backward()
        kl += online_kl.detach().sum() / count
    return {"kl": kl}


def gradient_step(
    config: TrainConfig, objective: Objective, policy: Transformer, reference: Transformer | None,
    groups: list[EncodedGroup], online: OnlineSamples | None, optimizer: torch.optim.Optimizer, step: int,
) -> dict[str, float]:
    """One optimizer step on the groups; returns what is logged of it. ValueError if it would not be finite."""
    started = time.perf_counter()
    policy.train()
    batches = micro_batches(groups, config.micro_batch_size, policy.args.vocab_size, policy.device)
    logged = preference_backward(objective, policy, reference, batches)
    if online is not None:
        logged |= regularizer_backward(objective, policy, online)
    logged["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip or math.inf)
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
    tokens = sum(int(batch.mask.sum()) for batch in batches)
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
            adam_beta1=0.9, adam_beta2=0.95, eval_interval=700, eval_stories=0, device=device,
        ))
        os.rename(f"{folder}.tmp", folder)
    checkpoint = checkpoints.load(reference, device)
    data.demo_groups(checkpoint, load_tokenizer(tokenizer, reference, checkpoint.model.args.vocab_size))
    return os.path.join(data.DEMO_DIR, data.DEMO_FILES[LOSSES[loss].data]), reference


def load_groups(config: TrainConfig, need: str, tokenizer: Tokenizer, policy: Checkpoint):
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
        print(f"{config.data}: {len(lines)} of {len(groups)} groups dropped, {reason} (first in line {lines[0]})")
    if not encoded:
        raise ValueError(f"{config.data}: none of its {len(groups)} groups can be used: {', '.join(drops)}")
    used = {group.line for group in encoded}
    return encoded, sorted({group.prompt for group in groups if group.line in used})


def new_run(config: TrainConfig, policy: Checkpoint, tokenizer: Tokenizer) -> Callable[[str], str]:
    """Make out_dir the folder of this run: what an earlier run left there is removed. Returns name -> path in it."""

    def in_run(name: str) -> str:
        return os.path.join(config.out_dir, name)

    files = ("ckpt.pt", "best.pt", "model.bin", "log.jsonl", "config.json", "tokenizer.model", "tokenizer.bin")
    former = [in_run(name) for name in files] + glob.glob(in_run("step_*.pt")) + glob.glob(in_run("stories/*.jsonl"))
    inputs = {os.path.realpath(p) for p in (config.init_from, tokenizer.path, config.data, config.baseline) if p}
    for path in former:
        if os.path.realpath(path) in inputs:
            raise ValueError(f"--out_dir={config.out_dir}: this run reads {path}, and would replace what is in "
                             "that folder; choose another --out_dir")
    for path in filter(os.path.exists, former):
        os.remove(path)
    os.makedirs(in_run("stories"), exist_ok=True)
    checkpoints.write_text(in_run("config.json"), json.dumps(policy.config, indent=1))
    checkpoints.copy_tokenizer(tokenizer, config.out_dir)
    return in_run


def describe(config: TrainConfig, objective: Objective, policy: Checkpoint, groups: list[EncodedGroup]) -> str:
    n = len(groups[0].responses)
    parameters = sum(p.numel() for p in policy.model.parameters())
    some = [groups[i] for i in range(min(1000, len(groups)))]
    tokens = sum(len(r) for g in some for r in g.responses) / len(some) * config.batch_size
    start = objective.start(n)
    known = "" if start is None else f", which is {start:.4f} while the policy equals the reference"
    return (f"{parameters:,} parameters on {policy.model.device}; {len(groups)} groups of {n} in {config.data}; "
            f"{config.max_iters} steps of {tokens:,.0f} tokens\nobjective: {objective}{known}")


def save(
    config: TrainConfig, in_run: Callable[[str], str], policy: Checkpoint, verdict: Verdict | None, best: float
) -> float:
    """The files of an evaluation (verdict None: of a model that nobody judges); returns the best win-rate so far."""
    checkpoints.save_pt(in_run("ckpt.pt"), policy)
    if config.keep_checkpoints:
        checkpoints.save_pt(in_run(f"step_{policy.step:06d}.pt"), policy)
    if verdict is not None:
        checkpoints.write_jsonl(in_run(f"stories/step_{policy.step:06d}.jsonl"), verdict.stories)
        if verdict.rate <= best:
            return best
        best = verdict.rate
        checkpoints.save_pt(in_run("best.pt"), policy, win_rate=best)
    checkpoints.save_llama2c(in_run("model.bin"), policy.model)
    return best


def train(config: TrainConfig) -> None:
    check_config(config)
    objective, device = objective_of(config), checkpoints.pick_device(config.device)
    if not config.data:
        groups_file, reference = demo(config.loss, device)
        steps = config.max_iters or 80
        config = dataclasses.replace(config, data=groups_file, init_from=reference, max_iters=steps)
    policy, tokenizer = policy_at_start(config, device)
    groups, prompts = load_groups(config, objective.loss.data, tokenizer, policy)
    if config.max_iters is None:  # one epoch: the least that uses every group
        config = dataclasses.replace(config, max_iters=math.ceil(len(groups) / config.batch_size))
    policy.config |= dataclasses.asdict(config)
    prompt_ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    optimizer = make_optimizer(config, policy.model)

    # A model from scratch has no reference worth beating: it is trained, and judged by nobody.
    judged = config.eval_stories > 0 and config.init_from != "scratch"
    start = copy.deepcopy(policy) if judged or objective.needs_reference else None
    reference = start.model.requires_grad_(False) if objective.needs_reference else None
    evaluation = Evaluation(
        start, tokenizer, prompts, config.eval_stories, judge=make_judge(config), seed=config.seed,
        max_new_tokens=config.max_new_tokens, baseline=config.baseline,
    ) if judged else None
    in_run = new_run(config, policy, tokenizer)
    print(describe(config, objective, policy, groups), flush=True)

    best_rate, online = -1.0, None
    bar = tqdm(total=config.max_iters, desc=config.loss, unit="step")
    with open(in_run("log.jsonl"), "w", encoding="utf-8") as log, bar:

        def record(step: int, values: dict[str, float]) -> None:
            log.write(json.dumps({"step": step} | values) + "\n")
            log.flush()

        for step in range(config.max_iters + 1):
            policy.step = step
            if step % config.eval_interval == 0 or step == config.max_iters:
                verdict = evaluation.evaluate(policy, "select") if judged else None
                best_rate = save(config, in_run, policy, verdict, best_rate)
                if judged:
                    record(step, verdict.logged("eval"))
                    bar.write(f"step {step}: win-rate over {evaluation.name} {verdict}\n"
                              f"    {textwrap.shorten(verdict.stories[0]['text'], 300)}")
            if step == config.max_iters:
                break

            if objective.online and step % config.kl_interval == 0:
                online = draw_online(config, policy, reference, prompt_ids, step)
            chosen = groups_of_step(groups, config.batch_size, step, config.seed)
            logged = gradient_step(config, objective, policy.model, reference, chosen, online, optimizer, step)
            if step % config.log_interval == 0 or step == config.max_iters - 1:
                record(step, logged)
                bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in logged.items()))
            bar.update()
        if judged and config.report:
            if best_rate < 0:
                raise ValueError("the judge gave no win-rate that can be trusted, so there is no best.pt; see ckpt.pt")
            best = checkpoints.load(in_run("best.pt"), device)
            report(evaluation, {"before": start, "best": best, "last": policy}, record)
            print(f"\n{config.out_dir}: best.pt, ckpt.pt, model.bin; sample with "
                  f"`python sample.py --checkpoint={in_run('best.pt')}`")


def main(argv: list[str]) -> None:
    train(parse(TrainConfig, argv, "spo_train.py", "Align a Llama by Soft Preference Optimization."))


if __name__ == "__main__":
    run(main)
