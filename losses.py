"""Log-probs in, one loss per group out: every objective, each one short function.

    SPO     Sharifnassab et al. 2024, "Soft Preference Optimization: Aligning Language Models to
            Expert Distributions", arXiv 2405.00747
    DPO     Rafailov et al. 2023, "Direct Preference Optimization"; its Appendix A.3 for rankings
    cDPO    Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO"
    rDPO    Chowdhury et al. 2024, "Provably Robust DPO", arXiv 2403.00409: here dpo_robust
    IPO     Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
            Preferences"
    KTO     Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization"
    CPO     Xu et al. 2024, "Contrastive Preference Optimization"
    R-DPO   Park et al. 2024, "Disentangling Length from Quality in Direct Preference Optimization"
    SimPO   Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward"
    S-DPO   Chen et al. 2024, "On Softmax Direct Preference Optimization for Recommendation"

Every loss takes `policy_logps (B, n)`: for B groups of n responses, best first, the log-prob of the
whole response (a sum over its tokens, terminator included, in nats). It returns (B,) in the dtype
of policy_logps; the loss of a batch is the mean over all groups of all processes. Everything else
that a function reads is in its signature: `reference_logps (B, n)`, `lengths (B, n)` (scored
tokens), its numbers, and the statistics of the GLOBAL batch (`weight_mean`, `kl_estimate`,
`mean_length`), which default to those of this batch. "At step 0" is where the policy still equals
the reference.

Sequence probabilities underflow (exp(-104) is 0 in float32, and a story has -200 nats), so none is
ever formed.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Loss:
    """A loss, and what its signature does not tell. Called, it is the function itself.

    data         "text": any responses; "best": column 0 is the best one; "pair": n = 2; "ranking":
                 a full order
    regularizer  the default of --regularizer
    statistic    (name, function), such as ("weight_mean", weight_statistic): the loss takes as
                 `name` the mean over the global batch of what function gives per group, (B, ...);
                 the function reads tensors and numbers by name, as a loss does
    start        the loss at step 0, from n and the loss's numbers by name; None: it depends on the
                 data
    """

    function: Callable[..., Tensor]
    data: str
    regularizer: str
    statistic: tuple[str, Callable[..., Tensor]] | None
    start: Callable[..., float] | None

    def __post_init__(self):
        functools.update_wrapper(self, self.function)  # its name, its docstring, its signature

    def __call__(self, *tensors, **named) -> Tensor:
        return self.function(*tensors, **named)


LOSSES: dict[str, Loss] = {}
REGULARIZERS: dict[str, Callable[..., Tensor]] = {}


def objective(
    data: str,
    regularizer: str = "none",
    statistic: tuple[str, Callable[..., Tensor]] | None = None,
    start: Callable[..., float] | None = None,
):
    """Enter a function into LOSSES; the arguments are those of Loss."""

    def register(function):
        LOSSES[function.__name__] = Loss(function, data, regularizer, statistic, start)
        return function

    return register


def check(
    policy_logps: Tensor,
    others: dict[str, Tensor] | None = None,
    least: int = 2,
    most: int | None = None,
):
    """ValueError, in words, for a shape that broadcasting would hide."""
    shape = tuple(policy_logps.shape)
    if len(shape) != 2:
        raise ValueError(f"policy_logps has shape {shape}, expected (groups, responses)")
    if shape[1] < least or (most is not None and shape[1] > most):
        expected = f"exactly {least}" if most == least else f"at least {least}"
        raise ValueError(
            f"policy_logps has {shape[1]} responses a group, this loss needs {expected}"
        )
    for name, tensor in (others or {}).items():
        if tensor is None or tuple(tensor.shape) != shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} {found}, policy_logps has shape {shape}")


# --- from logits to log-probs --------------------------------------------------------------------


def check_logits(logits: Tensor, mask: Tensor) -> None:
    if logits.dim() != 3 or mask.shape != logits.shape[:2]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and mask {tuple(mask.shape)}, "
            "expected (N, T, V) and (N, T)"
        )


def log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def sum_scored(values: Tensor, scored: Tensor) -> Tensor:
    """One value per True of scored (N, T), in reading order -> its sum per row, (N,)."""
    return (
        torch.zeros(scored.shape, dtype=values.dtype, device=values.device)
        .masked_scatter(scored, values)
        .sum(1)
    )


def sequence_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-prob of each sequence's scored tokens, summed, in nats.

        sum_t log softmax(logits[:, t - 1])[tokens[:, t]]

    logits   (N, T, V), any dtype: logits[:, t] predicts tokens[:, t + 1]; the last position
             predicts nothing
    tokens   (N, T) ids
    mask     (N, T) bool, True on scored tokens; the first token has no prediction and is never
             scored
    returns  (N,), float32 (float64 for float64 logits)
    """
    check_logits(logits, mask)
    if tokens.shape != mask.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} differ in shape"
        )
    scored = mask[:, 1:].bool()
    logps = log_softmax(logits[:, :-1][scored])  # (scored tokens, V): padding costs nothing
    return sum_scored(logps.gather(1, tokens[:, 1:][scored].unsqueeze(1)).squeeze(1), scored)


