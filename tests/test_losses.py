"""Each loss against values worked by hand and a slow reference in plain Python; the traps of the
paper.
"""

import functools
import inspect
import itertools
import math
import os
import re

import pytest
import torch
from helpers import ROOT

from losses import (
    LOSSES,
    REGULARIZERS,
    Objective,
    clamped,
    sequence_logps,
    token_kl,
    weight_statistic,
)

DOUBLE = torch.float64


# --- a slow reference: plain Python floats, one group at a time, no code shared with losses.py
# ---------------------------


def lse(xs):
    return max(xs) + math.log(sum(math.exp(x - max(xs)) for x in xs))


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_spo_stages(rows, stages, alpha, gamma, eta):
    """Eq. 17 with the weight of Eq. 13, its first `stages` stages."""
    statistic = [[math.exp(gamma * lse(row[k:])) for k in range(stages)] for row in rows]
    means = [sum(s[k] for s in statistic) / len(rows) for k in range(stages)]
    values = []
    for row, s in zip(rows, statistic, strict=True):
        total = 0.0
        for k in range(stages):
            if alpha == 0:
                term = sum(row[k:]) / len(row[k:]) - row[k]
            else:
                term = (
                    -math.log(math.exp(alpha * row[k] - lse([alpha * x for x in row[k:]]))) / alpha
                )
            total += eta ** (k + 1) * 2 * sigmoid(s[k] - means[k]) * term
        values.append(total)
    return values


def slow_pairs(rows, references, lengths, function):
    """function(l_w, l_l, r_w, r_l, len_w, len_l) of each pair."""
    return [
        function(*l, l[0] - q[0], l[1] - q[1], *n)
        for l, q, n in zip(rows, references, lengths, strict=True)
    ]


def slow_kto(rows, references, beta, lambda_d, lambda_u):
    ratios = [(l[0] - q[0], l[1] - q[1]) for l, q in zip(rows, references, strict=True)]
    z0 = max(0.0, sum(a + b for a, b in ratios) / (2 * len(ratios)))
    return [
        (lambda_d * (1 - sigmoid(beta * (a - z0))) + lambda_u * (1 - sigmoid(beta * (z0 - b)))) / 2
        for a, b in ratios
    ]


def slow_plackett_luce(rows, references, beta):
    """-log of the product over places of the softmax of the chosen one among those left; and its
    first factor.
    """
    whole, first = [], []
    for l, q in zip(rows, references, strict=True):
        s = [beta * (a - b) for a, b in zip(l, q, strict=True)]
        factors = [math.exp(s[k] - lse(s[k:])) for k in range(len(s) - 1)]
        whole.append(-sum(map(math.log, factors)))
        first.append(-math.log(factors[0]))
    return whole, first


