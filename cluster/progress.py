"""How far a command is: a bar on a terminal, by rich; elsewhere a plain line now and then."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from cluster.display import Table, columns_of, console_of, duration, in_thousands, on_terminal, show

PLAIN_SECONDS = 5.0  # between lines where they cannot be rewritten
DRAW_SECONDS = 0.1  # between drawings on a terminal: 0.3 ms of CPU each, in a process that may measure
RECENT_STEPS = 50  # in the rate behind the ETA
BAR_COLUMNS = 20  # none on a terminal of less than three times as many


class Progress:
    """The progress of a command of `total` steps. Use it as a context manager.

    Nothing is written before the first update. On a terminal it is one line with a bar, never longer than the
    terminal is wide, in colour unless NO_COLOR is set. rich is imported there alone.

    Args:
        total: the step at which the command is done; None: unknown, so there is no ETA.
        unit: what is counted.
        stream: where to write; default: standard error.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int | None,
        *,
        unit: str = "step",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._clock = clock
        self._in_place = on_terminal(self._stream)
        self._bar: Any = None  # rich's, from the first row on
        self._latest: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None  # when the first row came, and its step
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._next_show = -float("inf")
        self._shown = ""  # the newest plain line
        self._pending = False  # the newest row is not on the stream yet

    def update(self, row: dict[str, Any]) -> None:
        """Take in a row, such as one of `metrics.jsonl`, and show it.

        Keys used, all but `step` optional: step, doing (a few words), loss and validation_loss (nats per
        token), tokens_per_second (all devices), mfu (fraction of 1; None where the peak is unknown) and
        step_seconds; without these the ETA comes from the time since the first row.
        A value missing in this row stays as last seen, as the validation loss does between evaluations.
        """
        self._latest.update(row)
        self._first = self._first or (self._clock(), row["step"])
        if "step_seconds" in row:
            self._step_seconds.append(row["step_seconds"])
        self._pending = True
        done = self._total is not None and row["step"] >= self._total
        if done or self._clock() >= self._next_show:
            self._show()

    def advance(self, doing: str | None = None, *, by: int = 1) -> None:
        """Count `by` more steps. With 0 it shows `doing`; before the first step it starts the ETA's clock."""
        self.update({"step": self._latest.get("step", 0) + by} | ({"doing": doing} if doing else {}))

    def note(self, text: str | Table) -> None:
        """Print `text` as lines of their own; the progress line continues below."""
        show(text, file=self._stream, console=self._bar and self._bar.console)

    def close(self) -> None:
        """Show the newest row if it is not shown yet, and end the line."""
        if self._pending:
            self._show()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self) -> None:
        self._pending = False
        self._next_show = self._clock() + (DRAW_SECONDS if self._in_place else PLAIN_SECONDS)
        if not self._in_place:
            line = "  ".join(self._fields())
            if line != self._shown:
                show(line, file=self._stream)
            self._shown = line
            return
        self._bar = self._bar or _bar(self._stream, self._total)
        self._bar.console.width = columns_of(self._stream)  # a person may have changed it
        room = self._bar.console.width - (BAR_COLUMNS + 1) * (len(self._bar.columns) > 1)
        (task,) = self._bar.task_ids
        self._bar.update(
            task, completed=self._latest["step"], description=fit(self._fields(), width=room), refresh=True
        )

    def _fields(self) -> list[str]:
        """The parts of the line. `fit` keeps the first and the last, and leaves out others from the right."""
        latest = self._latest
        step = f"{latest['step']:,}"
        fields = [f"{self._unit} {step}" if self._total is None else f"{self._unit} {step}/{self._total:,}"]
        if latest.get("doing"):
            fields.append(latest["doing"])
        if latest.get("loss") is not None:
            fields.append(f"loss {latest['loss']:.3f}")
        if latest.get("validation_loss") is not None:
            fields.append(f"val {latest['validation_loss']:.3f}")
        if latest.get("tokens_per_second") is not None:
            fields.append(f"{in_thousands(latest['tokens_per_second'])} tok/s")
        if latest.get("mfu") is not None:
            fields.append(f"MFU {latest['mfu']:.1%}")
        if (seconds := self._seconds_left()) is not None:
            fields.append(f"ETA {duration(seconds)}")
        return fields

    def _seconds_left(self) -> float | None:
        if self._total is None or self._first is None:
            return None
        left = max(self._total - self._latest["step"], 0)
        if self._step_seconds:
            return left * statistics.median(self._step_seconds)
        begin, first = self._first
        done = self._latest["step"] - first
        return left * (self._clock() - begin) / done if done > 0 else None


def _bar(stream: TextIO, total: int | None) -> Any:
    """rich's progress, started, with one task. It draws when told: no thread runs beside a training."""
    from rich import progress

    console = console_of(stream)
    text = progress.TextColumn("{task.description}", markup=False)
    bar = progress.BarColumn(bar_width=BAR_COLUMNS)
    columns = (bar, text) if console.width >= 3 * BAR_COLUMNS else (text,)
    made = progress.Progress(*columns, console=console, auto_refresh=False, redirect_stdout=False)
    made.add_task("", total=total)
    made.start()
    console.show_cursor()  # rich hides it, and a killed process would leave it so
    return made


def fit(fields: list[str], *, width: int) -> str:
    """The fields in one line shorter than `width` columns, leaving out the ones before the last as needed."""
    fields = list(fields)
    while len("  ".join(fields)) >= width and len(fields) > 2:
        del fields[-2]
    return "  ".join(fields)[: width - 1]