def token_kl(policy_logits: Tensor, reference_logits: Tensor, mask: Tensor) -> Tensor:
    """Token-wise KL(policy || reference) along each sequence, SPO Eq. 15, SUMMED over tokens.

        KL = sum_t sum_s p_t(s) [log p_t(s) - log ref_t(s)]

    Each token counts the distribution it was drawn from, so the last step counted predicts the
    terminator.
    The gradient flows through p and log p, never into the reference; the sampled ids stay fixed (no
    score-function term). On fresh samples of the policy the value is unbiased for the sequence KL:
    it is the Rao-Blackwellised estimator of Amini, Vieira and Cotterell 2025, arXiv 2504.10637.

    policy_logits, reference_logits  (N, T, V);  mask (N, T) bool as in sequence_logps
    returns  (N,) nats, float32 (float64 for float64 logits); mean over sequences is the regularizer
    """
    check_logits(policy_logits, mask)
    if policy_logits.shape != reference_logits.shape:
        raise ValueError(
            f"policy logits {tuple(policy_logits.shape)}, reference {tuple(reference_logits.shape)}"
        )
    scored = mask[:, 1:].bool()
    policy = log_softmax(policy_logits[:, :-1][scored])
    reference = log_softmax(reference_logits[:, :-1][scored].detach())
    # An expectation over the vocabulary instead of the one token drawn: the same mean, less noise.
    return sum_scored((policy.exp() * (policy - reference)).sum(-1), scored)  # (N,)


def stage_logsumexp(values: Tensor) -> Tensor:
    """logsumexp over columns k..n for the stages k = 1..n-1: (B, n) -> (B, n-1).

    Not logcumsumexp: its gradient loses digits once the gaps reach thousands of nats.
    """
    return torch.stack([values[:, k:].logsumexp(1) for k in range(values.shape[1] - 1)], dim=1)


# --- Soft Preference Optimization ----------------------------------------------------------------


def weight_statistic(policy_logps: Tensor, gamma: float) -> Tensor:
    """What SPO's weight compares with its batch mean, Eq. 13.

        t_k = (sum of pi over columns k..n)^gamma

    policy_logps  (B, n)
    returns  (B, n-1), detached: column k-1 belongs to stage k. Stage 1 spans the whole group, and
             is all that spo and spo_bon use. Its mean over the global batch, `.mean(0)`, is their
             `weight_mean`.
    """
    # Log-probs are below 0, so the clamp touches nothing real. It saves made-up inputs from inf.
    return torch.exp((gamma * stage_logsumexp(policy_logps.detach())).clamp(max=50))


def weights(policy_logps: Tensor, gamma: float, weight_mean: Tensor | None) -> Tensor:
    """mu_k = 2 sigmoid(t_k - batch mean of t_k), Eq. 13, (B, n-1); no gradient flows through it."""
    statistic = weight_statistic(policy_logps, gamma)
    mean = statistic.mean(0) if weight_mean is None else torch.as_tensor(weight_mean).to(statistic)
    if mean.dim() == 0 and statistic.shape[1] == 1:
        mean = mean.reshape(1)
    if mean.shape != statistic.shape[1:]:
        raise ValueError(
            f"weight_mean has shape {tuple(mean.shape)}, "
            f"expected ({statistic.shape[1]},), one per stage"
        )
    return 2 * torch.sigmoid(statistic - mean)