SLOW = {  # name -> (n, settings, slow reference)
    "sft": (4, {}, lambda l, q, n: [-sum(a) / 4 / (sum(map(sum, n)) / (4 * len(n))) for a in l]),
    "best_sft": (4, {}, lambda l, q, n: [-a[0] / (sum(b[0] for b in n) / len(n)) for a in l]),
    "spo_basic": (2, {"alpha": 0.02}, lambda l, q, n: slow_spo_stages(l, 1, 0.02, 0.0, 1.0)),
    "spo": (
        2,
        {"alpha": 0.02, "gamma": 0.01},
        lambda l, q, n: slow_spo_stages(l, 1, 0.02, 0.01, 1.0),
    ),
    "spo_bon": (
        4,
        {"alpha": 0.02, "gamma": 0.01},
        lambda l, q, n: slow_spo_stages(l, 1, 0.02, 0.01, 1.0),
    ),
    "spo_rank": (
        4,
        {"alpha": 0.02, "gamma": 0.01, "eta": 0.5},
        lambda l, q, n: slow_spo_stages(l, 3, 0.02, 0.01, 0.5),
    ),
    "dpo": (
        2,
        {"beta": 0.05},
        lambda l, q, n: slow_pairs(l, q, n, lambda w, x, rw, rl, a, b: softplus(-0.05 * (rw - rl))),
    ),
    "cdpo": (
        2,
        {"beta": 0.05, "label_smoothing": 0.2},
        lambda l, q, n: slow_pairs(
            l,
            q,
            n,
            lambda w, x, rw, rl, a, b: (
                0.8 * softplus(-0.05 * (rw - rl)) + 0.2 * softplus(0.05 * (rw - rl))
            ),
        ),
    ),
    "dpo_robust": (
        2,
        {"beta": 0.05, "label_smoothing": 0.2},
        lambda l, q, n: slow_pairs(
            l,
            q,
            n,
            lambda w, x, rw, rl, a, b: (
                (0.8 * softplus(-0.05 * (rw - rl)) - 0.2 * softplus(0.05 * (rw - rl))) / 0.6
            ),
        ),
    ),
    "ipo": (
        2,
        {"tau": 0.02},
        lambda l, q, n: slow_pairs(l, q, n, lambda w, x, rw, rl, a, b: (rw - rl - 25.0) ** 2),
    ),
    "kto": (
        2,
        {"beta": 0.03, "lambda_d": 1.3, "lambda_u": 0.7},
        lambda l, q, n: slow_kto(l, q, 0.03, 1.3, 0.7),
    ),
    "cpo": (
        2,
        {"beta": 0.02, "alpha": 0.003},
        lambda l, q, n: slow_pairs(
            l, q, n, lambda w, x, rw, rl, a, b: softplus(-0.02 * (w - x)) - 0.003 * w
        ),
    ),
    "rdpo": (
        2,
        {"beta": 0.02, "alpha": 0.01},
        lambda l, q, n: slow_pairs(
            l, q, n, lambda w, x, rw, rl, a, b: softplus(-0.02 * (rw - rl) - 0.01 * (a - b))
        ),
    ),
    "simpo": (
        2,
        {"beta": 2.5, "gamma": 1.5},
        lambda l, q, n: slow_pairs(
            l, q, n, lambda w, x, rw, rl, a, b: softplus(1.5 - 2.5 * (w / a - x / b))
        ),
    ),
    "dpo_rank": (4, {"beta": 0.02}, lambda l, q, n: slow_plackett_luce(l, q, 0.02)[0]),
    "sdpo_bon": (4, {"beta": 0.02}, lambda l, q, n: slow_plackett_luce(l, q, 0.02)[1]),
    "sdpo_rank": (
        4,
        {"beta": 0.02},
        lambda l, q, n: [x / 3 for x in slow_plackett_luce(l, q, 0.02)[0]],
    ),
}


def story_logps(groups: int, n: int, seed: int = 0) -> torch.Tensor:
    """Log-probs 50 nats and more apart: nearer ones would hide a missing weight."""
    return (
        torch.randn(groups, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) * 60
        - 220
    )


def call(name, logps, reference=None, lengths=None, **settings):
    """LOSSES[name] with those of the tensors that it reads."""
    tensors = {"policy_logps": logps, "reference_logps": reference, "lengths": lengths}
    read = inspect.signature(LOSSES[name]).parameters
    return LOSSES[name](
        **{k: v for k, v in tensors.items() if k in read and v is not None}, **settings
    )


def some_lengths(groups: int, n: int) -> torch.Tensor:
    return torch.randint(40, 250, (groups, n), generator=torch.Generator().manual_seed(2))


def test_every_loss_has_a_slow_reference():
    assert (
        set(SLOW)
        == set(LOSSES)
        == set(
            """sft best_sft spo_basic spo spo_bon spo_rank dpo cdpo dpo_robust ipo kto cpo rdpo
        simpo dpo_rank sdpo_bon sdpo_rank""".split()
        )
    )
    assert set(REGULARIZERS) == {"global_kl", "logp", "tokenwise", "importance", "none"}


