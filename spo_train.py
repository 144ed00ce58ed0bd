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
import inspect
import json
import math
import os
import random
import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint as checkpoints
import judge
import tinystories_data as data
from checkpoint import Checkpoint
from config import flag, parse, run
from losses import LOSSES, REGULARIZERS, sequence_logps, token_kl
from model import ModelArgs, Transformer, generate
from tinystories_data import Batch, EncodedGroup
from tokenizer import Tokenizer, load_tokenizer

LOSS_NUMBERS = ("alpha", "beta", "gamma", "eta")  # flags that a loss takes or does not take
SHAPE_FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")


@dataclass
class TrainConfig:
    loss: str = flag("spo_rank", "the objective, a name in losses.LOSSES", choices=list(LOSSES))
    regularizer: str = flag("", "what beta weighs, for a loss with no beta of its own; none: the loss's default",
                            choices=["", *REGULARIZERS])
    alpha: float | None = flag(None, "the loss's alpha; none: its default (spo*: softmax exponent, 0.001)")
    beta: float | None = flag(None, "reference strength (dpo*) or weight of the regularizer (spo*: 0.1)")
    gamma: float | None = flag(None, "exponent in SPO's weight mu; none: 0.01")
    eta: float | None = flag(None, "spo_rank: stage k weighs eta^k; none: 1")
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
    max_iters: int = flag(100, "optimizer steps")
    learning_rate: float = flag(3e-4, "peak learning rate of AdamW")
    warmup_iters: int = flag(10, "steps of linear warm-up")
    decay_lr: bool = flag(True, "cosine decay of the learning rate to 0 at max_iters")
    weight_decay: float = flag(0.0, "AdamW's, on matrices")
    adam_beta1: float = flag(0.9, "AdamW's")
    adam_beta2: float = flag(0.95, "AdamW's")
    grad_clip: float = flag(1.0, "gradient norm to clip at; 0: no clipping")
    kl_interval: int = flag(8, "steps between fresh samples of the policy (T in the paper)")
    kl_batch_size: int = flag(32, "how many samples")
    max_new_tokens: int = flag(256, "longest sampled story, in tokens")
    eval_interval: int = flag(20, "steps between evaluations")
    eval_stories: int = flag(128, "stories judged at an evaluation; the final report judges twice as many fresh ones")
    baseline: str = flag("", "stories to win against (JSONL); none: the reference's own")
    log_interval: int = flag(5, "steps between log lines")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")
    seed: int = flag(1337, "of the data order, of every sample, and of the weights from scratch")


# --- what the flags mean -----------------------------------------------------------------------------------------------


def reads(*functions: Callable) -> set[str]:
    """The argument names of some losses and regularizers: the tensors and numbers they want."""
    return {name for function in functions for name in inspect.signature(function).parameters}


def call(function: Callable, values: dict):
    """function(**those of values that it reads); what it reads and values lacks keeps its default."""
    return function(**{name: values[name] for name in reads(function) if name in values})


@dataclass
class Objective:
    """The loss, its regularizer, and the numbers they run with."""

    loss: Callable[..., Tensor]
    regularizer: Callable[..., Tensor]
    numbers: dict[str, float]  # of the loss, defaults filled in
    beta: float  # weight of the regularizer

    def __post_init__(self):
        self.reads = reads(self.loss, self.regularizer)

    @property
    def needs_reference(self) -> bool:
        return bool(self.reads & {"reference_logps", "online_kl"})


def objective_of(config: TrainConfig) -> Objective:
    """ValueError, naming the flag, for a number that the loss does not take or cannot work with."""
    loss = LOSSES[config.loss]
    defaults = {n: p.default for n, p in inspect.signature(loss).parameters.items() if n in LOSS_NUMBERS}
    own_beta = "beta" in defaults
    name = config.regularizer or loss.regularizer
    if own_beta and name != "none":
        raise ValueError(f"--regularizer={name}: {config.loss} has a beta and a reference of its own; leave it out")
    takes = set(defaults) | ({"beta"} if name != "none" else set())
    numbers = {n: getattr(config, n) for n in LOSS_NUMBERS if getattr(config, n) is not None}
    for wrong in sorted(set(numbers) - takes):
        listed = ", ".join(f"--{n}" for n in sorted(takes)) or "no numbers"
        raise ValueError(f"--{wrong}: {config.loss} with regularizer {name} does not take it; it takes {listed}")
    for n, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{n}={value}: must be finite and not negative")
    beta = 0.0 if own_beta or name == "none" else numbers.pop("beta", 0.1)
    numbers = defaults | numbers
    if "centered" in reads(loss):
        numbers["centered"] = True  # the same gradient; the value is 0 at equal log-probs
    return Objective(loss, REGULARIZERS[name], numbers, beta)