def soft_choice(policy_logps: Tensor, alpha: float, centered: bool) -> Tensor:
    """Column 0 against all, (B,).

        -(1/alpha) log( p_1^alpha / (p_1^alpha + ... + p_n^alpha) ),   p = exp(policy_logps)

    At alpha = 0 the part that depends on the policy: mean_i logp_i - logp_1. centered: less
    log(n)/alpha, the value at equal log-probs, which says nothing and hides the rest (693 nats at
    alpha = 0.001, n = 2).
    """
    # The loss depends on differences of log-probs only, which stay small where log-probs do not.
    gaps = policy_logps - policy_logps[:, :1]  # (B, n)
    if alpha == 0:
        return gaps.mean(1)
    offset = math.log(gaps.shape[1]) if centered else 0.0
    return (torch.logsumexp(alpha * gaps, dim=1) - offset) / alpha


@objective(data="pair", regularizer="global_kl")
def spo_basic(policy_logps: Tensor, *, alpha: float = 0.001, centered: bool = False) -> Tensor:
    """SPO for pairs without weights, Eq. 9; its limit Eq. 10, -1/2 (logp_0 - logp_1), at alpha = 0.

        L = -(1/alpha) log( p0^alpha / (p0^alpha + p1^alpha) )
          = softplus(-alpha (logp_0 - logp_1)) / alpha

    policy_logps  (B, 2), column 0 chosen
    alpha         softmax exponent, >= 0: the minimiser is softmax(r / alpha), so smaller is harder
    centered      less log(2)/alpha: same gradient, 0 at equal log-probs
    at step 0     depends on the data: the loss reads no reference to be equal to
    """
    check(policy_logps, most=2)
    return soft_choice(policy_logps, alpha, centered)


@objective(data="pair", regularizer="global_kl", statistic=("weight_mean", weight_statistic))
def spo(
    policy_logps: Tensor,
    *,
    alpha: float = 0.001,
    gamma: float = 0.01,
    weight_mean: Tensor | None = None,
    centered: bool = False,
) -> Tensor:
    """Weighted SPO for pairs, Eq. 11 with the weight of Eq. 13; Eq. 12 at alpha = 0.

        L = mu * softplus(-alpha (logp_0 - logp_1)) / alpha
        mu = 2 sigmoid(t - mean t),   t = (p0 + p1)^gamma

    policy_logps  (B, 2), column 0 chosen
    gamma         0: every weight is 1. The weight lies in (0.538, 1.462) and carries no gradient
    weight_mean   mean of weight_statistic over the global batch, a scalar
    at step 0     as spo_basic
    """
    check(policy_logps, most=2)
    return spo_bon(
        policy_logps, alpha=alpha, gamma=gamma, weight_mean=weight_mean, centered=centered
    )


@objective(data="best", regularizer="global_kl", statistic=("weight_mean", weight_statistic))
def spo_bon(
    policy_logps: Tensor,
    *,
    alpha: float = 0.001,
    gamma: float = 0.01,
    weight_mean: Tensor | None = None,
    centered: bool = False,
) -> Tensor:
    """Best-of-n SPO, Eq. 16: the best against all n; columns 1..n-1 are unordered.

        L = -mu/alpha log( p_best^alpha / sum_i p_i^alpha ),   mu with t = (sum_i p_i)^gamma

    The paper asks for some symmetric mu; Eq. 13 over all n columns is our reading.

    policy_logps  (B, n), n >= 2
    weight_mean   mean of weight_statistic over the global batch: of stage 1 (scalar), or its whole
                  (n-1,) vector
    at step 0     as spo_basic
    """
    check(policy_logps)
    if weight_mean is not None:
        weight_mean = torch.as_tensor(weight_mean).reshape(-1)
        if len(weight_mean) == 1:  # stage 1 is the only one used: its mean is all there is to know
            weight_mean = weight_mean.expand(policy_logps.shape[1] - 1)
    mu = weights(policy_logps, gamma, weight_mean)[:, 0]
    return mu * soft_choice(policy_logps, alpha, centered)


