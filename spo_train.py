"""Align a Llama with Soft Preference Optimization, or with any other objective of losses.py.

    python spo_train.py --loss=spo_rank        # no --data: the offline demo
    python spo_train.py --loss=dpo --data=pairs.jsonl --init_from=stories260K.bin \\
        --tokenizer=tok512.model
    torchrun --nproc_per_node=4 spo_train.py --loss=spo --data=pairs.jsonl --init_from=llama-2-7b

train() is Algorithm 1 of the paper. Each step takes a batch of ranked groups and descends

    mean(preference loss)  +  beta * mean(KL(policy || reference), on samples of the policy itself)

A run writes to out_dir: ckpt.pt (latest), best.pt (highest win-rate, where there is a judge),
model.bin (the best one, for run.c), log.jsonl, config.json, the stories of every evaluation, and
state/, from which --resume continues.
"""

import spo  # isort: skip  # noqa: F401  (sets OpenMP's waiting; must precede torch)

import copy
import functools
import inspect
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from export import save_llama2c
from judge import JudgeFlags, OfflineJudge, make_judge
from losses import LOSSES, REGULARIZERS, Objective, call, preference_metrics, settings_of
from model import ModelArgs, Transformer
from spo import checkpoint, fast, head, parallel, plan, pool
from spo.config import (
    counted,
    extended,
    flag,
    flags_of,
    main_program,
    non_default,
    parse,
    refuse_if,
)
from spo.evaluation import Evaluation, report
from spo.failure import one_reason
from spo.generate import PURPOSE_KL, sample
from spo.groups import Batch, EncodedGroup, load_dataset, micro_batches, padding_share
from spo.order import batch_indices, indices_of_run
from spo.parallel import print0
from spo.passes import passes_and_mean
from spo.reference import PolicySamples, add_reference_logps, kl_of_rounding
from spo.run import RunFolder
from spo.tokenizer import Tokenizer, load_tokenizer
from tinystories_data import build_demo, pool_folder

RESULTS_OF_A_RUN = ("best.pt", "ckpt.pt", "model.bin")
SHAPE_FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads")
DTYPES = ["", "float32", "bfloat16"]
SETTINGS = sorted({"beta"}.union(*map(settings_of, LOSSES.values())))  # what losses are tuned with