@pytest.mark.parametrize("name", list(SLOW))
def test_values_equal_the_slow_reference(name):
    n, settings, slow = SLOW[name]
    logps, reference, lengths = story_logps(6, n), story_logps(6, n, seed=1), some_lengths(6, n)
    value = call(name, logps, reference, lengths, **settings)
    expected = torch.tensor(
        slow(logps.tolist(), reference.tolist(), lengths.tolist()), dtype=DOUBLE
    )
    assert value.dtype == DOUBLE and value.shape == (6,)
    assert torch.allclose(value, expected, rtol=1e-10, atol=1e-12)
    low = call(name, logps.float(), reference.float(), lengths, **settings)
    assert low.dtype == torch.float32 and torch.allclose(
        low.double(), expected, rtol=2e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", list(SLOW))
def test_gradients_equal_finite_differences(name):
    """Central differences in float64, with the statistics of the batch (mu, z0) held fixed: they
    carry no gradient.
    """
    n, settings, _ = SLOW[name]
    scale = 1.0 if name == "kto" else 20.0  # small gaps, where every term of the gradient counts
    logps, reference, lengths = (
        story_logps(4, n) / scale,
        story_logps(4, n, seed=1) / scale,
        some_lengths(4, n),
    )
    if "gamma" in settings and name != "simpo":
        settings = settings | {"gamma": 0.0}  # with mu: test_no_gradient_flows_through_the_weight
    if name == "kto":
        settings = settings | {"kl_estimate": (logps - reference).mean()}
    leaf = logps.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(call(name, leaf, reference, lengths, **settings).sum(), leaf)
    for i, j in itertools.product(range(4), range(n)):
        step = torch.zeros_like(logps)
        step[i, j] = 1e-4
        up, down = (
            call(name, logps + sign * step, reference, lengths, **settings).sum()
            for sign in (1, -1)
        )
        assert gradient[i, j].item() == pytest.approx(((up - down) / 2e-4).item(), abs=1e-6)


@pytest.mark.parametrize(
    "alpha,gamma,eta", [(0.001, 0.01, 1.0), (0.1, 0.01, 0.5), (1.0, 0.0, 1.0), (0.0, 0.01, 1.0)]
)
def test_spo_rank_equals_the_slow_reference_over_its_range(alpha, gamma, eta):
    logps = story_logps(6, 4)
    expected = torch.tensor(slow_spo_stages(logps.tolist(), 3, alpha, gamma, eta), dtype=DOUBLE)
    value = LOSSES["spo_rank"](logps, alpha=alpha, gamma=gamma, eta=eta)
    assert torch.allclose(value, expected, rtol=1e-10, atol=0)


def test_spo_basic_by_hand():
    """logps -1 and -3, alpha 0.5: d = 2, softplus(-1) / 0.5 = 2 log(1 + 1/e) = 0.626523; alpha 0:
    -1.
    """
    logps = torch.tensor([[-1.0, -3.0]], dtype=DOUBLE)
    assert LOSSES["spo_basic"](logps, alpha=0.5).item() == pytest.approx(
        0.6265233750364456, abs=1e-12
    )
    assert LOSSES["spo_basic"](logps, alpha=0.0).item() == -1.0


def test_weight_by_hand():
    """Groups of log(p0 + p1) = 0 and log 4 with gamma 1/2: t = 1, 2, mean 1.5, mu = 2
    sigmoid(-+0.5).
    """
    logps = torch.log(torch.tensor([[0.5, 0.5], [2.0, 2.0]], dtype=DOUBLE))
    ratio = LOSSES["spo"](logps, alpha=0.1, gamma=0.5) / LOSSES["spo_basic"](logps, alpha=0.1)
    assert torch.allclose(
        ratio, 2 * torch.sigmoid(torch.tensor([-0.5, 0.5], dtype=DOUBLE)), rtol=1e-12
    )


def test_weight_survives_story_log_probs_in_float32():
    """exp(-190) is 0 in float32, and a weight formed from it would be 1 in every row without a
    word.
    """
    logps = torch.tensor([[-210.0, -190.0], [-150.0, -160.0], [-305.0, -280.0]])
    assert weight_statistic(logps, 0.01)[:, 0].tolist() == pytest.approx(
        [0.150, 0.223, 0.061], abs=1e-3
    )
    mu = LOSSES["spo"](logps) / LOSSES["spo_basic"](logps)
    assert mu.tolist() == pytest.approx([1.002, 1.039, 0.958], abs=1e-3)


@pytest.mark.parametrize("name", ["spo", "spo_bon", "spo_rank"])
def test_parts_with_the_global_mean_equal_the_whole(name):
    logps = story_logps(8, 2 if name == "spo" else 4)
    mean = weight_statistic(logps, 0.01).mean(0)
    parts = torch.cat([LOSSES[name](part, weight_mean=mean) for part in logps.split(1)])
    assert torch.allclose(parts, LOSSES[name](logps), rtol=1e-14)
    alone = torch.cat([LOSSES[name](part) for part in logps.split(1)])
    assert (alone - parts).abs().max() > 1e-3  # a micro-batch's own mean is another loss


@pytest.mark.parametrize("name", ["spo", "spo_bon", "spo_rank"])
def test_no_gradient_flows_through_the_weight(name):
    """By finite differences with mu held fixed; a gradient through mu would differ."""
    logps = story_logps(3, 2 if name == "spo" else 4) / 20
    mean = weight_statistic(logps, 0.3).mean(0)
    leaf = logps.clone().requires_grad_(True)
    LOSSES[name](leaf, alpha=0.2, gamma=0.3, weight_mean=mean).sum().backward()
    mu = 2 * torch.sigmoid(weight_statistic(logps, 0.3) - mean)

    def with_fixed_weight(x):
        stages = []
        for k in range(1 if name != "spo_rank" else x.shape[1] - 1):
            stages.append(mu[:, k] * (torch.logsumexp(0.2 * x[:, k:], 1) - 0.2 * x[:, k]) / 0.2)
        return torch.stack(stages).sum()

    for i, j in itertools.product(range(3), range(logps.shape[1])):
        step = torch.zeros_like(logps)
        step[i, j] = 1e-5
        slope = (with_fixed_weight(logps + step) - with_fixed_weight(logps - step)) / 2e-5
        assert leaf.grad[i, j].item() == pytest.approx(slope.item(), abs=1e-8)


def test_pairs_are_the_case_n_2_of_spo_bon_and_spo_rank():
    pair = story_logps(5, 2)
    assert torch.equal(LOSSES["spo_bon"](pair), LOSSES["spo"](pair))
    assert torch.allclose(LOSSES["spo_rank"](pair, eta=0.5) / 0.5, LOSSES["spo"](pair), rtol=1e-14)
    assert torch.allclose(LOSSES["spo"](pair, gamma=0.0), LOSSES["spo_basic"](pair), rtol=1e-14)


def test_dpo_is_spo_basic_on_log_ratios():
    logps, reference = story_logps(5, 2), story_logps(5, 2, seed=1)
    spo = LOSSES["spo_basic"](logps - reference, alpha=0.05)
    assert torch.allclose(LOSSES["dpo"](logps, reference, beta=0.05), 0.05 * spo, rtol=1e-12)


@pytest.mark.parametrize(
    "name,settings,n,start",
    [
        ("dpo", {}, 2, math.log(2)),
        ("cdpo", {}, 2, math.log(2)),
        ("dpo_robust", {"label_smoothing": 0.4}, 2, math.log(2)),
        ("ipo", {"tau": 0.01}, 2, 2500.0),
        ("kto", {}, 2, 0.5),
        ("kto", {"lambda_d": 1.0, "lambda_u": 3.0}, 2, 1.0),
        ("dpo_rank", {}, 4, math.log(24)),
        ("sdpo_bon", {}, 4, math.log(4)),
        ("sdpo_rank", {}, 4, math.log(24) / 3),
    ],
)
def test_the_value_at_step_0_is_the_known_one(name, settings, n, start):
    logps = story_logps(5, n)
    assert call(name, logps, logps, some_lengths(5, n), **settings).tolist() == pytest.approx(
        [start] * 5
    )
    defaults = (
        {k: p.default for k, p in inspect.signature(LOSSES[name]).parameters.items()}
        | settings
        | {"n": n}
    )
    read = inspect.signature(LOSSES[name].start).parameters
    assert LOSSES[name].start(**{k: defaults[k] for k in read}) == pytest.approx(start)


def test_rdpo_at_step_0_is_about_the_lengths_alone():
    """Chosen 10 tokens longer, alpha 0.1: softplus(-1) = 0.313262; 10 shorter: softplus(1) =
    1.313262.
    """
    logps = story_logps(2, 2)
    value = LOSSES["rdpo"](logps, logps, torch.tensor([[20, 10], [10, 20]]), alpha=0.1)
    assert value.tolist() == pytest.approx([0.31326168751822286, 1.3132616875182228])


def test_baselines_by_hand():
    """Pair: logps (-10, -12), reference (-11, -11): logratios (1, -1), h = 2, d = 2; lengths (5,
    4).

    dpo   beta 0.5:               softplus(-1)                                 = 0.313262
    cdpo  the same, e 1/4:        3/4 0.313262 + 1/4 softplus(1) 1.313262      = 0.563262
    dpo_robust, e 1/4:            (3/4 0.313262 - 1/4 1.313262) / (1/2)        = -0.186738
    ipo   tau 0.25:               (2 - 2)^2                                    = 0;  per token: (1/5
          + 1/4 - 2)^2 = 2.4025
    kto   beta 1, z0 = 0:         (sigmoid(-1) + sigmoid(-1)) / 2              = 0.268941
          kl_estimate 1:          (sigmoid(0) + sigmoid(-2)) / 2               = 0.309601
          kl_estimate -5:         as with 0, the clamp
    cpo   beta 0.5, alpha 0.1:    softplus(-1) + 0.1 * 10                      = 1.313262;  per
          token: + 0.1 * 10/5 = 0.513262
    rdpo  beta 0.5, alpha 1:      softplus(-(1 + 1))                           = 0.126928
    simpo beta 1, gamma 1:        softplus(1 - (-2 + 3)) = softplus(0)         = 0.693147
    """
    logps, reference = (
        torch.tensor([[-10.0, -12.0]], dtype=DOUBLE),
        torch.tensor([[-11.0, -11.0]], dtype=DOUBLE),
    )
    lengths = torch.tensor([[5, 4]])
    cases = [
        ("dpo", {"beta": 0.5}, 0.31326168751822286),
        ("cdpo", {"beta": 0.5, "label_smoothing": 0.25}, 0.5632616875182229),
        ("dpo_robust", {"beta": 0.5, "label_smoothing": 0.25}, -0.18673831248177714),
        ("ipo", {"tau": 0.25}, 0.0),
        ("ipo", {"tau": 0.25, "norm": "mean"}, 2.4025),
        ("kto", {"beta": 1.0}, 0.2689414213699951),
        ("kto", {"beta": 1.0, "kl_estimate": 1.0}, 0.30960146101105876),
        ("kto", {"beta": 1.0, "kl_estimate": -5.0}, 0.2689414213699951),
        ("cpo", {"beta": 0.5, "alpha": 0.1}, 1.3132616875182228),
        ("cpo", {"beta": 0.5, "alpha": 0.1, "nll": "mean"}, 0.5132616875182229),
        ("rdpo", {"beta": 0.5, "alpha": 1.0}, 0.12692801104297263),
        ("simpo", {"beta": 1.0, "gamma": 1.0}, math.log(2)),
    ]
    for name, settings, expected in cases:
        assert call(name, logps, reference, lengths, **settings).item() == pytest.approx(
            expected, abs=1e-12
        ), name


def test_rankings_by_hand():
    """beta 1, logratios log(4, 2, 1): P(first) = 4/7, P(second) = 2/3; S-DPO: the first factor
    alone, and the mean of both.
    """
    logratios = torch.log(torch.tensor([[4.0, 2.0, 1.0]], dtype=DOUBLE))
    zero = torch.zeros(1, 3, dtype=DOUBLE)
    first, second = -math.log(4 / 7), -math.log(2 / 3)
    assert LOSSES["dpo_rank"](logratios, zero, beta=1.0).item() == pytest.approx(first + second)
    assert LOSSES["sdpo_bon"](logratios, zero, beta=1.0).item() == pytest.approx(first)
    assert LOSSES["sdpo_rank"](logratios, zero, beta=1.0).item() == pytest.approx(
        (first + second) / 2
    )
    # SPO at alpha 1 without weights is the same choice by probability; with eta 1/2, stages weigh
    # 1/2 and 1/4
    assert LOSSES["spo_bon"](logratios, alpha=1.0, gamma=0.0).item() == pytest.approx(first)
    assert LOSSES["spo_rank"](logratios, alpha=1.0, gamma=0.0, eta=0.5).item() == pytest.approx(
        first / 2 + second / 4
    )


def test_reading_a_ranking_by_places_instead_of_indices_shows_in_the_loss():
    """Responses a, b, c ranked b, c, a: the 3-cycle [1, 2, 0] is not its own inverse [2, 0, 1]."""
    by_response = torch.tensor([[-9.0, -1.0, -4.0]])  # a, b, c: the order of the ranking
    best_first = LOSSES["spo_rank"](by_response[:, [1, 2, 0]], alpha=1.0, gamma=0.0)
    assert best_first.item() == pytest.approx(lse([-1, -4, -9]) + 1 + lse([-4, -9]) + 4, abs=1e-5)
    assert (
        LOSSES["spo_rank"](by_response[:, [2, 0, 1]], alpha=1.0, gamma=0.0).item()
        > best_first.item() + 5
    )


# --- identities ----------------------------------------------------------------------------------


def test_without_smoothing_the_robust_losses_are_dpo():
    pair, reference = story_logps(5, 2), story_logps(5, 2, seed=1)
    for name in ("cdpo", "dpo_robust"):
        value = LOSSES[name](pair, reference, label_smoothing=0.0)
        assert torch.equal(value, LOSSES["dpo"](pair, reference))
        for wrong in (0.5, -0.1, 0.7):
            with pytest.raises(
                ValueError, match="label_smoothing is .*, must be 0 or more and bel"
            ):
                LOSSES[name](pair, reference, label_smoothing=wrong)


def test_robust_dpo_on_flipped_labels_is_dpo_on_the_true_ones_in_the_mean():
    """The identity of its paper: (1 - e) L(true) + e L(flipped) = dpo(true)."""
    pair, reference = story_logps(50, 2), story_logps(50, 2, seed=1)
    robust = functools.partial(LOSSES["dpo_robust"], label_smoothing=0.3)
    mean = 0.7 * robust(pair, reference) + 0.3 * robust(pair.flip(1), reference.flip(1))
    assert torch.allclose(mean, LOSSES["dpo"](pair, reference), rtol=1e-12)


def test_conservative_dpo_has_its_minimum_where_the_model_is_as_sure_as_the_label():
    h = torch.linspace(-60, 60, 24001, dtype=DOUBLE)
    pair = torch.stack((h, torch.zeros_like(h)), 1)
    value = LOSSES["cdpo"](pair, torch.zeros_like(pair), label_smoothing=0.2)
    assert torch.sigmoid(0.1 * h[value.argmin()]) == pytest.approx(0.8, abs=1e-3)


def test_ranked_baselines_collapse_to_dpo_for_pairs():
    pair, reference = story_logps(5, 2), story_logps(5, 2, seed=1)
    for name in ("dpo_rank", "sdpo_bon", "sdpo_rank"):
        value = LOSSES[name](pair, reference, beta=0.1)
        assert torch.allclose(value, LOSSES["dpo"](pair, reference, beta=0.1), rtol=1e-12)


def test_sdpo_rank_is_dpo_rank_over_n_minus_1():
    logps, reference = story_logps(5, 4), story_logps(5, 4, seed=1)
    ours = LOSSES["sdpo_rank"](logps, reference, beta=0.1)
    assert torch.allclose(3 * ours, LOSSES["dpo_rank"](logps, reference, beta=0.1), rtol=1e-14)
    # as the paper words it: each rank wins against all lower ranks, an example each
    examples = [LOSSES["sdpo_bon"](logps[:, k:], reference[:, k:], beta=0.1) for k in range(3)]
    assert torch.allclose(ours, torch.stack(examples).mean(0), rtol=1e-12)


def test_spo_rank_is_a_sum_of_spo_bon_over_its_stages():
    logps = story_logps(5, 4)
    stages = [0.5 ** (k + 1) * LOSSES["spo_bon"](logps[:, k:], alpha=0.1) for k in range(3)]
    assert torch.allclose(LOSSES["spo_rank"](logps, alpha=0.1, eta=0.5), sum(stages), rtol=1e-12)
    tiny_eta = LOSSES["spo_rank"](logps, alpha=0.1, eta=1e-9) / 1e-9  # only stage 1 keeps a weight
    assert torch.allclose(tiny_eta, LOSSES["spo_bon"](logps, alpha=0.1), rtol=1e-6)


def test_sdpo_bon_is_spo_bon_on_log_ratios():
    logps, reference = story_logps(5, 4), story_logps(5, 4, seed=1)
    spo_bon = LOSSES["spo_bon"](logps - reference, alpha=0.05, gamma=0.0)
    assert torch.allclose(
        LOSSES["sdpo_bon"](logps, reference, beta=0.05), 0.05 * spo_bon, rtol=1e-12
    )


def test_cpo_is_spo_basic_with_the_likelihood_as_regularizer():
    logps = story_logps(5, 2)
    ours = 0.05 * (LOSSES["spo_basic"](logps, alpha=0.05) + 0.3 * REGULARIZERS["logp"](logps))
    assert torch.allclose(LOSSES["cpo"](logps, beta=0.05, alpha=0.05 * 0.3), ours, rtol=1e-12)


def test_alpha_0_is_the_limit_of_small_alpha():
    logps = story_logps(5, 4) / 50
    for name in ("spo_bon", "spo_rank"):
        limit = LOSSES[name](logps, alpha=0.0)
        assert torch.allclose(LOSSES[name](logps, alpha=1e-7, centered=True), limit, atol=1e-4)


# --- regularizers --------------------------------------------------------------------------------


def test_importance_by_hand():
    """rho log rho: 0 at rho = 1 with slope 1; -1/e at rho = 1/e with slope 0; e at rho = e with
    slope 2e.
    """
    logratios = torch.tensor([[0.0], [-1.0], [1.0]], dtype=DOUBLE, requires_grad=True)
    value = REGULARIZERS["importance"](logratios, torch.zeros(3, 1, dtype=DOUBLE))
    value.sum().backward()
    assert value.tolist() == pytest.approx([0.0, -1 / math.e, math.e])
    assert logratios.grad[:, 0].tolist() == pytest.approx([1.0, 0.0, 2 * math.e])


def test_importance_stays_finite_pushes_back_and_counts_beyond_its_limit():
    logratios = torch.tensor([[19.9, 20.1], [1e4, -1e4]], requires_grad=True)
    value = REGULARIZERS["importance"](logratios, torch.zeros(2, 2))
    value.sum().backward()
    slope = 21 * math.exp(20) / 2
    assert torch.isfinite(value).all() and logratios.grad.flatten().tolist() == pytest.approx(
        [20.9 * math.exp(19.9) / 2, slope, slope, 0.0], rel=1e-5
    )
    assert clamped(logratios.detach(), torch.zeros(2, 2)).tolist() == [1, 1]


def test_the_other_regularizers_are_what_they_are_called():
    values = story_logps(3, 4)
    assert torch.equal(REGULARIZERS["logp"](values), -values[:, 0])
    assert torch.equal(REGULARIZERS["tokenwise"](values), values.mean(1))
    assert torch.equal(REGULARIZERS["global_kl"](values[:, 0]), values[:, 0]) and REGULARIZERS[
        "none"
    ]().tolist() == [0.0]


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].data == "best"])
def test_best_of_n_ignores_the_order_of_the_rest(name):
    logps, reference, order = story_logps(5, 4), story_logps(5, 4, seed=1), [0, 3, 1, 2]
    value, permuted = (
        call(name, x, q, some_lengths(5, 4))
        for x, q in ((logps, reference), (logps[:, order], reference[:, order]))
    )
    assert torch.allclose(value, permuted, rtol=1e-12)