def check_config(config: TrainConfig) -> None:
    at_least_one = ("batch_size", "kl_interval", "kl_batch_size", "max_new_tokens", "eval_interval", "log_interval")
    for name in at_least_one:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}: must be 1 or more")
    if config.micro_batch_size is not None and config.micro_batch_size < 1:
        raise ValueError(f"--micro_batch_size={config.micro_batch_size}: must be 1 or more")
    default = TrainConfig()
    for name in SHAPE_FLAGS if config.init_from != "scratch" else ():
        if getattr(config, name) != getattr(default, name):
            raise ValueError(f"--{name}: the shape comes with --init_from={config.init_from or 'the demo'}; "
                             "give it with --init_from=scratch only")
    for name in ("init_from", "tokenizer"):
        if not config.data and getattr(config, name):
            raise ValueError(f"--{name}: needs --data as well; without --data the demo brings its own model")
    if config.data and not config.init_from:
        raise ValueError("--data: needs --init_from, the model to align (a .pt, a llama2.c .bin, or `scratch`)")
    if config.init_from == "scratch" and not config.tokenizer:
        raise ValueError("--init_from=scratch: needs --tokenizer")


# What stories are drawn for: the second number of their seed, so that no two uses share a stream.
ONLINE, SELECT, SELECT_BASELINE, REPORT, REPORT_BASELINE = range(5)


# --- the pieces of a step ----------------------------------------------------------------------------------------------


def policy_at_start(config: TrainConfig, device: str) -> tuple[Checkpoint, Tokenizer]:
    if config.init_from != "scratch":
        checkpoint = checkpoints.load(config.init_from, device)
        return checkpoint, load_tokenizer(config.tokenizer, config.init_from, checkpoint.model.args.vocab_size)
    tokenizer = Tokenizer(config.tokenizer)
    shape = {name: getattr(config, name) for name in SHAPE_FLAGS}
    policy = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, multiple_of=32, **shape))
    policy.init_weights(torch.Generator().manual_seed(config.seed))
    return Checkpoint(policy.to(device), {"eos_id": tokenizer.bos_id}), tokenizer


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over warmup_iters steps, then a cosine to 0 at max_iters (or constant)."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if not config.decay_lr:
        return config.learning_rate
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def groups_of_step(groups: list[EncodedGroup], batch_size: int, step: int, seed: int) -> list[EncodedGroup]:
    """The batch of a step: epochs are permutations seeded by (seed, epoch), read one after the other."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, len(groups))
        if i == 0 or not chosen:
            order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        chosen.append(groups[order[i]])
    # Sorted by length, so that the sequences of a micro-batch need little padding; the loss is a mean over all.
    return sorted(chosen, key=lambda group: max(map(len, group.responses)))


def micro_batches(groups: list[EncodedGroup], size: int | None, vocab_size: int, device: str) -> list[Batch]:
    """The groups in batches of `size`, or of as many as keep the logits under 2^21 numbers (8 MB: they stay in a cache)."""
    if size is None:
        longest = max(len(g.prompt) + max(map(len, g.responses)) for g in groups)
        size = max(1, 2**21 // (longest * vocab_size * len(groups[0].responses)))
    return [data.make_batch(groups[i : i + size]).to(device) for i in range(0, len(groups), size)]


def response_logps(model: Transformer, batch: Batch) -> Tensor:
    """Log-probs of a batch's responses, (B, n)."""
    return sequence_logps(model(batch.tokens), batch.tokens, batch.mask).view(-1, batch.n)


def batch_statistic(objective: Objective, policy: Transformer, reference, batches: list[Batch]) -> dict[str, Tensor]:
    """The mean over the whole batch that the loss asks for, before any gradient: {its name: value}.

    With one micro-batch the loss computes it itself. The pass over the batch is spent only if the statistic
    depends on the policy: lengths are known, and mu is 1 at gamma = 0 whatever the mean.
    """
    if objective.loss.statistic is None or len(batches) == 1:
        return {}
    name, statistic = objective.loss.statistic
    if name == "weight_mean" and objective.numbers["gamma"] == 0:
        return {}
    values = []
    with torch.no_grad():
        for batch in batches:
            tensors = {"lengths": batch.lengths} | objective.numbers
            if "policy_logps" in reads(statistic):
                tensors["policy_logps"] = response_logps(policy, batch)
            if "reference_logps" in reads(statistic):
                tensors["reference_logps"] = response_logps(reference, batch)
            values.append(call(statistic, tensors))
    return {name: torch.cat(values).mean(0)}


