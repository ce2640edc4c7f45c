"""Documents to token shards: encoded on all cores, written in order, and continued after a kill.

`resume.json`, beside the shards, says what was written so far. A continued call reads the source again from
its beginning, which is much faster than encoding it, so readers and hashes have no saved state.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster import files
from training.data.corpora import Document
from training.data.dataset import SPLITS, Shard, Split
from training.data.records import Position

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 4096
SAVE_BYTES = 64 << 20  # of text between two writes of `resume.json`
MOST_THREADS = 16  # each holds a batch's encodings, some 100 bytes a token
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
    batches: int = 0
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
        tokenizer: Tokenizer,
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
        self._folder, self._tokenizer, self._resume = folder, tokenizer, resume
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

        The tokenizer's threads encode without Python's lock; meanwhile this thread reads and writes.
        """
        threads = min(len(os.sched_getaffinity(0)), MOST_THREADS) + 1
        with ThreadPoolExecutor(threads) as pool:
            pending = deque[Any]()
            for number, batch in enumerate(_batches(divided)):
                self.text_sha256.update(b"".join(document.digest for _, document in batch))
                if number >= self._resume.batches:
                    pending.append((position.num_bytes, batch, pool.submit(self._encode, batch)))
                if len(pending) > threads:
                    yield self._append(*pending.popleft())
            while pending:
                yield self._append(*pending.popleft())

    def _encode(self, batch: Batch) -> dict[str, NDArray[Any]]:
        encodings = self._tokenizer.encode_batch_fast([document.text for _, document in batch])
        end = (self._end_id,)
        return {
            name: np.fromiter(
                chain.from_iterable(
                    chain(encoding.ids, end)
                    for (split, _), encoding in zip(batch, encodings, strict=True)
                    if split == name
                ),
                dtype=self._dtype,
            )
            for name in self.splits
        }

    def _append(self, position: int, batch: Batch, encoded: Any) -> int:
        for name, tokens in encoded.result().items():
            self.splits[name].write((document for split, document in batch if split == name), tokens)
        self._resume.batches += 1
        if self.text_bytes - self._saved_bytes >= SAVE_BYTES:
            self._saved_bytes = self.text_bytes
            self._resume.save(self._folder)
        return position


def _batches(divided: Iterable[tuple[str, Document]]) -> Iterator[Batch]:
    """(split, document) in groups of at most 4096, that end once they hold 1 MiB."""
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
