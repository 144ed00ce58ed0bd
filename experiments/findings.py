"""Answer the questions of experiments/claims.md from experiments/study.jsonl; nothing is trained.

    python experiments/findings.py            # the figures, docs/findings.md and the README

What is between two comments of the form `<!-- E1 -->` and `<!-- end -->` is written by this script.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import study
from matched_kl import BUDGETS, Contrast, bootstrap, contrasts, spread
from study_reading import (
    EQUAL_RATE,
    Study,
    contrast_table,
    decided,
    known,
    mean_and_interval,
    table,
)

from spo import files, plot
from spo.config import flag, main_program, parse

DOCUMENTS = (os.path.join("docs", "findings.md"), "README.md")
RANKINGS = ("spo_rank", "dpo_rank", "spo_bon", "best_sft")
PAIRS = ("spo", "dpo", "ipo", "kto", "simpo")
BASELINES = {"spo_rank": "dpo_rank", "spo_bon": "dpo_rank", "best_sft": "dpo_rank"}
BASELINES |= {"spo": "dpo", "ipo": "dpo", "kto": "dpo", "simpo": "dpo", "dpo_rank": "dpo"}
SEEDS = range(3)
E1_SEEDS = range(study.EQUAL_KL_SEEDS)
COLORS = dict(zip((*RANKINGS, *PAIRS), (*plot.COLORS[:4], *plot.COLORS[:5]), strict=True))


@dataclass
class FindingsConfig:
    rows: str = flag(study.ROWS, "the runs")
    figures: str = flag("experiments", "the folder of the figures")
    check: bool = flag(
        False, "only compare the documents with the runs; exit code 2 if they differ"
    )


# --- the questions -------------------------------------------------------------------------------


def e6(runs: Study) -> str:
    """Return the cosines of gradients, as means over seeds."""
    if not runs.cosines:
        return "No runs yet."
    losses = runs.cosines[0]["cosines"]["losses"]
    rows = []
    for place, step in enumerate((0, 20)):
        for which, name in (("raw", "gradient"), ("scaled", "after AdamW's scaling")):
            mean = mean_cosines(runs, place, which)
            pairs = [losses.index(loss) for loss in PAIRS]
            upper = [mean[i, j] for i in pairs for j in pairs if i < j]
            others = [mean[i, j] for i in range(len(losses)) for j in range(i)]
            two = np.mean([r["steps"][place][f"{which}_two_batches"] for r in runs.cosines], 0)
            rows.append(
                [
                    str(step),
                    name,
                    f"{np.mean(upper):.2f} ({min(upper):.2f} to {max(upper):.2f})",
                    f"{mean[losses.index('spo_rank'), losses.index('dpo_rank')]:.2f}",
                    f"{np.mean(others):.2f} ({min(others):.2f} to {max(others):.2f})",
                    f"{two.mean():.2f} ({two.min():.2f} to {two.max():.2f})",
                ]
            )
    head = ["step", "of what", "two pairwise objectives, one batch", "spo_rank and dpo_rank"]
    head += ["any two, one batch", "one objective, two batches"]
    seeds = f"Means over {len(runs.cosines)} seeds, the smallest and largest cosine in brackets."
    return f"{e6_answer(runs)}\n\n{seeds}\n\n{table(head, rows)}"


def e6_answer(runs: Study) -> str:
    losses = runs.cosines[0]["cosines"]["losses"]
    places = [losses.index(loss) for loss in PAIRS]
    matrix = mean_cosines(runs, 0, "raw")
    pairs = np.mean([matrix[i, j] for i in places for j in places if i < j])
    two = [np.mean([r["steps"][0]["raw_two_batches"][i] for i in places]) for r in runs.cosines]
    seeds = len(runs.cosines)
    one = f"their mean cosine on one batch is {pairs:.2f}"
    other = f"that of one of them on two batches {mean_and_interval(two, 2)} ({seeds} seeds)"
    return f"**At step 0 the five pairwise objectives have one gradient:** {one}, {other}."


def mean_cosines(runs: Study, place: int, which: str) -> np.ndarray:
    return np.mean([row["steps"][place][which] for row in runs.cosines], 0)


def learning_rates(runs: Study) -> str:
    cells = [f"{loss} {rate:g}" for loss, rate in runs.rates.items() if rate and loss in COLORS]
    tried = "5e-05 and 1e-04 (best_sft: 1e-04 and 4e-04)"
    return f"Learning rates, of {tried}, chosen on half of seed 0's stories: {', '.join(cells)}."


def e0(runs: Study) -> str:
    """Return the standard deviation over seeds at each KL."""
    floor = runs.runs("dpo_rank")
    rows = []
    for nats in BUDGETS:
        values = known(runs.at(row, nats) for row in floor.values())
        if len(values) > 2:
            deviation, low, high = spread(values)
            between = bootstrap(values)
            rows.append(
                [
                    f"{nats:g}",
                    mean_and_interval(values),
                    f"[{between[0]:.1f}, {between[1]:.1f}]",
                    f"{deviation:.1f} [{low:.1f}, {high:.1f}]",
                    str(len(values)),
                ]
            )
    head = ["nats", "win-rate, % [95%]", "bootstrap", "deviation over seeds [95%]", "seeds"]
    return f"{e0_answer(runs)}\n\n{table(head, rows)}"


def e0_answer(runs: Study) -> str:
    values = at_2(runs, runs.runs("dpo_rank"))
    deviation, low, high = spread(values)
    size = f"{deviation:.1f} points [{low:.1f}, {high:.1f}]"
    return f"**The deviation of dpo_rank's win-rate at 2 nats over {len(values)} seeds is {size}.**"


def e1_contrasts(runs: Study) -> list[Contrast]:
    rows = {loss: runs.runs(loss, E1_SEEDS) for loss in BASELINES | {"dpo": ""}}
    named = {f"{loss} - {base}": (rows[loss], rows[base]) for loss, base in BASELINES.items()}
    return contrasts({name: runs.differences(*both) for name, both in named.items()})


def e1(runs: Study) -> str:
    rows = []
    for loss in (*RANKINGS, *PAIRS):
        mine = runs.runs(loss, E1_SEEDS)
        cells = [known(runs.at(row, nats) for row in mine.values()) for nats in BUDGETS]
        second = known(runs.at(row, 2.0, "second_win_rate") for row in mine.values())
        shown = [mean_and_interval(values, of=len(mine)) for values in cells]
        rows.append([loss, *shown, mean_and_interval(second, of=len(mine))])
    head = ["objective", *(f"{nats:g} nats" for nats in BUDGETS), "second judge, 2 nats"]
    rates = f"Win-rates over the reference, %, at equal KL. {learning_rates(runs)}"
    tested = contrast_table(e1_contrasts(runs))
    return f"{e1_answer(runs)}\n\n{rates}\n\n{table(head, rows)}\n\n{tested}"


def e1_answer(runs: Study) -> str:
    found = e1_contrasts(runs)
    seeds = " or ".join(sorted({str(contrast.seeds) for contrast in found}))
    return f"**Of {len(found)} contrasts, {seeds} seeds each:** {decided(found)}."


ALPHAS = ("alpha=0", "", "alpha=0.1", "alpha=1")  # "": the default, 0.001
SOFT = {  # what E4 compares: objective, regularizer, its settings
    "spo_rank": ("spo_rank", "", ALPHAS),
    "spo": ("spo", "", ALPHAS),
    "spo_rank without KL": ("spo_rank", "none", ("alpha=0.001", "alpha=0.1", "alpha=1")),
    "dpo": ("dpo", "", ("beta=0.01", "", "beta=1")),
}
SOFTNESS = ("entropy", "best_of_16", "distinct_4grams")


def soft_runs(runs: Study) -> dict[tuple[str, str], dict[int, dict]]:
    """Return the runs of E4 by (name, setting), those that are there."""
    found = {}
    for name, (loss, regularizer, settings) in SOFT.items():
        default = "beta=0.1" if loss == "dpo" else "alpha=0.001"
        for setting in settings:
            rows = runs.runs(loss, SEEDS, settings=setting, regularizer=regularizer)
            if rows:
                found[name, setting or default] = rows
    return found


def e4_contrasts(runs: Study, what: str) -> list[Contrast]:
    """Return each setting minus its objective's default (without KL: minus alpha 0.001)."""
    soft = soft_runs(runs)
    differences = {}
    for (name, setting), rows in soft.items():
        default = "beta=0.1" if name == "dpo" else "alpha=0.001"
        base = soft.get((name, default), {})
        if setting == default:
            continue
        values = []
        for seed in sorted(set(rows) & set(base)):
            both = [runs.at_equal_rate(side[seed], what) for side in (rows, base)]
            if None not in both:
                values.append(both[0] - both[1])
        differences[f"{name}, {setting}"] = values
    return contrasts(differences, margin=0.0)