def preference_backward(objective: Objective, policy, reference, batches: list[Batch]) -> dict[str, Tensor]:
    """Adds the gradient of the mean preference loss to the policy; returns what is logged of it, as sums over groups.

    margin and accuracy compare column 0 with the others: by reward / beta, i.e. log-ratio, where the loss reads
    a reference, and by log-prob where it does not.
    """
    count = sum(len(batch.lengths) for batch in batches)
    statistics = batch_statistic(objective, policy, reference, batches)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        tensors = {"policy_logps": response_logps(policy, batch), "lengths": batch.lengths}
        if "reference_logps" in objective.reads:
            with torch.no_grad():
                tensors["reference_logps"] = response_logps(reference, batch)
        values = call(objective.loss, tensors | statistics | objective.numbers)
        (values.sum() / count).backward()
        logps = tensors["policy_logps"].detach()
        logged = {"loss": values.detach(), "logps/chosen": logps[:, 0]}
        if batch.n > 1:
            compared = logps - tensors["reference_logps"] if "reference_logps" in tensors else logps
            gaps = compared[:, :1] - compared[:, 1:]
            logged |= {"logps/rejected": logps[:, 1:].mean(1), "margin": gaps.mean(1),
                       "accuracy": (gaps > 0).float().mean(1)}
        for name, value in logged.items():
            sums[name] = sums.get(name, 0) + value.sum() / count
    return sums


@dataclass
class OnlineSamples:
    """Samples of the policy, and the reference's logits of them: both stay for kl_interval steps."""

    batches: list[Batch]
    reference_logits: list[Tensor]


def draw_online(config, policy: Checkpoint, reference: Transformer, prompts: list[list[int]], step: int) -> OnlineSamples:
    """Whole samples of the policy: temperature 1, no truncation, eval mode (Eq. 15 is about the policy itself)."""
    rng = random.Random(config.seed + step)
    chosen = [rng.choice(prompts) for _ in range(config.kl_batch_size)]
    responses = generate(
        policy.model, chosen, config.max_new_tokens, stop_ids=[policy.eos_id],
        seed=(config.seed, ONLINE, step),
    )
    groups = [EncodedGroup(prompt, [response], 0) for prompt, response in zip(chosen, responses)]
    groups.sort(key=lambda group: len(group.responses[0]))
    device = str(policy.model.tok_embeddings.weight.device)
    batches = micro_batches(groups, config.micro_batch_size, policy.model.args.vocab_size, device)
    with torch.no_grad():
        return OnlineSamples(batches, [reference(batch.tokens) for batch in batches])


def regularizer_backward(objective: Objective, policy: Transformer, online: OnlineSamples) -> dict[str, Tensor]:
    """Adds the gradient of beta * mean(regularizer) on the online samples; returns the mean KL, in nats."""
    count = sum(len(batch.tokens) for batch in online.batches)
    kl = 0.0
    for batch, reference_logits in zip(online.batches, online.reference_logits):
        values = call(objective.regularizer, {"online_kl": token_kl(policy(batch.tokens), reference_logits, batch.mask)})
        (objective.beta * values.sum() / count).backward()
        kl += values.detach().sum() / count
    return {"kl": kl}


class Evaluation:
    """Stories of the policy against the baseline's, on fixed seeds: one set to select by, a fresh one to report.

    The best of many noisy evaluations looks better than it is; the report's seeds had no part in the choice.
    """

    def __init__(self, config: TrainConfig, reference: Checkpoint, tokenizer: Tokenizer, prompts: list[str]):
        self.config, self.tokenizer, self.prompts = config, tokenizer, prompts
        self.baselines = {}
        if config.baseline:
            records = [r for _, r in data.read_records(config.baseline)]
            texts, needed = judge.read_stories(config.baseline), 2 * config.eval_stories
            if len(texts) < needed:
                raise ValueError(f"--baseline={config.baseline}: {len(texts)} stories, the report needs {needed}; "
                                 f"make more or give --eval_stories={len(texts) // 2}")
            self.prompts = [record.get("prompt", "") for record in records[:needed]]
            self.baselines = {"select": texts[: config.eval_stories], "report": texts[:needed]}
            self.name = os.path.basename(config.baseline)
        else:
            self.name = "the reference"
            for which, purpose in (("select", SELECT_BASELINE), ("report", REPORT_BASELINE)):
                records = self.stories(reference, which, purpose, f"baseline stories ({which})")
                self.baselines[which] = [r["text"] for r in records]

    def stories(self, checkpoint: Checkpoint, which: str, purpose: int, progress: str | None = None) -> list[dict]:
        count = self.config.eval_stories * (2 if which == "report" else 1)
        return data.generate_stories(
            checkpoint, self.tokenizer, count, (self.config.seed, purpose), self.config.max_new_tokens,
            prompts=self.prompts[:count], name=f"step {checkpoint.step}", progress=progress,
        )

    def judge(self, checkpoint: Checkpoint, which: str) -> tuple[judge.WinRate, list[dict]]:
        records = self.stories(checkpoint, which, SELECT if which == "select" else REPORT)
        return judge.compare_all([r["text"] for r in records], self.baselines[which]), records


