"""Compare runs at equal KL: a curve for each, read off at the same nats; differences over seeds.

A run is a row of experiments/study.jsonl. claims.md says what is compared, and why like this.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BUDGETS = (0.5, 1.0, 2.0, 4.0)  # nats
DEGREE = 2  # of a curve in sqrt(KL)
FEWEST = DEGREE + 2  # checkpoints that a curve needs
MARGIN = 3.0  # points of win-rate: less than that is no difference
LEVEL = 0.05  # of tests; intervals hold 1 - LEVEL


# --- the curve of a run --------------------------------------------------------------------------


def fit(kls: Sequence[float], values: Sequence[float]) -> np.ndarray | None:
    """Fit values by a quadratic in sqrt(KL), by least squares; None: too few checkpoints.

    Checkpoints after the first one past the largest budget have no part in it. KL grows with the
    square of the distance between two policies, so that Gao, Schulman and Hilton (2023) plot
    rewards against sqrt(KL). The quadratic is a choice: theirs for the best of n.
    """
    past = [i for i, kl in enumerate(kls) if kl > BUDGETS[-1]]
    end = past[0] + 1 if past else len(kls)
    if end < FEWEST:
        return None
    distances = np.sqrt(np.maximum(kls[:end], 0.0))
    return np.polyfit(distances, values[:end], DEGREE)


def read(
    kls: Sequence[float], values: Sequence[float], nats: float, straight: bool = False
) -> float | None:
    """Return the value at `nats` on a run's curve; None where that would be extrapolated.

    straight  by straight lines, in sqrt(KL), from checkpoint to checkpoint, not by the quadratic
    """
    curve = fit(kls, values)
    if curve is None or max(kls) < nats:
        return None
    if straight:
        by_distance = sorted(zip(np.sqrt(np.maximum(kls, 0.0)), values, strict=True))
        return float(np.interp(math.sqrt(nats), *zip(*by_distance, strict=True)))
    return float(np.polyval(curve, math.sqrt(nats)))


def distance_at(kls: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Return the sqrt(KL) at which a run's curve first reaches a value; None: it does not."""
    curve = fit(kls, values)
    if curve is None:
        return None
    shifted = curve.copy()
    shifted[-1] -= target
    roots = [root.real for root in np.roots(shifted) if abs(root.imag) < 1e-9]
    within = [root for root in roots if 0 <= root <= math.sqrt(max(kls))]
    return min(within) if within else None


def shares_beaten(scores: Sequence[float], pool: np.ndarray) -> np.ndarray:
    """Return, of each score, the share of a sorted pool that it beats; an equal one counts half."""
    lower = np.searchsorted(pool, scores, "left")
    upper = np.searchsorted(pool, scores, "right")
    return (lower + upper) / 2 / len(pool)


def win_rates(row: dict, pool: Sequence[float], half: int | None = None) -> list[float]:
    """Return the win-rate of every checkpoint of a run, in percent.

    half  0 or 1: on the even or on the odd ones of its stories; None: on all
    """
    ordered = np.sort(np.array(pool))
    stories = slice(None) if half is None else slice(half, None, 2)
    return [
        100 * float(shares_beaten(point["scores"][stories], ordered).mean())
        for point in row["checkpoints"]
    ]


def win_rate_at(
    row: dict, pool: Sequence[float], nats: float, half: int | None = None
) -> float | None:
    """Return a run's win-rate at a KL, in percent; None where that would be extrapolated."""
    return read(kls_of(row), win_rates(row, pool, half), nats)


def kls_of(row: dict) -> list[float]:
    return [point["kl"] for point in row["checkpoints"]]


# --- Student's t ---------------------------------------------------------------------------------


