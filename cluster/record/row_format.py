"""How `metrics.jsonl` holds a row, and whether a record is writing to it. Standard library only.

Strict JSON has no NaN and no infinity. Such a value is null beside `<key>_nonfinite`: "nan", "inf" or "-inf".
"""

import fcntl
import math
import time
from pathlib import Path
from typing import Any

LAUNCHER_LOCK = "launcher.lock"  # in a run directory: held by the launcher of a start, whom it names

_NONFINITE = "_nonfinite"


def encode(row: dict[str, Any]) -> dict[str, Any]:
    """Write non-finite floats, here and in nested dicts, as null beside `<key>_nonfinite`."""
    encoded: dict[str, Any] = {}
    for key, value in row.items():
        if key.endswith(_NONFINITE):
            raise ValueError(f"key {key!r}: the ending {_NONFINITE!r} is reserved")
        if isinstance(value, float) and not math.isfinite(value):
            encoded[key], encoded[key + _NONFINITE] = None, str(float(value))
        else:
            encoded[key] = encode(value) if isinstance(value, dict) else value
    return encoded


def decode(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the file, and the objects in it, with their non-finite values as floats."""
    nonfinite = {k.removesuffix(_NONFINITE): float(v) for k, v in row.items() if k.endswith(_NONFINITE)}
    return {
        key: nonfinite.get(key, decode(value) if isinstance(value, dict) else value)
        for key, value in row.items()
        if not key.endswith(_NONFINITE)
    }


def is_being_written(path: Path) -> bool | None:
    """Whether a record holds this `metrics.jsonl` open; None without it, or on storage without locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def claim(descriptor: int) -> None:
    """Take the lock that `is_being_written` looks for, until the process ends. Readers hold it briefly."""
    for _ in range(100):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:  # this storage has no locks
            return
