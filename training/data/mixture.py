"""Several sources by weight, as one prepared folder: links to the shards of the sources' own folders.

The order of the samples is a pure function of (seed, position), like that of a single source, so a run
resumes exactly and reads the same at any world size. An exhausted source begins again, in another order.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster import files
from cluster.record import origins
from training.data.config import DataConfig, parse_source
from training.data.corpora import Corpus
from training.data.dataset import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SPLITS,
    DataError,
    Manifest,
    MixedSource,
    SampleOrder,
    Split,
    TokenDataset,
)

PERIOD = 10_000  # samples, in which each source has its exact share
_MIXING = 1 << 63  # sets the stream of the mixing apart from those of the epochs


class MixedOrder:
    """The endless order of sample ids of a mixture.

    Of every 10,000 samples, each source has its share by weight, spread evenly. Its own samples follow each
    other as in `SampleOrder`.
    """

    def __init__(self, dataset: TokenDataset, *, seed: int) -> None:
        self.names = [source.name for source in dataset.manifest.sources]
        self._ranges = list(dataset.parts.values())
        self._quotas = quotas([source.weight for source in dataset.manifest.sources])
        self._orders = [SampleOrder(len(each), seed=seed) for each in self._ranges]
        self._seed = seed
        self._period, self._turns = -1, np.empty(0, dtype=np.int64)

    def ids(self, start: int, *, count: int) -> NDArray[np.int64]:
        """Sample ids at the positions [start, start + count): int64 [count]. Any start, in any sequence."""
        ids = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            offset = (start + filled) % PERIOD
            before = self.drawn(start + filled)
            turns = self._turns_of((start + filled) // PERIOD)[offset : offset + count - filled]
            part = ids[filled : filled + len(turns)]
            for number, (order, within) in enumerate(zip(self._orders, self._ranges, strict=True)):
                mine = np.flatnonzero(turns == number)
                part[mine] = within.start + order.ids(before[number], count=len(mine))
            filled += len(turns)
        return ids

    def drawn(self, position: int) -> list[int]:
        """How many of the samples before `position` each source gave."""
        period, offset = divmod(position, PERIOD)
        here = np.bincount(self._turns_of(period)[:offset], minlength=len(self.names))
        return [period * quota + int(some) for quota, some in zip(self._quotas, here, strict=True)]

    def _turns_of(self, period: int) -> NDArray[np.int64]:
        """[PERIOD]: which source has each place. The k-th of n samples lies in the k-th of n equal parts."""
        if period != self._period:
            key = np.array([self._seed % 2**64, _MIXING + period], dtype=np.uint64)
            jitter = (np.random.Philox(key=key).random_raw(PERIOD) >> np.uint64(11)) * 2.0**-53
            sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
            numbers = np.concatenate([np.arange(quota) for quota in self._quotas])
            places = (numbers + jitter) / np.repeat(self._quotas, self._quotas)
            self._turns, self._period = sources[np.argsort(places, kind="stable")], period
        return self._turns


def quotas(weights: list[float]) -> list[int]:
    """Samples of each source in a period, by largest remainder."""
    exact = np.array(weights) / sum(weights) * PERIOD
    whole = np.floor(exact).astype(int)
    for number in np.argsort(whole - exact, kind="stable")[: PERIOD - whole.sum()]:
        whole[number] += 1
    return whole.tolist()


def order_of(dataset: TokenDataset, *, seed: int) -> SampleOrder | MixedOrder:
    """The order in which a run with this seed reads the data."""
    if dataset.manifest.sources:
        return MixedOrder(dataset, seed=seed)
    return SampleOrder(dataset.num_samples, seed=seed)


def drawn(order: SampleOrder | MixedOrder, samples: int, dataset: TokenDataset) -> dict[str, float]:
    """For the record: tokens and epochs that each source of a mixture gave before this position."""
    if isinstance(order, SampleOrder):
        return {}
    found: dict[str, float] = {}
    for name, count in zip(order.names, order.drawn(samples), strict=True):
        found[f"source_tokens_{name}"] = count * dataset.sequence_length
        found[f"source_epochs_{name}"] = count / len(dataset.parts[name])
    return found


def describe(dataset: TokenDataset, *, samples: int, seed: int) -> list[str]:
    """A line for each source of a mixture: its share, and how often a run of `samples` reads it."""
    order = order_of(dataset, seed=seed)
    if isinstance(order, SampleOrder):
        return []
    lines = []
    for name, count in zip(order.names, order.drawn(samples), strict=True):
        size = len(dataset.parts[name])
        repeats = f": it repeats, {count / size:.2f} epochs" if count > size else ""
        lines.append(f"data {name}: {count:,} of {samples:,} samples, from {size:,}{repeats}")
    return lines


def origin_of(dataset: TokenDataset) -> origins.Origin:
    """The origin of prepared data, for a record. That of a mixture names every source."""
    sources = dataset.manifest.sources
    inputs = [origins.of_dataset(Path(each.folder), each.fingerprint) for each in sources]
    return origins.of_dataset(dataset.directory, dataset.manifest.fingerprint, inputs=inputs)


# --- preparing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixtureRequest:
    """What `prepare` is asked for by `data.sources`, and the folder that will hold it."""

    config: DataConfig
    key: str  # SHA-256 over all that determines the content of the folder
    corpora: Mapping[str, Corpus]  # of the sources that are no prepared folders, by name

    @classmethod
    def of(cls, config: DataConfig, request_of: Callable[[DataConfig], Any]) -> "MixtureRequest":
        """Hashes the files of all sources. `request_of` gives that of one corpus. Raises `DataError`."""
        asked, corpora = [], {}
        for name, source, weight in map(parse_source, config.sources):
            if folder := prepared_folder(source):
                content = Manifest.read(folder).fingerprint
            else:
                request = request_of(of_source(config, source))
                content, corpora[name] = request.key, request.corpus
            asked.append([name, weight, content])
        key = hashlib.sha256(json.dumps([FORMAT_VERSION, asked]).encode()).hexdigest()
        return cls(config, key, corpora)

    @property
    def target(self) -> Path:
        """`<data.directory>/mixture-<12 hex digits of the key>`."""
        return Path(self.config.directory).expanduser() / f"mixture-{self.key[:12]}"

    def describe(self) -> str:
        """Lines for people: the sources with their weights, the folder and its state."""
        state = "there" if self.target.exists() else "not there yet"
        return "\n".join([f"mixture: {', '.join(self.config.sources)}", f"folder: {self.target} ({state})"])


def prepared_folder(source: str) -> Path | None:
    """The folder that a source names, if it was written by `prepare`."""
    folder = Path(source).expanduser()
    return folder if (folder / MANIFEST_FILE).is_file() else None


def of_source(config: DataConfig, source: str) -> DataConfig:
    """The configuration of one corpus of a mixture."""
    return replace(config, source=source, sources=())


def prepare_sources(
    request: MixtureRequest, prepare: Callable[[DataConfig, Corpus], Path]
) -> list[tuple[Path, Manifest]]:
    """Prepare or verify every source, all with the tokenizer of the first.

    Raises:
        DataError: a source is not usable, or was prepared with another tokenizer.
    """
    config, found = request.config, list[tuple[Path, Manifest]]()
    for name, source, _ in map(parse_source, config.sources):
        folder = prepared_folder(source)
        if folder:
            Manifest.read(folder).verify(folder)
        else:
            folder = prepare(of_source(config, source), request.corpora[name])
        found.append((folder.absolute(), manifest := Manifest.read(folder)))
        if config.tokenizer == "train":
            config = replace(config, tokenizer=str(folder / manifest.tokenizer_file))
        first, of_first = found[0]
        if _tokenizer_of(manifest) != _tokenizer_of(of_first):
            raise DataError(
                f"data.sources: {name} ({folder}) has another tokenizer than "
                f"{parse_source(config.sources[0])[0]} ({first}); prepare both with "
                f"data.tokenizer={first / of_first.tokenizer_file}"
            )
    return found


def _tokenizer_of(manifest: Manifest) -> tuple[str, int]:
    return manifest.tokenizer_sha256, manifest.end_of_text_id


def write_mixture(request: MixtureRequest, folders: list[tuple[Path, Manifest]]) -> bool:
    """Write the folder of links and its manifest. Returns False if it is already there, whole."""
    target, manifest = request.target, _manifest(request, folders)
    try:
        if Manifest.read(target) == manifest:
            for split in SPLITS:
                manifest.check_sizes(target, split=split)
            if files.sha256_of(target / manifest.tokenizer_file) == manifest.tokenizer_sha256:
                return False
    except (DataError, FileNotFoundError):
        pass
    with files.replace_folder(target) as folder:
        for source, (place, of_source) in zip(manifest.sources, folders, strict=True):
            for split in SPLITS:
                for shard in of_source.split(split).shards:
                    link = os.path.relpath((place / shard.file).resolve(), target.parent.resolve() / "x")
                    (folder / f"{source.name}-{shard.file}").symlink_to(link)
        place, first = folders[0]
        content = (place / first.tokenizer_file).read_bytes()
        (folder / manifest.tokenizer_file).write_bytes(content)
        files.write_text(folder / MANIFEST_FILE, manifest.to_json())
    return True


def _manifest(request: MixtureRequest, folders: list[tuple[Path, Manifest]]) -> Manifest:
    given = [parse_source(entry) for entry in request.config.sources]
    parts = [manifest for _, manifest in folders]
    sources = tuple(
        MixedSource(
            name, weight, len(part.train.shards), len(part.validation.shards), part.fingerprint, str(folder)
        )
        for (name, _, weight), (folder, part) in zip(given, folders, strict=True)
    )
    for source, quota in zip(sources, quotas([each.weight for each in sources]), strict=True):
        if not quota:
            raise DataError(f"data.sources: {source.name} has less than 1/{PERIOD} of the weight; raise it")

    def joined(split: str) -> Split:
        shards = [
            replace(shard, file=f"{source.name}-{shard.file}")
            for source, part in zip(sources, parts, strict=True)
            for shard in part.split(split).shards
        ]
        each = [part.split(split) for part in parts]
        return Split(sum(s.documents for s in each), sum(s.text_bytes for s in each), tuple(shards))

    skipped = [line for part in parts for line in part.skipped_first]
    return replace(
        parts[0],
        request=request.key,
        source="; ".join(
            f"{name} {weight:g}: {part.source}" for (name, _, weight), part in zip(given, parts, strict=True)
        ),
        text_sha256=hashlib.sha256("".join(part.text_sha256 for part in parts).encode()).hexdigest(),
        train=joined("train"),
        validation=joined("validation"),
        skipped_records=sum(part.skipped_records for part in parts),
        skipped_first=tuple(skipped[:10]),
        sources=sources,
    )
