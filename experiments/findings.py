"""Answer the questions of experiments/claims.md from experiments/study.jsonl; nothing is trained.

    python experiments/findings.py            # the figures, docs/findings.md and the README

What is between two comments of the form `<!-- E1 -->` and `<!-- end -->` is written by this script.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import study
from matched_kl import BUDGETS, LEVEL, MARGIN, Contrast, bootstrap, contrasts, spread
from study_reading import (
    DEPENDS,
    EQUAL_RATE,
    Study,
    by_verdict,
    contrast_table,
    decided,
    known,
    mean_and_interval,
    shown_p,
    table,
)

from spo import files
from spo.config import flag, main_program, parse

DOCUMENTS = (os.path.join("docs", "findings.md"), "README.md")
RANKINGS = ("spo_rank", "dpo_rank", "spo_bon", "best_sft")
PAIRS = ("spo", "dpo", "ipo", "kto", "simpo")
BASELINES = {"spo_rank": "dpo_rank", "spo_bon": "dpo_rank", "best_sft": "dpo_rank"}
BASELINES |= {"spo": "dpo", "ipo": "dpo", "kto": "dpo", "simpo": "dpo", "dpo_rank": "dpo"}
SEEDS = range(3)
SECOND = "second_win_rate"
E1_SEEDS = range(study.EQUAL_KL_SEEDS)
Runs = dict[int, dict]  # by seed


class NoRuns(Exception):
    """A question has no runs yet."""


@dataclass
class FindingsConfig:
    rows: str = flag(study.ROWS, "the runs; of another file, the answers are only printed")
    figures: str = flag("experiments", "the folder of the figures")
    check: bool = flag(
        False, "only compare the documents with the runs: exit code 2 if they differ"
    )


def needs(*runs) -> None:
    if not all(runs):
        raise NoRuns


def cells_at(runs: Study, rows: Runs, nats: float = 2.0, what: str = "win_rate") -> str:
    """Return the mean over seeds at a KL, with its interval."""
    values = known(runs.at(row, nats, what) for row in rows.values())
    return mean_and_interval(values, of=len(rows))


def first_seeds(by_name: dict) -> dict:
    """Keep seeds 0, 1 and 2 of runs by name: every setting has them, some have more."""
    return {n: {s: row for s, row in rows.items() if s in SEEDS} for n, rows in by_name.items()}


# --- E6: gradients -------------------------------------------------------------------------------


def mean_cosines(runs: Study, place: int, which: str) -> np.ndarray:
    return np.mean([row["steps"][place][which] for row in runs.cosines], 0)


def pair_cosines(runs: Study, place: int, which: str) -> list[float]:
    """Return the cosines of two different pairwise losses on one batch, means over seeds."""
    losses = runs.cosines[0]["cosines"]["losses"]
    places = [losses.index(loss) for loss in PAIRS]
    matrix = mean_cosines(runs, place, which)
    return [matrix[i, j] for i in places for j in places if i < j]


def e6_answer(runs: Study) -> str:
    needs(runs.cosines)
    losses, seeds = runs.cosines[0]["cosines"]["losses"], len(runs.cosines)
    places = [losses.index(loss) for loss in PAIRS]
    found = []
    for place, step in ((0, 0), (1, 20)):
        two = [
            np.mean([row["steps"][place]["raw_two_batches"][i] for i in places])
            for row in runs.cosines
        ]
        pair = float(np.mean(pair_cosines(runs, place, "raw")))
        found.append(f"at step {step} {pair:.2f}, and of one on two batches {np.mean(two):.2f}")
    what = "Mean cosine of the gradients of two pairwise losses on one batch"
    return f"**{what}: {'; '.join(found)}** ({seeds} seeds)."


def e6(runs: Study) -> str:
    answer = e6_answer(runs)
    losses = runs.cosines[0]["cosines"]["losses"]
    rows = []
    for place, step in enumerate((0, 20)):
        for which, name in (("raw", "gradient"), ("scaled", "scaled as by AdamW")):
            matrix = mean_cosines(runs, place, which)
            pairs = pair_cosines(runs, place, which)
            others = [matrix[i, j] for i in range(len(losses)) for j in range(i)]
            two = np.mean([r["steps"][place][f"{which}_two_batches"] for r in runs.cosines], 0)
            rankings = matrix[losses.index("spo_rank"), losses.index("dpo_rank")]
            cells = [
                f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (pairs, others, two)
            ]
            rows.append([str(step), name, cells[0], f"{rankings:.2f}", *cells[1:]])
    head = ["step", "of what", "two pairwise losses, one batch", "spo_rank and dpo_rank, one batch"]
    head += ["any two, one batch", "one loss, two batches"]
    brackets = "in brackets the smallest and the largest of these means"
    seeds = f"Means over {len(runs.cosines)} seeds; {brackets}."
    return f"{answer}\n\n{seeds}\n\n{table(head, rows)}"


# --- E0: noise -----------------------------------------------------------------------------------


def e0_answer(runs: Study) -> str:
    values = known(runs.at(row, 2.0) for row in runs.runs("dpo_rank").values())
    needs(len(values) > 2)
    deviation, low, high = spread(values)
    size = f"{deviation:.1f} points [{low:.1f}, {high:.1f}]"
    return f"**The deviation of dpo_rank's win-rate at 2 nats over {len(values)} seeds is {size}.**"


def e0(runs: Study) -> str:
    answer, rows = e0_answer(runs), []
    for nats in BUDGETS:
        values = known(runs.at(row, nats) for row in runs.runs("dpo_rank").values())
        deviation, low, high = spread(values)
        between = "[{:.1f}, {:.1f}]".format(*bootstrap(values))
        over_seeds = f"{deviation:.1f} [{low:.1f}, {high:.1f}]"
        mean = mean_and_interval(values)
        rows.append([f"{nats:g}", mean, between, over_seeds, str(len(values))])
    head = ["nats", "win-rate, % [95%]", "bootstrap", "deviation over seeds [95%]", "seeds"]
    return f"{answer}\n\n{table(head, rows)}"


# --- E1: equal KL --------------------------------------------------------------------------------


def e1_pairs(runs: Study) -> dict[str, tuple[Runs, Runs]]:
    """Return {contrast: (runs, the baseline's)}."""
    rows = {loss: runs.runs(loss, E1_SEEDS) for loss in BASELINES | {"dpo": ""}}
    return {f"{loss} - {base}": (rows[loss], rows[base]) for loss, base in BASELINES.items()}


def e1_contrasts(runs: Study, what: str = "win_rate", without: int | None = None) -> list[Contrast]:
    """without: a seed that is left out"""
    found = {}
    for name, (ours, theirs) in e1_pairs(runs).items():
        ours = {seed: row for seed, row in ours.items() if seed != without}
        found[name] = runs.differences(ours, theirs, what)
    return contrasts(found)


@functools.cache
def e1_readings(runs: Study) -> dict[str, list[Contrast]]:
    """Return the contrasts in every reading of the runs: as claims.md says, and three others."""
    return {
        "as claimed": e1_contrasts(runs),
        "without seed 0": e1_contrasts(runs, without=0),
        "without 0.5 nats": e1_contrasts(runs.reading(budgets=BUDGETS[1:])),
        "by straight lines": e1_contrasts(runs.reading(straight=True)),
    }


def in_every_reading(runs: Study) -> dict[str, str]:
    """Return, of each contrast, the verdict of all readings, or that it depends on them."""
    verdicts: dict[str, set[str]] = {}
    for found in e1_readings(runs).values():
        for contrast in found:
            verdicts.setdefault(contrast.name, set()).add(contrast.verdict)
    return {name: given.pop() if len(given) == 1 else DEPENDS for name, given in verdicts.items()}


def compared_up_to(runs: Study) -> dict[str, str]:
    """Return, of each contrast, the largest KL that all its seeds reach with both objectives."""
    found = {}
    for name, both in e1_pairs(runs).items():
        counts = runs.reached(*both)
        seeds = len(set(both[0]) & set(both[1]))
        nats = max(x for x, count in zip(BUDGETS, counts, strict=True) if count == seeds)
        found[name] = f"{nats:g} nat{'' if nats == 1 else 's'}"
    return found


def e1_answer(runs: Study) -> str:
    everywhere = in_every_reading(runs)
    needs(everywhere)
    up_to = compared_up_to(runs)
    named = {f"{name} (up to {up_to[name]})": verdict for name, verdict in everywhere.items()}
    return f"**Of {len(named)} contrasts at equal KL, in every reading:** {by_verdict(named)}."


def e1(runs: Study) -> str:
    answer, rows = e1_answer(runs), []
    for loss in (*RANKINGS, *PAIRS):
        mine = runs.runs(loss, E1_SEEDS)
        shown = [cells_at(runs, mine, nats) for nats in BUDGETS]
        rows.append([loss, *shown, cells_at(runs, mine, 2.0, SECOND)])
    head = ["objective", *(f"at {nats:g}" for nats in BUDGETS), "second judge, at 2"]
    second = {c.name: str(c) for c in e1_contrasts(runs, SECOND)}
    reached = {n: " ".join(map(str, runs.reached(*both))) for n, both in e1_pairs(runs).items()}
    more = {"seeds_at_0.5_1_2_4_nats": reached, "second_judge,_points": second}
    tested = contrast_table(e1_contrasts(runs), **more)
    title = "Win-rates over the reference, %, at 0.5 to 4 nats:"
    blocks = [answer, title, table(head, rows), gain(runs), tested, margin(runs), readings(runs)]
    return "\n\n".join([*blocks, by_kl(runs), rates(runs)])


def margin(runs: Study) -> str:
    """Return the margin as a share of dpo's gain."""
    gains = [known(runs.at(row, x) for row in runs.runs("dpo", E1_SEEDS).values()) for x in BUDGETS]
    means = [float(np.mean(values)) - 50 for values in gains]
    average = f"{100 * MARGIN / np.mean(means):.0f}% of what dpo gains over 50% on average"
    first = f"{100 * MARGIN / means[0]:.0f}% at 0.5 nats"
    return f"The margin of {MARGIN:g} points is {average}, and {first}."


def readings(runs: Study) -> str:
    """Return the verdicts in every reading, with the p of a difference as large as the margin."""
    found = e1_readings(runs)
    cells: dict[str, list[str]] = {}
    for contrasts_there in found.values():
        for c in contrasts_there:
            cells.setdefault(c.name, []).append(f"{c.verdict} ({c.p_margin:.4f})")
    everywhere = in_every_reading(runs)
    head = ["verdict (p of a difference of 3)", *found, "in every reading"]
    lines = table(head, [[name, *mine, everywhere[name]] for name, mine in cells.items()])
    needed = f"'No difference' needs a p below {LEVEL / 2:g}. Seed 0 chose the learning rates."
    return f"The same in other readings. {needed}\n\n{lines}"


def gain(runs: Study) -> str:
    """Return how many points above 50% the preference losses win, over sqrt(KL)."""
    rows = [row for loss in BASELINES | {"dpo": ""} for row in runs.runs(loss, E1_SEEDS).values()]
    rows = [row for row in rows if row["run"]["loss"] != "best_sft"]
    cells = []
    for nats in BUDGETS:
        values = known(runs.at(row, nats) for row in rows)
        points = (np.mean(values) - 50) / nats**0.5
        cells.append(f"{points:.1f} at {nats:g}")
    what = "Points above 50% over sqrt(KL), mean of all runs but best_sft's, by nats"
    return f"{what}: {', '.join(cells)}."


def by_kl(runs: Study) -> str:
    """Return every contrast at each KL by itself, uncorrected."""
    rows = []
    for name, (ours, theirs) in e1_pairs(runs).items():
        seeds, cells = sorted(set(ours) & set(theirs)), []
        for nats in BUDGETS:
            both = [runs.difference(ours[s], theirs[s], nats, "win_rate") for s in seeds]
            cells.append(mean_and_interval(known(both), of=len(seeds)))
        rows.append([name, *cells])
    head = ["points, uncorrected", *(f"at {nats:g}" for nats in BUDGETS)]
    return f"The same by nats:\n\n{table(head, rows)}"


def rates(runs: Study) -> str:
    """Return what each learning rate had on the half that chose it."""
    tried = []
    for loss in study.LOSSES:
        values = [(rate, runs.choosing_rate(loss, rate)) for rate in study.RATES[loss]]
        shown = [f"{rate:g}: {'-' if value is None else f'{value:.1f}'}" for rate, value in values]
        tried.append([loss, *shown, f"{runs.rates[loss]:g}"])
    head = ["objective", "tried: win-rate at 2 nats", "tried", "chosen"]
    return f"Learning rates, by half of seed 0's stories:\n\n{table(head, tried)}"


# --- E4: softness --------------------------------------------------------------------------------

DEFAULTS = {"spo_rank": "alpha=0.001", "spo": "alpha=0.001", "dpo": "beta=0.1"}
SOFT = {  # what is compared: objective, regularizer, its settings; "" is the default
    "spo_rank": ("spo_rank", "", ("alpha=0", "", "alpha=0.1", "alpha=1")),
    "spo": ("spo", "", ("alpha=0", "", "alpha=0.1", "alpha=1")),
    "spo_rank without KL": ("spo_rank", "none", ("alpha=0.001", "alpha=0.1", "alpha=1")),
    "dpo": ("dpo", "", ("beta=0.01", "", "beta=1")),
}
SOFTNESS = {"entropy": "entropy, nats a token", "best_of_16": "best of 16"}
CLAIMED = ("spo_rank, alpha=0.1", "spo_rank, alpha=1")


def soft_runs(runs: Study) -> dict[tuple[str, str], Runs]:
    """Return the runs of E4 by (name, setting), those that are there."""
    found = {}
    for name, (loss, regularizer, settings) in SOFT.items():
        for setting in settings:
            rows = runs.runs(loss, settings=setting, regularizer=regularizer)
            if rows:
                found[name, setting or DEFAULTS[loss]] = rows
    return found


def against_default(runs: Study) -> dict[str, list[tuple[dict, dict]]]:
    """Return, of each setting, the pairs (its run, its default's run of the same seed)."""
    soft, found = soft_runs(runs), {}
    for (name, setting), rows in soft.items():
        base = soft.get((name, DEFAULTS[SOFT[name][0]]), {})
        if rows is not base:
            seeds = sorted(set(rows) & set(base))
            found[f"{name}, {setting}"] = [(rows[seed], base[seed]) for seed in seeds]
    return found


def e4_differences(runs: Study, what: str, seeds: range = E1_SEEDS) -> dict[str, list[float]]:
    """Return, of each setting, its value minus its default's at equal win-rate, by seed."""
    found = {}
    for name, pairs in against_default(runs).items():
        pairs = [(a, b) for a, b in pairs if a["run"]["seed"] in seeds]
        both = [(runs.at_equal_rate(a, what), runs.at_equal_rate(b, what)) for a, b in pairs]
        found[name] = [a - b for a, b in both if None not in (a, b)]
    return found


def costs_at_2_nats(runs: Study) -> dict[str, list[float]]:
    """Return, of each setting, its win-rate at 2 nats minus its default's, by seed."""
    return {
        name: known(runs.difference(a, b, 2.0, "win_rate") for a, b in pairs)
        for name, pairs in against_default(runs).items()
    }


def e4_claimed(runs: Study, seeds: range = E1_SEEDS) -> dict[tuple[str, str], Contrast]:
    """Return the four contrasts that claims.md names, by (setting, measure)."""
    claimed = {}
    for what in SOFTNESS:
        differences = e4_differences(runs, what, seeds)
        for c in contrasts({name: differences.get(name, []) for name in CLAIMED}, margin=0.0):
            c.p_zero = min(1.0, len(SOFTNESS) * c.p_zero)  # two measures, each a family of two
            claimed[c.name, what] = c
    return claimed


def e4_answer(runs: Study) -> str:
    claimed = e4_claimed(runs)
    needs(len(claimed) == len(CLAIMED) * len(SOFTNESS))
    entropy, best = (claimed["spo_rank, alpha=1", what] for what in SOFTNESS)
    costs = {c.name: c for c in contrasts(costs_at_2_nats(runs))}
    cost = costs["spo_rank, alpha=1"]
    more = f"{entropy.mean:+.3f} [{entropy.low:+.3f}, {entropy.high:+.3f}] nats of entropy a token"
    story = f"{best.mean:+.2f} [{best.low:+.2f}, {best.high:+.2f}] of score for the best of 16"
    gained = f"Alpha 1 in place of 0.001 in spo_rank, at equal win-rate: {more}, {story}"
    return f"**{gained}; and {cost} points of win-rate at 2 nats** ({entropy.seeds} seeds)."


def e4(runs: Study) -> str:
    answer, rows = e4_answer(runs), []
    for (name, setting), mine in first_seeds(soft_runs(runs)).items():
        cells = []
        for what, digits in (("entropy", 2), ("best_of_16", 2), ("distinct_4grams", 1)):
            values = known(runs.at_equal_rate(row, what) for row in mine.values())
            cells.append(mean_and_interval(values, digits, of=len(mine)))
        nats = known(runs.at_equal_rate(row, "kl") for row in mine.values())
        at_2 = [cells_at(runs, mine), cells_at(runs, mine, 2.0, SECOND)]
        rows.append([name, setting, f"{np.mean(nats):.1f}" if nats else "-", *cells, *at_2])
    head = ["objective", "setting", "nats", *SOFTNESS.values(), "distinct 4-grams, %"]
    head += ["win-rate at 2 nats", "second judge at 2 nats"]
    claimed = [
        [
            setting,
            SOFTNESS[what],
            str(c.seeds),
            f"{c.mean:+.3f} [{c.low:+.3f}, {c.high:+.3f}]",
            shown_p(c.p_zero),
        ]
        for (setting, what), c in e4_claimed(runs).items()
    ]
    later = e4_differences(runs, "entropy", E1_SEEDS[len(SEEDS) :])
    shown = (f"{name} {mean_and_interval(later[name], 3)}" for name in CLAIMED)
    first = e4_claimed(runs, SEEDS)["spo_rank, alpha=1", "entropy"]
    added = f"By seeds 0 to 2 alone, p of alpha 1 and entropy was {shown_p(first.p_zero)}. "
    added += f"Entropy by the seeds that were then added, 3 to 5: {', '.join(shown)}."
    tested = table(
        ["minus the default (0.001)", "of what", "seeds", "difference [95%]", "p of 0"], claimed
    )
    where = f"Seeds 0 to 2, where the win-rate first reaches {EQUAL_RATE:g}%:"
    cost = ["Not in the claims, win-rates at 2 nats minus the default's:"]
    cost.append(contrast_table(contrasts(costs_at_2_nats(runs))))
    start = known(runs.values(row, "entropy")[0] for row in runs.runs("spo_rank", SEEDS).values())
    began = f"The reference's own entropy: {mean_and_interval(start, 2)}."
    return "\n\n".join([answer, tested, added, where, table(head, rows), began, *cost])


# --- E4: Theorem 1 -------------------------------------------------------------------------------


def theorem_runs(runs: Study, alpha: str) -> Runs:
    spec = {"settings": f"alpha={alpha}", "regularizer": "none", "labels": "bradley_terry"}
    return runs.runs("spo_basic", **spec, to_the_end=True)


def at_step(rows: Runs, step: int, what: str) -> list[float]:
    points = [point for row in rows.values() for point in row["checkpoints"]]
    return [point[what] for point in points if point["step"] == step]


def theorem_answer(runs: Study) -> str:
    ends = []
    for alpha in ("0.1", "1"):
        mine = theorem_runs(runs, alpha)
        needs(len(mine) > 1)
        start, end = (mean_and_interval(at_step(mine, step, "slope"), 2) for step in (0, 40))
        ends.append(f"from {start} to {end} at alpha {alpha}")
    goes = f"The slope, which is 1 at Theorem 1's minimum, goes {' and '.join(ends)}"
    return f"**{goes}**, in 40 steps ({len(mine)} seeds)."


def theorem(runs: Study) -> str:
    answer, rows = theorem_answer(runs), []
    for alpha in ("0.1", "1"):
        mine = theorem_runs(runs, alpha)
        for step in (0, 12, 40):
            named = [("slope", 2), ("r2", 3), ("error", 1), ("kl", 1)]
            cells = [mean_and_interval(at_step(mine, step, what), d) for what, d in named]
            rate = [100 * value for value in at_step(mine, step, "win_rate")]
            rows.append([alpha, str(step), *cells, mean_and_interval(rate)])
    head = ["alpha", "step", "slope", "R^2 of the line", "rms distance from the theorem's line"]
    return f"{answer}\n\n{table([*head, 'KL, nats', 'win-rate, %'], rows)}"


# --- E2: label noise -----------------------------------------------------------------------------

NOISY = ("spo_rank", "dpo_rank", "best_sft", "spo", "dpo", "ipo", "kto")
ROBUST = ("dpo_robust", "cdpo")
NOISES = (0.0, 0.2, 0.4)


def noisy_runs(runs: Study, method: str, noise: float) -> Runs:
    if method in ROBUST:
        return runs.runs(method, noise=noise, settings=f"label_smoothing={noise:g}")
    return runs.runs(method, noise=noise)


def signal_left(method: str, noise: float) -> float:
    """Return how much of the labels' signal noise leaves: a flipped pair says the opposite, a
    shuffled ranking says nothing.
    """
    return 1 - (1 if method in RANKINGS else 2) * noise


def e2(runs: Study) -> str:
    rows, costs = [], {}
    for method in (*NOISY, *ROBUST):
        by_noise = first_seeds({noise: noisy_runs(runs, method, noise) for noise in NOISES})
        if any(by_noise[noise] for noise in NOISES[1:]):
            cells = [cells_at(runs, by_noise[noise]) for noise in NOISES]
            kind = "rankings shuffled" if method in RANKINGS else "pairs flipped"
            rows.append([method, kind, *cells])
        if method in NOISY:
            cost = runs.differences(by_noise[0.4], by_noise[0.0])
            costs[f"{method}, 40% noise - none"] = cost
    needs(rows)
    dpo = noisy_runs(runs, "dpo", 0.4)

    def against_dpo(*methods: str) -> dict[str, list[float]]:
        return {
            f"{method} - dpo, 40% noise": runs.differences(noisy_runs(runs, method, 0.4), dpo)
            for method in methods
        }

    claimed = contrasts(against_dpo("spo", "dpo_robust"))
    others = contrasts(costs | against_dpo("ipo", "kto", "cdpo"))
    blocks = ["Win-rates at 2 nats, %, seeds 0 to 2:"]
    blocks.append(table(["objective", "noise", "none", "20%", "40%"], rows))
    if claimed:
        blocks.insert(0, f"**At 40% flipped pairs:** {decided(claimed)}.")
        blocks.append(contrast_table(claimed))
    if others:
        blocks += ["Not in the claims, at equal KL:", contrast_table(others)]
    return "\n\n".join(blocks)


# --- E3, E5, E7 ----------------------------------------------------------------------------------

SIZES = ((64, 40), (256, 40), (0, 40), (256, 16), (2560, 160))  # groups (0: all), steps


def e3(runs: Study) -> str:
    rows, used = [], study.study_run.GROUPS_PER_STEP * 40
    for loss in ("spo_rank", "dpo_rank", "spo", "dpo"):
        found = [runs.runs(loss, num_groups=groups, steps=steps) for groups, steps in SIZES]
        if any(found[:2] + found[3:]):
            rows.append([loss, *(cells_at(runs, mine) for mine in found)])
    adjacent = runs.runs("dpo", labels="adjacent")
    needs(rows or adjacent)
    named = [f"{groups or used:,} groups, {steps} steps" for groups, steps in SIZES]
    same = runs.differences(runs.runs("dpo_rank"), adjacent)
    found = contrasts({"dpo_rank - dpo on the ranking's three neighbouring pairs": same})
    blocks = ["Win-rates at 2 nats, %:", table(["objective", *named], rows)] if rows else []
    return "\n\n".join([*blocks, contrast_table(found)])


def e5(runs: Study) -> str:
    specs = {"gamma 0": {"settings": "gamma=0"}, "gamma 1": {"settings": "gamma=1"}}
    specs |= {f"T = {t}": {"kl_interval": t} for t in (1, 40)}
    specs |= {f"{n} samples": {"kl_batch_size": n} for n in (8, 128)}
    default = runs.runs("spo_rank")
    differences = {
        f"{name} - default": runs.differences(runs.runs("spo_rank", **spec), default)
        for name, spec in specs.items()
    }
    found = contrasts(differences)
    needs(found)
    return f"**spo_rank, {found[0].seeds} seeds:** {decided(found)}.\n\n{contrast_table(found)}"


def second_judge_falls(runs: Study) -> list[Contrast]:
    """Return, of every objective, the second judge's win-rate at 4 nats minus that at 1 nat."""
    falls = {}
    for loss in (*RANKINGS, *PAIRS):
        rows = runs.runs(loss).values()
        both = [(runs.at(row, 4.0, SECOND), runs.at(row, 1.0, SECOND)) for row in rows]
        falls[loss] = [later - early for later, early in both if None not in (later, early)]
    return contrasts(falls)


def e7_answer(runs: Study) -> str:
    found = second_judge_falls(runs)
    needs(found)
    return f"**By the second judge, a policy at 4 nats against one at 1 nat:** {decided(found)}."


def e7(runs: Study) -> str:
    blocks = [e7_answer(runs), contrast_table(second_judge_falls(runs))]
    rows = []
    for loss in ("spo_rank", "dpo_rank"):
        mine = runs.runs(loss, steps=study.LONG, to_the_end=True)
        for step in (5, 12, 18, 27, 40, 60, 90, 120, 160) if mine else ():
            named = ((1, "kl"), (100, "win_rate"), (100, SECOND))
            cells = [[scale * x for x in at_step(mine, step, name)] for scale, name in named]
            rows.append([loss, str(step), *map(mean_and_interval, cells)])
    if rows:
        head = ["objective", "step", "KL, nats", "win-rate, %", "second judge, %"]
        blocks.append(table(head, rows))
    return "\n\n".join(blocks)


QUESTIONS = {
    "E6": e6,
    "E0": e0,
    "E1": e1,
    "E4": e4,
    "theorem": theorem,
    "E2": e2,
    "E3": e3,
    "E5": e5,
    "E7": e7,
}
ANSWERS = (e6_answer, e4_answer)


# --- the documents -------------------------------------------------------------------------------


def summary(runs: Study) -> str:
    """Return the README's table: what is shown of every objective at equal KL."""
    found = e1_contrasts(runs)
    needs(found)
    seeds = " or ".join(sorted({str(contrast.seeds) for contrast in found}))
    everywhere = in_every_reading(runs)
    up_to = compared_up_to(runs)
    head = [f"at equal KL, {seeds} seeds", "points of win-rate [95%]", "all seeds up to"]
    rows = [[c.name, str(c), up_to[c.name], everywhere[c.name]] for c in found]
    return table([*head, "shown in every reading"], rows)


def answers(runs: Study) -> str:
    """Return the README's list: a sentence for each question that has an answer."""
    found = [block_of(answer, runs) for answer in ANSWERS]
    return "\n".join(f"- {answer}" for answer in found if answer != NOTHING)


BLOCKS = QUESTIONS | {"summary": summary, "answers": answers}
NOTHING = "No runs yet."


def block_of(function: Callable[[Study], str], runs: Study) -> str:
    try:
        return function(runs)
    except NoRuns:
        return NOTHING


def rewritten(path: str, runs: Study) -> str:
    """Return a document with every block between its comments made anew."""
    with open(path, encoding="utf-8") as f:
        text = f.read()

    def block(match: re.Match) -> str:
        if match[1] not in BLOCKS:
            raise ValueError(f"{path}: <!-- {match[1]} -->: no such block; {', '.join(BLOCKS)}")
        return f"<!-- {match[1]} -->\n{block_of(BLOCKS[match[1]], runs)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?\n?<!-- end -->", block, text, flags=re.DOTALL)


def draw(runs: Study, folder: str) -> None:
    """Draw the figures of the questions that have runs."""
    import study_figures as figures

    def path(name: str) -> str:
        return os.path.join(folder, f"{name}.png")

    def at_2(rows: Runs) -> list[float]:
        return known(runs.at(row, 2.0) for row in rows.values())

    if runs.cosines:
        losses = runs.cosines[0]["cosines"]["losses"]
        titles = ((0, "raw", "step 0"), (1, "raw", "step 20"), (1, "scaled", "step 20, scaled"))
        matrices = {title: mean_cosines(runs, place, which) for place, which, title in titles}
        figures.draw_cosines(matrices, losses, path("cosines"))
    if found := e1_contrasts(runs):
        families = {"rankings, best of n": RANKINGS, "pairs": PAIRS}
        shown = {
            title: {loss: runs.runs(loss, E1_SEEDS) for loss in losses}
            for title, losses in families.items()
        }
        figures.draw_curves(runs, shown, path("equal_kl"))
        figures.draw_forest(found, path("contrasts"))
    soft = first_seeds(soft_runs(runs))
    if soft := {key: rows for key, rows in soft.items() if key[0] != "dpo"}:
        entropy: dict[str, dict[str, list[float]]] = {}
        rate: dict[str, dict[str, list[float]]] = {}
        for (name, setting), rows in soft.items():
            alpha = setting.removeprefix("alpha=")
            values = known(runs.at_equal_rate(row, "entropy") for row in rows.values())
            entropy.setdefault(name, {})[alpha] = values
            rate.setdefault(name, {})[alpha] = at_2(rows)
        label = f"entropy at a win-rate of {EQUAL_RATE:g}%,\nnats a token"
        panels = {label: entropy, "win-rate at 2 nats, %": rate}
        figures.draw_softness(panels, path("softness"))
    noise = {
        method: {
            signal_left(method, x): at_2(rows)
            for x, rows in first_seeds({x: noisy_runs(runs, method, x) for x in NOISES}).items()
        }
        for method in (*NOISY, *ROBUST)
        if noisy_runs(runs, method, 0.4)
    }
    if noise:
        label = "share of the labels' signal that the noise leaves"
        figures.draw_by_x(noise, label, path("noise"))
    sizes = {
        loss: {n or 640: at_2(runs.runs(loss, num_groups=n)) for n in (64, 256, 0)}
        for loss in ("spo_rank", "dpo_rank", "spo", "dpo")
    }
    if any(points[64] for points in sizes.values()):
        figures.draw_by_x(sizes, "groups, 40 steps", path("data_size"), xscale="log")


def main(argv: list[str]) -> None:
    config = parse(FindingsConfig, argv, "findings.py", "Answers, from the runs of study.py.")
    runs = Study(study.read_rows(config.rows))
    if os.path.abspath(config.rows) != study.ROWS:  # the documents are of the project's own runs
        for name, function in QUESTIONS.items():
            print(f"\n## {name}\n\n{block_of(function, runs)}")
        return
    texts = {name: rewritten(os.path.join(ROOT, name), runs) for name in DOCUMENTS}
    if config.check:
        for name, text in texts.items():
            with open(os.path.join(ROOT, name), encoding="utf-8") as f:
                if f.read() != text:
                    raise ValueError(f"{name}: not what {config.rows} says; run findings.py")
    else:
        for name, text in texts.items():
            files.write_text(os.path.join(ROOT, name), text)
        draw(runs, config.figures)
    said = "as the runs say" if config.check else "written"
    print(f"{len(runs.rows)} runs; {', '.join(DOCUMENTS)}: {said}")


if __name__ == "__main__":
    main_program(main)
