"""Preferences -> win-rate, its interval, and the rate that is left when length is taken out."""

import math
from dataclasses import dataclass

import numpy as np

# With a larger share there is no win-rate: what is missing may not be like what is there.
MAX_INVALID = 0.01
Z = 1.959964  # the standard normal deviate that 2.5% exceed


@dataclass
class WinRate:
    """How often one side was preferred; a tie counts half. low, high: its 95% interval.

    count  stories that were judged
    ties   of the comparisons
    invalid  comparisons that the judge gave no usable answer to
    pool   stories that each was compared with; 0: one to one
    length_controlled  the rate at equal length, see `length_controlled_rate`
    """

    rate: float
    low: float
    high: float
    count: int
    ties: int
    invalid: int = 0
    length_controlled: float = math.nan
    pool: int = 0

    @property
    def trusted(self) -> bool:
        return self.invalid <= MAX_INVALID * (self.count + self.invalid)

    def __str__(self) -> str:
        if not self.trusted:
            return f"no win-rate: {self.invalid} of {self.count + self.invalid} invalid"
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.count}"


def win_rate(
    preferences: list[float | None], length_differences: list[float] | None = None
) -> WinRate:
    """Preferences (1 win, 0 loss, 0.5 tie, None invalid) -> win-rate with its 95% interval.
    ValueError if there are none.

    length_differences  of each pair, in characters: with them, the length-controlled rate
    """
    scored = [p for p in preferences if p is not None]
    n = len(scored)
    if not preferences:
        raise ValueError("no comparisons, so no win-rate")
    if n == 0:
        return WinRate(math.nan, math.nan, math.nan, 0, 0, len(preferences))
    p = sum(scored) / n
    result = WinRate(p, *wilson(p, n, Z), n, scored.count(0.5), len(preferences) - n)
    if length_differences is not None:
        both = zip(length_differences, preferences, strict=True)
        differences = [difference for difference, preferred in both if preferred is not None]
        result.length_controlled = length_controlled_rate(scored, differences)
    return result


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Return the Wilson interval of a share p of n, for a deviate z."""
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def length_controlled_rate(preferences: list[float], length_differences: list[float]) -> float:
    """The win-rate if both sides were equally long, as AlpacaEval 2 has it (Dubois et al. 2024):
    sigmoid(a) of

        P(win) = sigmoid(a + b tanh(d / std(d))),    d = length of the policy's story - length of
        the baseline's

    the logistic regression that minimises cross-entropy + (|a| + |b|) / C, with ties as half a win,
    and C out of ten by 5-fold cross-validation. This is the package's `length_controlled_minimal`.
    Its default has a third term, for the difficulty of each instruction, which is known for the 805
    instructions of its own benchmark only.
    """
    y, d = np.array(preferences), np.array(length_differences, dtype=float)
    spread = d.std(ddof=1) if len(d) > 1 else 0.0
    x = np.stack([np.ones_like(d), np.tanh(d / spread) if spread > 0 else np.zeros_like(d)], axis=1)
    folds, strengths = np.empty(len(y), int), np.logspace(-4, 4, 10)
    folds[np.argsort(np.full(len(y), 2))[::-1]] = (
        np.arange(len(y)) % 5
    )  # as scikit-learn deals equal groups out
    strength = strengths[-1]
    if len(y) >= 5:

        def loss_of(C: float) -> float:
            parts = [(folds != k, folds == k) for k in range(5)]
            return np.mean(
                [
                    cross_entropy(x[out], y[out], fit(x[fold], y[fold], C)).mean()
                    for fold, out in parts
                ]
            )

        strength = min(strengths, key=loss_of)
    return float(1 / (1 + np.exp(-fit(x, y, strength)[0])))


def cross_entropy(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of the logistic regression x (N, K) @ weights (K,) and targets y (N,) in [0, 1], per row, in
    nats.
    """
    logits = x @ weights
    return np.logaddexp(0, logits) - y * logits


