"""What happened to a run: `events.jsonl` in its directory, one JSON object a line, only appended to.

    {"time": "2026-11-26T12:05:34Z", "kind": "loss_spike", "level": "warning", "step": 120, "text": "..."}

Any process of the run may append: rank 0 and the launcher do. A resumed run keeps the events of its earlier
starts. `alarms` has the rules for the warnings.
"""

import fcntl
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.masking import masked

FILE = "events.jsonl"
INFO, WARNING, ERROR = "info", "warning", "error"
KINDS = {  # kind -> its level, and what it reports
    "started": (INFO, "a run began at step 0"),
    "resumed": (INFO, "the same command continues a run from a checkpoint"),
    "waiting": (INFO, "the cluster is full, and the run waits in line for its workers"),
    "workers": (INFO, "the workers of a start are ready to take their first step"),
    "restarted": (WARNING, "Ray started the workers again, from the newest checkpoint"),
    "worker_failed": (WARNING, "a worker ended with an error; Ray may start the workers again"),
    "first_step": (INFO, "the first step of a start, and how long each part before it took"),
    "checkpoint": (INFO, "a checkpoint was written"),
    "uploaded": (INFO, "a checkpoint was sent to checkpoint.upload"),
    "upload_failed": (WARNING, "a checkpoint could not be sent to checkpoint.upload; it is tried again"),
    "checkpoint_withheld": (WARNING, "a checkpoint was not written, because its numbers are not finite"),
    "checkpoint_damaged": (WARNING, "a checkpoint is half-written or damaged, and an older one is used"),
    "finished": (INFO, "the run took its last step"),
    "stopped": (INFO, "a user ended the run"),
    "failed": (ERROR, "the run ended with an error"),
    "killed": (ERROR, "an earlier start did not report its end; the next start does"),
    "loss_not_finite": (ERROR, "a loss became NaN or infinite"),
    "loss_spike": (WARNING, "the loss rose far above its recent values"),
    "rewound": (WARNING, "the run went back to before a loss spike, and skips the batches since"),
    "not_rewound": (WARNING, "the run could not go back, so it goes on after the spike"),
    "skipped_steps": (WARNING, "steps were skipped, because their gradient was not finite"),
    "no_progress": (ERROR, "neither a line of metrics.jsonl nor a checkpoint for some minutes"),
    "progress": (INFO, "the run moves again after no_progress"),
    "hung": (ERROR, "a worker made no progress, and the run, or this start of its workers, was ended"),
    "out_of_memory": (ERROR, "the kernel killed a worker, because there was no memory left"),
    "straggler": (WARNING, "the forward pass of a rank takes much longer than the others'"),
    "node_lost": (ERROR, "a node left Ray while the run was going"),
    "node_joined": (INFO, "a node joined Ray while the run was going"),
    "gpu_bad": (ERROR, "a GPU failed; it is drained: no run uses it until a user clears it"),
    "gpu_problem": (WARNING, "a GPU is throttled, its links or its program report errors, or others use it"),
    "node_problem": (WARNING, "a node's clock is off, a disk is full or fails, or its GPUs do not answer"),
    "disk_nearly_full": (WARNING, "little space is left where the run directory is"),
}
STARTS = ("started", "resumed")  # of the run, by its launcher
WORKERS = ("workers", "restarted")  # of its workers, by rank 0
ENDS = ("finished", "stopped", "failed", "killed")  # every start of a run ends with exactly one


def append(
    directory: Path, kind: str, text: str, *, level: str | None = None, step: int | None = None, **more: Any
) -> None:
    """Append one event, with one write. On return it survives the death of the process (SIGKILL too).

    `level` defaults to that of the kind in KINDS. If the file cannot be written, say because the disk is
    full, the event is printed on stderr instead: an event never ends a run.

    Args:
        text: one sentence.
        more: flat and JSON-ready. Strings are masked; a float that is not finite becomes "nan" or "inf".
    """
    assert kind in KINDS, kind
    event = {
        "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "kind": kind,
        "level": level or KINDS[kind][0],
        "step": step,
        "text": text,
        **{name: _strict(value) for name, value in more.items()},
    }
    line = f"{json.dumps(masked(event), allow_nan=False)}\n".encode()
    path = directory / FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.pread(descriptor, 1, max(os.fstat(descriptor).st_size - 1, 0)) not in (b"", b"\n"):
                line = b"\n" + line  # the one before is torn; or still being written: then a line is empty
            written = os.write(descriptor, line)
        finally:
            os.close(descriptor)
        problem = None if written == len(line) else "no space for a whole line"
    except OSError as error:
        problem = error.strerror
    if problem:
        print(f"{path}: {problem}; the event: {describe(masked(event))}", file=sys.stderr, flush=True)


def end(directory: Path, kind: str, text: str, *, step: int | None = None, **more: Any) -> None:
    """Append one of ENDS, unless this start has ended already: the first report has the cause."""
    assert kind in ENDS, kind
    append_first(directory, kind, text, among=ENDS, since=STARTS, step=step, **more)


def append_first(
    directory: Path, kind: str, text: str, *, among: Sequence[str], since: Sequence[str], **more: Any
) -> None:
    """Append an event, unless one of the kinds `among` follows the newest of the kinds `since` already."""
    with suppress(OSError), (directory / FILE).open("ab") as file:  # storage without locks: see the last line
        fcntl.flock(file, fcntl.LOCK_EX)
        if newest(read(directory), (*among, *since)) not in among:
            append(directory, kind, text, **more)
        return
    append(directory, kind, text, **more)


def has_ended(found: list[dict[str, Any]]) -> bool:
    """Whether the newest start among these events has ended. False without any."""
    return newest(found, (*STARTS, *ENDS)) in ENDS


def newest(found: list[dict[str, Any]], kinds: Sequence[str]) -> str | None:
    """The kind of the newest event that is of these kinds."""
    return next((event["kind"] for event in reversed(found) if event["kind"] in kinds), None)


def read(directory: Path) -> list[dict[str, Any]]:
    """The events of a run, the oldest first; empty if it has none."""
    return read_from(directory, 0)[0]


def read_from(directory: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The events that begin at byte `position` or later, and the position to ask for next.

    A last line without its newline is left for the next call. A damaged line (a full disk, or a loss of
    power, may tear one) is skipped, and so hides no other event.
    """
    try:
        with (directory / FILE).open("rb") as file:
            file.seek(position)
            whole, newline, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return [], 0
    return [event for event in map(_parsed, whole.split(b"\n")) if event], position + len(whole + newline)


def alarms(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The warnings and errors among them."""
    return [event for event in events if event["level"] != INFO]


def describe(event: dict[str, Any]) -> str:
    """An event in one line for people: "2026-11-26 12:05 warning: step 120: the loss ..."."""
    step = f"step {event['step']}: " if event["step"] is not None else ""
    return f"{event['time'][:16].replace('T', ' ')} {event['level']}: {step}{' '.join(event['text'].split())}"


def _strict(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    texts = ("time", "kind", "level", "text")
    whole = isinstance(event, dict) and "step" in event and all(isinstance(event.get(t), str) for t in texts)
    return event if whole else None
