"""Compare runs at equal KL: a curve for each, read off at the same nats; differences over seeds."""

import math
from collections.abc import Sequence

import numpy as np

BUDGETS = (0.5, 1.0, 2.0, 4.0)  # nats
DEGREE = 2  # of the curve in sqrt(KL)
FEWEST = DEGREE + 2  # checkpoints that a curve needs
MARGIN = 3.0  # points of win-rate: a difference below it is none


def fit(kls: Sequence[float], values: Sequence[float], degree: int = DEGREE) -> np.ndarray | None:
    """Fit values by a polynomial in sqrt(KL), by least squares; None: too few checkpoints.

    Checkpoints after the first one past the largest budget have no part in it.

    KL grows with the square of the distance in parameters, and rewards with the distance itself
    (Gao, Schulman and Hilton 2023), so that sqrt(KL) makes curves that a quadratic fits.
    """
    past = [i for i, kl in enumerate(kls) if kl > BUDGETS[-1]]
    end = past[0] + 1 if past else len(kls)
    if end < max(FEWEST, degree + 2):
        return None
    distances = np.sqrt(np.maximum(kls[:end], 0.0))
    return np.polyfit(distances, values[:end], degree)


def read(kls: Sequence[float], values: Sequence[float], nats: float) -> float | None:
    """Return the value at `nats` on a run's curve; None where that would be extrapolated."""
    curve = fit(kls, values)
    if curve is None or max(kls) < nats:
        return None
    return float(np.polyval(curve, math.sqrt(nats)))


def shares_beaten(scores: Sequence[float], pool: np.ndarray) -> np.ndarray:
    """Return, of each score, the share of the pool that it beats; an equal one counts half."""
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
    kls = [point["kl"] for point in row["checkpoints"]]
    return read(kls, win_rates(row, pool, half), nats)
