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
import glob
import json
import math
import os
import shutil
import signal
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

import tinystories_data as data
from judge import OfflineJudge, make_judge
from losses import LOSSES
from model import ModelArgs, Transformer, rope_tables
from spo import checkpoint as checkpoints
from spo import machine, parallel, plan
from spo.checkpoint import Checkpoint, PtFile
from spo.config import parse, run
from spo.evaluation import Evaluation, Verdict, report
from spo.files import write_jsonl, write_text
from spo.folders import fill, on_meta, open_folder
from spo.groups import (
    EncodedGroup,
    encode_groups,
    longest_sequence,
    micro_batches,
    read_groups,
    require,
)
from spo.parallel import World, full
from spo.pretokenize import TokenWindows
from spo.reference import ReferenceCache, complete
from spo.tokenizer import Tokenizer, load_tokenizer
from step import (
    OnlineSamples,
    draw_online,
    gradient_step,
    groups_of_step,
    make_optimizer,
    numbers_of_step,
    online_of,
)
from train_config import SHAPE_FLAGS, Objective, TrainConfig, check_config, identity, objective_of

# --- what a run begins with ----------------------------------------------------------------------


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
    elif (
        source := source_of(config.init_from, world.size if config.plan is None else 2)
    ) is not None:  # a plan loads nothing
        tokenizer = load_tokenizer(config.tokenizer, config.init_from, source.args.vocab_size)
        return (
            Checkpoint(on_meta(source), dataclasses.asdict(config) | {"eos_id": source.eos_id}),
            tokenizer,
            source,
        )
    else:
        loaded = checkpoints.load(config.init_from)
        model, eos_id = loaded.model, loaded.eos_id
        tokenizer = load_tokenizer(config.tokenizer, config.init_from, model.args.vocab_size)
    return (
        Checkpoint(model.to(world.device), dataclasses.asdict(config) | {"eos_id": eos_id}),
        tokenizer,
        None,
    )


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


def demo(loss: str, device: str) -> tuple[str, str]:
    """Build what is missing of the offline demo; returns its dataset for a loss, and its reference model.

    Text and tokenizer, a reference model trained on them by this very loop, groups of its stories, ranked.
    """
    data.demo_text()
    tokenizer, folder = (
        os.path.join(data.DEMO_DIR, "tokenizer.model"),
        os.path.join(data.DEMO_DIR, "reference"),
    )
    reference = os.path.join(folder, "ckpt.pt")
    if not os.path.isdir(folder):
        print("demo: training a reference model on the stories of a small grammar", flush=True)
        train(
            TrainConfig(
                loss="sft",
                data=os.path.join(data.DEMO_DIR, data.DEMO_FILES["text"]),
                init_from="scratch",
                tokenizer=tokenizer,
                out_dir=f"{folder}.tmp",
                dim=96,
                n_layers=3,
                n_heads=3,
                max_seq_len=256,
                batch_size=16,
                max_iters=700,
                learning_rate=3e-3,
                warmup_iters=20,
                weight_decay=0.1,
                log_interval=100,
                adam_beta1=0.9,
                adam_beta2=0.95,
                eval_interval=700,
                eval_stories=0,
            ),
            World(device=device),
        )
        os.rename(f"{folder}.tmp", folder)
    checkpoint = checkpoints.load(reference, device)
    data.demo_groups(
        checkpoint, load_tokenizer(tokenizer, reference, checkpoint.model.args.vocab_size)
    )
    return os.path.join(data.DEMO_DIR, data.DEMO_FILES[LOSSES[loss].data]), reference


def load_groups(
    config: TrainConfig,
    need: str,
    tokenizer: Tokenizer,
    policy: Checkpoint,
    say: Callable[[str], None],
):
    """(encoded groups, the different prompts) of the dataset. ValueError if it does not suit the loss."""
    if os.path.isdir(config.data) or config.data.endswith(".bin"):
        if need != "text":
            raise ValueError(
                f"--data={config.data}: token files are text for --loss=sft; {config.loss} needs groups "
                "(JSONL)"
            )
        return TokenWindows(
            config.data, policy.model.args.max_seq_len, policy.model.args.vocab_size
        ), [""]
    groups = read_groups(config.data)
    require(groups, need, config.data, config.loss)
    encoded, drops = encode_groups(groups, tokenizer, policy.eos_id, policy.model.args.max_seq_len)
    for reason, lines in drops.items():
        say(
            f"{config.data}: {len(lines)} of {len(groups)} groups dropped, {reason} (first in line {lines[0]})"
        )
    if not encoded:
        raise ValueError(
            f"{config.data}: none of its {len(groups)} groups can be used: {', '.join(drops)}"
        )
    used = {group.line for group in encoded}
    return encoded, sorted({group.prompt for group in groups if group.line in used})


