"""Files of text as records: .txt, .jsonl, .json and Parquet, plain or compressed, here or behind a URL.

A record is a text, or a `Bad` one that says what is wrong with it. What makes a whole file useless is a
`DataError` that names it. Memory is bounded by the longest line, or a Parquet row group, not by the file.
"""

import glob
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.files import sha256_of
from training.data.dataset import DataError
from training.data.records import Bad, Position, TextOrBad, in_a_line, on_a_line, reading, text_of
from training.data.streams import COMPRESSIONS, Joined, plain_stream
from training.data.tables import parquet_records
from training.data.urls import file_system

TEXT_PIECE_CHARACTERS = 1 << 20  # a longer .txt file becomes several records
JSON_PIECE_CHARACTERS = 1 << 16
LONGEST_LINE = 64 << 20  # bytes of a line of .jsonl, characters of a record of .json
LONGEST_WORD = 16  # of what JSON does not allow to be cut: -Infinity, or an escaped pair of surrogates
COMPANION_SHARE = 0.01  # files of another kind may lie beside the corpus, up to this share of its bytes
KINDS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
READABLE = ".txt .jsonl .json .parquet, the first three also with .gz .bz2 .xz .zst"


_DECODER = json.JSONDecoder(parse_int=float)  # only texts are used, and Python's int has a limit of digits


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus.

    Attributes:
        path: local path, or what its file system calls it, as messages show it.
        name: relative to the corpus.
        identity: SHA-256 of a local file; size and version (such as an ETag) of a remote one.
        stamp: a local file's number, size and time of change when it was hashed.
    """

    path: str
    name: str
    kind: str
    num_bytes: int
    identity: Any
    stamp: Any
    opener: "_LocalFile | _RemoteFile"

    def records(self, field: str, position: Position) -> Iterator[TextOrBad]:
        """Its records in order; `field` holds the text of all but .txt. Moves `position`."""
        with reading(self.path), self.opener() as stream:
            position.stream = stream
            if self.kind == "parquet":
                yield from parquet_records(stream, field, self.path)
            else:
                plain = plain_stream(stream, self.name, path=self.path)
                yield from _READERS[self.kind](plain, field, self.path)
            if self.stamp != self.opener.stamp():
                raise DataError(f"{self.path}: changed while it was read; run again once nobody writes to it")
        position.before += self.num_bytes


def find(source: str) -> tuple[list[SourceFile], str]:
    """The files of `data.source`, in order of path, and a note on those that were left out.

    Raises:
        DataError: nothing there, nothing readable, or too much of another kind to leave out.
    """
    candidates = list(_remote(source) if "://" in source else _local(source))
    if not candidates:
        raise DataError(
            f"data.source: {source!r} matches no file; give 'botocore', or a file, folder, glob or URL of "
            f"{READABLE}"
        )
    sizes: Counter[str] = Counter()
    for _, name, size, _ in candidates:
        if kind := kind_of(name):
            sizes[kind] += size
    path, name, largest, _ = max(candidates, key=lambda each: each[2] if not kind_of(each[1]) else -1)
    if largest > sum(sizes.values()) or not sizes:
        suffix = on_a_line(Path(name).suffix) or "files without extension"
        raise DataError(f"{path}: cannot read {suffix}; only {READABLE}")
    [(chosen, _), *others] = sizes.most_common()
    if sum(size for _, size in others) > COMPANION_SHARE * sum(sizes.values()):
        kinds = " and ".join(sorted(f".{kind}" for kind in sizes))
        raise DataError(f"data.source: {source!r} mixes {kinds}; choose with a glob")
    files, left_out = [], []
    for path, name, size, opener in candidates:
        if kind_of(name) == chosen:
            with reading(path):
                stamp, identity = opener.stamp(), opener.identity
            files.append(SourceFile(path, name, chosen, size, identity, stamp, opener))
        else:
            left_out.append(on_a_line(name))
    note = f"; left out {len(left_out)} other files, such as {left_out[0]}" if left_out else ""
    return files, note


def kind_of(name: str) -> str | None:
    """txt, jsonl, json or parquet by a file's name; None if it cannot be read."""
    stem, suffix = os.path.splitext(name.lower())
    compressed = suffix in COMPRESSIONS
    kind = KINDS.get(os.path.splitext(stem)[1] if compressed else suffix)
    return None if compressed and kind == "parquet" else kind


_Candidate = tuple[str, str, int, "_LocalFile | _RemoteFile"]


def _local(source: str) -> Iterator[_Candidate]:
    """(path, name, bytes, opener) of a file, a folder's files without hidden ones, or a glob's; each once."""
    path = Path(source).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(_walk(path))
    else:
        paths = [each for each in sorted(map(Path, glob.glob(str(path), recursive=True))) if each.is_file()]
    if not paths:
        return
    root = Path(os.path.commonpath([each.absolute().parent for each in paths]))
    seen = set()
    for each in paths:
        if (real := each.resolve()) not in seen:
            seen.add(real)
            shown = on_a_line(str(each))
            with reading(shown):
                size = each.stat().st_size
            yield shown, str(each.absolute().relative_to(root)), size, _LocalFile(each)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below `folder`. Links to folders are followed, each folder once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(place, name) for name in names if not name.startswith(".") and Path(place, name).is_file()
        )


