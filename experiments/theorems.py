"""Theorems 1 to 4 of the SPO paper, run: gradient descent on the real losses, in the tabular
setting.

    python experiments/theorems.py [--out=experiments/theorems.png]

Five responses with rewards r, a policy that is a softmax of five free logits, and data whose
preferences follow Bradley-Terry (rankings: Plackett-Luce) on r while what is compared with what is
drawn from a random, UNEVEN query measure. Every expectation is exact: a weighted sum over all
possible rows. The theorems say that the only fixed point is softmax(r / alpha), for pairs (1;
weighted: 2), best-of-n (3) and rankings (4), whatever the query measure and the weight.
"""

import itertools
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from losses import LOSSES, token_kl, weight_statistic
from spo.config import flag, main_program, parse

REWARDS = torch.tensor([1.0, 0.4, 0.0, -0.5, -1.2], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.0, 0.8, 0.3, 1.0, 0.5], dtype=torch.float64), 0)


@dataclass
class TheoremConfig:
    out: str = flag("experiments/theorems.png", "the figure")
    seed: int = flag(35, "of the query measure")


@dataclass
class Data:
    """All rows that can occur, (R, n) indices of responses, best first, and their probabilities
    (R,).
    """

    rows: Tensor
    probability: Tensor


def preference_data(n: int, ranked: bool, seed: int, even: bool = False) -> Data:
    """Every n of the five responses, ranked (all n! orders) or with their best named (n rows)."""
    subsets = list(itertools.combinations(range(len(REWARDS)), n))
    measure = (
        torch.rand(len(subsets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ** 3
        + 0.02
    )
    measure = torch.ones_like(measure) if even else measure
    rows, probabilities = [], []
    for subset, weight in zip(subsets, measure / measure.sum(), strict=True):
        orders = (
            itertools.permutations(subset)
            if ranked
            else [(b, *(i for i in subset if i != b)) for b in subset]
        )
        for order in orders:
            stages = n - 1 if ranked else 1
            strengths = REWARDS[list(order)].exp()
            rows.append(order)
            choices = torch.stack([strengths[k] / strengths[k:].sum() for k in range(stages)])
            probabilities.append(weight * choices.prod())
    return Data(torch.tensor(rows), torch.stack(probabilities))


def expected_loss(log_policy: Tensor, data: Data, loss: str, **settings) -> Tensor:
    """The exact expectation of a loss of losses.py under the data; the mean inside SPO's weight is
    exact, too.
    """
    logps = log_policy[data.rows]
    if settings.get("gamma"):
        statistic = weight_statistic(logps, settings["gamma"])
        settings["weight_mean"] = (data.probability[:, None] * statistic).sum(0)
    if loss.startswith("dpo"):
        settings["reference_logps"] = REFERENCE[data.rows]
    return (data.probability * LOSSES[loss](logps, **settings)).sum()


def descend(
    objective, learning_rate: float, steps: int = 20_000, tolerance: float = 1e-10
) -> Tensor:
    """Plain gradient descent on five logits from zero, until the gradient is below tolerance ->
    log-probs (5,).
    """
    logits = torch.zeros(len(REWARDS), dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(objective(torch.log_softmax(logits, 0)), logits)
        if gradient.abs().max() < tolerance:
            break
        with torch.no_grad():
            logits -= learning_rate * gradient
    return torch.log_softmax(logits.detach(), 0)


def entropy(log_policy: Tensor) -> float:
    return float(-(log_policy.exp() * log_policy).sum())


def kl_to_reference(log_policy: Tensor) -> Tensor:
    """token_kl of a one-token language is the KL of the two distributions."""
    logits, mask = torch.stack([log_policy, log_policy])[None], torch.tensor([[False, True]])
    reference = torch.stack([REFERENCE, REFERENCE])[None]
    return token_kl(logits, reference, mask)[0]


CASES = [  # theorem, loss, responses, settings
    ("1", "spo_basic", 2, {}),
    ("2", "spo", 2, {"gamma": 1.0}),
    ("2", "spo", 2, {"gamma": 0.01}),
    ("3", "spo_bon", 4, {"gamma": 0.0}),
    ("3", "spo_bon", 4, {"gamma": 1.0}),
    ("4", "spo_rank", 3, {"gamma": 0.0, "eta": 1.0}),
    ("4", "spo_rank", 3, {"gamma": 1.0, "eta": 0.5}),
]


def fixed_points(seed: int) -> list[tuple[str, float, float, float]]:
    """(label, alpha, largest error, entropy) of every case; prints the table."""
    found = []
    print(
        "gradient descent on losses.py against softmax(r / alpha): "
        "largest |difference of a probability|\n"
    )
    print("theorem  loss                              alpha 0.5  alpha 1.0  alpha 2.0")
    for theorem, loss, n, settings in CASES:
        data = preference_data(n, loss in ("spo_rank",), seed)
        errors = []
        for alpha in (0.5, 1.0, 2.0):
            log_policy = descend(
                lambda p: expected_loss(p, data, loss, alpha=alpha, **settings), 4 / alpha
            )
            errors.append(float((log_policy.exp() - torch.softmax(REWARDS / alpha, 0)).abs().max()))
            found.append((loss, alpha, errors[-1], entropy(log_policy)))
        label = f"{loss} n={n} " + " ".join(f"{k}={v:g}" for k, v in settings.items())
        print(f"{theorem:<9}{label:<34}" + "  ".join(f"{e:9.1e}" for e in errors))
    return found


def softness(seed: int) -> list[tuple[float, float, float]]:
    """(beta, entropy of DPO's fixed point, entropy of SPO's at alpha = 1 with beta * KL); prints
    the table.
    """
    data, results = preference_data(2, True, seed), []
    print("\nthe strength of the reference goes to 0: DPO hardens, SPO stays at its alpha (1.0)\n")
    print("beta    entropy DPO  (theory)  entropy SPO + beta KL")
    for beta in (2.0, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02):
        dpo = descend(lambda p: expected_loss(p, data, "dpo", beta=beta), 4 / beta**2)
        theory = torch.log_softmax(REFERENCE + REWARDS / beta, 0)
        spo = descend(
            lambda p: expected_loss(p, data, "spo_basic", alpha=1.0) + beta * kl_to_reference(p),
            1.0,
        )
        results.append((beta, entropy(dpo), entropy(spo)))
        print(f"{beta:<8g}{entropy(dpo):11.4f}  ({entropy(theory):6.4f})  {entropy(spo):21.4f}")
    limit = entropy(torch.log_softmax(REWARDS, 0))
    print(f"{'limit':<8}{0:11.4f}  {'':8}  {limit:21.4f}")
    return results


def without_softness(seed: int) -> None:
    """alpha = 0 with uneven sampling: what Theorem 1 leaves out."""
    print(
        "\nalpha = 0 (Eq. 10): -1/2 sum_y c(y) log pi(y), "
        "c = how often y wins less how often it loses\n"
    )
    for name, even in (("even", True), ("uneven", False)):
        data = preference_data(2, True, seed, even)
        count = torch.zeros(len(REWARDS), dtype=torch.float64)
        count.index_add_(0, data.rows[:, 0], data.probability).index_add_(
            0, data.rows[:, 1], -data.probability
        )
        end = descend(
            lambda p: expected_loss(p, data, "spo_basic", alpha=0.0), 10.0, steps=2000
        ).exp()
        soft = descend(lambda p: expected_loss(p, data, "spo_basic", alpha=0.02), 200.0).exp()
        print(
            f"{name + ' sampling:':<17} c = {[round(float(c), 3) for c in count]}; "
            f"mass on response {int(end.argmax())} ({float(end.max()):.4f}), "
            f"best by c: {int(count.argmax())}, best by r: "
            f"{int(REWARDS.argmax())}; alpha 0.02 ends on {int(soft.argmax())}"
        )
    print(
        "Nothing is minimised there: the logits move along c for ever. "
        "With uneven sampling, what is compared often\n"
        "counts like what is good; a small alpha on few steps behaves alike."
    )


def draw(path: str, found, soft) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    alphas = torch.linspace(0.3, 2.4, 100)
    theory = [entropy(torch.log_softmax(REWARDS / a, 0)) for a in alphas.double()]
    left.plot(alphas, theory, color="0.6", label="softmax(r / alpha), the theorems")
    for loss, marker, size in (
        ("spo_basic", "s", 10),
        ("spo", "o", 7),
        ("spo_bon", "^", 6),
        ("spo_rank", "x", 5),
    ):
        points = [(a, h) for name, a, _, h in found if name == loss]
        left.plot(*zip(*points, strict=True), marker, label=loss, markersize=size, fillstyle="none")
    left.set(
        xlabel="alpha",
        ylabel="entropy of the fixed point (nats)",
        title="Theorems 1-4: alpha sets the softness",
    )
    left.legend()
    betas = [b for b, _, _ in soft]
    right.semilogx(betas, [d for _, d, _ in soft], "o-", color="tab:red", label="DPO")
    right.semilogx(betas, [s for _, _, s in soft], "s-", color="tab:blue", label="SPO, alpha = 1")
    right.axhline(
        entropy(torch.log_softmax(REWARDS, 0)), color="0.6", linestyle="--", label="softmax(r)"
    )
    right.set(
        xlabel="beta, the strength of the reference",
        ylabel="entropy of the fixed point (nats)",
        title="Without a reference: DPO hardens, SPO does not",
    )
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\n{path}: the figure")


def main(argv: list[str]) -> None:
    config = parse(TheoremConfig, argv, "theorems.py", "The paper's theorems, run.")
    found = fixed_points(config.seed)
    soft = softness(config.seed)
    without_softness(config.seed)
    draw(config.out, found, soft)


if __name__ == "__main__":
    main_program(main)