def tail(t: float, freedom: float) -> float:
    """Return the probability that Student's t exceeds a value.

    With t = sqrt(freedom) tan(angle), the density in the angle is cos(angle)^(freedom - 1).
    """
    middles = (np.arange(4000) + 0.5) / 4000
    start = math.atan(abs(t) / math.sqrt(freedom))
    above = np.cos(start + (math.pi / 2 - start) * middles) ** (freedom - 1)
    half = np.cos(math.pi / 2 * middles) ** (freedom - 1)
    share = 0.5 * above.mean() * (math.pi / 2 - start) / (half.mean() * math.pi / 2)
    return float(share if t >= 0 else 1 - share)


@functools.lru_cache
def quantile(freedom: float) -> float:
    """Return the t that LEVEL / 2 of Student's distribution exceed."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > LEVEL / 2 else (low, middle)
    return high


# --- differences over seeds ----------------------------------------------------------------------


@dataclass
class Contrast:
    """A mean difference over seeds, with its 95% interval, in the unit of what was compared.

    deviation         of this contrast's own seeds
    p_zero, p_margin  of "it is 0" and of "it is at least the margin", after Holm's correction over
                      the contrasts of the question
    """

    name: str
    seeds: int
    mean: float
    low: float
    high: float
    deviation: float
    p_zero: float
    p_margin: float

    @property
    def verdict(self) -> str:
        """Tell what is shown; "not decided" where nothing is."""
        way = "higher" if self.mean > 0 else "lower"
        # Half the level in each of two one-sided tests: a 95% interval within the margin.
        differs, is_small = self.p_zero < LEVEL, self.p_margin < LEVEL / 2
        if differs:
            return f"{way}, by less than {MARGIN:g}" if is_small else way
        return "no difference" if is_small else "not decided"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def contrasts(differences: Mapping[str, Sequence[float]], margin: float = MARGIN) -> list[Contrast]:
    """Test the contrasts of one question.

    differences  of each contrast: one number per seed. Those of fewer than 2 seeds are left out
    Each is tested twice: with one standard deviation for all contrasts, and with its own. The
    wider interval and the larger p-values count.
    """
    known = {name: np.array(values) for name, values in differences.items() if len(values) > 1}
    if not known:
        return []
    shared_freedom = sum(len(values) - 1 for values in known.values())
    squares = sum(float(values.var()) * len(values) for values in known.values())
    shared = math.sqrt(squares / shared_freedom)
    found = []
    for name, values in known.items():
        n, mean, own = len(values), float(values.mean()), float(values.std(ddof=1))
        half, p_zero, p_margin = 0.0, 0.0, 0.0
        for deviation, freedom in ((shared, shared_freedom), (own, n - 1)):
            error = max(deviation / math.sqrt(n), 1e-12)
            half = max(half, quantile(freedom) * error)
            p_zero = max(p_zero, 2 * tail(abs(mean) / error, freedom))
            p_margin = max(p_margin, tail((margin - abs(mean)) / error, freedom))
        found.append(Contrast(name, n, mean, mean - half, mean + half, own, p_zero, p_margin))
    for which in ("p_zero", "p_margin"):
        corrected = holm([getattr(contrast, which) for contrast in found])
        for contrast, p in zip(found, corrected, strict=True):
            setattr(contrast, which, p)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979).

    p_values=[0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    by_size = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for place, i in enumerate(by_size):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = highest
    return corrected


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a standard deviation over seeds and its 95% interval, from chi-square's quantiles."""
    deviation, freedom = float(np.std(values, ddof=1)), len(values) - 1
    draws = np.random.default_rng(0).chisquare(freedom, 1_000_000)
    low, high = np.quantile(draws, (LEVEL / 2, 1 - LEVEL / 2))
    return deviation, deviation * math.sqrt(freedom / high), deviation * math.sqrt(freedom / low)


def bootstrap(values: Sequence[float], draws: int = 20_000) -> tuple[float, float]:
    """Return the 95% interval of a mean over seeds, by drawing them again (percentiles)."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.array(values), (draws, len(values))).mean(1)
    low, high = np.quantile(means, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)
