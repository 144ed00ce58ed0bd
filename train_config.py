"""The flags of spo_train.py, what they mean together, and which of them make a run the run that it is."""

import dataclasses
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from judge import JudgeFlags
from losses import LOSSES, REGULARIZERS
from spo.config import flag
from spo.files import file_sha256
from spo.parallel import World

SHAPE_FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")
ONLINE_FLAGS = ("kl_interval", "kl_batch_size")


@dataclass
class TrainConfig(JudgeFlags):
    loss: str = flag("spo_rank", "the objective, a name in losses.LOSSES", choices=list(LOSSES))
    regularizer: str = flag(
        "",
        "what beta weighs, for a loss with no beta of its own; none: the loss's default",
        choices=["", *REGULARIZERS],
    )
    alpha: float | None = flag(
        None, "spo*: softmax exponent; cpo: weight of the likelihood; rdpo: of the length"
    )
    beta: float | None = flag(
        None, "strength of the reference, or weight of the regularizer (spo*: 0.1)"
    )
    gamma: float | None = flag(
        None, "spo, spo_bon, spo_rank: exponent in the weight mu; simpo: margin"
    )
    eta: float | None = flag(None, "spo_rank: stage k weighs eta^k")
    tau: float | None = flag(None, "ipo: its margin is 1/(2 tau)")
    lambda_d: float | None = flag(None, "kto: weight of the chosen")
    lambda_u: float | None = flag(None, "kto: weight of the rejected")
    norm: str | None = flag(
        None, "ipo: log-ratios of whole responses or per token", choices=["sum", "mean"]
    )
    nll: str | None = flag(
        None, "cpo: likelihood of whole responses or per token", choices=["sum", "mean"]
    )
    data: str = flag("", "ranked groups (JSONL); none: the offline demo")
    init_from: str = flag(
        "",
        "policy and reference to start from: a .pt, a llama2.c .bin, a folder of Meta or Hugging Face, "
        "or `scratch`",
    )
    tokenizer: str = flag("", "sentencepiece model; none: tokenizer.model beside init_from")
    out_dir: str = flag("out", "where the run's files go")
    dim: int = flag(288, "width, with --init_from=scratch")
    n_layers: int = flag(6, "layers, with --init_from=scratch")
    n_heads: int = flag(6, "attention heads, with --init_from=scratch")
    n_kv_heads: int | None = flag(None, "key-value heads, with --init_from=scratch; none: n_heads")
    max_seq_len: int = flag(256, "context, with --init_from=scratch")
    batch_size: int = flag(32, "groups per optimizer step")
    micro_batch_size: int | None = flag(
        None, "groups per forward pass: memory, never the result; none: what fits"
    )
    max_iters: int | None = flag(
        None, "optimizer steps; none: 80 for the demo, one epoch of other data"
    )
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW")
    warmup_iters: int = flag(5, "steps of linear warm-up")
    decay_lr: bool = flag(True, "cosine decay of the learning rate to 0 at max_iters")
    weight_decay: float = flag(0.0, "AdamW's, on matrices")
    adam_beta1: float = flag(
        0.95, "AdamW's; gradients of preferences are mostly noise, so the mean is a long one"
    )
    adam_beta2: float = flag(0.99, "AdamW's")
    grad_clip: float = flag(1.0, "gradient norm to clip at; 0: no clipping")
    kl_interval: int = flag(8, "steps between fresh samples of the policy (T in the paper)")
    kl_batch_size: int = flag(32, "how many samples")
    max_new_tokens: int = flag(256, "longest sampled story, in tokens")
    eval_interval: int = flag(20, "steps between evaluations")
    eval_stories: int = flag(
        128, "stories judged at an evaluation, twice as many fresh ones at the end; 0: none"
    )
    baseline: str = flag("", "stories to win against (JSONL); none: the reference's own")
    report: bool = flag(True, "end with a table on fresh stories: before, best and last")
    keep_checkpoints: bool = flag(False, "keep the weights of every evaluation, as step_N.pt")
    log_interval: int = flag(5, "steps between log lines")
    device: str = flag("", "cpu, cuda, cuda:1, mps; none: cuda where there is one, else cpu")
    dtype: str = flag(
        "",
        "what layers compute in, float32 or bfloat16; weights, sums and optimizer stay float32; "
        "none: bfloat16 on a GPU that has it",
        choices=["", "float32", "bfloat16"],
    )
    activation_checkpointing: bool = flag(
        False, "compute activations again in the backward pass: less memory, same result"
    )
    compile: bool = flag(
        False,
        "torch.compile the layers for training: a minute at the start, then faster steps of narrow models",
    )
    seed: int = flag(1337, "of the data order, of every sample, and of the weights from scratch")
    plan: int | None = flag(
        None,
        "only print what each of so many processes needs of memory, and whether it fits",
        alone=1,
    )
    resume: str = flag(
        "",
        "go on from the newest state in out_dir, or from STATE; auto: from the newest whole one, if any",
        alone="newest",
    )


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
        # is a reference read at every step (and not once, of the dataset)?
        self.needs_reference = bool(self.reads & {"response_kl", "online_kl"})

    def __str__(self) -> str:
        settings = ", ".join(
            f"{name} {value}" for name, value in self.settings.items() if name != "centered"
        )
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
        raise ValueError(
            f"--regularizer={name}: the beta of {config.loss} is its own; leave the regularizer out"
        )
    takes = set(defaults) | ({"beta"} if name != "none" else set())
    every_setting = {"beta"}.union(*map(settings_of, LOSSES.values()))
    settings = {
        n: getattr(config, n) for n in sorted(every_setting) if getattr(config, n) is not None
    }
    for n, value in settings.items():
        if n not in takes:
            listed = ", ".join(f"--{n}" for n in sorted(takes)) or "no settings"
            raise ValueError(
                f"--{n}: {config.loss} with regularizer {name} does not take it; it takes {listed}"
            )
        if isinstance(value, float) and not (
            math.isfinite(value) and value >= 0 and (value > 0 or n != "tau")
        ):
            raise ValueError(
                f"--{n}={value}: must be finite and {'above 0' if n == 'tau' else 'not negative'}"
            )
    beta = 0.0 if own_beta or name == "none" else settings.pop("beta", 0.1)
    settings = defaults | settings
    if "centered" in reads(loss):
        settings["centered"] = True  # the same gradient; the value is 0 at equal log-probs
    objective = Objective(loss, REGULARIZERS[name], settings, beta)
    for flag_name in () if objective.online else ONLINE_FLAGS:
        if getattr(config, flag_name) != getattr(TrainConfig(), flag_name):
            raise ValueError(
                f"--{flag_name}: {config.loss} with regularizer {name} draws no samples of the policy"
            )
    return objective