def with_reference(
    config: TrainConfig, groups: list[EncodedGroup], policy: Checkpoint, world: World
):
    """The groups that this run will see with what the policy, as it is at the start, says of them."""
    wanted = {
        i
        for step in range(config.max_iters)
        for i in numbers_of_step(len(groups), config.batch_size, step, config.seed)
    }
    cached = config.init_from != "scratch"
    cache = (
        world.from_first(lambda: ReferenceCache(config.data, groups, config.init_from, world.dtype))
        if cached
        else None
    )
    return complete(groups, wanted, policy.model, cache, config.micro_batch_size, world, world.say)


def in_run(config: TrainConfig, name: str) -> str:
    return os.path.join(config.out_dir, name)


def new_run(config: TrainConfig, policy: Checkpoint, tokenizer: Tokenizer) -> None:
    """Make out_dir the folder of this run: what an earlier run left there is removed."""
    files = (
        "ckpt.pt",
        "best.pt",
        "model.bin",
        "log.jsonl",
        "config.json",
        "tokenizer.model",
        "tokenizer.bin",
    )
    former = [in_run(config, name) for name in files]
    former += glob.glob(in_run(config, "step_*.pt")) + glob.glob(in_run(config, "stories/*.jsonl"))
    inputs = {
        os.path.realpath(p)
        for p in (config.init_from, tokenizer.path, config.data, config.baseline)
        if p
    }
    for path in former:
        if os.path.realpath(path) in inputs:
            raise ValueError(
                f"--out_dir={config.out_dir}: this run reads {path}, and would replace what is in "
                "that folder; choose another --out_dir"
            )
    for path in filter(os.path.exists, former):
        os.remove(path)
    shutil.rmtree(in_run(config, "state"), ignore_errors=True)
    for folder in ("stories", "state"):
        os.makedirs(in_run(config, folder), exist_ok=True)
    write_text(in_run(config, "config.json"), json.dumps(policy.config, indent=1))
    checkpoints.copy_tokenizer(tokenizer, config.out_dir)


def state_to_resume(config: TrainConfig) -> str | None:
    """The state that --resume means, if it is one of this very run. ValueError, naming the flag, if it is not."""
    path = parallel.find_state(in_run(config, "state"), config.resume)
    if path is None:
        return None
    former, now = parallel.facts_of(path)["identity"], identity(config)
    for name, value in now["flags"].items():
        if former["flags"].get(name) != value:
            raise ValueError(
                f"--{name}={value}: {path} is of a run with {former['flags'].get(name)}; resume it with the "
                "same flags, or start anew in another --out_dir"
            )
    for name, digest in now["files"].items():
        if former["files"].get(name) != digest:
            raise ValueError(f"{name}: has changed since the run began; it cannot be resumed")
    return path


def describe(
    config: TrainConfig,
    objective: Objective,
    policy: Checkpoint,
    groups: Sequence[EncodedGroup],
    device: str,
) -> str:
    n = len(groups[0].responses)
    parameters = sum(p.numel() for p in policy.model.parameters())
    some = [groups[i] for i in range(min(1000, len(groups)))]
    tokens = sum(len(r) for g in some for r in g.responses) / len(some) * config.batch_size
    start = objective.start(n)
    known = "" if start is None else f", which is {start:.4f} while the policy equals the reference"
    return (
        f"{parameters:,} parameters on {device}; {len(groups)} groups of {n} in {config.data}; "
        f"{config.max_iters} steps of {tokens:,.0f} tokens\nobjective: {objective}{known}"
    )


