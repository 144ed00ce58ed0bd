"""The figures of docs/findings.md, drawn from a study_reading.Study."""

import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matched_kl import BUDGETS, MARGIN, Contrast, fit, kls_of, quantile

from spo import plot
from spo.files import atomic_path

PALETTE = plot.COLORS
WIDTH = 9.0  # inches
FEW = 4  # seeds: with fewer, a band is so wide that it hides everything else
HALO = {"alpha": 0.15, "linewidth": 0}


def save(figure, path: str) -> None:
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def band(axis, x: np.ndarray, curves: Sequence[np.ndarray], color: str, label: str) -> None:
    """Draw the mean of curves over seeds, and its 95% interval; of few seeds, each curve."""
    values = np.array(curves)
    mean = values.mean(0)
    axis.plot(x, mean, color=color, label=label)
    if len(values) < FEW:
        axis.plot(x, values.T, color=color, linewidth=0.6, alpha=0.6)
    else:
        error = values.std(0, ddof=1) / len(values) ** 0.5 * quantile(len(values) - 1)
        axis.fill_between(x, mean - error, mean + error, color=color, **HALO)


def draw_curves(runs, families: dict[str, dict[str, dict]], path: str) -> None:
    """Draw the win-rate against sqrt(KL): the checkpoints of all seeds, and their mean curve.

    families  {title: {objective: its runs by seed}}
    """
    with plt.rc_context(plot.STYLE):
        figure, axes = plt.subplots(1, len(families), figsize=(WIDTH, 4.2), sharey=True)
        for axis, (title, losses) in zip(axes, families.items(), strict=True):
            for (loss, by_seed), color in zip(losses.items(), PALETTE, strict=False):
                rows = list(by_seed.values())
                shared = min((max(kls_of(row)) for row in rows), default=0.0)
                x = np.linspace(0, min(shared, BUDGETS[-1]) ** 0.5, 100)
                fits = [fit(kls_of(row), runs.rate_values(row)) for row in rows]
                if not fits or any(f is None for f in fits):
                    continue
                band(axis, x, [np.polyval(f, x) for f in fits], color, loss)
                for row in rows:
                    within = [kl <= BUDGETS[-1] for kl in kls_of(row)]
                    points = np.array([np.sqrt(kls_of(row)), runs.rate_values(row)])[:, within]
                    axis.plot(*points, ".", color=color, markersize=3, alpha=0.5)
            axis.axhline(50, color="#888888", linewidth=1)
            axis.set(title=title, xlabel="square root of the KL to the reference, nats")
            axis.legend(loc="upper left")
        axes[0].set_ylabel("win-rate over the reference, %")
        save(figure, path)


def draw_forest(found: Sequence[Contrast], path: str) -> None:
    """Draw each difference with its interval, over the band that counts as no difference."""
    with plt.rc_context(plot.STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH * 0.8, 0.5 + 0.42 * len(found)))
        axis.axvspan(-MARGIN, MARGIN, color="#5b8c5a", alpha=0.12, linewidth=0)
        axis.axvline(0, color="#888888", linewidth=1)
        for place, contrast in enumerate(reversed(found)):
            is_shown = contrast.verdict.startswith(("higher", "lower"))
            color = PALETTE[1] if is_shown else PALETTE[0]
            axis.plot([contrast.low, contrast.high], [place, place], color=color)
            axis.plot(contrast.mean, place, "o", color=color)
        axis.set_yticks(range(len(found)), [contrast.name for contrast in reversed(found)])
        axis.set_xlabel(f"points of win-rate at equal KL; green: within {MARGIN:g} points")
        save(figure, path)


def draw_cosines(matrices: dict[str, np.ndarray], losses: Sequence[str], path: str) -> None:
    """Draw matrices of cosines between the objectives' gradients."""
    with plt.rc_context(plot.STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, len(matrices), figsize=(WIDTH * 1.5, WIDTH * 0.58))
        for axis, (title, matrix) in zip(axes, matrices.items(), strict=True):
            axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu")
            for (i, j), value in np.ndenumerate(matrix):
                color = "white" if abs(value) > 0.6 else "black"
                number = f"{value:.2f}"
                axis.text(j, i, number, ha="center", va="center", fontsize=7, color=color)
            axis.set_xticks(range(len(losses)), losses, rotation=90)
            axis.set_yticks(range(len(losses)), losses)
            axis.set_title(title, fontsize=11)
        save(figure, path)


def draw_softness(panels: dict[str, dict[str, dict[str, list[float]]]], path: str) -> None:
    """Draw values against alpha: a panel for each label, a line for each objective, a dot a seed.

    panels  {label: {objective: {alpha: values over seeds}}}; alphas are drawn at equal distances
    """
    with plt.rc_context(plot.STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6))
        for axis, (label, lines) in zip(axes, panels.items(), strict=True):
            alphas = sorted({alpha for points in lines.values() for alpha in points}, key=float)
            for (name, points), color in zip(lines.items(), PALETTE, strict=False):
                mine = [alpha for alpha in alphas if points.get(alpha)]
                places = [alphas.index(alpha) for alpha in mine]
                means = [np.mean(points[alpha]) for alpha in mine]
                axis.plot(places, means, marker="o", color=color, label=name)
                for place, alpha in zip(places, mine, strict=True):
                    dots = points[alpha]
                    axis.plot([place] * len(dots), dots, ".", color=color, alpha=0.4)
            axis.set_xticks(range(len(alphas)), alphas)
            axis.set(xlabel="alpha", ylabel=label)
        axes[0].legend(fontsize=9)
        save(figure, path)


def draw_by_x(lines: dict[str, dict[float, list[float]]], x_label: str, path: str, **more) -> None:
    """Draw win-rates at 2 nats against a number, a line for each objective.

    lines  {objective: {x: values over seeds}}
    """
    with plt.rc_context(plot.STYLE):
        figure, axis = plt.subplots(figsize=(WIDTH * 0.7, 4))
        for number, (name, points) in enumerate(lines.items()):
            xs = sorted(x for x, values in points.items() if values)
            means = [np.mean(points[x]) for x in xs]
            color = PALETTE[number % len(PALETTE)]
            style = {"linestyle": "-" if number < len(PALETTE) else "--"}
            axis.plot(xs, means, marker="o", color=color, label=name, **style)
            for x in xs:
                axis.plot([x] * len(points[x]), points[x], ".", color=color, alpha=0.4)
        axis.set(xlabel=x_label, ylabel="win-rate at 2 nats, %", **more)
        axis.legend(fontsize=8, ncols=2)
        save(figure, path)