def check_config(config: TrainConfig, world: World) -> None:
    """ValueError, naming the flag, for what no run can work with."""
    positive = (
        "plan",
        "batch_size",
        "max_iters",
        "kl_interval",
        "kl_batch_size",
        "max_new_tokens",
        "eval_interval",
        "log_interval",
        "micro_batch_size",
        *SHAPE_FLAGS,
    )
    for name in positive:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value}: must be 1 or more")
    for name in (
        "learning_rate",
        "warmup_iters",
        "weight_decay",
        "grad_clip",
        "eval_stories",
        "seed",
    ):
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name}={value}: must be finite and not negative")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)}: must be in [0, 1)")
    for name in SHAPE_FLAGS if config.init_from != "scratch" else ():
        if getattr(config, name) != getattr(TrainConfig(), name):
            raise ValueError(
                f"--{name}: the shape comes with --init_from={config.init_from or 'the demo'}; "
                "give it with --init_from=scratch only"
            )
    for name in ("init_from", "tokenizer"):
        if not config.data and getattr(config, name):
            raise ValueError(
                f"--{name}: needs --data as well; without --data the demo brings its own model"
            )
    if config.data and not config.init_from:
        raise ValueError(
            "--data: needs --init_from, the model to align (a .pt, a llama2.c .bin, or `scratch`)"
        )
    for name in ("batch_size", "kl_batch_size"):
        if getattr(config, name) % world.size:
            raise ValueError(
                f"--{name}={getattr(config, name)}: must be a multiple of the number of processes, {world.size}"
            )
    if config.judge != "offline" and config.eval_stories == 0:
        raise ValueError(
            f"--judge={config.judge}: nothing is judged with --eval_stories=0; leave it out"
        )
    if config.baseline and (config.eval_stories == 0 or config.init_from == "scratch"):
        raise ValueError(
            "--baseline: nothing is judged with --eval_stories=0 or --init_from=scratch; leave it out"
        )
    if config.init_from == "scratch" and not config.tokenizer:
        raise ValueError("--init_from=scratch: needs --tokenizer")


# What a resumed run may change: what it costs and shows, and nothing of what it computes.
FREE = {
    "resume",
    "device",
    "micro_batch_size",
    "activation_checkpointing",
    "log_interval",
    "report",
    "keep_checkpoints",
    "workers",
    "max_usd",
    "base_url",
    "journal",
    "judge_timeout",
    "judge_retries",
    "judge_attempts",
}


def identity(config: TrainConfig) -> dict:
    """What makes a run this run: its flags, and the SHA-256 of the files that it reads."""
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    files = [
        path for path in (config.data, config.init_from, config.baseline) if os.path.isfile(path)
    ]
    return {"flags": flags, "files": {path: file_sha256(path) for path in files}}
