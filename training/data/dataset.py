"""Prepared token shards: their manifest, their samples, and the order in which a run consumes them.

A prepared folder (made by `training.data.prepare`) holds flat little-endian token files, a tokenizer and
`manifest.json`. Which sample a rank reads is a pure function of (seed, consumed samples): no loader
state, so a run resumes exactly, at any number of ranks.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from cluster.cli import UserError
from cluster.files import sha256_of

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "validation")
DTYPES = ("uint16", "uint32")
REMEDY = "run `python -m training.data.prepare` again"


class DataError(UserError):
    """A corpus or prepared folder that cannot be used. The message names the file and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One token file of a split."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The documents of a split and the shards that hold their tokens, in order."""

    documents: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        """Tokens over all shards, the end-of-text token of each document included."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class MixedSource:
    """A source of a mixture (`training.data.mixture`): its weight, and how many of the shards are its own."""

    name: str
    weight: float
    train_shards: int
    validation_shards: int
    fingerprint: str
    folder: str  # where it was prepared


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `request` is the hash of everything that was asked of `prepare`.

    `skipped_records` of the source could not be used; `skipped_first` says where the first ones are, and why.
    `sources` of a mixture, in the order of its shards.
    """

    version: int
    request: str
    source: str
    text_sha256: str
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_text_id: int
    dtype: str
    train: Split
    validation: Split
    skipped_records: int
    skipped_first: tuple[str, ...]
    sources: tuple[MixedSource, ...] = ()

    def __post_init__(self) -> None:
        shards = [shard for split in SPLITS for shard in self.split(split).shards]
        files = [self.tokenizer_file, *(shard.file for shard in shards)]
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of: {', '.join(DTYPES)}")
        if not 0 <= self.end_of_text_id < self.vocab_size <= np.iinfo(self.dtype).max + 1:
            raise ValueError(f"end_of_text_id, vocab_size and {self.dtype} contradict each other")
        if any(shard.tokens < 1 for shard in shards):
            raise ValueError("a shard without tokens")
        if any(Path(file).name != file for file in files):
            raise ValueError("a file name that leaves the folder")
        if self.sources and not all(0 < source.weight < float("inf") for source in self.sources):
            raise ValueError("a source without a positive weight")
        for split in SPLITS if self.sources else ():
            if sum(self.shards_by_source(split).values()) != len(self.split(split).shards):
                raise ValueError("the shards of the sources are not those of the splits")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check `<directory>/manifest.json`; the shards are not looked at.

        Raises:
            DataError: missing, unreadable, of another format version, or not a manifest.
        """
        path = directory / MANIFEST_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("version") != FORMAT_VERSION:
                raise ValueError(f"format version {content.get('version')!r}, not {FORMAT_VERSION}")
            return _decode(cls, content, "manifest")
        except FileNotFoundError as error:
            raise DataError(f"{path}: missing, so this is no prepared folder; {REMEDY}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check data.directory") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a usable manifest ({error}); {REMEDY}") from error

    def to_json(self) -> str:
        """The text that `read` reads back to an equal object."""
        content = dataclasses.asdict(self)
        if not self.sources:
            del content["sources"]
        return json.dumps(content, indent=2) + "\n"

    def shards_by_source(self, split: str) -> dict[str, int]:
        """Name of each source -> how many shards of the split are its own."""
        return {source.name: getattr(source, f"{split}_shards") for source in self.sources}

    def split(self, name: str) -> Split:
        """The split 'train' or 'validation'."""
        assert name in SPLITS, name
        return getattr(self, name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of what the model sees: tokenizer, dtype, tokens of each shard, mixture."""
        shards = {name: [(s.tokens, s.sha256) for s in self.split(name).shards] for name in SPLITS}
        identity: list[Any] = [self.tokenizer_sha256, self.dtype, shards]
        if self.sources:
            identity.append([[source.name, source.weight, source.fingerprint] for source in self.sources])
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def check_sizes(self, directory: Path, *, split: str) -> None:
        """Raise a `DataError` unless every shard of `split` is there with its exact size."""
        for shard in self.split(split).shards:
            path = directory / shard.file
            expected = shard.tokens * np.dtype(self.dtype).itemsize
            if not path.is_file():
                raise DataError(f"{path}: missing shard; {REMEDY}")
            if (size := path.stat().st_size) != expected:
                raise DataError(f"{path}: {size} bytes, but the manifest says {expected}; {REMEDY}")

    def verify(self, directory: Path) -> None:
        """Raise a `DataError` unless every file is there with the SHA-256 of the manifest. Reads it all."""
        hashes = {self.tokenizer_file: self.tokenizer_sha256}
        for split in SPLITS:
            self.check_sizes(directory, split=split)
            hashes |= {shard.file: shard.sha256 for shard in self.split(split).shards}
        for file, expected in hashes.items():
            path = directory / file
            if not path.is_file():
                raise DataError(f"{path}: missing; {REMEDY}")
            if sha256_of(path) != expected:
                raise DataError(f"{path}: corrupt, its SHA-256 is not the manifest's; {REMEDY}")


