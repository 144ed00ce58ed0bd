"""How fast, how much memory, how near the machine's limit: both sides of a comparison in one run.

    python experiments/bench.py                    # W1, W2, W3 on a CPU; W4 too, if there is a GPU
    python experiments/bench.py --only=W1 --rounds=3

    W1          one DPO step: 15M parameters, vocabulary 32,000, 8 pairs of 150 to 256 tokens
    W2          one step: 260K parameters, vocabulary 512, 32 groups of 4, with and without the
                online KL (for TRL: 64 pairs, as many sequences)
    W3          generation: 32 rows of 256 tokens at temperature 1, 15M and 260K
    W4          one spo_rank step with its online KL: 110M, 32 groups of 4; GPU only
    generation  110M, 32 to 1,024 rows
    7B          a step of spo and dpo in as many layers as fit
    head        log-probs of 8,192 tokens
    errors      loss and gradient in each precision against float64

The last four are measured only where they are asked for, as experiments/gpu.sh does. Weights and
tokens are random. Every measurement is a process of its own, the sides take turns, and the median
step of all rounds counts: on a shared machine ratios mean something and seconds little. TRL and
transformers take part where they are installed (pip install trl). Memory is the high-water mark
over what rests after the models are built. Prints lines of JSON, then a table.
"""

import copy
import gc
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import losses
import spo_train
from losses import Objective
from model import ModelArgs, Transformer
from spo import fast, head, parallel, plan
from spo.config import flag, main_program, parse
from spo.generate import generate
from spo.groups import EncodedGroup
from spo.reference import with_reference_logps
from spo_train import TrainConfig

SHAPES = {  # dim, layers, heads, key-value heads, hidden, vocabulary
    "tiny": (32, 2, 4, 2, 48, 512),
    "260K": (64, 5, 8, 4, 172, 512),
    "15M": (288, 6, 6, 6, 768, 32000),
    "110M": (768, 12, 12, 12, 2048, 32000),
    "7B": (4096, 32, 32, 32, 11008, 32000),
}
TINY = {
    "shape": "tiny",
    "groups": 2,
    "rows": 4,
    "count": 2,
    "tokens": 128,
    "compiled": False,
}  # the arguments with --tiny

MOST_FOR_A_RATE = 60.0  # seconds, for eight products
WORKLOADS = ("W1", "W2", "W3", "W4", "generation", "7B", "head")


@dataclass
class BenchConfig:
    only: str = flag("", "one workload", choices=["", *WORKLOADS, "errors"])
    rounds: int = flag(2, "how often every measurement is made, if there is time")
    minutes: float = flag(15.0, "when it ends; what does not fit is left out, and named")
    measure: str = flag(
        "",
        "one measurement, or all of a workload, in this process: a line of JSON each",
    )
    tiny: bool = flag(
        False, "with --measure: at a tiny shape, to see that the measurement itself works"
    )


# --- what is measured ----------------------------------------------------------------------------


def shape_of(shape: str) -> ModelArgs:
    dim, layers, heads, kv, hidden, vocab = SHAPES[shape]
    return ModelArgs(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv,
        hidden_dim=hidden,
        vocab_size=vocab,
        max_seq_len=512,
    )