@objective(data="ranking", regularizer="global_kl", statistic=("weight_mean", weight_statistic))
def spo_rank(
    policy_logps: Tensor,
    *,
    alpha: float = 0.001,
    gamma: float = 0.01,
    eta: float = 1.0,
    weight_mean: Tensor | None = None,
    centered: bool = False,
) -> Tensor:
    """Ranking SPO, Eq. 17: stage k picks rank k out of ranks k..n.

        L = sum_{k=1}^{n-1} -(eta^k mu_k / alpha) log( p_k^alpha / sum_{j>=k} p_j^alpha )

    policy_logps  (B, n), best first, n >= 2
    eta           stage k weighs eta^k, k from 1 (the paper's D.2): eta < 1 also weakens the loss
                  against the KL
    weight_mean   (n-1,): mean of weight_statistic over the global batch, one per stage
    at step 0     as spo_basic
    """
    check(policy_logps)
    n = policy_logps.shape[1]
    mu = weights(policy_logps, gamma, weight_mean)  # (B, n-1)
    # Stage k is a best-of-(n-k+1): column k-1 against itself and all that are ranked below it.
    stages = [soft_choice(policy_logps[:, k:], alpha, centered) for k in range(n - 1)]
    decay = eta ** torch.arange(1, n, dtype=mu.dtype, device=mu.device)  # (n-1,)
    return (decay * mu * torch.stack(stages, dim=1)).sum(1)


# --- baselines -----------------------------------------------------------------------------------


def mean_length_of_all(lengths: Tensor) -> Tensor:
    return lengths.float().mean(1)


def mean_length_of_best(lengths: Tensor) -> Tensor:
    return lengths[:, 0].float()


@objective(data="text", statistic=("mean_length", mean_length_of_all))
def sft(policy_logps: Tensor, lengths: Tensor, *, mean_length: Tensor | None = None) -> Tensor:
    """Supervised fine-tuning on every response: total NLL / total tokens, as llama2.c's.

    policy_logps, lengths  (B, n), n >= 1
    mean_length            mean of lengths over the global batch; a mean of micro-batch means is
                           another loss
    at step 0              the cross-entropy of the model it starts from; log V for a constant one
    """
    check(policy_logps, {"lengths": lengths}, least=1)
    mean_length = lengths.to(policy_logps).mean() if mean_length is None else mean_length
    return -policy_logps.mean(1) / mean_length


@objective(data="best", statistic=("mean_length", mean_length_of_best))
def best_sft(policy_logps: Tensor, lengths: Tensor, *, mean_length: Tensor | None = None) -> Tensor:
    """Best-response SFT: sft on column 0 alone.

    policy_logps, lengths  (B, n), n >= 1
    mean_length            mean of lengths[:, 0] over the global batch
    at step 0              the cross-entropy of the model it starts from, on the best responses
    """
    check(policy_logps, {"lengths": lengths}, least=1)
    return sft(policy_logps[:, :1], lengths[:, :1], mean_length=mean_length)


def chosen_over_rejected(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]


@objective(data="pair", start=lambda: math.log(2))
def dpo(policy_logps: Tensor, reference_logps: Tensor, *, beta: float = 0.1) -> Tensor:
    """Direct Preference Optimization, DPO Eq. 7.

        L = softplus(-beta h),   h = logratio_0 - logratio_1
        logratio = policy_logps - reference_logps

    policy_logps, reference_logps  (B, 2), column 0 chosen
    beta       strength of the implied KL: smaller lets the policy go further from the reference
    at step 0  log 2
    """
    check(policy_logps, {"reference_logps": reference_logps}, most=2)
    return F.softplus(-beta * chosen_over_rejected(policy_logps - reference_logps))