def e4(runs: Study) -> str:
    rows = []
    for (name, setting), mine in soft_runs(runs).items():
        reached = [known(runs.at_equal_rate(row, w) for row in mine.values()) for w in SOFTNESS]
        rate = known(runs.at(row, 2.0) for row in mine.values())
        ends = [row["checkpoints"][-1]["kl"] for row in mine.values()]
        shown = [mean_and_interval(values, 2, of=len(mine)) for values in reached[:2]]
        shown.append(mean_and_interval(reached[2], of=len(mine)))
        end = f"{min(ends):.1f} to {max(ends):.1f}"
        rows.append([name, setting, *shown, mean_and_interval(rate, of=len(mine)), end])
    head = ["objective", "setting", "entropy, nats a token", "best of 16", "distinct 4-grams, %"]
    head += ["win-rate at 2 nats", "KL of the last checkpoint"]
    tests = [
        [c.name, what, f"{c.mean:+.3f} [{c.low:+.3f}, {c.high:+.3f}]", f"{c.p_zero:.3f}"]
        for what in SOFTNESS[:2]
        for c in e4_contrasts(runs, what)
    ]
    against = table(["minus the default", "of what", "difference [95%]", "p of 0"], tests)
    where = f"Where the win-rate first reaches {EQUAL_RATE:g}%:"
    return f"{e4_answer(runs)}\n\n{where}\n\n{table(head, rows)}\n\n{against}"


