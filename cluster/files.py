"""Files that are either whole or absent: temporary sibling, fsync, rename, fsync of the folder."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) atomically; on return it survives a loss of power.

    Raises:
        OSError: the folder is missing or the disk is full, say; it names `path`, and `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a failed write or fsync names no file at all
        raise
    fsync_folder(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Replace `path` by `obj` as indented strict JSON, atomically.

    Raises:
        ValueError: `obj` holds NaN or an infinity, which JSON has no way to write.
        OSError: as in `write_text`.
    """
    try:
        text = json.dumps(obj, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_text(path, f"{text}\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `ValueError`, which names the file, if it does not hold JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON or malformed UTF-8
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def fsync_folder(path: Path) -> None:
    """Make the creations, renames and removals inside the folder `path` survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
