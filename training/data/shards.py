"""Documents to token shards: encoded on all cores, written in order, and continued after a kill.

Each thread encodes its own batch with its own copy of the tokenizer. The library's threads would share one
word cache, and leave every token to be freed by a thread that did not allocate it.

`resume.json`, beside the shards, says what was written so far. A continued call reads the source again from
its beginning, which is much faster than encoding it, so readers and hashes have no saved state.
"""

import hashlib
import json
import os
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from cluster import files
from training.data.corpora import Document
from training.data.dataset import SPLITS, Shard, Split
from training.data.records import Position
from training.data.tokenizer import load_tokenizer

BATCH_BYTES = 1 << 19
BATCH_DOCUMENTS = 4096
SAVE_BYTES = 64 << 20  # of text between two writes of `resume.json`
PENDING_BYTES = 16 << 20  # of text that is being encoded or waits to be written
MOST_THREADS = 16  # reading and writing, by one thread, keeps no more of them busy
RESUME_FILE = "resume.json"
TOKENIZER_FILE = "tokenizer.json"

Batch = list[tuple[str, Document]]  # (split, document)


@dataclass
class Written:
    """How much of a split is in its shards."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


@dataclass
class Resume:
    """How far a call came, and how long its shards were then."""

    request: str
    tokenizer_sha256: str = ""
    library: str = tokenizers.__version__  # another one may cut a text differently
    splits: dict[str, Written] = field(default_factory=lambda: {name: Written() for name in SPLITS})
    shard_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, request: str) -> "Resume":
        """What a killed call left in `folder`, with what it wrote afterwards cut off.

        If that is not usable for `request`, the folder is emptied.
        """
        try:
            content = json.loads((folder / RESUME_FILE).read_bytes())
            splits = {name: Written(**content["splits"][name]) for name in SPLITS}
            left = cls(**{**content, "splits": splits})
            sizes = {name: (folder / name).stat().st_size for name in left.shard_bytes}
            same = (left.request, left.library) == (request, tokenizers.__version__)
            usable = same and files.sha256_of(folder / TOKENIZER_FILE) == left.tokenizer_sha256
            usable = usable and all(sizes[name] >= size for name, size in left.shard_bytes.items())
        except (OSError, ValueError, KeyError, TypeError):
            usable = False
        kept = {RESUME_FILE: None, TOKENIZER_FILE: None, **left.shard_bytes} if usable else {}
        for path in folder.iterdir():
            if path.name not in kept:
                path.unlink()
            elif (size := kept[path.name]) is not None:
                os.truncate(path, size)
        return left if usable else cls(request)

    def save(self, folder: Path) -> None:
        """Write it beside the shards, after these are on disk."""
        for path in folder.glob("*.bin"):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                self.shard_bytes[path.name] = os.fstat(stream.fileno()).st_size
        files.write_json(folder / RESUME_FILE, asdict(self))


class SplitWriter:
    """Writes the tokens of a split to `<split>-00000.bin`, `<split>-00001.bin`, … of `shard_tokens` each.

    Args:
        written: what earlier calls wrote.
    """

    def __init__(self, folder: Path, name: str, *, shard_tokens: int, written: Written) -> None:
        self.written = written
        self._folder, self._name, self._shard_tokens = folder, name, shard_tokens

    def write(self, documents: Iterable[Document], tokens: NDArray[Any]) -> None:
        """Append documents, whose tokens these are; what a full shard cannot take goes into the next."""
        for document in documents:
            self.written.documents += 1
            self.written.text_bytes += document.num_bytes
        while len(tokens):
            number, filled = divmod(self.written.tokens, self._shard_tokens)
            part, tokens = np.split(tokens, [self._shard_tokens - filled])
            with self._file(number).open("ab") as stream:
                stream.write(part.data)
            self.written.tokens += len(part)

    def split(self) -> Split:
        """What was written, as the manifest records it."""
        shards = []
        for number, first in enumerate(range(0, self.written.tokens, self._shard_tokens)):
            file, tokens = self._file(number), min(self._shard_tokens, self.written.tokens - first)
            shards.append(Shard(file.name, tokens, files.sha256_of(file)))
        return Split(self.written.documents, self.written.text_bytes, tuple(shards))

    def _file(self, number: int) -> Path:
        return self._folder / f"{self._name}-{number:05}.bin"


class ShardWriter:
    """Encodes and writes both splits. `resume` says what is already there.

    Attributes:
        text_sha256: over the digests of all documents, in order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        end_id: int,
        dtype: str,
        shard_tokens: int,
        resume: Resume,
    ) -> None:
        self.text_sha256 = hashlib.sha256()
        self.splits = {
            name: SplitWriter(folder, name, shard_tokens=shard_tokens, written=written)
            for name, written in resume.splits.items()
        }
        self._folder, self._resume, self._own = folder, resume, threading.local()
        self._end_id, self._dtype = end_id, np.dtype(dtype).newbyteorder("<")
        self._saved_bytes = self.text_bytes

    @property
    def tokens(self) -> int:
        """Of both splits, those of earlier calls included."""
        return sum(writer.written.tokens for writer in self.splits.values())

    @property
    def text_bytes(self) -> int:
        """As `tokens`."""
        return sum(writer.written.text_bytes for writer in self.splits.values())

    def write(self, divided: Iterable[tuple[str, Document]], position: Position) -> Iterator[int]:
        """Write the documents. After each batch it yields the `position` up to which all is written.

        The threads encode without Python's lock; meanwhile this one reads and writes.
        """
        threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
        pool, pending, pending_bytes = ThreadPoolExecutor(threads), deque[Any](), 0
        with _library_without_threads():
            try:
                for batch in _batches(self._after_the_written(divided)):
                    num_bytes = sum(document.num_bytes for _, document in batch)
                    while pending and pending_bytes + num_bytes > PENDING_BYTES:
                        pending_bytes -= pending[0][0]
                        yield self._append(*pending.popleft()[1:])
                    pending.append((num_bytes, position.num_bytes, batch, pool.submit(self._encode, batch)))
                    pending_bytes += num_bytes
                while pending:
                    yield self._append(*pending.popleft()[1:])
            finally:
                pool.shutdown(cancel_futures=True)

    def _after_the_written(self, divided: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, Document]]:
        """The documents that earlier calls did not write. Those too are in `text_sha256`."""
        written = sum(writer.written.documents for writer in self.splits.values())
        for number, (split, document) in enumerate(divided):
            self.text_sha256.update(document.digest)
            if number >= written:
                yield split, document

    def _encode(self, batch: Batch) -> dict[str, NDArray[Any]]:
        if not hasattr(self._own, "tokenizer"):
            self._own.tokenizer = load_tokenizer(self._folder / TOKENIZER_FILE)
        encodings = self._own.tokenizer.encode_batch_fast([document.text for _, document in batch])
        ids = {name: array("I") for name in self.splits}  # filled from a list faster than NumPy's
        for (split, _), encoding in zip(batch, encodings, strict=True):
            ids[split].fromlist(encoding.ids)
            ids[split].append(self._end_id)
        return {name: np.array(part, dtype=self._dtype) for name, part in ids.items()}

    def _append(self, position: int, batch: Batch, encoded: Any) -> int:
        for name, tokens in encoded.result().items():
            self.splits[name].write((document for split, document in batch if split == name), tokens)
        if self.text_bytes - self._saved_bytes >= SAVE_BYTES:
            self._saved_bytes = self.text_bytes
            self._resume.save(self._folder)
        return position


@contextmanager
def _library_without_threads() -> Iterator[None]:
    name = "TOKENIZERS_PARALLELISM"  # read by the library at each call
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _batches(divided: Iterable[tuple[str, Document]]) -> Iterator[Batch]:
    """(split, document) in groups of at most 4096, that end once they hold 512 KiB."""
    batch: Batch = []
    num_bytes = 0
    for split, document in divided:
        batch.append((split, document))
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
