"""What is read from a corpus: texts, records that cannot be used, and how far the reading is."""

import errno
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from training.data.dataset import DataError

LONGEST_TEXT = 16 << 20  # characters; training/README.md says what memory its encoding takes


class Bad(NamedTuple):
    """A record that cannot be used: the file and the place in it, and the problem with its remedy."""

    where: str
    problem: str


class Position:
    """How many bytes of a source were read, compressed ones where it is compressed."""

    def __init__(self) -> None:
        self.before = 0  # of the files that are finished
        self.stream: IO[bytes] | None = None

    @property
    def num_bytes(self) -> int:
        return self.before + (self.stream.tell() if self.stream and not self.stream.closed else 0)


TextOrBad = str | Bad


_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half a pair, UTF-8 cannot hold it


def text_of(record: Any, field: str, *, where: str) -> TextOrBad:
    """The text in `field` of an object. "a.b" is b of the object in a, unless there is a field "a.b"."""
    remedy = "fix or remove the record"
    value = record
    for name in [field] if isinstance(record, dict) and field in record else field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is not None and not isinstance(value, str):
        kind = {dict: "an object", list: "a list", bool: "a boolean"}.get(type(value), "a number")
        return Bad(where, f"{field!r} holds {kind}, not a text; set data.text_field, or {remedy}")
    if value is None:
        fields = ", ".join(map(str, record)) if isinstance(record, dict) else "none, it is not an object"
        fields = fields.encode(errors="backslashreplace").decode()  # they too may hold half a pair
        return Bad(where, f"no text in {field!r} (fields: {fields}); set data.text_field, or {remedy}")
    if not value.isascii() and _SURROGATE.search(value):
        return Bad(where, f"{field!r} holds half a surrogate pair; {remedy}")
    return checked(value, where=where)


def checked(text: str, *, where: str) -> TextOrBad:
    """The text, unless it is too long to be encoded in bounded memory."""
    if len(text) > LONGEST_TEXT:
        limit = f"{LONGEST_TEXT >> 20} Mi characters"
        return Bad(where, f"a text of more than {limit}; divide it, or give it as .txt, which is divided")
    return text


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a `DataError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        remedy = "convert it, for example with iconv"
        raise DataError(f"{path}: not valid UTF-8 ({error.reason}); {remedy}") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); copy it again") from error
    except OSError as error:
        problem, remedy = error.strerror or in_a_line(error), "check the path and its permissions"
        raise DataError(f"{path}: cannot be read ({problem}); {remedy}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("zstandard", "zstd"):
            raise
        raise DataError(f"{path}: damaged or cut off ({error}); copy it again") from error


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def on_a_line(name: str) -> str:
    """A file's name as a message shows it: what cannot be printed, such as a line end, is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)


def require_file(path: Path) -> None:
    """Raise an `OSError` for a pipe or a device, which might never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file")