def products(shape: str, n_layers: int | None = None) -> int:
    """Multiplications with weights that a token meets: 2 flops each forward, 4 backward."""
    dim, layers, heads, kv, hidden, vocab = SHAPES[shape]
    layers = n_layers or layers
    return layers * (2 * dim * dim + 2 * dim * dim * kv // heads + 3 * dim * hidden) + dim * vocab


def responses(shape: str, groups: int, n: int, seed: int) -> list[list[list[int]]]:
    """`groups` groups of n responses, 149 to 255 random ids behind a BOS."""
    random_ids, vocab = random.Random(seed), SHAPES[shape][-1]
    return [
        [
            [random_ids.randrange(3, vocab) for _ in range(random_ids.randint(149, 255))]
            for _ in range(n)
        ]
        for _ in range(groups)
    ]


class Peak:
    """Memory over what was held when this was made, in MB; `added` asks for the high-water mark
    since.
    """

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            with open("/proc/self/clear_refs", "w") as f:
                f.write("5")
            self.start = self.resident("VmRSS")

    def resident(self, name: str) -> int:
        with open("/proc/self/status") as f:
            return 1024 * int(dict(line.split(":", 1) for line in f)[name].split()[0])

    def added(self) -> float:
        return (
            (torch.cuda.max_memory_allocated() if self.cuda else self.resident("VmHWM"))
            - self.start
        ) / 1e6


def timed(work) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_rate(dtype: str, **_) -> dict:
    """Flops per second of the machine in the classifier's product of 15M (on a GPU of 7B), into
    memory that is there.
    """
    device, kind = parallel.pick_device(""), getattr(torch, dtype)
    fast.enable_fast_matmul(device)
    rows, size = (1024, 288) if device == "cpu" else (8192, 4096)
    left, right = (
        torch.randn(rows, size, device=device, dtype=kind),
        torch.randn(size, 32000, device=device, dtype=kind),
    )
    out = torch.empty(rows, 32000, device=device, dtype=kind)
    times = [timed(lambda: torch.mm(left, right, out=out)) for _ in range(8)]
    return {"seconds": times, "flops": 2 * rows * size * 32000}


def layers_that_fit(shape: str, groups: int, dtype: str) -> ModelArgs:
    """Return the shape with as many layers as a step of `groups` pairs leaves room for, by plan."""
    args, (there, _) = shape_of(shape), plan.available(parallel.pick_device(""), 1)
    for n_layers in range(args.n_layers, 0, -1):
        args.n_layers = n_layers
        if sum(planned_for_training(args, groups * 2, dtype).values()) < 0.85 * there:
            break
    return args


def planned_for_training(args: ModelArgs, sequences: int, dtype: str) -> dict[str, int]:
    """Return plan.memory of what a step without samples takes: {kind: bytes}."""
    load = plan.Load(
        processes=1,
        device=parallel.pick_device(""),
        dtype=dtype,
        reference=False,
        online=0,
        eval_stories=0,
        sequences=sequences,
        longest=256,
        new_tokens=256,
        activation_checkpointing=False,
    )
    kinds = plan.memory(args, True, load)
    return {kind: kinds.get(kind, 0) for kind in plan.PHASES["training"]}


def our_model(args: ModelArgs, device: str) -> Transformer:
    with torch.device(device):
        model = Transformer(args)
    model.init_weights(torch.Generator(device).manual_seed(0))
    model.eos_ids = (1,)
    return fast.use(model)


def our_step(
    shape: str,
    loss: str,
    groups: int,
    n: int,
    reference_each_step: bool = False,
    online: bool = False,
    dtype: str = "float32",
    precision: str = "",
    compiled: bool = False,
    fit: bool = False,
    library_head: bool = False,
    count: int = 6,
) -> dict:
    """One optimizer step.

    fit           as many layers as there is memory for, in one micro-batch, and the plan beside
                  the peak
    library_head  log-probs by torch's linear_cross_entropy, in place of spo/head.py
    """
    if library_head:
        head.logps_from_hidden = library_logps
    device, dtype = parallel.start("", dtype)
    fast.enable_fast_matmul(device)
    if precision:
        torch.set_float32_matmul_precision(precision)
    size = groups if fit else None
    config = TrainConfig(loss=loss, batch_size=groups, max_iters=count, micro_batch_size=size)
    objective = config.objective()
    args = layers_that_fit(shape, groups, dtype) if fit else shape_of(shape)
    start = Peak()
    policy, reference = our_model(args, device), None
    if online or reference_each_step:
        reference = copy.deepcopy(policy).requires_grad_(False)
    if compiled:
        parallel.compile_layers(policy)
    for model in filter(None, (policy, reference)):
        parallel.shard(model, dtype)
    optimizer = spo_train.make_optimizer(config, policy)
    peak = start if fit else Peak()
    samples, drawing, seconds, tokens = None, 0.0, [], 0
    if online:

        def draw():
            nonlocal samples
            samples = spo_train.draw_samples(config, policy, reference, [[1]], 0)

        timed(draw)
        drawing = timed(draw)
    for i in range(count):
        batch = [
            EncodedGroup([1], group, line)
            for line, group in enumerate(responses(shape, groups, n, seed=i))
        ]
        tokens += sum(len(response) + 1 for group in batch for response in group.responses)
        if "reference_logps" in objective.reads and not reference_each_step:
            batch = with_reference_logps(batch, policy)  # once for all of a run: not counted

        def step(batch=batch):
            scored = with_reference_logps(batch, reference) if reference_each_step else batch
            spo_train.preference_gradient(objective, policy, reference, scored, size)
            if samples is not None:
                spo_train.kl_gradient(objective.beta, policy, samples)
            parallel.clip_gradient(policy, config.grad_clip)
            spo_train.optimizer_step(optimizer, 1e-4)

        seconds.append(timed(step) + drawing / config.kl_interval)
    result = {
        "seconds": seconds[1:],
        "tokens": tokens / count,
        "flops": 6 * products(shape, args.n_layers) * tokens / count,
        "peak_mb": peak.added(),
        "sampling": drawing,
    }
    if fit:
        planned = sum(planned_for_training(args, groups * n, dtype).values())
        result |= {"layers": args.n_layers, "planned_mb": planned / 1e6}
    return result


def library_logps(hidden, classifier, tokens, mask):
    """head.logps_from_hidden by torch.nn.functional.linear_cross_entropy, new in torch 2.13."""
    scored = mask[:, 1:]
    rows, targets = hidden[:, :-1][scored], tokens[:, 1:][scored]
    nll = F.linear_cross_entropy(rows, classifier, targets, reduction="none")
    return losses.sum_scored(-nll, scored)


def our_generation(shape: str, dtype: str = "float32", rows: int = 32, count: int = 4) -> dict:
    device = parallel.pick_device("")
    fast.enable_fast_matmul(device)
    model = our_model(shape_of(shape), device).to(getattr(torch, dtype))
    peak = Peak()
    seconds = [
        timed(lambda seed=i: generate(model, [[1]] * rows, 256, seed=seed)) for i in range(count)
    ]
    return {
        "seconds": seconds[1:],
        "tokens": rows * 256,
        "flops": 2 * products(shape) * rows * 256,
        "peak_mb": peak.added(),
    }


def head_of(
    which: str, tokens: int = 8192, dim: int = 4096, vocab: int = 32000, count: int = 6, **_
) -> dict:
    """Log-probs of `tokens` tokens and their gradient, from hidden states and the classifier: ours,
    and the others'.
    """
    if which == "torch" and not hasattr(F, "linear_cross_entropy"):
        raise ValueError(f"torch {torch.__version__} has no linear_cross_entropy")
    device = parallel.pick_device("")
    dim, vocab, dtype = (dim, vocab, torch.bfloat16) if tokens > 128 else (64, 512, torch.float32)
    random_ids = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(
        1, tokens + 1, dim, device=device, dtype=dtype, generator=random_ids
    ).requires_grad_()
    classifier = (
        (torch.randn(vocab, dim, device=device, generator=random_ids) / dim**0.5)
        .to(dtype)
        .requires_grad_()
    )
    ids = torch.randint(vocab, (1, tokens + 1), device=device, generator=random_ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False

    def total():
        if which == "ours":
            return head.logps_from_hidden(hidden, classifier, ids, mask).sum()
        if which == "torch":
            return -F.linear_cross_entropy(
                hidden[0, :-1], classifier, ids[0, 1:], reduction="none"
            ).sum()
        return losses.sequence_logps(hidden @ classifier.t(), ids, mask).sum()

    peak = Peak()
    seconds = [timed(lambda: total().backward()) for _ in range(count)]
    return {
        "seconds": seconds[1:],
        "tokens": tokens,
        "flops": 6 * tokens * dim * vocab,
        "peak_mb": peak.added(),
    }


def gradient_errors(shape: str, loss: str) -> list[dict]:
    """Return loss and gradient of a policy near its reference, and their errors."""
    n = 2 if loss == "dpo" else 4
    groups = [
        EncodedGroup([1], group, line) for line, group in enumerate(responses(shape, 8, n, seed=0))
    ]
    objective, lines, exact = Objective(loss), [], None
    for what in ("float64", "float32", "float32, fast products", "bfloat16"):
        torch.set_float32_matmul_precision("highest")
        dtype = "bfloat16" if what == "bfloat16" else "float32"
        device, dtype = parallel.start("", dtype)
        if "fast" in what:
            fast.enable_fast_matmul(device)
        generator = torch.Generator().manual_seed(0)
        reference = Transformer(shape_of(shape))
        reference.init_weights(generator)
        policy = copy.deepcopy(reference)
        with torch.no_grad():
            for weight in policy.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight += 0.02 * weight.std() * noise if weight.dim() > 1 else 0
        for model in (policy, reference):
            model.to(device, torch.float64 if what == "float64" else torch.float32)
            parallel.shard(fast.use(model), dtype)
        scored = with_reference_logps(groups, reference)
        value = spo_train.preference_gradient(objective, policy, None, scored, None)["loss"]
        gradients = [parallel.full_tensor(p.grad) for p in policy.parameters()]
        gradient = torch.cat([g.double().flatten() for g in gradients])
        exact = exact or (value, gradient)
        lines.append(
            {
                "shape": shape,
                "loss": loss,
                "what": what,
                "value": value,
                "error": abs(value - exact[0]),
                "gradient_error": float((gradient - exact[1]).norm() / exact[1].norm()),
            }
        )
        parallel.end()
    return lines


# --- the others ----------------------------------------------------------------------------------


def their_model(shape: str, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    dim, layers, heads, kv, hidden, vocab = SHAPES[shape]
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            intermediate_size=hidden,
            vocab_size=vocab,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            pad_token_id=0,
            **more,
        )
    )


def trl_step(
    shape: str,
    pairs: int,
    precision: str = "highest",
    precomputed: bool = False,
    bf16: bool = False,
    count: int = 4,
) -> dict:
    import tempfile

    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_float32_matmul_precision(precision)
    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(SHAPES[shape][-1])}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w0"
    )
    records, tokens = [], 0
    for i in range(count):
        for pair in responses(shape, pairs, 2, seed=i):
            tokens += sum(len(response) + 1 for response in pair)
            chosen, rejected = (
                " " + " ".join(f"w{t}" for t in response[:-1]) for response in pair
            )  # TRL adds a terminator
            records.append({"prompt": "w1", "chosen": chosen, "rejected": rejected})
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=pairs,
            max_steps=count,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            max_length=512,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            gradient_checkpointing=False,
            precompute_ref_log_probs=precomputed,
        )
        trainer = DPOTrainer(
            model=their_model(shape, eos_token_id=2),
            ref_model=their_model(shape, eos_token_id=2),
            args=arguments,
            train_dataset=Dataset.from_list(records),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        peak = Peak()
        trainer.train()
    return {
        "seconds": seconds[1:],
        "tokens": tokens / count,
        "flops": 6 * products(shape) * tokens / count,
        "peak_mb": peak.added(),
    }


def their_generation(shape: str, dtype: str = "float32", rows: int = 32, count: int = 3) -> dict:
    model = their_model(shape, eos_token_id=None).eval().to(getattr(torch, dtype))
    ids, peak = torch.ones(rows, 1, dtype=torch.long), Peak()
    seconds = [
        timed(
            lambda: model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=256,
                min_new_tokens=256,
            )
        )
        for _ in range(count)
    ]
    return {
        "seconds": seconds[1:],
        "tokens": rows * 256,
        "flops": 2 * products(shape) * rows * 256,
        "peak_mb": peak.added(),
    }


