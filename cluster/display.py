"""Numbers, tables of text, tables of Markdown, and figures, in one style."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

DPI = 120
COLORS = ("#1b6ca8", "#c8553d", "#e0a458", "#6a994e", "#c4c8cc")  # in this order


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, *, digits: int = 3) -> str:
    """A number to this many significant digits, as people write it: "6,500", "0.850", "1.20·10⁻⁷".

    Powers of ten only below 0.0001 and from 10¹⁵ on.
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if not -5 < exponent < 15:
        return f"{mantissa}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return f"{float(f'{mantissa}e{power}'):,.{max(digits - 1 - exponent, 0)}f}"


def span(values: Sequence[float], *, digits: int = 3) -> str:
    """The least and the largest number, "0.310 to 0.438", or the one if both are written alike."""
    low, high = number(min(values), digits=digits), number(max(values), digits=digits)
    return low if low == high else f"{low} to {high}"


def in_thousands(rate: float) -> str:
    """Three digits or so of a rate: '812', '9.8k', '123k', '1.2M'."""
    for scale, suffix in ((1e6, "M"), (1e3, "k")):
        if rate >= 0.9995 * scale:
            return f"{rate / scale:.1f}{suffix}" if rate < 99.95 * scale else f"{rate / scale:.0f}{suffix}"
    return f"{rate:.0f}"


def duration(seconds: float) -> str:
    """The two largest units of a duration in seconds: '9s', '2m10s', '1h05m', '3d04h'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    return f"{minutes}m{s:02}s" if minutes else f"{s}s"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: Sequence[int] = (0,)) -> str:
    """Columns as wide as their widest cell, two spaces apart. None is shown as a dash.

    Args:
        left: the columns that are aligned left, such as names; -1 is the last. Others are aligned right.
    """
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [place in left or place - len(head) in left for place in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_text else cell.rjust(width)
            for cell, width, is_text in zip(row, widths, text, strict=True)
        ).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values, without a head."""
    return table(("", ""), rows, left=(0, 1)).partition("\n")[2]


def markdown(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()
) -> Iterator[str]:
    """The lines of a Markdown table. None is shown as a dash; a "|" inside a cell is escaped.

    Args:
        right: the columns that are aligned right, such as numbers.
    """
    rule = ["---:" if place in right else "---" for place in range(len(head))]
    for row in (head, rule, *rows):
        cells = (_cell(value).replace("|", r"\|") for value in row)
        yield f"| {' | '.join(cells)} |"


def figure(width: float, height: float, *, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A matplotlib figure of this size in inches, and its axes side by side. `save` writes it.

    Args:
        options: of `matplotlib.figure.Figure.subplots`, such as sharey.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI)  # without pyplot there is nothing to close
    axes = made.subplots(1, columns, squeeze=False, **options)[0]
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return made, list(axes)


def save(made: Any, path: Path) -> Path:
    """Write a figure as PNG. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, bbox_inches="tight")
    return path
