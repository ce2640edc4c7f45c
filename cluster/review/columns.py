"""The numbers of metrics.jsonl by key, in arrays: millions of rows fit into memory."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST = 1.7e308  # a larger integer is no float
AXES = ("step", "tokens", "seconds")


@dataclass
class Column:
    """The numbers of one key: `values[i]` stands in row `rows[i]`. Not-a-number and infinities are kept."""

    rows: array = field(default_factory=lambda: array("L"))
    values: array = field(default_factory=lambda: array("d"))


def of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Column]:
    """The columns of these rows; a value that is no number is in none."""
    found: dict[str, Column] = {}
    for number, row in enumerate(rows):
        for key, value in row.items():
            if isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST):
                column = found.setdefault(key, Column())
                column.rows.append(number)
                column.values.append(value)
    return found


def curve(column: Column | None, axis: Column | None) -> tuple[array, array]:
    """(x, y) of the rows that hold both."""
    if column is None or axis is None:
        return array("d"), array("d")
    if axis.rows == column.rows:
        return axis.values, column.values
    x = dict(zip(axis.rows, axis.values, strict=True))
    both = [(x[row], y) for row, y in zip(column.rows, column.values, strict=True) if row in x]
    return array("d", [x for x, _ in both]), array("d", [y for _, y in both])


def seconds_of_steps(columns: Mapping[str, Column]) -> Column | None:
    """The time of all steps until each row; None if it was not measured."""
    if "step_seconds" not in columns or "step" not in columns:
        return None
    seconds, total, before = Column(), 0.0, 0.0
    took = dict(zip(columns["step_seconds"].rows, columns["step_seconds"].values, strict=True))
    for row, step in zip(columns["step"].rows, columns["step"].values, strict=True):
        if row in took:
            total += (step - before) * took[row]
            before = step
        seconds.rows.append(row)
        seconds.values.append(total)
    return seconds