# --- the table -----------------------------------------------------------------------------------

# workload: [(what, function, its arguments)]; the first of a workload is what the others are
# compared with
MEASUREMENTS = {
    "W1": [
        ("spo", our_step, {"shape": "15M", "loss": "dpo", "groups": 8, "n": 2}),
        (
            "spo, without oneDNN, reference at every step",
            our_step,
            {
                "shape": "15M",
                "loss": "dpo",
                "groups": 8,
                "n": 2,
                "precision": "highest",
                "reference_each_step": True,
            },
        ),
        (
            "spo, bfloat16",
            our_step,
            {"shape": "15M", "loss": "dpo", "groups": 8, "n": 2, "dtype": "bfloat16"},
        ),
        ("spo, 16 pairs", our_step, {"shape": "15M", "loss": "dpo", "groups": 16, "n": 2}),
        (
            "spo, torch's linear_cross_entropy",
            our_step,
            {"shape": "15M", "loss": "dpo", "groups": 8, "n": 2, "library_head": True},
        ),
        ("TRL, without oneDNN, reference at every step", trl_step, {"shape": "15M", "pairs": 8}),
        (
            "TRL, oneDNN, reference precomputed",
            trl_step,
            {"shape": "15M", "pairs": 8, "precision": "medium", "precomputed": True},
        ),
        (
            "TRL, bfloat16, reference precomputed",
            trl_step,
            {"shape": "15M", "pairs": 8, "bf16": True, "precomputed": True},
        ),
    ],
    "W2": [
        ("dpo_rank", our_step, {"shape": "260K", "loss": "dpo_rank", "groups": 32, "n": 4}),
        (
            "spo_rank without its online KL",
            our_step,
            {"shape": "260K", "loss": "spo_rank", "groups": 32, "n": 4},
        ),
        (
            "spo_rank with its online KL",
            our_step,
            {"shape": "260K", "loss": "spo_rank", "groups": 32, "n": 4, "online": True},
        ),
        ("TRL, dpo, 64 pairs", trl_step, {"shape": "260K", "pairs": 64}),
        ("TRL, dpo, 64 pairs, bfloat16", trl_step, {"shape": "260K", "pairs": 64, "bf16": True}),
        (
            "TRL, dpo, 64 pairs, bfloat16, reference precomputed",
            trl_step,
            {"shape": "260K", "pairs": 64, "bf16": True, "precomputed": True},
        ),
    ],
    "W3": [
        ("15M", our_generation, {"shape": "15M"}),
        ("15M, bfloat16", our_generation, {"shape": "15M", "dtype": "bfloat16"}),
        ("15M, transformers", their_generation, {"shape": "15M"}),
        ("15M, transformers, bfloat16", their_generation, {"shape": "15M", "dtype": "bfloat16"}),
        ("260K", our_generation, {"shape": "260K"}),
        ("260K, transformers", their_generation, {"shape": "260K"}),
    ],
    "W4": [
        (
            f"spo_rank {kind} its online KL{how}",
            our_step,
            {
                "shape": "110M",
                "loss": "spo_rank",
                "groups": 32,
                "n": 4,
                "dtype": "bfloat16",
                "online": kind == "with",
                "compiled": bool(how),
            },
        )
        for how in ("", ", --compile")
        for kind in ("without", "with")
    ],
    "generation": [
        (f"110M, {rows} rows", our_generation, {"shape": "110M", "rows": rows, "dtype": "bfloat16"})
        for rows in (32, 128, 1024)
    ],
    "7B": [
        (
            loss,
            our_step,
            {
                "shape": "7B",
                "loss": loss,
                "groups": 8,
                "n": 2,
                "dtype": "bfloat16",
                "fit": True,
                "count": 4,
            },
        )
        for loss in ("spo", "dpo")
    ],
    "head": [
        (which, head_of, {"which": which, "tokens": 8192})
        for which in ("ours", "plain logits", "torch")
    ],
}
RATES = [(f"matmul, {dtype}", matmul_rate, {"dtype": dtype}) for dtype in ("float32", "bfloat16")]


