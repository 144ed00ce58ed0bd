"""One optimizer step: groups -> micro-batches -> log-probs -> loss and KL -> gradient, over one process or several.

The mean over the batch is the mean over all micro-batches of all processes, whatever the layout; so are the statistics
that a loss asks for. Which groups, when to sample and what to keep is the loop's, in spo_train.py.
"""

import functools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses import clamped, importance
from model import Transformer
from spo import head
from spo.checkpoint import Checkpoint
from spo.evaluation import ONLINE
from spo.groups import Batch, EncodedGroup, micro_batches
from spo.parallel import World, full, whole
from spo.sampling import sample
from train_config import Objective, TrainConfig, call, reads


def make_optimizer(config: TrainConfig, model: Transformer) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2)
    )


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


def numbers_of_step(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `count` groups are the batch of a step: epochs are permutations by seed + epoch, one after the other."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, count)
        chosen.append(order_of_epoch(count, seed + epoch)[i])
    return chosen


def groups_of_step(
    groups: Sequence[EncodedGroup], batch_size: int, step: int, seed: int
) -> list[EncodedGroup]:
    return [groups[i] for i in numbers_of_step(len(groups), batch_size, step, seed)]


def tensors_of(
    batch: Batch, wanted: set[str], policy: Transformer, reference: Transformer | None
) -> dict[str, Tensor]:
    """The (B, n) tensors that losses and regularizers read of a batch, those of `wanted` at least."""
    tokens, mask = batch.tokens, batch.mask
    tensors = {"lengths": batch.lengths}
    other = read_reference(reference, tokens) if "response_kl" in wanted else None

    def read(hidden: Tensor, classifier: Tensor) -> dict[str, Tensor]:
        values = {"policy_logps": head.sequence_logps(hidden, classifier, tokens, mask)}
        if "response_kl" in wanted:
            values["response_kl"] = head.token_kl(hidden, classifier, *other, mask)
        return values

    tensors |= policy.with_head(tokens, read)
    if "reference_logps" in wanted:
        tensors["reference_logps"] = batch.reference_logps.to(tensors["policy_logps"].dtype)
    return {name: tensor.view(-1, batch.n) for name, tensor in tensors.items()}


@torch.no_grad()
def read_reference(reference: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states (N, T, D) of the reference, its classifier (V, D))."""
    hidden = reference.with_head(tokens, lambda hidden, classifier: hidden)
    return hidden, classifier_of(reference, hidden.dtype)


def classifier_of(model: Transformer, dtype: torch.dtype) -> Tensor:
    """(V, D), gathered if the model is sharded: all processes have to ask."""
    return full(model.output.weight.detach()).to(dtype)


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
            logged |= {
                "logps/rejected": logps[:, 1:].mean(1),
                "margin": gaps.mean(1),
                "accuracy": (gaps > 0).float().mean(1),
            }
        if objective.beta and not objective.online:
            regularizer = call(objective.regularizer, tensors)
            values = values + objective.beta * regularizer
            logged["regularizer"] = regularizer.detach()
            if objective.regularizer is importance:
                logged["clamped"] = clamped(logps, tensors["reference_logps"]) * float(
                    count
                )  # a count, not a mean
        (
            values.sum() * world.size / count
        ).backward()  # several processes: FSDP takes the mean over them
        for name, value in logged.items():
            means[name] = means.get(name, 0) + value.sum() / count
    return {name: world.total(value) for name, value in means.items()}


@dataclass
class OnlineSamples:
    """Samples of the policy, and the reference's hidden states of them: both stay for kl_interval steps.

    samples  those of all processes; batches and hidden states (N, T, D) are of this process's share
    """

    samples: list[EncodedGroup]
    batches: list[Batch]
    reference_hidden: list[Tensor]


def draw_online(
    config: TrainConfig,
    policy: Checkpoint,
    reference: Transformer,
    prompts: list[list[int]],
    step: int,
    world: World = World(),
) -> OnlineSamples:
    """Whole samples of the policy: temperature 1, no truncation, eval mode (Eq. 15 is about the policy itself)."""
    policy.model.eval()
    chosen = random.Random(config.seed + step).choices(prompts, k=config.kl_batch_size)
    with whole(policy.model):
        mine = sample(
            policy,
            chosen,
            (config.seed, ONLINE, step),
            config.max_new_tokens,
            part=world.share(len(chosen)),
        )
    return online_of(
        config, [group for part in world.gather(mine) for group in part], reference, world
    )


def online_of(
    config: TrainConfig, samples: list[EncodedGroup], reference: Transformer, world: World
) -> OnlineSamples:
    mine = samples[world.share(len(samples))]
    batches = micro_batches(mine, config.micro_batch_size, reference.args, world.device, world.most)
    return OnlineSamples(
        samples, batches, [read_reference(reference, batch.tokens)[0] for batch in batches]
    )


def regularizer_backward(
    objective: Objective,
    policy: Transformer,
    reference: Transformer,
    online: OnlineSamples,
    world: World = World(),
) -> dict[str, Tensor]:
    """Adds the gradient of beta * mean(regularizer) on the online samples; returns the mean KL, in nats."""
    count = len(online.samples)
    kl, classifier = 0.0, classifier_of(reference, online.reference_hidden[0].dtype)
    for batch, hidden in zip(online.batches, online.reference_hidden):
        online_kl = policy.with_head(
            batch.tokens,
            lambda *policy_head: head.token_kl(*policy_head, hidden, classifier, batch.mask),
        )
        (objective.beta * objective.regularizer(online_kl).sum() * world.size / count).backward()
        kl += online_kl.detach().sum() / count
    return {"kl": world.total(kl)}


def gradient_step(
    config: TrainConfig,
    objective: Objective,
    policy: Transformer,
    reference: Transformer | None,
    groups: list[EncodedGroup],
    online: OnlineSamples | None,
    optimizer: torch.optim.Optimizer,
    step: int,
    world: World = World(),
) -> dict[str, float]:
    """One optimizer step on the groups of all processes; returns what is logged. ValueError if it would not be finite."""
    started = time.perf_counter()
    policy.train()
    mine = groups[world.rank :: world.size]
    batches = micro_batches(mine, config.micro_batch_size, policy.args, world.device, world.most)
    logged = preference_backward(objective, policy, reference, batches, world)
    if online is not None:
        logged |= regularizer_backward(objective, policy, reference, online, world)
    logged["grad_norm"] = full(
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip or math.inf)
    )
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
    prompts = sum(len(group.prompt) * len(group.responses) for group in groups)
    passed = float(
        world.total(
            torch.tensor(float(sum(batch.tokens.numel() for batch in batches)), device=world.device)
        )
    )
    return logged | {
        "lr": learning_rate(config, step),
        "padding": 1 - (prompts + tokens) / passed,
        "tokens_per_second": tokens / (time.perf_counter() - started),
    }
