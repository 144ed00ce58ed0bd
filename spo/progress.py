"""Progress bars; where nobody looks at a terminal, a plain line now and then."""

import re
import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10
CONTROL = re.compile(r"\x1b\[[A-Z]|\r")


def progress(total: int | None, label: str, unit: str, **more) -> tqdm:
    """Return a progress bar on stderr: a bar on a terminal, and a line every ten seconds in a file.

    more  tqdm's initial, disable, leave and unit_scale
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=label, unit=unit, **more)
    form = "{desc}: {n_fmt} of {total_fmt} " + unit + ", {elapsed}{postfix}"
    return tqdm(
        total=total,
        desc=label,
        file=PlainLines(),
        bar_format=form,
        mininterval=SECONDS_BETWEEN_LINES,
        delay=SECONDS_BETWEEN_LINES / 2,  # what is done by then says nothing
        **(more | {"leave": False}),
    )


def show_beside(bar: tqdm, text: str) -> None:
    """Put a text beside a bar; a plain line shows it when it is printed next."""
    bar.set_postfix_str(text, refresh=sys.stderr.isatty())


class PlainLines:
    """Writes to stderr what is meant for a terminal: lines, and no control characters."""

    def write(self, text: str) -> None:
        line = CONTROL.sub("", text).strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