def _decode(kind: Any, value: Any, name: str) -> Any:
    """JSON `value` as the type `kind`: a dataclass, a tuple of one type, or a scalar; else a ValueError."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        optional = {field.name for field in dataclasses.fields(kind) if field.default == ()}
        if not isinstance(value, dict) or set(value) | optional != set(hints):
            raise ValueError(f"{name} must have exactly the fields {', '.join(hints)}")
        return kind(**{field: _decode(hints[field], value[field], field) for field in value})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list")
        return tuple(_decode(get_args(kind)[0], item, name) for item in value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}")
    return value


@dataclass(frozen=True)
class TokenDataset:
    """The samples of one split. Sample i of a shard is its tokens [i*L, i*L + L + 1), L = sequence_length.

    Neighbours share one token: the last target of one is the first input of the next. No sample crosses
    a shard, so the last tokens of each shard (fewer than L) are left out.

    A copy that another process receives maps the shards itself, and checks their sizes on its own node.
    """

    directory: Path
    manifest: Manifest
    split: str
    sequence_length: int

    @classmethod
    def open(cls, directory: Path, *, split: str, sequence_length: int) -> "TokenDataset":
        """The split 'train' or 'validation' of a prepared folder.

        Raises:
            DataError: no usable manifest, a missing or truncated shard, or fewer tokens than one sample.
        """
        dataset = cls(directory, Manifest.read(directory), split, sequence_length)
        _ = dataset.shards  # maps and checks them
        if dataset.num_samples == 0:
            longest = max((shard.tokens for shard in dataset.manifest.split(split).shards), default=0)
            raise DataError(
                f"{directory}: the longest {split} shard has {longest} tokens, but one sample needs "
                f"batch.sequence_length + 1 = {sequence_length + 1}; lower batch.sequence_length, or prepare "
                "more text (data.source, data.validation_fraction, data.shard_tokens)"
            )
        for name, within in dataset.parts.items():
            if not within:
                raise DataError(
                    f"{directory}: the {split} shards of {name} are shorter than one sample of "
                    f"batch.sequence_length + 1 = {sequence_length + 1} tokens; lower batch.sequence_length, "
                    "or take it out of data.sources"
                )
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:  # without the maps, which pickle would copy
        return TokenDataset, (self.directory, self.manifest, self.split, self.sequence_length)

    @cached_property
    def shards(self) -> tuple[np.memmap, ...]:
        """The shards, mapped into memory: uint16 or uint32 [tokens] each."""
        self.manifest.check_sizes(self.directory, split=self.split)
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        files = (self.directory / shard.file for shard in self.manifest.split(self.split).shards)
        return tuple(np.memmap(file, dtype=dtype, mode="r") for file in files)

    @cached_property
    def first_samples(self) -> NDArray[np.int64]:
        """[num_shards + 1]: number of samples before each shard, then in all."""
        shards = self.manifest.split(self.split).shards
        samples = [(shard.tokens - 1) // self.sequence_length for shard in shards]
        return np.cumsum([0, *samples], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples in the split, over all shards."""
        return int(self.first_samples[-1])

    @cached_property
    def parts(self) -> dict[str, range]:
        """The samples of each source of a mixture, by its name; of other data, all under the name ""."""
        counts = self.manifest.shards_by_source(self.split) or {"": len(self.first_samples) - 1}
        ends = self.first_samples[np.cumsum([0, *counts.values()])].tolist()
        return {name: range(*pair) for name, pair in zip(counts, itertools.pairwise(ends), strict=True)}

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each of `parts`; they add up to 1."""
        weights = {source.name: source.weight for source in self.manifest.sources} or {"": 1.0}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def sample(self, index: int) -> NDArray[np.int64]:
        """Sample `index` of the split: int64 [sequence_length + 1]."""
        return self.samples([index])[0]

    def samples(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples `ids`, each in [0, num_samples): int64 [len(ids), sequence_length + 1]."""
        tokens = np.empty((len(ids), self.sequence_length + 1), dtype=np.int64)
        for row, index in zip(tokens, ids, strict=True):
            assert 0 <= index < self.num_samples, index
            shard = int(np.searchsorted(self.first_samples, index, side="right")) - 1
            start = int(index - self.first_samples[shard]) * self.sequence_length
            row[:] = self.shards[shard][start : start + len(row)]
        return tokens


