"""Log-probs and KL of a model straight from its hidden states, without ever holding all logits.

`sequence_logps` and `token_kl` equal the functions of the same names in losses.py, applied to
`model(tokens)`. The vocabulary projection runs on blocks of scored tokens; each block's gradient
overwrites its logits and is kept for the backward pass, so nothing is computed twice, and the size
of a micro-batch bounds how many blocks there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import sum_scored
from model import Transformer
from spo import parallel
from spo.groups import Batch

# Numbers in a block of logits. On a CPU they are 32 MiB, about the size of its cache.
NUMBERS_PER_BLOCK = {"cpu": 2**23, "cuda": 2**27}
ROWS_ROUNDED_TO = 64  # oneDNN keeps scratch memory for every shape that it meets


@dataclass
class ReferenceStates:
    """What the KL needs of the reference for one batch.

    hidden      (N, T, D) its final hidden states
    classifier  (V, D), gathered if the reference is sharded
    """

    hidden: Tensor
    classifier: Tensor


# --- of a model and a batch ----------------------------------------------------------------------


def sequence_logps(policy: Transformer, batch: Batch) -> Tensor:
    """Equal `losses.sequence_logps(policy(batch.tokens), batch.tokens, batch.mask)`, as (B, n).

    In nats, float32 (float64 for a float64 model).
    """

    def compute(policy: Transformer) -> Tensor:
        hidden = policy.hidden(batch.tokens)
        return logps_from_hidden(hidden, policy.output.weight, batch.tokens, batch.mask)

    return parallel.with_weights(policy, compute).view(-1, batch.n)


def token_kl(
    policy: Transformer, batch: Batch, reference: ReferenceStates
) -> tuple[Tensor, Tensor]:
    """Equal `losses.token_kl(policy(tokens), reference(tokens), mask)`; and the policy's entropy.

    Both are (B, n), summed over the scored tokens, in nats. The entropy carries no gradient.
    """

    def compute(policy: Transformer) -> tuple[Tensor, Tensor]:
        hidden = policy.hidden(batch.tokens)
        return kl_from_hidden(hidden, policy.output.weight, reference, batch.mask)

    kl, entropy = parallel.with_weights(policy, compute)
    return kl.view(-1, batch.n), entropy.view(-1, batch.n)


def logps_and_kl(
    policy: Transformer, batch: Batch, reference: ReferenceStates
) -> tuple[Tensor, Tensor]:
    """Return `sequence_logps` and `token_kl`'s KL, (B, n) each, from one pass of the policy."""

    def compute(policy: Transformer) -> tuple[Tensor, Tensor]:
        hidden = policy.hidden(batch.tokens)
        classifier = policy.output.weight
        logps = logps_from_hidden(hidden, classifier, batch.tokens, batch.mask)
        kl, _ = kl_from_hidden(hidden, classifier, reference, batch.mask)
        return logps, kl

    logps, kl = parallel.with_weights(policy, compute)
    return logps.view(-1, batch.n), kl.view(-1, batch.n)


@torch.no_grad()
def hidden_states(reference: Transformer, batch: Batch) -> Tensor:
    """Return the reference's final hidden states (N, T, D)."""
    return parallel.with_weights(reference, lambda model: model.hidden(batch.tokens))


def full_classifier(reference: Transformer, dtype: torch.dtype) -> Tensor:
    """Return the classifier (V, D), gathered if the model is sharded. Collective."""
    return parallel.full_tensor(reference.output.weight.detach()).to(dtype)


@torch.no_grad()
def reference_states(reference: Transformer, batch: Batch) -> ReferenceStates:
    hidden = hidden_states(reference, batch)
    return ReferenceStates(hidden, full_classifier(reference, hidden.dtype))


def logps_of_states(reference: ReferenceStates, batch: Batch) -> Tensor:
    """Return the `sequence_logps` of the model whose states these are, (B, n)."""
    hidden, classifier = reference.hidden, reference.classifier
    return logps_from_hidden(hidden, classifier, batch.tokens, batch.mask).view(-1, batch.n)


# --- from hidden states --------------------------------------------------------------------------


