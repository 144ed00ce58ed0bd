"""The README's drawings: python experiments/pictures.py

recipe.png   from stories to ranked groups, as tinystories_data.py makes them
stages.png   the ranking loss as a choice of the best, of the rest, and so on
kl.png       where the KL to the reference is measured: DPO on the data, SPO on the policy's samples
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from spo.plot import COLORS, STYLE

BLUE, RED, GREEN = COLORS[:3]
GRAY = "#555555"


def blank(width: float, height: float):
    """Return a figure and axes without ticks, a unit to an inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x: float, y: float, text: str, color: str, width: float = 1.0, height: float = 0.42):
    """Draw a text in a rounded box around (x, y)."""
    shape = plt.matplotlib.patches.FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.08",
        facecolor=color + "22",
        edgecolor=color,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes, start: tuple, end: tuple, text: str = "") -> None:
    properties = {"arrowstyle": "-|>", "color": GRAY, "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", end, start, arrowprops=properties)
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1)
        axes.text(*middle, text, ha="center", va="bottom", color=GRAY, fontsize=10)


def recipe() -> None:
    """Four stories, two orders, one ranking if they agree."""
    figure, axes = blank(8, 2.7)
    for i, name in enumerate("ABCD"):
        box(axes, 0.75, 2.25 - 0.5 * i, f"story {name}", BLUE)
    axes.text(0.75, 0.2, "four samples", ha="center", color=GRAY, fontsize=10)
    orders = (("A B C D", "C A D B", 1.95), ("D C B A", "C A D B", 1.05))
    for shown, answer, y in orders:
        arrow(axes, (1.3, 1.5), (2.15, y))
        box(axes, 2.75, y, f"shown\n{shown}", GRAY, height=0.62)
        arrow(axes, (3.3, y), (4.1, y), "judge")
        box(axes, 4.75, y, f"best first\n{answer}", RED, 1.15, 0.62)
        arrow(axes, (5.38, y), (6.15, 1.5))
    axes.text(2.75, 0.2, "both orders", ha="center", color=GRAY, fontsize=10)
    axes.text(4.75, 0.2, "they agree", ha="center", color=GRAY, fontsize=10)
    box(axes, 6.95, 1.5, "ranked group\nC > A > D > B", GREEN, 1.5, 0.66)
    axes.text(6.95, 0.2, "or it is left out", ha="center", color=GRAY, fontsize=10)
    save(figure, "recipe.png")


def stages() -> None:
    """The loss of C > A > D > B is that of three choices."""
    figure, axes = blank(8, 2.9)
    ranking = "CADB"
    for stage in range(3):
        y = 2.35 - 0.85 * stage
        left = ranking[stage:]
        for place, name in enumerate(left):
            chosen = place == 0
            box(axes, 0.7 + 0.85 * (place + stage), y, name, GREEN if chosen else GRAY, 0.6)
        weight = (r"$\eta$", r"$\eta^2$", r"$\eta^3$")[stage]
        terms = " + ".join(rf"p_{name}^\alpha" for name in left)
        fraction = rf"$\frac{{p_{left[0]}^\alpha}}{{{terms}}}$"
        axes.text(4.25, y, r"$-\frac{1}{\alpha}\,\log$", va="center", fontsize=15)
        axes.text(4.0, y, weight, va="center", ha="center", fontsize=15)
        axes.text(5.2, y, fraction, va="center", fontsize=18)
        label = ("best of 4", "best of 3", "best of 2")[stage]
        axes.text(7.95, y, label, va="center", ha="right", color=GRAY, fontsize=10)
    save(figure, "stages.png")


def kl() -> None:
    """Two densities, data under the reference, and the part that the policy has moved to."""
    figure, both = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
    x = np.linspace(-4, 7, 400)
    reference = np.exp(-(x**2) / 2)
    policy = np.exp(-((x - 2.8) ** 2) / 1.2)
    rng = np.random.default_rng(0)
    samples = (rng.normal(0, 1, 24), rng.normal(2.8, 0.75, 24))
    titles = ("DPO: on the dataset's responses", "SPO: on samples of the policy")
    for axes, title, points, color in zip(both, titles, samples, (GRAY, RED), strict=True):
        axes.plot(x, reference, color=BLUE)
        axes.plot(x, policy, color=RED)
        axes.plot(points, np.full(len(points), -0.12), "|", color=color, markersize=9)
        axes.set(title=title, xticks=[], yticks=[], ylim=(-0.25, 1.25))
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.text(-1.2, 0.95, "reference", color=BLUE, ha="right")
        axes.text(4.1, 0.75, "policy", color=RED)
        axes.set_xlabel("| where it is compared with the reference", color=color, fontsize=10)
    figure.tight_layout()
    save(figure, "kl.png")


def save(figure, name: str) -> None:
    path = os.path.join(HERE, name)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main() -> None:
    with plt.rc_context(STYLE):
        recipe()
        stages()
        kl()


if __name__ == "__main__":
    main()