@dataclass(frozen=True)
class _LocalFile:
    path: Path

    @property
    def identity(self) -> str:
        return sha256_of(self.path)

    def stamp(self) -> Any:
        state = self.path.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns

    def __call__(self) -> IO[bytes]:
        return self.path.open("rb")


@dataclass(frozen=True)
class _RemoteFile:
    system: Any
    path: str
    identity: Any

    def stamp(self) -> None:
        """Not asked for again: file systems answer it from what they keep of a listing."""

    def __call__(self) -> IO[bytes]:
        return self.system.open(self.path, "rb")


def _remote(source: str) -> Iterator[_Candidate]:
    """The same behind a URL: s3://, gs://, hf://, http://, …"""
    try:
        system, path = file_system(source)
        paths = system.glob(path) if glob.has_magic(path) else system.find(path)
        infos = {each: system.info(each) for each in sorted(paths)}
    except Exception as error:  # every file system has its own
        raise DataError(
            f"data.source: {source}: cannot be listed ({type(error).__name__}: {error}); check the URL, the "
            "credentials, and that the package for its protocol is installed (gcsfs for gs://)"
        ) from error
    for each, info in infos.items():
        version = next(
            (
                str(info[name])
                for name in ("ETag", "etag", "sha256", "LastModified", "mtime", "created")
                if info.get(name)
            ),
            "",
        )
        size = info.get("size") or 0
        name = each.removeprefix(path).lstrip("/") or each.rpartition("/")[2]
        if info.get("type") == "file" and not any(part.startswith(".") for part in name.split("/")):
            yield on_a_line(each), name, size, _RemoteFile(system, each, [size, version])


# --- kinds --------------------------------------------------------------------------------------------


def _txt(stream: IO[bytes], _field: str, _path: str) -> Iterator[TextOrBad]:
    """The whole file as one text; a long one in pieces of 1 to 2 Mi characters that end with a line."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    while piece := text.read(TEXT_PIECE_CHARACTERS) + text.readline(TEXT_PIECE_CHARACTERS):
        yield piece


def _jsonl(stream: IO[bytes], field: str, path: str) -> Iterator[TextOrBad]:
    for number, line in enumerate(_lines(stream), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if len(line) > LONGEST_LINE:
            problem = f"a line of more than {LONGEST_LINE >> 20} MiB; divide or remove it"
            yield Bad(f"{path}:{number}", problem)
        elif line.strip():
            yield _parsed(line, field, where=f"{path}:{number}")


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines; of one that is longer than LONGEST_LINE, a byte more than that."""
    while line := stream.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE + 1)


def _parsed(line: bytes, field: str, *, where: str) -> TextOrBad:
    remedy = "fix or remove the line"
    try:
        record = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return Bad(where, f"not valid UTF-8 ({error.reason}); {remedy}")
    except json.JSONDecodeError as error:
        return Bad(where, f"not JSON ({error.msg}, column {error.colno}); {remedy}")
    except RecursionError:
        return Bad(where, f"nested too deeply; {remedy}")
    return text_of(record, field, where=where)


def _json(stream: IO[bytes], field: str, path: str) -> Iterator[TextOrBad]:
    """An array of objects; else lines, as Spark and others write under this name."""
    head = b""
    while not head.strip(b"\xef\xbb\xbf \t\r\n") and (more := stream.read(1 << 12)):
        head += more
    parts = Joined(head.removeprefix(b"\xef\xbb\xbf"), stream)
    if not head.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _jsonl(io.BufferedReader(parts), field, path)
        return
    items, number = _items(io.TextIOWrapper(io.BufferedReader(parts), "utf-8")), 0
    try:
        for number, record in enumerate(items, start=1):
            yield text_of(record, field, where=f"{path}, record {number}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a whole JSON array ({in_a_line(error)} after record {number}); write it again"
        ) from error


def _items(stream: IO[str]) -> Iterator[Any]:
    """The items of a JSON array, in the memory of the largest. Raises `ValueError`: it is not one.

    ijson does the same, but a whole number of 4301 digits or a deep nest ends the process.
    """
    text = _JsonText(stream)
    text.take("[")
    if text.next() == "]":
        text.take("]")
    else:
        yield text.value()
        while text.take(",", "]") == ",":
            yield text.value()
    text.take("")


class _JsonText:
    """The text of a stream, of which only what is being read is held."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._text, self._place, self._ended = "", 0, False

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._place = len(self._text) - len(self._text[self._place :].lstrip(" \t\r\n"))
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def take(self, *allowed: str) -> str:
        """Go past the next character."""
        if (found := self.next()) not in allowed:
            raise ValueError(f"{found!r} in place of {' or '.join(filter(None, allowed)) or 'the end'}")
        self._place += 1
        return found

    def value(self) -> Any:
        """Go past the next value."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or len(self._text) - error.pos < LONGEST_WORD
                if self._ended or not cut_off:
                    raise ValueError(error.msg) from error
            else:
                if end < len(self._text) - 2 or self._ended:  # a number may go on after 3, 3. or 3e-
                    self._place = end
                    return value
            self._more()

    def _more(self) -> None:
        rest = self._text[self._place :]
        if len(rest) > LONGEST_LINE:
            raise ValueError(f"more than {LONGEST_LINE >> 20} Mi characters, or no end,")
        more = self._stream.read(max(JSON_PIECE_CHARACTERS, len(rest)))
        self._text, self._place, self._ended = rest + more, 0, not more


_READERS: dict[str, Callable[[Any, str, str], Iterator[TextOrBad]]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "json": _json,
}