def e4_answer(runs: Study) -> str:
    parts = []
    for what, name in (("entropy", "entropy, nats a token"), ("best_of_16", "the best of 16")):
        found = {c.name: c for c in e4_contrasts(runs, what)}
        hard = found.get("spo_rank, alpha=1")
        if hard is None:
            return "No runs yet."
        size = f"{hard.mean:+.3f} [{hard.low:+.3f}, {hard.high:+.3f}], p {hard.p_zero:.2f}"
        parts.append(f"{name}: {size}")
    where = f"alpha 1 in place of 0.001 in spo_rank, both at a win-rate of {EQUAL_RATE:g}%"
    return f"**{where[0].upper()}{where[1:]}:** {'; '.join(parts)} ({hard.seeds} seeds)."


def theorem_runs(runs: Study, alpha: str) -> dict[int, dict]:
    spec = {"settings": f"alpha={alpha}", "regularizer": "none", "labels": "bradley_terry"}
    return runs.runs("spo_basic", SEEDS, **spec, to_the_end=True)


def slopes(rows: dict[int, dict], step: int) -> list[float]:
    points = [point for row in rows.values() for point in row["checkpoints"]]
    return [point["slope"] for point in points if point["step"] == step]


def theorem(runs: Study) -> str:
    rows = []
    for alpha in ("0.1", "1"):
        mine = theorem_runs(runs, alpha)
        cells = [mean_and_interval(slopes(mine, step), 3) for step in (0, 12, 40)]
        last = [row["checkpoints"][-1] for row in mine.values()]
        cells.append(mean_and_interval([p["kl"] for p in last]))
        cells.append(mean_and_interval([100 * p["win_rate"] for p in last]))
        rows.append([alpha, *cells])
    head = [
        "alpha",
        "slope at step 0",
        "step 12",
        "step 40",
        "KL at step 40",
        "win-rate at step 40",
    ]
    return f"{theorem_answer(runs)}\n\n{table(head, rows)}"


