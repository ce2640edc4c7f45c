"""One line that tells how far a run is: rewritten in place on a terminal, now and then elsewhere."""

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from cluster.display import duration, in_thousands

PLAIN_SECONDS = 5.0  # between lines where they cannot be rewritten
RECENT_STEPS = 50  # in the rate behind the ETA


class Progress:
    """The progress line of a run of `total_steps` optimizer steps. Use it as a context manager.

    Args:
        total_steps: the step at which the run is complete.
        stream: where to write; standard error unless told.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = stream or sys.stderr
        self._clock = clock
        self._in_place = self._stream.isatty()
        self._latest: dict[str, Any] = {}
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._next_plain = -float("inf")
        self._pending = False  # the newest row is not on the stream yet
        self._shown = ""  # what stands on the terminal's current line

    def update(self, row: dict[str, Any]) -> None:
        """Take in a row of `metrics.jsonl` and show it.

        Keys used, all but `step` optional: step, loss and validation_loss (nats per token),
        tokens_per_second (all devices), mfu (fraction of 1; None where the peak is unknown), step_seconds.
        A value missing in this row stays as last seen, as the validation loss does between evaluations.
        """
        self._latest.update(row)
        if "step_seconds" in row:
            self._step_seconds.append(row["step_seconds"])
        self._pending = True
        if self._in_place or self._clock() >= self._next_plain or row["step"] >= self._total_steps:
            self._show()

    def note(self, text: str) -> None:
        """Print `text` as a line of its own; the progress line continues below."""
        self._erase()
        self._stream.write(f"{text}\n")
        if self._in_place and self._latest:
            self._show()
        self._stream.flush()

    def close(self) -> None:
        """Show the newest row if it is not shown yet, and end the line."""
        if self._pending:
            self._show()
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self) -> None:
        self._pending = False
        fields = self._fields()
        if self._in_place:
            line = fit(fields, width=os.get_terminal_size(self._stream.fileno()).columns or 80)
            self._stream.write(f"\r{line.ljust(len(self._shown))}")
            self._shown = line
        else:
            self._stream.write("  ".join(fields) + "\n")
            self._next_plain = self._clock() + PLAIN_SECONDS
        self._stream.flush()

    def _erase(self) -> None:
        if self._shown:
            self._stream.write(f"\r{' ' * len(self._shown)}\r")
            self._shown = ""

    def _fields(self) -> list[str]:
        """The parts of the line. All but the first and the last can be left out, the last of them first."""
        latest = self._latest
        fields = [f"step {latest['step']}/{self._total_steps}"]
        if latest.get("loss") is not None:
            fields.append(f"loss {latest['loss']:.3f}")
        if latest.get("validation_loss") is not None:
            fields.append(f"val {latest['validation_loss']:.3f}")
        if latest.get("tokens_per_second") is not None:
            fields.append(f"{in_thousands(latest['tokens_per_second'])} tok/s")
        if latest.get("mfu") is not None:
            fields.append(f"MFU {latest['mfu']:.1%}")
        if self._step_seconds:
            remaining = max(self._total_steps - latest["step"], 0)
            fields.append(f"ETA {duration(remaining * statistics.median(self._step_seconds))}")
        return fields


def fit(fields: list[str], *, width: int) -> str:
    """The fields in one line shorter than `width` columns, leaving out the ones before the last as needed."""
    fields = list(fields)
    while len("  ".join(fields)) >= width and len(fields) > 2:
        del fields[-2]
    return "  ".join(fields)[: width - 1]