@dataclass
class TrainConfig(JudgeFlags):
    # A setting that the loss does not take is an error, never ignored.
    loss: str = flag("spo_rank", "the loss", choices=list(LOSSES), heading="objective")
    regularizer: str = flag(
        "", "what --beta weighs, if the loss has no beta", choices=["", *REGULARIZERS]
    )
    alpha: float | None = flag(
        None, "spo*: softmax exponent; cpo: weight of the likelihood; rdpo: of the length", least=0
    )
    beta: float | None = flag(
        None, "strength of the reference, or weight of the regularizer (spo*: 0.1)", least=0
    )
    gamma: float | None = flag(None, "spo*: exponent in the weight mu; simpo: margin", least=0)
    eta: float | None = flag(None, "spo_rank: stage k is weighted by eta^k", least=0)
    tau: float | None = flag(None, "ipo: the margin to reach is 1/(2 tau)", above=0)
    lambda_d: float | None = flag(None, "kto: weight of the chosen response", least=0)
    lambda_u: float | None = flag(None, "kto: weight of the rejected response", least=0)
    label_smoothing: float | None = flag(
        None, "cdpo, dpo_robust: how many labels are wrong", least=0, below=0.5
    )
    norm: str | None = flag(None, "ipo: log-ratios, summed or per token", choices=["sum", "mean"])
    nll: str | None = flag(None, "cpo: likelihood, summed or per token", choices=["sum", "mean"])
    data: str = flag("", "groups; default: the demo's", path=True, also="dataset", heading="data")
    skip_bad: bool = flag(False, "leave out and name records that cannot be read")
    init_from: str = flag("", "a .pt, .bin or folder, or `scratch`", path=True, also="model")
    tokenizer: str = flag("", "its tokenizer; default: tokenizer.model by init_from", path=True)
    out_dir: str = flag("out", "where the run's files go", free=True, also="output_dir")
    dim: int = flag(288, "width (this and the next three: with --init_from=scratch)", least=1)
    n_layers: int = flag(6, "layers", least=1)
    n_heads: int = flag(6, "attention heads", least=1)
    n_kv_heads: int | None = flag(None, "key-value heads; default: n_heads", least=1)
    max_seq_len: int | None = flag(None, "context; default: the model's, 256 from scratch", least=1)
    rope_factor: float | None = flag(None, "of Meta's Llama 3.1 (8), 3.2 (32) folders", above=0)
    batch_size: int = flag(32, "groups per step, all processes", least=1, heading="optimization")
    micro_batch_size: int | None = flag(
        None, "groups per pass: memory, never the result; default: what fits", least=1, free=True
    )
    max_iters: int | None = flag(
        None, "optimizer steps; default: one epoch, demo: 80", least=1, also="steps epochs"
    )
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW", least=0, most=1e30)
    warmup_iters: int = flag(5, "steps of linear warm-up", least=0)
    decay_lr: bool = flag(True, "cosine decay of the learning rate to 0 at max_iters")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only", least=0)
    adam_beta1: float = flag(0.95, "high, since preference gradients are noisy", least=0, below=1)
    adam_beta2: float = flag(0.99, "AdamW's", least=0, below=1)
    grad_clip: float = flag(1.0, "clip the gradient norm at this; 0: no clipping", least=0)
    seed: int = flag(1337, "of the data order, of samples, of weights from scratch", least=0)
    kl_interval: int = flag(8, "steps between fresh samples", least=1, heading="KL on samples")
    kl_batch_size: int = flag(32, "how many samples, over all processes", least=1)
    max_new_tokens: int = flag(256, "longest sampled story, in tokens", least=1)
    eval_interval: int = flag(20, "steps between evaluations", least=1, heading="evaluation")
    eval_stories: int = flag(128, "stories judged at an evaluation; 0: none", least=0)
    eval_pool: int = flag(1024, "the reference's, each judged against all; 0: one to one", least=0)
    judge: str = flag(
        "", "offline (a formula for stories), a model's name, or none; default: offline for stories"
    )
    baseline: str = flag("", "stories to win against; default: the reference's own", path=True)
    stop_kl: float | None = flag(None, "end when the KL passes this, in nats", above=0, free=True)
    report: bool = flag(True, "end with a table on twice as many fresh stories", free=True)
    curves: bool = flag(True, "draw curves.png into out_dir at the end", free=True)
    save_dtype: str = flag(
        "", "of ckpt.pt, best.pt; default: float32, above 2 GB the run's", choices=DTYPES, free=True
    )
    keep_checkpoints: bool = flag(False, "keep every evaluation's weights, as step_N.pt", free=True)
    log_interval: int = flag(5, "steps between log lines", least=1, free=True)
    device: str = flag(
        "", "cpu, cuda, cuda:1, mps; default: cuda, else cpu", free=True, heading="system"
    )
    dtype: str = flag("", "of the layers; default: bfloat16 on a GPU that has it", choices=DTYPES)
    activation_checkpointing: bool = flag(False, "recompute activations: less memory", free=True)
    compile: bool = flag(False, "torch.compile the layers: a slow start, then faster if narrow")
    plan: int | None = flag(None, "only print what each of PLAN processes needs", alone=1, least=1)
    gpu_gib: float | None = flag(None, "with --plan: on GPUs of this memory, here or not", above=0)
    resume: str = flag(
        "",
        "continue from the newest state in out_dir, or from a named one; auto: if there is one",
        alone="newest",
        free=True,
    )

    def objective(self) -> Objective:
        settings = {name: getattr(self, name) for name in SETTINGS}
        return Objective(self.loss, self.regularizer, **settings)

    def check(self) -> None:
        """ValueError for flags that contradict each other; a flag's bounds are declared with it."""
        given, objective = non_default(self), self.objective()
        scratch = self.init_from == "scratch"
        for name in SHAPE_FLAGS:
            comes = f"the shape comes with --init_from={self.init_from or 'the demo'}"
            only = "give it with --init_from=scratch only"
            refuse_if(name in given and not scratch, f"--{name}: {comes}; {only}")
        for name in ("init_from", "tokenizer"):
            demo = "needs --data as well; without --data the demo brings its own model"
            refuse_if(name in given and not self.data, f"--{name}: {demo}")
        refuse_if(scratch and self.rope_factor, "--rope_factor: goes with a folder of Meta's")
        model = "the model to align (a .pt, a llama2.c .bin, or `scratch`)"
        refuse_if(self.data and not self.init_from, f"--data: needs --init_from, {model}")
        refuse_if(scratch and not self.tokenizer, "--init_from=scratch: needs --tokenizer")
        for name in ("kl_interval", "kl_batch_size"):
            method = f"{self.loss} with regularizer {objective.regularizer.__name__}"
            draws = f"--{name}: {method} draws no samples of the policy"
            refuse_if(name in given and not objective.online, draws)
        for name in ["batch_size", "kl_batch_size"][: 1 + objective.online]:
            parallel.refuse_uneven(name, getattr(self, name))
        refuse_if(self.gpu_gib and self.plan is None, "--gpu_gib: goes with --plan")
        no_data = "--plan: needs --data and --init_from, what to plan for"
        refuse_if(self.plan is not None and not self.data, no_data)
        asked = self.judge not in ("", "offline", "none") and self.eval_stories == 0
        refuse_if(
            asked, f"--judge={self.judge}: nothing is judged with --eval_stories=0; leave it out"
        )
        self._refuse_what_no_judge_reads()
        one_to_one = "--eval_pool: --baseline and an API judge compare one to one; leave it out"
        api = self.judge not in ("", "offline")
        refuse_if("eval_pool" in given and (self.baseline or api), one_to_one)

    def _refuse_what_no_judge_reads(self) -> None:
        """ValueError, naming the flag, for one that is about judging where nothing is judged."""
        if self.judged:
            return
        given = non_default(self)
        judging = [name for name in non_default(self, JudgeFlags) if name != "judge"]
        why = "with --eval_stories=0 or --init_from=scratch; leave it out"
        if self.judge == "none":
            judging += ["eval_stories"] if self.eval_stories else []
            why = (
                "with --judge=none, the default for data with prompts; name a judge or leave it out"
            )
        for name in ("baseline", "stop_kl", "eval_pool", *judging):
            refuse_if(name in given, f"--{name}: nothing is judged, nor evaluated, {why}")

    def with_judge(self, are_stories: bool) -> "TrainConfig":
        """Return the config with the judge that --judge="" stands for; print it if that is none.

        The offline judge is a formula about stories for children. It says nothing of answers.
        """
        if self.judge or not self.judged:
            return self
        config = replace(self, judge="offline" if are_stories else "none")
        config._refuse_what_no_judge_reads()
        if not are_stories:
            why = "these data have prompts, and the offline judge is a formula for stories"
            mend = "to judge answers give --judge=MODEL (an API), or --judge=offline all the same"
            print0(f"nothing is judged, and there will be no best.pt: {why}; {mend}")
        return config

    @property
    def judged(self) -> bool:
        """Is the policy judged? A model from scratch has no reference worth beating."""
        return self.eval_stories > 0 and self.init_from != "scratch" and self.judge != "none"


