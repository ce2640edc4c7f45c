"""Tables of text, tables of Markdown, and figures, in one style."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

DPI = 120
COLORS = ("#1b6ca8", "#c8553d", "#e0a458", "#6a994e", "#c4c8cc")  # in this order


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


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """The lines of a Markdown table. None is shown as a dash; a "|" inside a cell is escaped."""
    for row in (head, ["---"] * len(head), *rows):
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