def fit(x: np.ndarray, y: np.ndarray, C: float) -> np.ndarray:
    """The weights (K,) that minimise sum(cross_entropy) + sum |w| / C, by proximal Newton steps."""
    weights = np.zeros(x.shape[1])

    def objective(w: np.ndarray) -> float:
        return cross_entropy(x, y, w).sum() + np.abs(w).sum() / C

    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        gradient, hessian = (
            x.T @ (p - y),
            (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(len(weights)),
        )
        new = weights.copy()
        for _ in range(50):  # coordinate descent on the quadratic model and the penalty
            for k in range(len(new)):
                slope = gradient[k] + hessian[k] @ (new - weights) - hessian[k, k] * new[k]
                new[k] = -np.sign(slope) * max(0.0, abs(slope) - 1 / C) / hessian[k, k]
        step = 1.0
        while step > 1e-8 and objective(weights + step * (new - weights)) > objective(weights):
            step /= 2
        moved = step * (new - weights)
        weights = weights + moved
        if np.abs(moved).max() < 1e-8:
            break
    return weights


# --- every story against a pool ------------------------------------------------------------------


def all_pairs(ours: dict[str, list[float]], pool: dict[str, list[float]]) -> WinRate:
    """Compare every story with every story of a pool to the same prompt, by their scores.

    ours  the scores of the policy's stories to each prompt: {prompt: scores}, N in all
    pool  the reference's, two or more to each prompt

    The rate is the two-sample U-statistic (Mann and Whitney): the mean over the policy's stories of
    the share of the pool that each beats, an equal score counting half. Its variance is that of
    DeLong, DeLong and Clarke-Pearson (1988): how far those shares vary over the policy's stories,
    and the shares of the policy that each story of the pool loses to over the pool. The 95%
    interval is taken on the scale of log(p / (1 - p)), with Student's t for the degrees of freedom
    of Satterthwaite. Where that variance is 0 (the rate is 0 or 1, or all scores are equal), it is
    the Wilson interval of as many comparisons as the smaller side has stories.
    """
    beaten, variance_of_pool, ties, sizes, parts = [], 0.0, 0, [], []
    count = sum(map(len, ours.values()))
    for prompt, scores in ours.items():
        mine, theirs = np.sort(np.array(scores)), np.sort(np.array(pool[prompt]))
        lower, upper = (np.searchsorted(theirs, mine, side) for side in ("left", "right"))
        beaten.append((lower + upper) / 2 / len(theirs))
        ties += int((upper - lower).sum())
        lost = sum(np.searchsorted(mine, theirs, side) for side in ("left", "right"))
        share = len(mine) / count
        part = share**2 * (1 - lost / 2 / len(mine)).var(ddof=1) / len(theirs)
        parts.append(part**2 / (len(theirs) - 1))
        variance_of_pool += part
        sizes.append(len(theirs))
    shares = np.concatenate(beaten)
    p = float(shares.mean())
    variance_of_ours = shares.var(ddof=1) / count if count > 1 else 0.0
    variance = float(variance_of_ours + variance_of_pool)
    if variance == 0 or not 0 < p < 1:
        low, high = wilson(p, min(count, sum(sizes)), Z)
    else:
        freedom = variance**2 / (variance_of_ours**2 / max(1, count - 1) + sum(parts))
        half = student(freedom) * math.sqrt(variance) / (p * (1 - p))
        middle = math.log(p / (1 - p))
        low, high = (1 / (1 + math.exp(-(middle + side * half))) for side in (-1, 1))
    return WinRate(p, low, high, count, ties, pool=min(sizes))


def student(freedom: float) -> float:
    """Return Student's t that 2.5% exceed, by the expansion of Cornish and Fisher (to 1% from 3
    degrees of freedom on).
    """
    z, f = Z, max(freedom, 3.0)
    terms = [z, (z**3 + z) / (4 * f), (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)]
    return sum(terms) + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