def load_of(
    config: TrainConfig,
    objective: Objective,
    policy: Checkpoint,
    groups: Sequence[EncodedGroup],
    world: World,
) -> plan.Load:
    """What --plan is to reckon with."""
    mine = max(1, config.batch_size // config.plan)
    some = [groups[i] for i in range(min(1000, len(groups)))]
    longest = max(some, key=longest_sequence)
    batch = micro_batches(
        [longest] * mine, config.micro_batch_size, policy.model.args, world.device
    )[0]
    return plan.Load(
        processes=config.plan,
        device=world.device,
        dtype=world.dtype,
        reference=objective.needs_reference or config.eval_stories > 0,
        online=config.kl_batch_size if objective.online else 0,
        eval_stories=config.eval_stories,
        sequences=len(batch.tokens),
        longest=batch.tokens.shape[1],
        new_tokens=config.max_new_tokens,
        activation_checkpointing=config.activation_checkpointing,
    )


def gathered(policy: Checkpoint, world: World) -> Checkpoint | None:
    """The policy with all its weights, on the CPU of the first process; the others get None. All have to ask.

    Of a bfloat16 run they are bfloat16, as its layers computed: nobody holds all of a large model in float32. The
    weights that the optimizer goes on from are in the state.
    """
    weights, model = {}, policy.model
    for name, weight in model.state_dict().items():
        whole_weight = full(weight.detach())  # one at a time
        if world.rank == 0:
            weights[name] = whole_weight.to("cpu", getattr(torch, world.dtype))
    if world.rank > 0:
        return None
    if model.tied:
        return dataclasses.replace(
            policy, model=checkpoints.build("the policy", model.args, weights)
        )
    with torch.device("meta"):
        unsharded = Transformer(model.args, tied=False)
    unsharded.load_state_dict(weights, assign=True)
    unsharded.freqs_cos, unsharded.freqs_sin = rope_tables(model.args)
    return dataclasses.replace(policy, model=unsharded)


def save(
    config: TrainConfig, policy: Checkpoint, verdict: Verdict | None, best: float, world: World
) -> float:
    """The files of an evaluation (verdict None: of a model that nobody judges); returns the best win-rate so far."""
    improved = verdict is None or verdict.rate > best
    policy = gathered(policy, world) if parallel.is_sharded(policy.model) else policy
    if world.rank == 0:
        checkpoints.save_pt(in_run(config, "ckpt.pt"), policy)
        if config.keep_checkpoints:
            checkpoints.save_pt(in_run(config, f"step_{policy.step:06d}.pt"), policy)
        if verdict is not None:
            write_jsonl(in_run(config, f"stories/step_{policy.step:06d}.jsonl"), verdict.stories)
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
    if config.plan is not None:
        world.say(
            plan.report(
                policy.model.args,
                policy.model.tied,
                load_of(config, objective, policy, groups, world),
            )
        )
        return
    policy.config |= dataclasses.asdict(config)
    prompt_ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]

    # A model from scratch has no reference worth beating: it is trained, and judged by nobody.
    judged = config.eval_stories > 0 and config.init_from != "scratch"
    start = copy.deepcopy(policy) if judged or objective.needs_reference else None
    reference = start.model.requires_grad_(False) if objective.needs_reference else None
    evaluation = (
        Evaluation(
            start,
            tokenizer,
            prompts,
            config.eval_stories,
            judge=make_judge(config) if world.rank == 0 else OfflineJudge(),
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            baseline=config.baseline,
            world=world,
        )
        if judged
        else None
    )
    world.say(describe(config, objective, policy, groups, world.device))
    state = world.from_first(lambda: state_to_resume(config)) if config.resume else None
    if state is None:
        world.from_first(lambda: new_run(config, policy, tokenizer))
    compiled = config.compile and parallel.can_compile(world.device, world.say)
    for model in (policy.model, start.model) if start else (policy.model,):
        if compiled:
            parallel.compile_layers(model)
        parallel.shard(model, world)
        if source is not None:
            fill(model.to_empty(device=world.device), source, world.rank, world.size)
    if config.activation_checkpointing:
        parallel.checkpoint_activations(policy.model)
    if "reference_logps" in objective.reads:  # the policy still is the reference
        groups = with_reference(config, groups, policy, world)
    optimizer = make_optimizer(config, policy.model)
    run = Run(config, objective, policy, reference, evaluation, optimizer, world, prompt_ids)
    if state is not None:
        run.restore(state)
    run.loop(groups)
    if judged and config.report and not run.stopped:
        if run.best_rate < 0:
            raise ValueError(
                "the judge gave no win-rate that can be trusted, so there is no best.pt; see ckpt.pt"
            )
        best = load_sharded(in_run(config, "best.pt"), world)
        report(evaluation, {"before": start, "best": best, "last": policy}, run.record)
        world.say(
            f"\n{config.out_dir}: best.pt, ckpt.pt, model.bin; sample with "
            f"`python sample.py --checkpoint={in_run(config, 'best.pt')}`"
        )


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
            "identity": identity(self.config),
            "best_rate": self.best_rate,
            "evaluated": self.evaluated,
            "log_bytes": os.path.getsize(log) if os.path.exists(log) else 0,
            "online": [dataclasses.astuple(group) for group in self.online.samples]
            if self.online
            else None,
        }
        tensors = parallel.tensors_of_run(self.policy.model, self.optimizer)
        parallel.save_state(
            in_run(self.config, "state"), self.policy.step, tensors, facts, self.world
        )

    def restore(self, path: str) -> None:
        facts = parallel.facts_of(path)
        self.first = self.policy.step = facts["step"]
        self.best_rate, self.evaluated = facts["best_rate"], facts["evaluated"]
        parallel.load_state(
            path, parallel.tensors_of_run(self.policy.model, self.optimizer), self.world
        )
        if facts["online"] is not None:
            samples = [EncodedGroup(*group) for group in facts["online"]]
            self.online = online_of(self.config, samples, self.reference, self.world)
        if self.world.rank == 0:
            with open(in_run(self.config, "log.jsonl"), "ab") as log:
                log.truncate(
                    facts["log_bytes"]
                )  # what was logged after the state is computed again
        self.world.say(f"resumed from {path}, step {self.first}")

    def evaluate(self, say: Callable[[str], None]) -> None:
        """Judge the policy, if it is judged, and keep it."""
        step, evaluation = self.policy.step, self.evaluation
        verdict = evaluation.evaluate(self.policy, "select") if evaluation else None
        self.best_rate = save(self.config, self.policy, verdict, self.best_rate, self.world)
        if verdict is not None:
            self.record(step, verdict.logged("eval"))
            say(
                f"step {step}: win-rate over {evaluation.name} {verdict}\n"
                f"    {textwrap.shorten(verdict.stories[0]['text'], 300)}"
            )
        self.evaluated = step
        self.keep()

    def loop(self, groups: Sequence[EncodedGroup]) -> None:
        """Algorithm 1, from the first step to max_iters; SIGTERM keeps the state and ends it."""
        config, world, policy = self.config, self.world, self.policy
        terminated = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: terminated.set())
        bar = tqdm(
            total=config.max_iters,
            initial=self.first,
            desc=config.loss,
            unit="step",
            disable=world.rank > 0,
        )

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
                    say(
                        f"stopped by SIGTERM before step {step}; the same command with --resume goes on"
                    )
                    return
                if (
                    step % config.eval_interval == 0 or step == config.max_iters
                ) and self.evaluated != step:
                    self.evaluate(say)
                if step == config.max_iters:
                    return
                if self.objective.online and step % config.kl_interval == 0:
                    self.online = draw_online(
                        config, policy, self.reference, self.prompts, step, world
                    )
                chosen = groups_of_step(groups, config.batch_size, step, config.seed)
                logged = gradient_step(
                    config,
                    self.objective,
                    policy.model,
                    self.reference,
                    chosen,
                    self.online,
                    self.optimizer,
                    step,
                    world,
                )
                if step % config.log_interval == 0 or step == config.max_iters - 1:
                    self.record(step, logged)
                    say(
                        f"step {step}: "
                        + ", ".join(f"{name} {value:.4g}" for name, value in logged.items())
                    )
                bar.update()


def main(argv: list[str]) -> None:
    config = parse(
        TrainConfig, argv, "spo_train.py", "Align a Llama by Soft Preference Optimization."
    )
    device = machine.pick_device(config.device)
    config = dataclasses.replace(config, dtype=machine.pick_dtype(config.dtype, device))
    world = parallel.start(device, config.dtype)
    world.say(machine.fast_products(world.device))
    train(config, world)
    parallel.end()


if __name__ == "__main__":
    run(main)
