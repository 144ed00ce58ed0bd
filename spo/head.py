"""What is read of the classifier, from hidden states: log-probs and KL, with no (N, T, V) tensor.

Equal to `losses.sequence_logps` and `losses.token_kl` of the logits. Only scored tokens meet the classifier, a block of
them at a time. Of a block its gradient is kept, written over the logits themselves, and only if there is to be a backward
pass: nothing is computed twice, and micro-batches bound how many blocks there are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import sum_scored

BLOCK = {
    "cpu": 2**23,
    "cuda": 2**27,
}  # numbers in a block of logits: on a CPU 32 MiB, about its cache
ROUND = (
    64  # rows come in multiples of this: oneDNN keeps scratch memory for every shape that it meets
)


def sequence_logps(hidden: Tensor, classifier: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """`losses.sequence_logps` of the logits hidden @ classifier.T.

    hidden      (N, T, D) final hidden states, of any dtype;  classifier (V, D)
    tokens, mask  (N, T) ids, and bool: True on scored tokens
    returns     (N,) nats, float32 (float64 for float64)
    """
    scored = mask[:, 1:]
    targets = rounded(tokens[:, 1:][scored].unsqueeze(1))  # (S, 1)

    def negative_logp(logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        logps = torch.log_softmax(logits, -1, out=logits)
        values = -logps.gather(1, targets[rows]).squeeze(1)
        if with_gradient:  # softmax - one-hot
            logits.exp_().scatter_add_(1, targets[rows], logits.new_full((len(values), 1), -1.0))
        return values

    return -per_sequence(hidden, classifier, scored, negative_logp)


def token_kl(
    hidden: Tensor,
    classifier: Tensor,
    reference_hidden: Tensor,
    reference_classifier: Tensor,
    mask: Tensor,
) -> Tensor:
    """`losses.token_kl` of the logits of both models: no gradient flows into the reference.

    hidden, reference_hidden  (N, T, D);  both classifiers (V, D);  mask (N, T) bool
    returns                   (N,) nats, as above
    """
    scored = mask[:, 1:]
    reference_hidden = rounded(reference_hidden[:, :-1][scored].detach())

    def kl(logits: Tensor, rows: slice, with_gradient: bool) -> Tensor:
        logps = torch.log_softmax(logits, -1, out=logits)
        reference = logits_of(reference_hidden[rows], reference_classifier.detach())
        gap = torch.sub(logps, torch.log_softmax(reference, -1, out=reference), out=reference)
        p = logits.exp_()
        values = torch.linalg.vecdot(p, gap)
        if with_gradient:  # p (log p - log ref - KL)
            p.mul_(gap.sub_(values.unsqueeze(1)))
        give_back(reference)
        return values

    return per_sequence(hidden, classifier, scored, kl)


def per_sequence(hidden: Tensor, classifier: Tensor, scored: Tensor, value: Callable) -> Tensor:
    """The sum over each sequence's scored tokens of what `value` makes of their logits, (N,)."""
    rows = hidden[:, :-1][scored]  # (S, D)
    return sum_scored(
        ValuePerToken.apply(rounded(rows), classifier, value, torch.is_grad_enabled())[: len(rows)],
        scored,
    )


def rounded(rows: Tensor) -> Tensor:
    """(S, ...) with zeros below, up to a multiple of ROUND."""
    return F.pad(rows, (0, 0, 0, -len(rows) % ROUND))


class ValuePerToken(torch.autograd.Function):
    """hidden (S, D), classifier (V, D) -> (S,): one value of each token's logits.

    value(logits, rows, with_gradient)  the values (R,) of a block of logits (R, V), which are those of the tokens `rows`;
                                        writes their gradient over the logits
    One backward pass, and none of second order.
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
        values, ctx.gradients = [hidden.new_empty(0, dtype=wide(hidden))], []
        size = block_size(hidden, classifier)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = logits_of(hidden[rows], classifier)
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
        to_hidden, to_classifier = torch.empty_like(hidden), torch.empty_like(classifier)
        done = 0
        for gradient in ctx.gradients:
            rows = slice(done, done + len(gradient))
            narrow = gradient.to(hidden.dtype)
            torch.mm(narrow, classifier, out=to_hidden[rows])
            to_classifier.addmm_(
                narrow.t(), weighed[rows], beta=min(done, 1)
            )  # the first block needs no zeros to be added to
            give_back(gradient)
            done = rows.stop
        ctx.gradients = None
        if not done:
            to_classifier.zero_()
        return to_hidden.mul_(upstream), to_classifier, None, None


# --- blocks of logits ----------------------------------------------------------------------------

# On a CPU the blocks are used again and again: fresh memory costs half as much as the product that fills it.
spare: dict[tuple, list[Tensor]] = {}


def wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def block_size(hidden: Tensor, classifier: Tensor) -> int:
    """Tokens in a block."""
    return max(1, BLOCK.get(hidden.device.type, 2**27) // len(classifier) // ROUND) * ROUND


def logits_of(hidden: Tensor, classifier: Tensor) -> Tensor:
    """(R, D), R of a block at most -> logits (R, V), float32 at least."""
    shape, dtype = (block_size(hidden, classifier), len(classifier)), wide(hidden)
    if hidden.device.type != "cpu":
        return (hidden @ classifier.t()).to(dtype)
    blocks = spare.setdefault((shape, dtype), [])
    logits = (blocks.pop() if blocks else torch.empty(shape, dtype=dtype))[: len(hidden)]
    if hidden.dtype == dtype:
        return torch.mm(hidden, classifier.t(), out=logits)
    return logits.copy_(hidden @ classifier.t())


def give_back(logits: Tensor) -> None:
    """Nobody reads these logits any more."""
    if logits.device.type == "cpu":
        spare[logits._base.shape, logits.dtype].append(logits._base)