def chosen(only: str) -> list[tuple[str, str]]:
    """(workload, what) of all that can run here."""
    needs = {trl_step: "trl", their_generation: "transformers"}
    workloads = [only] if only else ["W1", "W2", "W3"] + ["W4"] * torch.cuda.is_available()
    return [
        (workload, what)
        for workload in workloads
        for what, function, _ in MEASUREMENTS[workload]
        if function not in needs or importlib.util.find_spec(needs[function])
    ]


def measure(name: str, tiny: bool) -> None:
    """WORKLOAD/WHAT, in this process: a line of JSON. WORKLOAD: all of it and the rate of its
    products; what fails is a line, too.
    """
    workload, _, what = name.partition("/")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    listed = MEASUREMENTS.get(workload, RATES) if what else [RATES[1], *MEASUREMENTS[workload]]
    for label, function, arguments in listed:
        if what and what != label:
            continue
        arguments = arguments | {
            key: value for key, value in TINY.items() if tiny and key in arguments
        }
        try:
            result = function(**arguments)
        except Exception as error:
            if what:
                raise
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(
            json.dumps(result if what else {"workload": workload, "what": label} | result),
            flush=True,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(workload: str, what: str, seconds: float) -> dict | None:
    """In a process of its own; None if it takes longer than so many seconds."""
    command = [sys.executable, os.path.abspath(__file__), f"--measure={workload}/{what}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise ValueError(f"{workload} {what}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> str:
    """Return the processor's instruction sets, as torch and the system name them, and its cores."""
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve", "asimd")
    flags: set[str] = set()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = {
                word for line in f if line.startswith(("flags", "Feat")) for word in line.split()
            }
    sets = ", ".join(name for name in known if name in flags) or "unknown"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{len(os.sched_getaffinity(0))} cores, {sets}; torch computes with {capability}"


def run_all(config: BenchConfig) -> dict[tuple[str, str], list[dict]]:
    """Measure what fits into the time, the sides in turn; {(workload, what): results}."""
    deadline = time.monotonic() + 60 * config.minutes
    print(machine(), flush=True)
    results: dict[tuple[str, str], list[dict]] = {}
    took: dict[tuple[str, str], float] = {}

    def attempt(case: tuple[str, str], seconds: float) -> None:
        started = time.monotonic()
        result = measured(*case, min(seconds, deadline - started))
        took[case] = time.monotonic() - started if result else math.inf
        if result is None:
            print(f"left out: {'/'.join(case)}, longer than its {seconds:.0f} s", flush=True)
            return
        results.setdefault(case, []).append(result)
        print(json.dumps({"workload": case[0], "what": case[1]} | result), flush=True)

    for what, *_ in RATES:
        attempt(("matmul", what), MOST_FOR_A_RATE)
    cases = chosen(config.only)
    slower = bfloat16_is_slower(results)
    if slower:
        print(f"left out: all in bfloat16, whose products take {slower} here", flush=True)
        cases = [case for case in cases if "bfloat16" not in case[1]]
    for turn in range(config.rounds):
        for number, case in enumerate(cases):
            left = deadline - time.monotonic()
            # In the first round a case may take four times its share of what is left.
            needed, share = (took[case], left) if turn else (1, 4 * left / (len(cases) - number))
            if needed > left:
                print(f"left out of round {turn + 1}: {'/'.join(case)}", flush=True)
            else:
                attempt(case, share)
    return results


def bfloat16_is_slower(results: dict) -> str:
    """Return by how much products in bfloat16 are slower than in float32; "" if they are not."""
    whats = [("matmul", what) for what, *_ in RATES]
    if not all(what in results for what in whats):
        return "too long to be measured"
    single, half = (min(results[what][0]["seconds"]) for what in whats)
    return f"{half / single:.0f} times as long" if half > 1.2 * single else ""


def main(argv: list[str]) -> None:
    config = parse(
        BenchConfig,
        argv,
        "bench.py",
        "Measure the workloads, and TRL and transformers on the same work.",
    )
    if config.measure:
        measure(config.measure, config.tiny)
        return
    if config.only == "errors":
        for shape, loss in (
            ("260K", "dpo"),
            ("260K", "spo_rank"),
            ("15M", "dpo"),
            ("15M", "spo_rank"),
        ):
            for line in gradient_errors(shape, loss):
                print(json.dumps(line), flush=True)
        return
    all_of = run_all(config)
    rows, rates, first, steps_of = [], {}, {}, {}
    for (workload, what), results in all_of.items():
        seconds = statistics.median(s for result in results for s in result["seconds"])
        flops = results[0]["flops"] / seconds
        if workload == "matmul":
            rates[what.split(", ")[1]] = flops
            rows.append(
                (workload, what, f"{seconds:.3f}", "", "", f"{flops / 1e9:.0f} GFLOP/s", "")
            )
            continue
        tokens, steps_of[workload, what] = results[0]["tokens"] / seconds, seconds
        base = first.setdefault((workload, what.split(", ")[0] if workload == "W3" else ""), tokens)
        rows.append(
            (
                workload,
                what,
                f"{seconds:.2f}",
                f"{tokens:,.0f}",
                f"{max(r['peak_mb'] for r in results):,.0f}",
                f"{flops / rates['bfloat16' if 'bfloat16' in what else 'float32']:.0%}",
                f"{tokens / base:.2f}",
            )
        )
    head = ("", "", "s", "tokens/s", "MB added", "of matmul limit", "to the first")
    print(
        "\n"
        + "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))
    )
    for workload in ("W2", "W4"):
        without, with_kl = (
            steps_of.get((workload, f"spo_rank {kind} its online KL"))
            for kind in ("without", "with")
        )
        if with_kl:
            added, share = with_kl / without - 1, 1 - without / with_kl
            print(f"\n{workload}: sampling and KL add {added:.0%} to the step: {share:.0%} of it")


if __name__ == "__main__":
    main_program(main)
