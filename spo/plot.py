"""The curves of runs: win-rates with their intervals, and the KL, by step."""

import json
import os
from collections.abc import Sequence

from spo.files import atomic_path

COLORS = ("#1f6f8b", "#d1603d", "#5b8c5a", "#7d5ba6", "#b08900", "#444444")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def evaluations(folder: str) -> list[dict]:
    """Return the evaluations in a run's log.jsonl, as {"step", "win_rate", "low", ...}.

    ValueError, naming the file, if there is none.
    """
    path = os.path.join(folder, "log.jsonl")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; name the out_dir of a run")
    found = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            entry = json.loads(line)
            values = {k.removeprefix("eval/"): v for k, v in entry.items() if k[:5] == "eval/"}
            if "win_rate" in values:
                found.append({"step": entry["step"]} | values)
    if not found:
        raise ValueError(f"{path}: holds no evaluation with a win-rate")
    return found


def draw_curves(folders: Sequence[str], path: str) -> None:
    """Draw runs into a .png: above the win-rate with its 95% interval, below the KL."""
    # Imported here because it takes a second, even for --help.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(
            2, 1, figsize=(8, 5.2), sharex=True, height_ratios=(2, 1)
        )
        for number, folder in enumerate(folders):
            rows = evaluations(folder)
            color = COLORS[number % len(COLORS)]
            steps = [row["step"] for row in rows]
            label = os.path.basename(os.path.normpath(folder)) if len(folders) > 1 else "the judge"
            rates = [100 * row["win_rate"] for row in rows]
            above.plot(steps, rates, marker="o", color=color, label=label)
            low = [100 * row["low"] for row in rows]
            high = [100 * row["high"] for row in rows]
            above.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            if len(folders) == 1 and all("second_win_rate" in row for row in rows):
                second = [100 * row["second_win_rate"] for row in rows]
                style = {"marker": ".", "color": COLORS[1], "linestyle": "--"}
                above.plot(steps, second, label="a second judge, unseen in training", **style)
            below.plot(steps, [row["kl"] for row in rows], marker="o", color=color)
        above.axhline(50, color="#888888", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
        above.annotate("no difference", (1, 49.5), fontsize=9, color="#555555", **place)
        above.set_ylabel("win-rate over\nthe reference, %")
        above.legend(loc="upper left")
        below.set(ylabel="KL to the\nreference, nats", xlabel="step")
        figure.tight_layout()
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
        plt.close(figure)