def theorem_answer(runs: Study) -> str:
    ends = []
    for alpha in ("0.1", "1"):
        mine = theorem_runs(runs, alpha)
        start, end = (mean_and_interval(slopes(mine, step), 2) for step in (0, 40))
        ends.append(f"from {start} to {end} at alpha {alpha}")
    goes = f"The slope, 1 at Theorem 1's minimum, goes {' and '.join(ends)}"
    return f"**{goes}**, in 40 steps ({len(theorem_runs(runs, '1'))} seeds)."


NOISY = ("spo_rank", "dpo_rank", "spo", "dpo", "ipo", "kto", "best_sft")


def noisy_runs(runs: Study, method: str, noise: float) -> dict[int, dict]:
    if method in NOISY:
        return runs.runs(method, SEEDS, noise=noise)
    return runs.runs(method, SEEDS, noise=noise, settings=f"label_smoothing={noise:g}")


def e2(runs: Study) -> str:
    rows = []
    for method in (*NOISY, "dpo_robust", "cdpo"):
        by_noise = [noisy_runs(runs, method, noise) for noise in (0.0, 0.2, 0.4)]
        cells = [known(runs.at(row, 2.0) for row in some.values()) for some in by_noise]
        if any(by_noise[1:]):
            rows.append([method, *(mean_and_interval(values) for values in cells)])
    clean, noisy = noisy_runs(runs, "dpo", 0.0), noisy_runs(runs, "dpo", 0.4)
    differences = {
        f"{method} - dpo, 40% flipped": runs.differences(noisy_runs(runs, method, 0.4), noisy)
        for method in ("spo", "ipo", "kto", "dpo_robust", "cdpo")
    }
    differences["dpo, 40% flipped - none"] = runs.differences(noisy, clean)
    head = ["objective", "no noise", "20%", "40%"]
    tested = contrasts(differences)
    at = "Win-rates at 2 nats, %."
    return f"{at}\n\n{table(head, rows)}\n\n{contrast_table(tested)}" if rows else "No runs yet."


def e3(runs: Study) -> str:
    rows = []
    for loss in ("spo_rank", "dpo_rank", "spo", "dpo"):
        sizes = [(64, 40), (256, 40), (0, 40), (256, 16), (2560, 160)]
        cells = []
        for groups, steps in sizes:
            mine = runs.runs(loss, SEEDS, num_groups=groups, steps=steps)
            cells.append(mean_and_interval(known(runs.at(row, 2.0) for row in mine.values())))
        if any(cell != "-" for cell in cells[:2] + cells[3:]):
            rows.append([loss, *cells])
    adjacent = runs.runs("dpo", SEEDS, labels="adjacent")
    if not rows and not adjacent:
        return "No runs yet."
    found = contrasts(
        {"dpo_rank - dpo on three pairs": runs.differences(runs.runs("dpo_rank"), adjacent)}
    )
    head = ["objective", "64 groups, 40 steps", "256, 40", "640, 40", "256, 16", "2,560, 160"]
    return f"Win-rates at 2 nats, %.\n\n{table(head, rows)}\n\n{contrast_table(found)}"


def e5(runs: Study) -> str:
    specs = {"default": {}, "gamma 0": {"settings": "gamma=0"}, "gamma 1": {"settings": "gamma=1"}}
    specs |= {f"T = {t}": {"kl_interval": t} for t in (1, 40)}
    specs |= {f"{n} samples": {"kl_batch_size": n} for n in (8, 128)}
    by_name = {name: runs.runs("spo_rank", SEEDS, **spec) for name, spec in specs.items()}
    default = by_name.pop("default")
    differences = {
        f"{name} - default": runs.differences(rows, default) for name, rows in by_name.items()
    }
    found = contrasts(differences)
    return contrast_table(found) if found else "No runs yet."


def e7(runs: Study) -> str:
    rows = []
    for loss in ("spo_rank", "dpo_rank"):
        mine = runs.runs(loss, SEEDS, steps=study.LONG, to_the_end=True)
        for step in (5, 12, 18, 27, 40, 60, 90, 120, 160) if mine else ():
            points = [p for row in mine.values() for p in row["checkpoints"] if p["step"] == step]
            named = [(1, "kl"), (100, "win_rate"), (100, "second_win_rate")]
            cells = [mean_and_interval([k * p[name] for p in points]) for k, name in named]
            rows.append([loss, str(step), *cells])
    head = ["objective", "step", "KL, nats", "win-rate, %", "second judge, %"]
    return table(head, rows) if rows else "No runs yet."


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