def flags_of_settings(declared: set[str]) -> dict[str, tuple[type, str]]:
    """Return {name: (kind, help)} of the settings that losses take and that have no flag yet."""
    flags = {}
    parameters = {loss: inspect.signature(LOSSES[loss]).parameters for loss in LOSSES}
    for name in sorted(set(SETTINGS) - declared):
        takers = {loss: mine[name] for loss, mine in parameters.items() if name in mine}
        kind = next(iter(takers.values())).annotation
        text = ", ".join(f"{loss}: default {taken.default}" for loss, taken in takers.items())
        plain = kind if kind in (int, float, str) else float
        flags[name] = (plain, text)
    return flags


# A loss of your own may take a number of its own: its flag comes from its signature.
TrainConfig = extended(TrainConfig, flags_of_settings(set(flags_of(TrainConfig))), "objective")


# --- Algorithm 1 ---------------------------------------------------------------------------------


def train(config: TrainConfig) -> bool:
    """Run Algorithm 1; return whether it came to its end, and was not stopped by SIGTERM."""
    objective = config.objective()
    policy, tokenizer, weights = load_policy(config)
    need, skip_bad = objective.loss.data, config.skip_bad
    dataset = load_dataset(config.data, config.loss, need, tokenizer, policy, skip_bad)
    groups, prompts, are_stories = dataset
    config = config.with_judge(are_stories)
    if config.max_iters is None:
        config = replace(config, max_iters=math.ceil(len(groups) / config.batch_size))  # one epoch
    if config.plan is not None:
        load = plan.load_of(config, objective, policy.args, groups)
        print0(plan.report(policy.args, policy.tied, load))
        return True
    print0(describe(config, objective, policy, groups))

    # The reference is the policy before step 0. It is frozen, and the KL is measured to it.
    reference = None
    if objective.needs_reference or config.judged:
        reference = copy.deepcopy(policy).requires_grad_(False)
    evaluation = make_evaluation(config, reference, tokenizer, prompts)
    run = RunFolder(config, tokenizer)  # a new one, or that of a run that is resumed
    compiled = config.compile and parallel.can_compile(config.device)
    for model in filter(None, (policy, reference)):
        checkpoint.load_and_shard(model, weights, config.device, config.dtype, compiled)
    if config.activation_checkpointing:
        parallel.checkpoint_activations(policy)
    if "reference_logps" in objective.reads:  # the policy still equals the reference
        groups = add_reference_logps(groups, indices_of_run(config, len(groups)), policy, config)
    optimizer = make_optimizer(config, policy)
    run.start(policy, optimizer, weights)
    if evaluation:
        evaluation.kl_rounding = run.kl_rounding
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    samples = PolicySamples.of(run.samples, reference, config.micro_batch_size)

    for step in run.steps():
        if run.stop_requested():
            run.stop(step, samples.groups)
            break
        if step % config.eval_interval == 0 or step == config.max_iters:
            evaluate_and_save(run, step, policy, evaluation, samples)
        if step == config.max_iters or run.passes_stop_kl(step):
            break

        # Every kl_interval steps (T in the paper), draw fresh samples from the policy itself.
        if objective.online and step % config.kl_interval == 0:
            samples = draw_samples(config, policy, reference, prompts, step)
            if run.kl_rounding is None:
                run.kl_rounding = kl_of_rounding(reference, samples.groups, config.seed)

        started = time.perf_counter()
        indices = batch_indices(len(groups), config.batch_size, step, config.seed)
        batch = [groups[i] for i in indices]
        metrics = preference_gradient(objective, policy, reference, batch, config.micro_batch_size)
        if objective.online:  # the gradients of the two terms add up in the same .grad
            metrics |= kl_gradient(objective.beta, policy, samples)
        metrics["grad_norm"] = parallel.clip_gradient(policy, config.grad_clip)  # before clipping
        stop_unless_finite(config, step, metrics, batch)  # before anything is updated
        metrics["lr"] = optimizer_step(optimizer, learning_rate(config, step))
        tokens = sum(group.scored_tokens for group in batch)
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
        run.log(step, metrics)

    if evaluation and config.report and not run.stopped:
        final_report(run, evaluation, policy)
    return run.end()