def logps_from_hidden(hidden: Tensor, classifier: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Equal `losses.sequence_logps(hidden @ classifier.T, tokens, mask)`.

    hidden        (N, T, D) final hidden states, of any dtype;  classifier (V, D)
    tokens, mask  (N, T) ids, and bool: True on scored tokens
    returns       (N,) nats, float32 (float64 for float64)
    """
    scored = mask[:, 1:]
    targets = rounded_up(tokens[:, 1:][scored].unsqueeze(1))  # (S, 1)

    def negative_logp(logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        logps = torch.log_softmax(logits, -1, out=logits)
        values = -logps.gather(1, targets[rows]).squeeze(1)
        if with_gradient:  # softmax - one-hot
            minus_one = logits.new_full((len(values), 1), -1.0)
            logits.exp_().scatter_add_(1, targets[rows], minus_one)
        return values

    return -per_sequence(hidden, classifier, scored, negative_logp)


def kl_from_hidden(
    hidden: Tensor, classifier: Tensor, reference: ReferenceStates, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Equal `losses.token_kl` of the logits of both models; return it and the policy's entropy.

    hidden   (N, T, D);  classifier (V, D);  mask (N, T) bool
    returns  (N,) and (N,) nats, as above; no gradient flows into the reference, nor through the
             entropy
    """
    scored = mask[:, 1:]
    reference_rows = rounded_up(reference.hidden[:, :-1][scored].detach())  # (S, D)
    reference_classifier = widened(reference.classifier.detach())
    entropies: list[Tensor] = []

    def kl(logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        logps = torch.log_softmax(logits, -1, out=logits)
        reference_logits = logits_of(reference_rows[rows], reference_classifier)
        reference_logps = torch.log_softmax(reference_logits, -1, out=reference_logits)
        gap = torch.sub(logps, reference_logps, out=reference_logits)
        p = torch.exp(logps, out=block_like(logits))
        values = torch.linalg.vecdot(p, gap)
        entropies.append(-torch.linalg.vecdot(p, logps))
        if with_gradient:  # p (log p - log ref - KL)
            torch.mul(p, gap.sub_(values.unsqueeze(1)), out=logits)
        give_back(p)
        give_back(reference_logits)
        return values

    values = per_sequence(hidden, classifier, scored, kl)
    entropy = torch.cat(entropies)[: int(scored.sum())] if entropies else values.new_empty(0)
    return values, sum_scored(entropy, scored)


def per_sequence(hidden: Tensor, classifier: Tensor, scored: Tensor, value: Callable) -> Tensor:
    """Sum over each sequence's scored tokens what `value` makes of their logits: (N,)."""
    rows = hidden[:, :-1][scored]  # (S, D)
    recording = torch.is_grad_enabled()
    values = ValuePerToken.apply(rounded_up(rows), classifier, value, recording)
    return sum_scored(values[: len(rows)], scored)


def rounded_up(rows: Tensor) -> Tensor:
    """Add rows of zeros to (S, ...), up to a multiple of ROWS_ROUNDED_TO."""
    return F.pad(rows, (0, 0, 0, -len(rows) % ROWS_ROUNDED_TO))


class ValuePerToken(torch.autograd.Function):
    """hidden (S, D), classifier (V, D) -> (S,): one value of each token's logits.

    value(logits, rows, with_gradient)  returns the values (R,) of a block of logits (R, V), which
    are those of the
                                        tokens `rows`; writes their gradient over the logits
    There is one backward pass, and none of second order.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        classifier: Tensor,
        value: Callable[[Tensor, slice, bool], Tensor],
        recording: bool,
    ):
        with_gradient = recording and any(ctx.needs_input_grad)
        values = [hidden.new_empty(0, dtype=wide(hidden))]
        ctx.gradients = []
        size = rows_per_block(hidden, classifier)
        factor = widened(classifier)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = logits_of(hidden[rows], factor)
            values.append(value(logits, rows, with_gradient))
            if with_gradient:
                ctx.gradients.append(logits)
            else:
                give_back(logits)
        ctx.save_for_backward(hidden, classifier)
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass: its logits have been given back")
        hidden, classifier = ctx.saved_tensors
        upstream = upstream.to(hidden.dtype).unsqueeze(1)
        weighed = hidden * upstream
        to_hidden = torch.empty_like(hidden)
        to_classifier = torch.empty_like(classifier)
        done = 0
        for gradient in ctx.gradients:
            rows = slice(done, done + len(gradient))
            narrow = gradient.to(hidden.dtype)
            torch.mm(narrow, classifier, out=to_hidden[rows])
            # beta=0 for the first block: it is written, and needs no zeros to be added to.
            to_classifier.addmm_(narrow.t(), weighed[rows], beta=min(done, 1))
            give_back(gradient)
            done = rows.stop
        ctx.gradients = None
        if not done:
            to_classifier.zero_()
        return to_hidden.mul_(upstream), to_classifier, None, None


# --- blocks of logits ----------------------------------------------------------------------------

# On a CPU the blocks are used again and again: fresh memory costs half as much as the product that
# fills it.
spare: dict[tuple, list[Tensor]] = {}


def wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def rows_per_block(hidden: Tensor, classifier: Tensor) -> int:
    numbers = NUMBERS_PER_BLOCK.get(hidden.device.type, 2**27)
    return max(1, numbers // len(classifier) // ROWS_ROUNDED_TO) * ROWS_ROUNDED_TO


def widened(classifier: Tensor) -> Tensor:
    """Return the classifier as logits_of multiplies with it: on a GPU as it is, else float32."""
    return classifier if classifier.is_cuda else classifier.to(wide(classifier))


def logits_of(hidden: Tensor, classifier: Tensor) -> Tensor:
    """hidden (R, D), a block at most; a `widened` classifier (V, D) -> logits (R, V).

    They are never rounded to bfloat16. A logit of 20 would be off by up to 0.06, and the KL of two
    models that differ by less would be noise.
    """
    dtype = wide(hidden)
    if hidden.is_cuda:  # factors of bfloat16 are multiplied exactly, and the sums are float32
        more = {} if hidden.dtype == dtype else {"out_dtype": dtype}
        return torch.mm(hidden, classifier.t(), **more)
    if hidden.device.type != "cpu":
        return hidden.to(dtype) @ classifier.t()
    shape = (rows_per_block(hidden, classifier), len(classifier))
    logits = take_block(shape, dtype)[: len(hidden)]
    return torch.mm(hidden.to(dtype), classifier.t(), out=logits)


def block_like(logits: Tensor) -> Tensor:
    """Return another block of this shape, with any content."""
    if logits.device.type != "cpu":
        return torch.empty_like(logits)
    return take_block(logits._base.shape, logits.dtype)[: len(logits)]


def take_block(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    blocks = spare.setdefault((tuple(shape), dtype), [])
    return blocks.pop() if blocks else torch.empty(shape, dtype=dtype)


def give_back(logits: Tensor) -> None:
    """Let the next block of logits have this one's memory."""
    if logits.device.type == "cpu":
        spare[tuple(logits._base.shape), logits.dtype].append(logits._base)