def test_sft_is_total_nll_over_total_tokens():
    logps, lengths = (
        torch.tensor([[-10.0, -20.0], [-30.0, -60.0]]),
        torch.tensor([[5, 10], [5, 20]]),
    )
    assert LOSSES["sft"](logps, lengths).mean().item() == pytest.approx(120 / 40)
    assert LOSSES["best_sft"](logps, lengths).mean().item() == pytest.approx(40 / 10)


def test_centering_changes_the_value_by_a_constant_and_not_the_gradient():
    leaf = story_logps(3, 4).requires_grad_(True)
    (plain,) = torch.autograd.grad(LOSSES["spo_rank"](leaf).sum(), leaf)
    (centered,) = torch.autograd.grad(LOSSES["spo_rank"](leaf, centered=True).sum(), leaf)
    assert torch.equal(plain, centered)
    assert LOSSES["spo_rank"](torch.zeros(1, 4), centered=True).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", list(LOSSES))
def test_gaps_of_ten_thousand_nats_leave_loss_and_gradient_finite(name):
    n = SLOW[name][0]
    sharp = (
        {"alpha": 1.0}
        if name.startswith("spo")
        else {"beta": 1.0}
        if "beta" in SLOW[name][1]
        else {}
    )
    for gap, settings in itertools.product((-1e4, -100.0, 0.0, 100.0, 1e4), ({}, sharp)):
        logps = torch.tensor(
            [[-200.0 + gap] + [-200.0] * (n - 2) + [-200.0 - gap]], requires_grad=True
        )
        value = call(name, logps, torch.full((1, n), -200.0), torch.full((1, n), 99), **settings)
        value.sum().backward()
        assert (
            value.shape == (1,) and torch.isfinite(value).all() and torch.isfinite(logps.grad).all()
        )


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].data == "pair"])
def test_a_pairwise_loss_refuses_groups_of_three(name):
    with pytest.raises(ValueError, match="exactly 2"):
        call(name, story_logps(2, 3), story_logps(2, 3), some_lengths(2, 3))