def preference_gradient(
    objective: Objective,
    policy: Transformer,
    reference: Transformer | None,
    groups: list[EncodedGroup],
    micro_batch_size: int | None,
) -> dict[str, float]:
    """Add the gradient of the mean preference loss over all groups; return the metrics to log.

    Micro-batches bound the memory and never change the result: a loss that compares a group with
    the mean of its batch (mu in Eq. 13, z0 in KTO) is given the mean of all.
    """
    policy.train()
    # Every process gets long and short groups, and cuts its own into micro-batches by length.
    batches = micro_batches(parallel.deal(groups), micro_batch_size, policy)
    forward = functools.partial(read_batch, objective, policy, reference)
    passes, mean = passes_and_mean(objective, forward, policy, batches, len(groups))
    means = parallel.GlobalMean(len(groups))
    for tensors in passes:  # (B, n) each
        losses = objective.preference_loss(tensors | mean)  # (B,)
        means.add({"loss": losses} | call(preference_metrics, tensors))
        regularizer = objective.dataset_regularizer(tensors)  # (B,); None for SPO's own, below
        if regularizer is not None:
            losses = losses + objective.beta * regularizer
            means.add(objective.regularizer_metrics(tensors, regularizer, len(groups)))
        (losses.sum() / len(groups)).backward()  # gradients are sums over the processes
    return means.over_all_processes() | {"padding": padding_share(groups, batches)}


def kl_gradient(beta: float, policy: Transformer, samples: PolicySamples) -> dict[str, float]:
    """Add the gradient of beta * mean KL(policy || reference), Eq. 15, on the policy's own samples.

    Returns the KL, in nats a sample, and the policy's entropy, in nats a token.
    """
    count = len(samples.groups)
    means = parallel.GlobalMean(count)
    for batch, states in samples.with_reference():
        kl, entropy = head.token_kl(policy, batch, states)  # (M, 1) each, in nats
        (beta * kl.sum() / count).backward()
        means.add({"kl": kl, "entropy": entropy})
    metrics = means.over_all_processes()
    tokens = sum(group.scored_tokens for group in samples.groups)
    metrics["entropy"] *= count / tokens  # from nats a sample to nats a token
    return metrics


