"""The bytes of a corpus file, decompressed, after a look at whether they are what its name says."""

import bz2
import gzip
import io
import lzma
import os
from typing import IO, Any

from training.data.dataset import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ZSTD_CHUNK_BYTES = 1 << 13  # compressed; they become 256 MB at most
ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=31`, as public dumps are written; most windows are below 8 MB

_OTHER_CONTENT = {
    b"\x1f\x8b": "gzip, not text; give it the ending .gz",
    **{b"BZh%d1AY&SY" % level: "bzip2, not text; give it the ending .bz2" for level in range(1, 10)},
    b"\xfd7zXZ": "xz, not text; give it the ending .xz",
    b"\x28\xb5\x2f\xfd": "zstd, not text; give it the ending .zst",
    b"PAR1\x15": "Parquet, not text; give it the ending .parquet",
    b"PK\x03\x04": "a zip archive, not text; unpack it",
    b"\xff\xfe": "UTF-16, not UTF-8; convert it, for example with iconv",
    b"\xfe\xff": "UTF-16, not UTF-8; convert it, for example with iconv",
}


def plain_stream(stream: IO[bytes], name: str, *, path: str) -> io.BufferedReader:
    """The decompressed bytes of `stream`, whose file has this name.

    Raises:
        DataError: it begins like a file of another kind. What is damaged raises an error of the library.
    """
    plain = _decompressed(stream, os.path.splitext(name.lower())[1])
    head = plain.read(10)
    for magic, found in _OTHER_CONTENT.items():
        if head.startswith(magic):
            raise DataError(f"{path}: holds {found}")
    return io.BufferedReader(Joined(head, plain))


def _decompressed(stream: IO[bytes], suffix: str) -> Any:
    match suffix:
        case ".gz":
            return gzip.open(stream)
        case ".bz2":
            return bz2.open(stream)
        case ".xz":
            return lzma.open(stream)
        case ".zst":
            return io.BufferedReader(_ZstdFrames(stream))
    return stream


class _ZstdFrames(io.RawIOBase):
    """The frames of a .zst file, one after another. zstandard's own reader takes a cut-off file for whole."""

    def __init__(self, stream: IO[bytes]) -> None:
        import zstandard

        self._frame: Any
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj
        self._stream, self._frame = stream, None
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._stream.read(ZSTD_CHUNK_BYTES)
            if not data:
                if self._frame:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            frame = self._frame or self._new_frame()
            self._ready, self._rest = memoryview(frame.decompress(data)), frame.unused_data
            self._frame = None if frame.eof else frame
        part = self._ready[: len(buffer)]
        self._ready = self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


class Joined(io.RawIOBase):
    """A stream with the bytes that were already read from it put back in front."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