def test_wrong_shapes_are_refused_in_words():
    with pytest.raises(ValueError, match="reference_logps has shape"):
        LOSSES["dpo"](story_logps(3, 2), story_logps(1, 2))
    with pytest.raises(ValueError, match="lengths has shape"):
        LOSSES["simpo"](story_logps(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="norm is 'median'"):
        LOSSES["ipo"](story_logps(3, 2), story_logps(3, 2), norm="median")
    with pytest.raises(ValueError, match="at least 2"):
        LOSSES["spo_rank"](story_logps(3, 1))
    with pytest.raises(ValueError, match="weight_mean"):
        LOSSES["spo_rank"](story_logps(3, 4), weight_mean=torch.zeros(2))
    with pytest.raises(ValueError, match="weight_mean"):
        LOSSES["spo_rank"](story_logps(3, 4), weight_mean=0.5)
    with pytest.raises(ValueError, match="kl_estimate has shape"):
        LOSSES["kto"](story_logps(3, 2), story_logps(3, 2), kl_estimate=torch.zeros(3))
    with pytest.raises(ValueError, match="lengths is missing"):
        LOSSES["ipo"](story_logps(3, 2), story_logps(3, 2), norm="mean")


# --- log-probs and KL ----------------------------------------------------------------------------


def random_batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 7, dtype=DOUBLE, generator=generator)
    tokens = torch.randint(7, (3, 6), generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    return logits, tokens, mask


def test_sequence_logps_equal_a_loop_over_tokens():
    logits, tokens, mask = random_batch()
    for row in range(3):
        expected = 0.0
        for t in range(1, 6):
            if mask[row, t]:
                p = [math.exp(x) for x in logits[row, t - 1].tolist()]
                expected += math.log(p[tokens[row, t]] / sum(p))
        assert sequence_logps(logits, tokens, mask)[row].item() == pytest.approx(
            expected, abs=1e-12
        )


def test_constant_logits_give_minus_length_log_vocabulary():
    _, tokens, mask = random_batch()
    logps = sequence_logps(torch.zeros(3, 6, 7), tokens, mask)
    assert logps.tolist() == pytest.approx([-n * math.log(7) for n in (5, 2, 1)])


def test_one_logit_moves_only_its_own_sequence():
    logits, tokens, mask = random_batch()
    before = sequence_logps(logits, tokens, mask)
    logits[1, 2] += torch.arange(7)
    assert (sequence_logps(logits, tokens, mask) != before).tolist() == [False, True, False]


def test_padding_changes_nothing():
    logits, tokens, mask = random_batch()
    padded = [
        torch.nn.functional.pad(x, pad)
        for x, pad in ((logits, (0, 0, 0, 9)), (tokens, (0, 9)), (mask, (0, 9)))
    ]
    assert torch.allclose(sequence_logps(*padded), sequence_logps(logits, tokens, mask), atol=1e-12)
    kl = token_kl(logits, 0.5 * logits, mask)
    assert torch.allclose(token_kl(padded[0], 0.5 * padded[0], padded[2]), kl, atol=1e-12)


def test_bfloat16_logits_are_summed_in_float32():
    logits, tokens, mask = random_batch()
    low = logits.bfloat16()
    value = sequence_logps(low, tokens, mask)
    assert value.dtype == torch.float32
    assert torch.allclose(value.double(), sequence_logps(low.double(), tokens, mask), atol=1e-5)


def test_token_kl_sums_the_full_distribution_over_scored_tokens():
    logits, _, mask = random_batch()
    other, _, _ = random_batch(seed=1)
    expected = [0.0, 0.0, 0.0]
    for row, t in itertools.product(range(3), range(1, 6)):
        if mask[row, t]:
            p, q = (
                torch.softmax(logits[row, t - 1], 0).tolist(),
                torch.softmax(other[row, t - 1], 0).tolist(),
            )
            expected[row] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert token_kl(logits, other, mask).tolist() == pytest.approx(expected, abs=1e-12)
    assert token_kl(logits, logits, mask).tolist() == [0.0, 0.0, 0.0]


def test_token_kl_gradient_is_that_of_the_formula_and_spares_the_reference():
    """d KL / d logit(s) = p(s) [log p(s)/ref(s) - KL_t] at every scored step."""
    logits, _, mask = random_batch()
    other, _, _ = random_batch(seed=1)
    logits.requires_grad_(True), other.requires_grad_(True)
    token_kl(logits, other, mask).sum().backward()
    p, ratio = logits.softmax(-1), logits.log_softmax(-1) - other.log_softmax(-1)
    expected = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    expected = torch.cat(
        [expected[:, :-1] * mask[:, 1:, None], torch.zeros(3, 1, 7, dtype=DOUBLE)], dim=1
    )
    assert torch.allclose(logits.grad, expected, atol=1e-12) and other.grad is None


def test_the_readme_has_the_defaults_of_every_loss():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\|([^|]*)\|", file.read(), re.MULTILINE)
    documented = {
        name: dict(setting.split() for setting in flags.split(",") if setting.strip())
        for name, flags in rows
        if name in LOSSES
    }
    actual = {}
    for name in LOSSES:
        objective = Objective(name)
        settings = {key: value for key, value in objective.settings.items() if key != "centered"}
        if objective.beta:
            settings["beta"] = objective.beta
        actual[name] = {key: f"{v:g}" if v != str(v) else v for key, v in settings.items()}
    assert documented == actual