def read_batch(
    objective: Objective, policy: Transformer, reference: Transformer | None, batch: Batch
) -> dict[str, torch.Tensor]:
    """Return the tensors, (B, n) each, that losses and regularizers read of a batch."""
    if objective.needs_response_kl:  # the ablations `tokenwise` and `importance`, on the dataset
        states = head.reference_states(reference, batch)
        logps, response_kl = head.logps_and_kl(policy, batch, states)
        return known_tensors(objective, batch, logps) | {"response_kl": response_kl}
    return known_tensors(objective, batch, head.sequence_logps(policy, batch))


def known_tensors(
    objective: Objective, batch: Batch, logps: torch.Tensor
) -> dict[str, torch.Tensor]:
    tensors = {"policy_logps": logps, "lengths": batch.lengths, "desirable": batch.desirable}
    if "reference_logps" in objective.reads:
        tensors["reference_logps"] = batch.reference_logps.to(logps.dtype)
    return tensors


# --- samples of the policy -----------------------------------------------------------------------


def draw_samples(
    config: TrainConfig,
    policy: Transformer,
    reference: Transformer,
    prompts: list[list[int]],
    step: int,
) -> PolicySamples:
    """Draw complete, untruncated samples at temperature 1: Eq. 15 is about the policy itself."""
    chosen = random.Random(config.seed + step).choices(prompts, k=config.kl_batch_size)
    # Each process samples its share at its own pace, so it needs all weights for a while.
    with parallel.unsharded(policy):
        seed = (config.seed, PURPOSE_KL, step)
        groups = sample(policy, chosen, seed, config.max_new_tokens)
    return PolicySamples.of(groups, reference, config.micro_batch_size)


# --- the optimizer --------------------------------------------------------------------------------


