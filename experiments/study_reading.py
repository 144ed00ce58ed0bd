"""The runs of experiments/study.jsonl, found by what they are; numbers and tables of them."""

import copy
import os
import sys
from collections.abc import Iterable, Sequence

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import study
from matched_kl import (
    BUDGETS,
    Contrast,
    distance_at,
    fit,
    kls_of,
    quantile,
    read,
    win_rate_at,
    win_rates,
)
from study_run import Run

EQUAL_RATE = 54.0  # percent, which all settings reach: entropy and diversity at equal score
DEPENDS = "depends on the reading"
UNDECIDED = (DEPENDS, "not decided")


class Study:
    """The runs, found by what they are, and the numbers that are read off them."""

    def __init__(self, rows: Sequence[dict]):
        self.budgets: Sequence[float] = BUDGETS  # the nats that contrasts are means over
        self.straight = False  # curves are read by straight lines
        self.rows = {study.key_of(row): row for row in rows if "run" in row}
        self.cosines = [row for row in rows if "cosines" in row]
        self.pool = next((row["scores"] for row in rows if "pool" in row), [])
        self.rates = {loss: study.chosen_rate(rows, loss) for loss in study.LOSSES}
        self.rates |= dict.fromkeys(("cdpo", "dpo_robust"), self.rates["dpo"])
        self.rates["spo_basic"] = self.rates["spo"]

    def reading(self, budgets: Sequence[float] = BUDGETS, straight: bool = False) -> "Study":
        """Return the same runs, read another way."""
        other = copy.copy(self)
        other.budgets = budgets
        other.straight = straight
        return other

    def runs(self, loss: str, seeds: Iterable[int] = range(64), **spec) -> dict[int, dict]:
        """Return {seed: row} of the runs of one objective and setting that are there."""
        jobs = {seed: study.key(Run(loss, seed, self.rates[loss], **spec)) for seed in seeds}
        return {seed: self.rows[key] for seed, key in jobs.items() if key in self.rows}

    def choosing_rate(self, loss: str, learning_rate: float) -> float | None:
        """Return a learning rate's win-rate on the stories that chose, at the KL that chose."""
        row = self.rows.get(study.key(Run(loss, 0, learning_rate)))
        return row and win_rate_at(row, self.pool, study.CHOOSING_NATS, half=0)

    def rate_values(self, row: dict) -> list[float]:
        """Return a run's win-rates, in percent; those of seed 0, which chose the learning rate, on
        the stories that had no part in the choice.
        """
        return win_rates(row, self.pool, half=1 if row["run"]["seed"] == 0 else None)

    def values(self, row: dict, what: str) -> list[float]:
        if what == "win_rate":
            return self.rate_values(row)
        factor = 100.0 if what in ("second_win_rate", "distinct_4grams") else 1.0
        return [factor * point[what] for point in row["checkpoints"]]

    def at(self, row: dict, nats: float, what: str = "win_rate") -> float | None:
        return read(kls_of(row), self.values(row, what), nats, self.straight)

    def at_equal_rate(self, row: dict, what: str, rate: float = EQUAL_RATE) -> float | None:
        """Return a value where the run's win-rate first reaches `rate` percent."""
        distance = distance_at(kls_of(row), self.rate_values(row), rate)
        curve = fit(kls_of(row), self.values(row, what))
        return None if distance is None else float(np.polyval(curve, distance))

    def differences(
        self, ours: dict[int, dict], theirs: dict[int, dict], what: str = "win_rate"
    ) -> list[float]:
        """Return, of each seed that both have, the mean difference over the KLs that both reach."""
        found = []
        for seed in sorted(set(ours) & set(theirs)):
            both = known(self.difference(ours[seed], theirs[seed], x, what) for x in self.budgets)
            if both:
                found.append(float(np.mean(both)))
        return found

    def difference(self, ours: dict, theirs: dict, nats: float, what: str) -> float | None:
        a, b = self.at(ours, nats, what), self.at(theirs, nats, what)
        return None if a is None or b is None else a - b

    def reached(self, ours: dict[int, dict], theirs: dict[int, dict]) -> list[int]:
        """Return how many seeds reach each KL with both runs: [6, 6, 4, 0]."""
        seeds = set(ours) & set(theirs)
        counts = []
        for nats in BUDGETS:
            both = [self.difference(ours[seed], theirs[seed], nats, "win_rate") for seed in seeds]
            counts.append(len(known(both)))
        return counts


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def mean_and_interval(values: Sequence[float], digits: int = 1, of: int | None = None) -> str:
    """Return "61.2 [60.1, 62.3]", with Student's interval over seeds.

    of  how many seeds there are: where fewer have a value, their number is shown
    """
    if not values:
        return "-"
    fewer = f" ({len(values)} of {of} seeds)" if of and len(values) < of else ""
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.{digits}f}{fewer or ' (1 seed)'}"
    half = quantile(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]{fewer}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def contrast_table(found: Sequence[Contrast], **more: dict[str, str]) -> str:
    """Return contrasts as a table; more: further columns, {heading: {contrast: cell}}."""
    head = [
        "contrast",
        "seeds",
        "difference, points [95%]",
        "deviation",
        "p of 0",
        "p of 3",
        "shown",
    ]
    rows = []
    for c in found:
        tests = [shown_p(c.p_zero), shown_p(c.p_margin)]
        values = [str(c), f"{c.deviation:.1f}", *tests, c.verdict]
        rows.append([c.name, str(c.seeds), *values, *(cells[c.name] for cells in more.values())])
    return table([*head, *(heading.replace("_", " ") for heading in more)], rows)


def shown_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def by_verdict(verdicts: dict[str, str]) -> str:
    """Return what each verdict was given to: "no difference: a, b; not decided: c"."""
    names: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        names.setdefault(verdict, []).append(name)
    order = sorted(names, key=lambda verdict: (verdict in UNDECIDED, verdict))
    return "; ".join(f"{verdict}: {', '.join(names[verdict])}" for verdict in order)


def decided(found: Sequence[Contrast]) -> str:
    return by_verdict({contrast.name: contrast.verdict for contrast in found})
