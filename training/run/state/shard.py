"""One rank's file of a checkpoint: safetensors' format, written in pieces, each on the disk before the next.

safetensors' own `save_file` says nothing until all is written, and an fsync of it all takes as long as the
disk needs. A slow disk could not be told from one that stands still.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20  # a disk of 0.4 MB/s still moves within `workers.hang_seconds`
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip


def write(file: Path, tensors: Mapping[str, Tensor], *, moved: Callable[[int], None]) -> str:
    """Write and sync the bytes of `safetensors.torch.save(tensors)`. Returns their SHA-256.

    Args:
        tensors: on the CPU, of DTYPES.
        moved: called with the number of bytes of each piece that is on the disk.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            stream.write(content)
            stream.flush()
            os.fdatasync(stream.fileno())
            moved(len(content))

        put(_header(tensors, ordered))
        for name in ordered:
            content = tensors[name].contiguous().flatten().view(torch.uint8).numpy().data
            for first in range(0, len(content), PIECE_BYTES):
                put(content[first : first + PIECE_BYTES])
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], ordered: list[str]) -> bytes:
    """The length of a JSON object, eight bytes, and the object, padded to a multiple of eight."""
    about, end = {}, 0
    for name in ordered:
        tensor = tensors[name]
        first, end = end, end + tensor.nbytes
        about[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]
        }  # fmt: skip
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
