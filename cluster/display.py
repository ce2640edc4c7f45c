"""Numbers, tables of text, tables of Markdown, and figures, in one style."""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

DPI = 120
COLORS = ("#1b6ca8", "#c8553d", "#e0a458", "#6a994e", "#c4c8cc")  # of curves, in this order
STYLES = {  # of cells that say how something ended
    "supported": "green", "contradicted": "red", "not decided": "yellow",
    "FAILED": "bold red", "warning": "yellow",
}  # fmt: skip

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


@dataclass(frozen=True)
class Table:
    """A table of text. `str` gives plain columns as wide as their widest cell, two spaces apart.

    `show` draws it on a terminal by rich: long texts are folded, and columns that do not fit continue below.

    Attributes:
        head: of the columns; empty for a table of names and values.
        rows: of cells; None is shown as a dash.
        left: the columns that are aligned left, such as names; -1 is the last. Others are aligned right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int]

    def __str__(self) -> str:
        widths, text = self._widths(), self._is_text()
        return "\n".join(
            "  ".join(
                cell.ljust(width) if is_text else cell.rjust(width)
                for cell, width, is_text in zip(row, widths, text, strict=True)
            ).rstrip()
            for row in self._lines()
        )

    def _lines(self) -> list[Sequence[str]]:
        return [self.head, *self.rows] if self.head else list(self.rows)

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(*self._lines(), strict=True)]

    def _is_text(self) -> list[bool]:
        number = len(self._widths())
        return [place in self.left or place - number in self.left for place in range(number)]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.table import Table as RichTable
        from rich.text import Text

        text = self._is_text()
        for places in _blocks(self._widths(), text, width=options.max_width):
            drawn = RichTable(box=None, show_header=bool(self.head), pad_edge=False, padding=(0, 2, 0, 0))
            for place in places:
                name = self.head[place] if self.head else ""
                drawn.add_column(
                    Text(name), justify="left" if text[place] else "right", no_wrap=not text[place],
                    overflow="fold", style="" if self.head or place else "bold",
                )  # fmt: skip
            for row in self.rows:
                drawn.add_row(*(Text(row[place], style=STYLES.get(row[place], "")) for place in places))
            yield drawn


def _blocks(widths: Sequence[int], text: Sequence[bool], *, width: int) -> list[list[int]]:
    """Columns that fit beside each other; the first begins each block. Text takes at least a third."""
    needed = [
        min(size, max(width // 3, 12)) if is_text else size
        for size, is_text in zip(widths, text, strict=True)
    ]
    blocks, used = [[0]], needed[0]
    for place in range(1, len(needed)):
        if len(blocks[-1]) > 1 and used + 2 + needed[place] > width:
            blocks.append([0])
            used = needed[0]
        blocks[-1].append(place)
        used += 2 + needed[place]
    return blocks


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, left: Sequence[int] = (0,)) -> Table:
    """A table; `left` as in `Table`. None is shown as a dash."""
    return Table(head, [[_cell(value) for value in row] for row in rows], left)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def pairs(rows: Iterable[tuple[str, Any]]) -> Table:
    """A table of names and values, without a head."""
    return table((), rows, left=(0, 1))


def show(*parts: str | Table, file: TextIO | None = None, console: Any = None) -> None:
    """Print texts and tables, each from a new line: plain where `file` (standard output) is no terminal.

    Args:
        console: rich's, if there is one for `file`.
    """
    stream = file or sys.stdout
    if console is None and on_terminal(stream) and any(isinstance(part, Table) for part in parts):
        console = console_of(stream)
    if console is not None:
        for part in parts:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    else:
        print(*parts, sep="\n", file=stream)
    stream.flush()


def console_of(stream: TextIO) -> Any:
    """rich's console for a terminal, of its width. Left alone, rich may measure another stream."""
    from rich.console import Console

    return Console(file=stream, force_terminal=True, width=columns_of(stream))


def columns_of(stream: TextIO) -> int:
    """How wide a terminal is now; 80 where it does not say."""
    return os.get_terminal_size(stream.fileno()).columns or 80


def on_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at this stream, on a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


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


def figure(
    width: float, height: float, *, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Any, list[Any]]:
    """A matplotlib figure of this size in inches, and its axes, row by row. `save` writes it.

    Args:
        options: of `matplotlib.figure.Figure.subplots`, such as sharey.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI)  # without pyplot there is nothing to close
    axes = list(made.subplots(rows, columns, squeeze=False, **options).flat)
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return made, axes


def save(made: Any, path: Path) -> Path:
    """Write a figure as PNG. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, bbox_inches="tight")
    return path
