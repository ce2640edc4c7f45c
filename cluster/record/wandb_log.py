"""W&B's transaction log: the file `run-<id>.wandb` that every W&B run keeps on disk, online or offline.

`wandb sync` sends such a file as a whole. To send each row once, `cluster.review.sync` copies the file
without the rows that W&B has already. The format is W&B's own (wandb 0.31, pinned): records of its protocol,
framed as in LevelDB's log: blocks of 32 KiB, each piece with CRC-32, length and type.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK = 1 << 15
_PIECE = struct.Struct("<IHB")  # CRC-32 of type and data, length, type
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read(path: Path) -> Iterator[Any]:
    """The records (`wandb_internal_pb2.Record`), up to the first that is torn or damaged.

    A SIGKILL, or a run that is still writing, leaves a torn last one.

    Raises:
        ValueError: this is no transaction log, or one of another version.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when imported

    with path.open("rb") as file:
        header = file.read(len(_HEADER))
        if header != _HEADER[: len(header)]:
            raise ValueError(f"{path}: not a transaction log of wandb 0.31; send it with `wandb sync` itself")
        for content in _contents(file):
            yield Record.FromString(content)


def write(path: Path, records: Iterable[Any]) -> None:
    """Write records to a new log."""
    with path.open("wb") as file:
        file.write(_HEADER)
        for record in records:
            rest, kind = record.SerializeToString(), _FIRST
            while kind in (_FIRST, _MIDDLE):
                free = _BLOCK - file.tell() % _BLOCK
                if free < _PIECE.size:
                    file.write(bytes(free))
                    continue
                data, rest = rest[: free - _PIECE.size], rest[free - _PIECE.size :]
                last = _WHOLE if kind == _FIRST else _LAST
                piece, kind = (kind, _MIDDLE) if rest else (last, last)
                file.write(_PIECE.pack(zlib.crc32(bytes([piece]) + data), len(data), piece) + data)


def row_of(record: Any) -> dict[str, Any] | None:
    """The row of a history record, without W&B's own keys; None for any other record."""
    if not record.HasField("history"):
        return None
    row: dict[str, Any] = {}
    for item in record.history.item:
        *parents, key = item.nested_key or [item.key]  # a table is one value, logged as several items
        place = row
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = json.loads(item.value_json)
    return {key: value for key, value in row.items() if not key.startswith("_")}


def _contents(file: Any) -> Iterator[bytes]:
    whole = b""
    while True:
        free = _BLOCK - file.tell() % _BLOCK
        if free < _PIECE.size:
            file.seek(free, 1)
        head = file.read(_PIECE.size)
        if len(head) < _PIECE.size:
            return
        checksum, length, kind = _PIECE.unpack(head)
        data = file.read(length)
        if len(data) < length or zlib.crc32(bytes([kind]) + data) != checksum:
            return
        whole = whole + data if kind in (_MIDDLE, _LAST) else data
        if kind in (_WHOLE, _LAST):
            yield whole
