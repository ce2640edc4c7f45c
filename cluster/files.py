"""Files and folders that are whole or absent: temporary sibling, fsync, rename, fsync of the parent."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def slug(name: str) -> str:
    """`name` in a file's name: lower case, each run of other characters than letters and digits a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replace `path` by `text` (UTF-8) atomically; on return it survives a loss of power.

    Args:
        mode: of the new file, less the umask; 0o600 for what may hold a secret.

    Raises:
        OSError: the folder is missing or the disk is full, say; it names `path`, and `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
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


def problem_of(error: OSError) -> str:
    """For people: which file, if the error names one, and what is wrong with it."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


class DamagedFile(ValueError):
    """A file does not hold what it should. The message names it; `cluster.cli.run` prints no traceback."""


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `DamagedFile` if it does not hold JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, or nested too deeply
        raise DamagedFile(f"{path}: not valid JSON: {error}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def set_mode_of_folder(path: Path) -> None:
    """Give a file the permissions of its folder: safetensors makes its files 0600."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in a folder that others may have made, such as a checkpoint.

    In the Hugging Face hub's cache the files of models--X/snapshots/REVISION/ are links to models--X/blobs/.

    Raises:
        ValueError: the name is absolute, or it or a link leads out of the folder.
    """
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in a name
        raise ValueError(f"{path}: leads nowhere ({error})") from error
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if Path(name).is_absolute() or not any(real.is_relative_to(each) for each in homes):
        raise ValueError(f"{path}: leads out of {folder}, to {real}; put the file itself there")
    return path


@contextmanager
def replace_folder(path: Path, *, resumable: bool = False) -> Iterator[Path]:
    """An empty folder for the block to fill. After the block its files are synced and it replaces `path`.

    If the block fails, the new folder is removed and `path` is unchanged. What a killed process left is
    removed by the next one; two at the same time would destroy each other's work.

    Args:
        resumable: what a killed or interrupted process left is kept, and the block finds it in the folder.
    """
    partial, replaced = (path.with_name(f".{path.name}.{role}") for role in ("partial", "replaced"))
    for leftover in (replaced,) if resumable else (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=resumable)
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        fsync_folder(partial)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    except BaseException as error:
        if not (resumable and isinstance(error, KeyboardInterrupt)):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def size_text(num_bytes: float) -> str:
    """Three digits of a size in decimal units: "846 kB", "1.58 MB", "28.4 GB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:.3g} {units[0]}"


def fsync_folder(path: Path) -> None:
    """Make the creations, renames and removals inside the folder `path` survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
