"""The curves of one run or several: python experiments/plot.py curves.png out [out/dpo ...]"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from spo.config import main_program
from spo.plot import draw_curves


def main(argv: list[str]) -> None:
    if len(argv) < 2 or not argv[0].endswith(".png"):
        usage = "python experiments/plot.py curves.png out"
        raise ValueError(f"give a .png to write and the folders of runs, as in `{usage}`")
    draw_curves(argv[1:], argv[0])
    print(f"{argv[0]}: {len(argv) - 1} runs")


if __name__ == "__main__":
    main_program(main)