def mean_score(records: list[dict]) -> float:
    return sum(judge.score(r["text"]) for r in records) / len(records)


def side_by_side(left: str, right: str, titles: tuple[str, str], width: int = 48) -> str:
    columns = [[title, "-" * width, *textwrap.wrap(text, width)] for title, text in zip(titles, (left, right))]
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns))
    return "\n".join(f"{a:<{width}}   {b}".rstrip() for a, b in rows)


# --- the run -----------------------------------------------------------------------------------------------------------


def demo() -> None:
    """Build what is missing of the offline demo: text and tokenizer, a reference trained on them, ranked groups."""
    data.demo_text()
    reference = os.path.join(data.DEMO_DIR, "reference")
    tokenizer = os.path.join(data.DEMO_DIR, "tokenizer.model")
    if not os.path.isdir(reference):
        print("demo: training the reference model on stories of a small grammar")
        train(TrainConfig(
            loss="sft", data=os.path.join(data.DEMO_DIR, data.DEMO_FILES["text"]), init_from="scratch",
            tokenizer=tokenizer, out_dir=f"{reference}.tmp", dim=96, n_layers=4, n_heads=3, max_seq_len=256,
            batch_size=64, max_iters=250, learning_rate=4e-3, warmup_iters=20, weight_decay=0.1, log_interval=25,
            eval_interval=250, eval_stories=0,
        ))
        os.rename(f"{reference}.tmp", reference)
    checkpoint = checkpoints.load(os.path.join(reference, "ckpt.pt"))
    data.demo_groups(checkpoint, load_tokenizer(tokenizer, reference, checkpoint.model.args.vocab_size))