def make_optimizer(config: TrainConfig, model: Transformer) -> torch.optim.AdamW:
    # Weight decay would pull the norms' gains, which start at 1, towards 0.
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    parameters = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    # On a GPU the default would copy all weights once more in each step.
    fused = config.device.startswith("cuda")
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=betas, fused=fused or None)


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return lr


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rise linearly over warmup_iters steps, then fall as a cosine to 0 at max_iters (or stay)."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if not config.decay_lr:
        return config.learning_rate
    done = (step - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def stop_unless_finite(
    config: TrainConfig, step: int, metrics: dict[str, float], groups: list[EncodedGroup]
) -> None:
    """ValueError naming the step, the values, the batch and what to try."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    values = f"loss is {metrics['loss']}, grad norm {metrics['grad_norm']}"
    lines = sorted(group.line for group in groups)
    raise ValueError(
        f"step {step}: {values}; ckpt.pt holds the last evaluation. "
        f"Try --learning_rate={config.learning_rate / 4:g}; "
        f"the batch holds lines {lines} of {config.data}"
    )


# --- before, between and after -------------------------------------------------------------------


def load_policy(config: TrainConfig):
    """Return the model to align, its tokenizer, and the file of its weights (None: it has them)."""
    if config.init_from != "scratch":
        weights = checkpoint.open_weights(config.init_from, config)
        policy = checkpoint.without_weights(weights)
        return policy, load_tokenizer(config.tokenizer, config.init_from, policy), weights
    tokenizer = Tokenizer(config.tokenizer)
    shape = {name: getattr(config, name) for name in SHAPE_FLAGS}
    shape["max_seq_len"] = config.max_seq_len or 256
    policy = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, multiple_of=32, **shape))
    policy.init_weights(torch.Generator().manual_seed(config.seed))
    policy.eos_ids = (tokenizer.story_end_id,)
    return fast.use(policy.to(config.device)), tokenizer, None


def make_evaluation(
    config: TrainConfig, reference: Transformer | None, tokenizer: Tokenizer, prompts: list[str]
) -> Evaluation | None:
    if not config.judged:
        return None
    return Evaluation(
        reference,
        tokenizer,
        prompts,
        config.eval_stories,
        judge=make_judge(config) if parallel.rank() == 0 else OfflineJudge(),
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        baseline=config.baseline,
        pool_size=config.eval_pool if config.judge == "offline" else 0,
        keep_pool=functools.partial(pool.keep, config, tokenizer.path, pool_folder(config)),
    )


def describe(
    config: TrainConfig, objective: Objective, policy: Transformer, groups: Sequence[EncodedGroup]
) -> str:
    """Return two lines to print before step 0: the run's sizes, and the loss it should start at."""
    n = len(groups[0].responses)
    parameters = sum(p.numel() for p in policy.parameters())
    some = plan.first_groups(groups)
    tokens = sum(group.scored_tokens for group in some) / len(some) * config.batch_size
    start = objective.start(n)
    known = ""
    if start is not None:
        known = f", which is {start:.4f} while the policy equals the reference"
    data = f"{counted(len(groups), 'group')} of {n} in {config.data}"
    if config.batch_size > len(groups):
        data += f" (fewer than --batch_size={config.batch_size}: some count twice in a step)"
    steps = f"{counted(config.max_iters, 'step')} of {tokens:,.0f} tokens"
    sizes = f"{parameters:,} parameters on {config.device}; {data}; {steps}"
    return f"{sizes}\nobjective: {objective}{known}"


def evaluate_and_save(
    run: RunFolder,
    step: int,
    policy: Transformer,
    evaluation: Evaluation | None,
    samples: PolicySamples,
) -> None:
    """Judge the policy, unless nobody does, and save it and the state that --resume reads."""
    if run.evaluated == step:  # a run that was resumed right here
        return
    verdict = evaluation.evaluate(policy, step, "select") if evaluation else None
    # The first of equals stays the best. Where nobody judges, the latest is.
    improved = verdict is None or verdict.rate > run.best_rate
    whole = parallel.full_model(policy, run.save_dtype())  # all weights, on rank 0
    parallel.on_rank_0(lambda: run.save_evaluation(step, whole, verdict, improved, save_llama2c))
    if verdict is not None:
        run.best_rate, run.kl = max(run.best_rate, verdict.rate), verdict.kl
        run.kl_rounding = verdict.kl_rounding
        run.record(step, verdict.logged("eval"))
        shown = f"{verdict}\n    {verdict.besides}\n    {verdict.sample}"
        run.say(f"step {step}: win-rate over {evaluation.name} {shown}")
    run.say_what_is_lost(step)
    run.evaluated = step
    if step > 0:  # before it there is nothing to continue
        run.save_state(step, samples.groups)


def final_report(run: RunFolder, evaluation: Evaluation, policy: Transformer) -> None:
    """Print the table on fresh stories: the policy before, at its best, and at the end."""
    config = run.config
    if run.best_rate < 0:
        untrusted = "the judge gave no win-rate that can be trusted, so there is no best.pt"
        raise ValueError(f"{untrusted}; see ckpt.pt")
    weights = checkpoint.open_weights(run.path("best.pt"))
    best = checkpoint.without_weights(weights)
    checkpoint.load_and_shard(best, weights, config.device, config.dtype)
    before, last = (evaluation.reference, 0), (policy, run.evaluated)
    policies = {"before": before, "best": (best, weights.step), "last": last}
    report(evaluation, policies, run.record)
    name = "best.pt"
    if weights.step == 0:
        name = "ckpt.pt"
        same = "best.pt and model.bin are the model you started from; ckpt.pt is the last one"
        print0(f"\nnothing got better: {same}")
    files = [file for file in RESULTS_OF_A_RUN if os.path.isfile(run.path(file))]
    there = ", ".join([*files, "curves.png"] if config.curves else files)
    print0(f"\n{config.out_dir}: {there}; `python sample.py --checkpoint={run.path(name)}`")


def main(argv: list[str]) -> None:
    about = "Align a Llama with Soft Preference Optimization."
    config = parse(TrainConfig, argv, "spo_train.py", about)
    if config.gpu_gib and not config.dtype:
        config = replace(config, dtype="bfloat16")  # as on such a GPU
    device, dtype = parallel.start(config.device, config.dtype)
    config = replace(config, device=device, dtype=dtype)
    with one_reason():  # of several processes, one says why they end
        config.check()
        machine = fast.enable_fast_matmul(device, dtype)
        if config.plan is None:
            print0(machine)
        if not config.data:
            config = build_demo(config, train)  # its reference model is trained by this very loop
        if config is not None:  # None: SIGTERM while the demo was built
            train(config)
    parallel.end()


if __name__ == "__main__":
    main_program(main)