@objective(data="pair", start=lambda: math.log(2))
def cdpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Conservative DPO: each label is wrong with probability e = label_smoothing.

        L = (1 - e) softplus(-beta h) + e softplus(beta h),   h as in dpo

    Its minimum is where sigmoid(beta h) = 1 - e: the margin is bounded.

    policy_logps, reference_logps  (B, 2), column 0 chosen
    label_smoothing  0 to 1/2, 1/2 excluded
    at step 0        log 2
    """
    as_labelled, flipped = _both_labels(policy_logps, reference_logps, beta, label_smoothing)
    return (1 - label_smoothing) * as_labelled + label_smoothing * flipped


@objective(data="pair", start=lambda: math.log(2))
def dpo_robust(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """Robust DPO: if labels are flipped with probability e, the mean of L is DPO's on true labels.

        L = ((1 - e) softplus(-beta h) - e softplus(beta h)) / (1 - 2 e),   h as in dpo

    policy_logps, reference_logps  (B, 2), column 0 chosen
    label_smoothing  e, 0 to 1/2, 1/2 excluded
    at step 0        log 2
    """
    as_labelled, flipped = _both_labels(policy_logps, reference_logps, beta, label_smoothing)
    difference = (1 - label_smoothing) * as_labelled - label_smoothing * flipped
    return difference / (1 - 2 * label_smoothing)


def _both_labels(
    policy_logps: Tensor, reference_logps: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return dpo's loss of each pair as it is labelled, and with its label flipped."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be 0 or more and below 0.5")
    flipped = policy_logps.flip(1), reference_logps.flip(1)
    return dpo(policy_logps, reference_logps, beta=beta), dpo(*flipped, beta=beta)


@objective(data="pair", start=lambda tau: 1 / (4 * tau**2))
def ipo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor | None = None,
    *,
    tau: float = 0.1,
    norm: str = "sum",
) -> Tensor:
    """Identity Preference Optimization, IPO Eq. 17.

        L = (h - 1/(2 tau))^2,   h = logratio_0 - logratio_1

    policy_logps, reference_logps  (B, 2), column 0 chosen
    tau        the margin to reach is 1/(2 tau): 5 nats at 0.1
    norm       "sum": h of whole responses, as Eq. 17 prints it; "mean": per token, as TRL has it
               (reads lengths)
    at step 0  1/(4 tau^2)
    """
    check(policy_logps, {"reference_logps": reference_logps}, most=2)
    logratios = policy_logps - reference_logps
    if norm == "mean":
        check(policy_logps, {"lengths": lengths})
        logratios = logratios / lengths
    elif norm != "sum":
        raise ValueError(f"norm is {norm!r}, expected 'sum' or 'mean'")
    return (chosen_over_rejected(logratios) - 1 / (2 * tau)) ** 2


def mean_logratio(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """(B,) detached: its mean over the global batch is kto's `kl_estimate`."""
    return (policy_logps - reference_logps).detach().mean(1)


@objective(
    data="pair",
    statistic=("kl_estimate", mean_logratio),
    start=lambda lambda_d, lambda_u, n: (
        (lambda_d + lambda_u) / 4 if n == 2 or lambda_d == lambda_u else None
    ),
)
def kto(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float = 0.1,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
    kl_estimate: Tensor | None = None,
    desirable: Tensor | None = None,
) -> Tensor:
    """Kahneman-Tversky Optimization (KTO): each response is desirable or not, by itself.

        L = 1/2 [ lambda_d (1 - sigmoid(beta (r_0 - z0)))
                + lambda_u (1 - sigmoid(beta (z0 - r_1))) ],   r = logratio

    policy_logps, reference_logps  (B, 2), column 0 chosen; a pair's value is the mean of its two
                                   examples. Or (B, 1), unpaired
    desirable    (B, 1) bool, of unpaired data: is the response desirable?
    kl_estimate  mean of mean_logratio over the global batch; z0 = max(0, kl_estimate), without
                 gradient. KTO estimates z0 on mismatched prompts and responses; without prompts
                 (TinyStories) every response matches, so that the batch's own responses serve, here
                 always
    at step 0    (lambda_d + lambda_u) / 4; unpaired, half of the lambda of each
    """
    if desirable is None:
        check(policy_logps, {"reference_logps": reference_logps}, most=2)
        desirable = torch.tensor([[True, False]], device=policy_logps.device)
    else:
        others = {"reference_logps": reference_logps, "desirable": desirable}
        check(policy_logps, others, least=1, most=1)
    logratios = policy_logps - reference_logps
    estimate = (
        logratios.mean() if kl_estimate is None else torch.as_tensor(kl_estimate).to(logratios)
    )
    if estimate.numel() != 1:
        raise ValueError(
            f"kl_estimate has shape {tuple(estimate.shape)}, "
            "expected one number for the global batch"
        )
    z0 = estimate.detach().clamp(min=0)
    gains = torch.where(desirable, logratios - z0, z0 - logratios)
    values = torch.sigmoid(-beta * gains)  # 1 - sigmoid(x) = sigmoid(-x)
    return torch.where(desirable, lambda_d * values, lambda_u * values).mean(1)