def train(config: TrainConfig) -> None:
    check_config(config)
    objective, device = objective_of(config), checkpoints.pick_device(config.device)
    if not config.data:
        demo()
        file = os.path.join(data.DEMO_DIR, data.DEMO_FILES[objective.loss.data])
        reference_file = os.path.join(data.DEMO_DIR, "reference", "ckpt.pt")
        config = dataclasses.replace(config, data=file, init_from=reference_file)

    texts = data.read_groups(config.data)
    data.require(texts, objective.loss.data, config.data, config.loss)
    policy, tokenizer = policy_at_start(config, device)
    policy.config = dataclasses.asdict(config) | {"eos_id": policy.eos_id}
    policy.step, args = 0, policy.model.args
    groups, drops = data.encode_groups(texts, tokenizer, policy.eos_id, args.max_seq_len)
    if not groups:
        raise ValueError(f"{config.data}: all {len(texts)} groups were dropped: {dict(drops)}")
    prompts = sorted({group.prompt for group in texts})
    prompt_ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    reference = copy.deepcopy(policy.model).requires_grad_(False) if objective.needs_reference else None

    os.makedirs(os.path.join(config.out_dir, "stories"), exist_ok=True)
    checkpoints.write_text(os.path.join(config.out_dir, "config.json"), json.dumps(policy.config, indent=1))
    shutil.copyfile(tokenizer.path, os.path.join(config.out_dir, "tokenizer.model"))
    tokenizer.export(os.path.join(config.out_dir, "tokenizer.bin"))
    log = open(os.path.join(config.out_dir, "log.jsonl"), "w", encoding="utf-8")

    decayed = [p for p in policy.model.parameters() if p.dim() >= 2]
    vectors = [p for p in policy.model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
    )
    tokens = sum(len(r) for g in groups for r in g.responses) / len(groups) * config.batch_size
    weight = f" + {objective.beta} * {objective.regularizer.__name__}" if objective.beta else ""
    print(f"{sum(p.numel() for p in policy.model.parameters()):,} parameters on {device}; {len(groups)} groups of "
          f"{len(groups[0].responses)} from {config.data} (dropped: {dict(drops) or 'none'}); "
          f"{tokens:,.0f} tokens a step\nobjective: {config.loss} {objective.numbers}{weight}")

    # A model from scratch has no reference worth beating: it is only sampled.
    judged = config.eval_stories > 0 and config.init_from != "scratch"
    start = copy.deepcopy(policy) if judged else None
    evaluation = Evaluation(config, start, tokenizer, prompts) if judged else None
    best_rate, best_step, online = -1.0, 0, None
    bar = tqdm(total=config.max_iters, desc=config.loss, unit="step")
    for step in range(config.max_iters + 1):
        policy.step = step
        if judged and (step % config.eval_interval == 0 or step == config.max_iters):
            policy.model.eval()
            result, records = evaluation.judge(policy, "select")
            checkpoints.write_jsonl(os.path.join(config.out_dir, "stories", f"step_{step:06d}.jsonl"), records)
            entry = {"step": step, "win_rate": result.rate, "low": result.low, "high": result.high,
                     "score": mean_score(records)}
            log.write(json.dumps(entry) + "\n")
            bar.write(f"step {step}: win-rate over {evaluation.name} {result}, score {entry['score']:.2f}\n"
                      f"    {textwrap.shorten(records[0]['text'], 300)}")
            checkpoints.save_pt(os.path.join(config.out_dir, "ckpt.pt"), policy)
            if result.rate > best_rate:
                best_rate, best_step = result.rate, step
                checkpoints.save_pt(os.path.join(config.out_dir, "best.pt"), policy, win_rate=result.rate)
                checkpoints.save_llama2c(os.path.join(config.out_dir, "model.bin"), policy.model)
        if step == config.max_iters:
            break

        started, lr = time.perf_counter(), learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if "online_kl" in objective.reads and step % config.kl_interval == 0:
            policy.model.eval()
            online = draw_online(config, policy, reference, prompt_ids, step)
        policy.model.train()
        chosen = groups_of_step(groups, config.batch_size, step, config.seed)
        batches = micro_batches(chosen, config.micro_batch_size, args.vocab_size, device)
        logged = preference_backward(objective, policy.model, reference, batches)
        if online is not None:
            logged |= regularizer_backward(objective, policy.model, online)
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.grad_clip or math.inf)
        logged = {name: float(value) for name, value in logged.items()} | {"grad_norm": float(norm), "lr": lr}
        if not (math.isfinite(logged["loss"]) and math.isfinite(logged["grad_norm"])):
            raise ValueError(
                f"step {step}: loss is {logged['loss']}, grad norm {logged['grad_norm']}; the weights of step {step} "
                f"were left as they are. Try --learning_rate={config.learning_rate / 4:g}; the batch holds lines "
                f"{[group.line for group in chosen]} of {config.data}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        logged["tokens_per_second"] = sum(int(b.mask.sum()) for b in batches) / (time.perf_counter() - started)
        if step % config.log_interval == 0 or step == config.max_iters - 1:
            log.write(json.dumps({"step": step} | logged) + "\n")
            log.flush()
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in logged.items()))
        bar.update()
    bar.close()
    log.close()
    if not judged:
        policy.model.eval()
        checkpoints.save_pt(os.path.join(config.out_dir, "ckpt.pt"), policy)
        checkpoints.save_llama2c(os.path.join(config.out_dir, "model.bin"), policy.model)
        return
    report(config, evaluation, start, policy, best_step)


def report(config: TrainConfig, evaluation: Evaluation, start: Checkpoint, last: Checkpoint, best_step: int) -> None:
    """The final table, on seeds that nothing was selected by, and one story before and after."""
    best = checkpoints.load(os.path.join(config.out_dir, "best.pt"), str(last.model.tok_embeddings.weight.device))
    rows = [("before (step 0)", start), (f"best (step {best_step})", best), (f"last (step {last.step})", last)]
    judged = [(name, *evaluation.judge(checkpoint, "report")) for name, checkpoint in rows]
    print(f"\nwin-rate over {evaluation.name}, fresh stories, offline judge [95% interval]")
    for name, result, records in judged:
        print(f"  {name:<18} {str(result):<36} mean score {mean_score(records):.2f}")
    before, after = judged[0][2][0]["text"], judged[1][2][0]["text"]
    print("\n" + side_by_side(before, after, ("before", "after")))
    print(f"\n{config.out_dir}: best.pt, ckpt.pt, model.bin; sample with "
          f"`python sample.py --checkpoint={os.path.join(config.out_dir, 'best.pt')}`")


def main(argv: list[str]) -> None:
    train(parse(TrainConfig, argv, "spo_train.py", "Align a Llama by Soft Preference Optimization."))


if __name__ == "__main__":
    run(main)