ANSWERS = (e6_answer, e4_answer, theorem_answer)


# --- the documents -------------------------------------------------------------------------------


def summary(runs: Study) -> str:
    """Return the README's table: what is shown of every objective at equal KL."""
    head = ["at equal KL", "points of win-rate [95%]", "shown"]
    return table(head, [[c.name, str(c), c.verdict] for c in e1_contrasts(runs)])


def answers(runs: Study) -> str:
    """Return the README's list: one sentence for each question that has an answer."""
    return "\n".join(f"- {answer(runs)}" for answer in ANSWERS)


def rewritten(path: str, blocks: dict[str, Callable[[Study], str]], runs: Study) -> str:
    """Return a document with every block between its comments made anew."""
    with open(path, encoding="utf-8") as f:
        text = f.read()

    def block(match: re.Match) -> str:
        if match[1] not in blocks:
            raise ValueError(f"{path}: <!-- {match[1]} -->: no such block; {', '.join(blocks)}")
        return f"<!-- {match[1]} -->\n{blocks[match[1]](runs)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?\n?<!-- end -->", block, text, flags=re.DOTALL)


def draw(runs: Study, folder: str) -> None:
    """Draw the figures of the questions that have runs."""
    import study_figures as figures

    def path(name: str) -> str:
        return os.path.join(folder, f"{name}.png")

    if runs.cosines:
        losses = runs.cosines[0]["cosines"]["losses"]
        titles = ((0, "raw", "step 0"), (1, "raw", "step 20"), (1, "scaled", "step 20, scaled"))
        matrices = {title: mean_cosines(runs, place, which) for place, which, title in titles}
        figures.draw_cosines(matrices, losses, path("cosines"))
    found = e1_contrasts(runs)
    if found:
        families = {"rankings, best of n": RANKINGS, "pairs": PAIRS}
        figures.draw_curves(runs, families, path("equal_kl"))
        figures.draw_forest(found, path("contrasts"))
    soft = soft_runs(runs)
    if len(soft) > len(SOFT):
        named = {"entropy": "entropy, nats a token", "best_of_16": "best score of 16"}
        figures.draw_softness(soft, runs, named, path("softness"))
    noise = {m: {x: at_2(runs, noisy_runs(runs, m, x)) for x in (0.0, 0.2, 0.4)} for m in NOISY}
    if any(points[0.4] for points in noise.values()):
        figures.draw_by_x(noise, "share of wrong labels", path("noise"))
    sizes = {
        loss: {n or 640: at_2(runs, runs.runs(loss, SEEDS, num_groups=n)) for n in (64, 256, 0)}
        for loss in ("spo_rank", "dpo_rank", "spo", "dpo")
    }
    if any(points[64] for points in sizes.values()):
        figures.draw_by_x(sizes, "groups, 40 steps", path("data_size"), xscale="log")


def at_2(runs: Study, rows: dict[int, dict]) -> list[float]:
    return known(runs.at(row, 2.0) for row in rows.values())


def main(argv: list[str]) -> None:
    config = parse(FindingsConfig, argv, "findings.py", "Answers, from the runs of study.py.")
    runs = Study(study.read_rows(config.rows))
    different = []
    for name in DOCUMENTS:
        path = os.path.join(ROOT, name)
        text = rewritten(path, QUESTIONS | {"summary": summary, "answers": answers}, runs)
        with open(path, encoding="utf-8") as f:
            if f.read() != text:
                different.append(name)
        if not config.check:
            files.write_text(path, text)
    if config.check and different:
        raise ValueError(f"{' and '.join(different)}: not what {config.rows} says; run findings.py")
    if not config.check:
        draw(runs, config.figures)
    print(
        f"{len(runs.rows)} runs; {', '.join(DOCUMENTS)}: {'equal' if config.check else 'written'}"
    )


if __name__ == "__main__":
    main_program(main)