@objective(data="pair", statistic=("mean_length", mean_length_of_best))
def cpo(
    policy_logps: Tensor,
    lengths: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    nll: str = "sum",
    mean_length: Tensor | None = None,
) -> Tensor:
    """Contrastive Preference Optimization (CPO), its likelihood weighted by the SPO paper's alpha.

        L = softplus(-beta d) - alpha logp_0,   d = logp_0 - logp_1

    policy_logps  (B, 2), column 0 chosen; no reference
    nll           "sum": -logp_0 in nats, as CPO prints it; "mean": total NLL / total tokens of the
                  chosen, as TRL has it (reads lengths, and mean_length: the mean of lengths[:, 0]
                  over the global batch)
    at step 0     depends on the data
    """
    check(policy_logps, most=2)
    scale = 1.0
    if nll == "mean":
        check(policy_logps, {"lengths": lengths})
        scale = lengths[:, 0].to(policy_logps).mean() if mean_length is None else mean_length
    elif nll != "sum":
        raise ValueError(f"nll is {nll!r}, expected 'sum' or 'mean'")
    return (
        F.softplus(-beta * chosen_over_rejected(policy_logps)) - alpha * policy_logps[:, 0] / scale
    )


@objective(data="pair")
def rdpo(
    policy_logps: Tensor,
    reference_logps: Tensor,
    lengths: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> Tensor:
    """Length-regularised DPO (R-DPO).

        L = softplus(-[beta h + alpha (length_0 - length_1)]),   h as in dpo

    The reward is r - alpha * length, which puts the PLUS before alpha: a longer chosen response
    already explains part of the preference, so that less of it is left for the policy to learn.

    policy_logps, reference_logps, lengths  (B, 2), column 0 chosen
    at step 0  the mean of softplus(-alpha (length_0 - length_1)): log 2 for equal lengths
    """
    check(policy_logps, {"reference_logps": reference_logps, "lengths": lengths}, most=2)
    margin = beta * chosen_over_rejected(policy_logps - reference_logps)
    return F.softplus(-(margin + alpha * chosen_over_rejected(lengths.to(policy_logps))))


@objective(data="pair")
def simpo(
    policy_logps: Tensor, lengths: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    """SimPO, SimPO Eq. 6: the reward is the log-prob per token, with a target margin.

        L = softplus(-[beta logp_0/length_0 - beta logp_1/length_1 - gamma])

    policy_logps, lengths  (B, 2), column 0 chosen; no reference
    gamma      the margin, in units of the reward (not divided by beta)
    at step 0  depends on the data, near softplus(gamma)
    """
    check(policy_logps, {"lengths": lengths}, most=2)
    return F.softplus(gamma - beta * chosen_over_rejected(policy_logps / lengths))


@objective(data="ranking", start=lambda n: math.lgamma(n + 1))
def dpo_rank(policy_logps: Tensor, reference_logps: Tensor, *, beta: float = 0.01) -> Tensor:
    """DPO for rankings (Plackett-Luce), DPO Appendix A.3.

        L = sum_{k=1}^{n-1} log sum_{j>=k} exp(s_j - s_k),   s = beta * logratio

    policy_logps, reference_logps  (B, n), best first, n >= 2
    at step 0  log n!
    """
    check(policy_logps, {"reference_logps": reference_logps})
    rewards = beta * (policy_logps - reference_logps)
    return (stage_logsumexp(rewards) - rewards[:, :-1]).sum(1)


@objective(data="best", start=lambda n: math.log(n))
def sdpo_bon(policy_logps: Tensor, reference_logps: Tensor, *, beta: float = 0.01) -> Tensor:
    """S-DPO on best-of-n data: one winner against all others at once.

        L = softplus( log sum_{i>1} exp(s_i - s_1) ) = log sum_i exp(s_i) - s_1
        s = beta * logratio

    policy_logps, reference_logps  (B, n), column 0 the best, the rest unordered, n >= 2
    at step 0  log n
    """
    check(policy_logps, {"reference_logps": reference_logps})
    rewards = beta * (policy_logps - reference_logps)
    return rewards.logsumexp(1) - rewards[:, 0]


@objective(data="ranking", start=lambda n: math.lgamma(n + 1) / (n - 1))
def sdpo_rank(policy_logps: Tensor, reference_logps: Tensor, *, beta: float = 0.01) -> Tensor:
    """S-DPO on rankings, SPO Appendix D.2: ranks 1..n-1 each win against all lower ranks.

    Their mean, which is dpo_rank / (n - 1) exactly: the two differ by a constant that AdamW
    cancels.

    policy_logps, reference_logps  (B, n), best first, n >= 2
    at step 0  log(n!) / (n - 1)
    """
    return dpo_rank(policy_logps, reference_logps, beta=beta) / (policy_logps.shape[1] - 1)


# --- regularizers (SPO Table 4): what `beta` multiplies, for a loss that takes no beta
# ------------------------

IMPORTANCE_LIMIT = 20.0  # nats; one response of ratio exp(20) already outweighs a batch by 10^8


def regularizer(function):
    """Enter a regularizer; like a loss, its signature says which tensors it reads."""
    REGULARIZERS[function.__name__] = function
    return function


@regularizer
def global_kl(online_kl: Tensor) -> Tensor:
    """SPO's own, Eq. 15: token_kl on samples that the policy itself drew.

    online_kl (M,): token_kl of M whole samples, temperature 1, no truncation -> (M,); 0 at step 0
    """
    return online_kl


@regularizer
def logp(policy_logps: Tensor) -> Tensor:
    """Likelihood of the best response, -logp_1 in nats: with spo_basic it makes CPO.

    (B, n) -> (B,)
    """
    return -policy_logps[:, 0]


@regularizer
def tokenwise(response_kl: Tensor) -> Tensor:
    """token_kl on the dataset's responses: (B, n) -> (B,), their mean; 0 at step 0."""
    return response_kl.mean(1)


@regularizer
def importance(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """The sequence KL by importance sampling from the dataset: the mean of rho log rho.

    rho = exp(logratio), over all responses.
    Differentiated through rho. Its minimum is -1/e, at rho = 1/e; at step 0 it is 0 and pushes
    every response DOWN.
    Beyond a logratio of IMPORTANCE_LIMIT it continues along its tangent: finite, and still pushing
    back.

    policy_logps, reference_logps  (B, n)  ->  (B,)
    """
    check(policy_logps, {"reference_logps": reference_logps}, least=1)
    logratios = policy_logps - reference_logps
    limited = logratios.clamp(max=IMPORTANCE_LIMIT)
    slope = math.exp(IMPORTANCE_LIMIT) * (1 + IMPORTANCE_LIMIT)
    return (limited.exp() * limited + slope * (logratios - limited)).mean(1)


def clamped(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """How many responses of each group `importance` had to limit: (B, n) -> (B,)."""
    return (policy_logps - reference_logps > IMPORTANCE_LIMIT).sum(1)


@regularizer
def none() -> Tensor:
    """No regularizer. -> (1,), zero"""
    return torch.zeros(1)


# --- what is trained: a loss and its regularizer -------------------------------------------------

DEFAULT_WEIGHT = 0.1  # of a regularizer


def reads(*functions: Callable) -> set[str]:
    """Return the argument names of losses and regularizers: the tensors and numbers they want."""
    return {name for function in functions for name in inspect.signature(function).parameters}


def settings_of(loss: Callable) -> dict[str, float | str]:
    """Return what a loss is tuned with (numbers, and words such as norm) and the defaults.

    settings_of(ipo) -> {"tau": 0.1, "norm": "sum"}
    """
    parameters = inspect.signature(loss).parameters.values()
    tuned = (p for p in parameters if isinstance(p.default, int | float | str))
    return {p.name: p.default for p in tuned if not isinstance(p.default, bool)}


def call(function: Callable, values: dict):
    """Call function with those of the values that it reads; the rest keeps its defaults."""
    return function(**{name: values[name] for name in reads(function) if name in values})


class Objective:
    """mean(preference loss) + beta * mean(regularizer), and what the loss is tuned with."""

    def __init__(self, loss: str, regularizer: str = "", **given):
        """
        loss         a name in LOSSES
        regularizer  a name in REGULARIZERS; "": the loss's own default
        given        what the loss is tuned with, by name, and beta; None: the default
        ValueError, naming the flag, for a setting that the loss does not take.
        """
        self.loss = LOSSES[loss]
        regularizer = regularizer or self.loss.regularizer
        self.regularizer = REGULARIZERS[regularizer]
        defaults = settings_of(self.loss)
        if "beta" in defaults and regularizer != "none":
            own = f"the beta of {loss} is its own; leave the regularizer out"
            raise ValueError(f"--regularizer={regularizer}: {own}")
        takes = set(defaults) | ({"beta"} if regularizer != "none" else set())
        given = {name: value for name, value in given.items() if value is not None}
        for name in sorted(given):
            if name not in takes:
                listed = ", ".join(f"--{name}" for name in sorted(takes)) or "no settings"
                does_not = f"{loss} with regularizer {regularizer} does not take it"
                raise ValueError(f"--{name}: {does_not}; it takes {listed}")
        self.beta = 0.0  # of the regularizer
        if regularizer != "none" and "beta" not in defaults:
            self.beta = given.pop("beta", DEFAULT_WEIGHT)
        self.settings = defaults | given
        if "centered" in reads(self.loss):
            self.settings["centered"] = True  # the same gradient; the value is 0 at equal log-probs

        self.reads = reads(self.loss, self.regularizer)
        # Does the regularizer read samples of the policy (and not the dataset)?
        self.online = "online_kl" in self.reads
        # Is the KL to the reference read on the dataset's own responses?
        self.needs_response_kl = "response_kl" in self.reads
        # Is a reference read at every step (and not once, of the dataset)?
        self.needs_reference = self.online or self.needs_response_kl
        # What the loss compares its groups with is a mean over the global batch. At gamma = 0 every
        # weight is 1.
        self.statistic = None if self.settings.get("gamma") == 0 else self.loss.statistic

    def preference_loss(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the loss of each group, (B,), from the tensors and batch statistics by name."""
        return call(self.loss, tensors | self.settings)

    def dataset_regularizer(self, tensors: dict[str, Tensor]) -> Tensor | None:
        """Return the regularizer of each group, (B,); None if it is not on the dataset."""
        if self.online or not self.beta:
            return None
        return call(self.regularizer, tensors)

    def regularizer_metrics(
        self, tensors: dict[str, Tensor], regularizer: Tensor, count: int
    ) -> dict[str, Tensor]:
        """Return what is logged of a regularizer on the dataset; its mean over all groups is shown.

        `clamped` is how many responses `importance` had to limit: a sum, not a mean.
        """
        metrics = {"regularizer": regularizer}
        if self.regularizer is importance:
            metrics["clamped"] = call(clamped, tensors) * float(count)
        return metrics

    def statistic_of(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return what each group adds to the mean that the loss asks for, (B, ...)."""
        return call(self.statistic[1], tensors | self.settings)

    def start(self, n: int) -> float | None:
        """Return the preference loss at step 0 for groups of n; None where the data decides."""
        return call(self.loss.start, self.settings | {"n": n}) if self.loss.start else None

    def __str__(self) -> str:
        shown = {name: value for name, value in self.settings.items() if name != "centered"}
        settings = ", ".join(f"{name} {value}" for name, value in shown.items())
        weighed = f" + {self.beta:g} * {self.regularizer.__name__}" if self.beta else ""
        return f"{self.loss.__name__}({settings}){weighed}"


def preference_metrics(
    policy_logps: Tensor, reference_logps: Tensor | None = None, desirable: Tensor | None = None
) -> dict[str, Tensor]:
    """Return what is logged of each group, (B,) each.

    margin and accuracy compare column 0 with the others: by log-ratio where a reference is read,
    else by log-prob. Of unpaired data the margin is a desirable response's log-ratio, and the
    negative one of another.
    """
    if desirable is not None:
        logratios = policy_logps - reference_logps
        margin = torch.where(desirable, logratios, -logratios)[:, 0]
        return {"logps": policy_logps[:, 0], "margin": margin, "accuracy": (margin > 0).float()}
    metrics = {"logps/chosen": policy_logps[:, 0]}
    if policy_logps.shape[1] > 1:
        compared = policy_logps if reference_logps is None else policy_logps - reference_logps
        gaps = compared[:, :1] - compared[:, 1:]
        metrics["logps/rejected"] = policy_logps[:, 1:].mean(1)
        metrics["margin"] = gaps.mean(1)
        metrics["accuracy"] = (gaps > 0).float().mean(1)
    return metrics