class SampleOrder:
    """The endless order of sample ids: epoch e is a permutation keyed by (seed, e).

    The permutation sorts raw Philox words, because NumPy promises the bits of a bit generator for ever
    but not the algorithm of `Generator.permutation`: a run resumes in the same order under a later NumPy.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        assert num_samples >= 1, num_samples
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def ids(self, start: int, *, count: int) -> NDArray[np.int64]:
        """Sample ids at the positions [start, start + count): int64 [count]. Any start, in any sequence."""
        ids = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, offset = divmod(start + filled, self.num_samples)
            part = self._of_epoch(epoch)[offset : offset + count - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
        return ids

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            key = np.array([self.seed % 2**64, epoch], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(self.num_samples)
            self._permutation = np.argsort(words, kind="stable")
            self._epoch = epoch
        return self._permutation


class Order(Protocol):
    """An endless order of sample ids, such as `SampleOrder`."""

    def ids(self, start: int, *, count: int) -> NDArray[np.int64]: ...


def micro_batch(
    dataset: TokenDataset,
    order: Order,
    *,
    consumed_samples: int,
    micro_step: int,
    rank: int,
    world_size: int,
    micro_sequences: int,
) -> NDArray[np.int64]:
    """What `rank` reads in forward pass `micro_step` of the global batch that starts at `consumed_samples`.

    Ranks take consecutive positions, micro step after micro step, so that a global batch is the same
    samples whatever the world size.

    Returns:
        int64 [micro_sequences, sequence_length + 1]; inputs are [:, :-1], targets [:, 1:].
    """
    start = consumed_samples + (micro_step * world_size + rank) * micro_sequences
    return dataset.samples(order.ids(start, count=micro_sequences))


def document_starts(inputs: NDArray[np.int64], *, end_of_text: int) -> NDArray[np.int32]:
    """Where documents begin in `inputs` [B, T], counted over all B·T tokens: int32 [N + 1], the last is B·T.

    A sequence begins one, and so does the token after an end of text.
    """
    begins = np.ones(inputs.shape, dtype=bool)
    begins[:, 1:] = inputs[:, :-1] == end_of_text
    return np.append(np.flatnonzero(begins), inputs.size).astype(np.int32)


def validation_batches(
    dataset: TokenDataset,
    *,
    sequences: int,
    rank: int,
    world_size: int,
    micro_sequences: int,
    apart_from: int = 0,
    within: range | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """min(sequences, num_samples) samples, evenly spaced over the split and dealt over the ranks once each.

    Every rank yields the same number of batches, because the forward pass of ZeRO-3 is collective; rows
    without a sample of their own repeat the first with weight 0.

    Args:
        apart_from: leave out the samples of `sequences=apart_from`, and space over the others.
        within: the samples to choose from; None: all.

    Yields:
        tokens int64 [micro_sequences, sequence_length + 1], weights float32 [micro_sequences], 1 or 0.
    """
    ids = np.arange(dataset.num_samples) if within is None else np.array(within)
    if apart_from:
        ids = np.delete(ids, _evenly_spaced(ids, apart_from))
    ids = _evenly_spaced(ids, sequences)
    for first in range(0, len(ids), world_size * micro_sequences):
        positions = first + rank * micro_sequences + np.arange(micro_sequences)
        real = positions < len(ids)
        yield dataset.samples(ids[np.where(real, positions, 0)]), real.astype(np.float32)


def _evenly_spaced(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """min(count, len(ids)) of `ids`, in order, the first among them."""
    count = min(count, len(ids))
    return ids[np.arange(count) * len(ids) // count] if count else ids[:0]


def of_share(sequences: int, share: float) -> int:
    """How many of `sequences` a source with this share of a mixture has: one or more, or none of none."""
    return max(round(sequences * share), 1) if sequences else 0


def require_tuning_sequences(dataset: TokenDataset, *, sequences: int, tuning_sequences: int) -> None:
    """Raise a `DataError` unless the split holds both, disjoint; without tuning sequences anything goes."""
    for name, share in dataset.shares.items() if tuning_sequences else ():
        wanted = of_share(sequences, share) + of_share(tuning_sequences, share)
        there = len(dataset.parts[name])
        if wanted > there:
            raise DataError(
                f"evaluation.tuning_sequences: {tuning_sequences} besides evaluation.sequences={sequences}, "
                f"but the validation split has {there} sequences of {dataset.sequence_length} tokens"
                f"{' of ' * bool(name)}{name}; lower either, or raise data.validation_fraction"
            )
