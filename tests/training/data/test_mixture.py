"""Mixtures: the order by weight, the folder of links, and every refusal."""

from pathlib import Path

import numpy as np
import pytest

from cluster import files
from tests.training.data.small_corpus import change, silent, texts, write_jsonl
from training.data import mixture, readers
from training.data.config import DataConfig
from training.data.dataset import DataError, Manifest, TokenDataset, micro_batch
from training.data.mixture import MixedOrder, describe, drawn, order_of
from training.data.prepare import main, prepare

LENGTH = 32
WEIGHTS = {"web": 0.6, "books": 0.3, "code": 0.1}


@pytest.fixture
def mixed(config: DataConfig, tmp_path: Path) -> DataConfig:
    """Three corpora; that of web is far too small for its weight."""
    documents = texts(400)
    given = {
        "web": documents[:40],
        "books": documents[40:300],
        "code": [text[::-1] for text in documents[300:]],
    }
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in given.items()}
    return change(config, sources=tuple(f"{name}={files[name]}@{weight}" for name, weight in WEIGHTS.items()))


def opened(config: DataConfig, *, split: str = "train") -> TokenDataset:
    return TokenDataset.open(prepare(config, report=silent), split=split, sequence_length=LENGTH)


def test_the_order_is_a_pure_function_of_seed_and_position(mixed: DataConfig) -> None:
    dataset = opened(mixed)
    whole = MixedOrder(dataset, seed=7).ids(0, count=25_000)
    pieces = MixedOrder(dataset, seed=7)
    for start, count in ((24_990, 10), (0, 3), (9_990, 20), (3, 5000), (20_000, 1)):
        assert pieces.ids(start, count=count).tolist() == whole[start : start + count].tolist()
    assert MixedOrder(dataset, seed=8).ids(0, count=100).tolist() != whole[:100].tolist()
    ends = [part.stop for part in dataset.parts.values()]
    turns = np.searchsorted(ends, MixedOrder(dataset, seed=0).ids(0, count=12), side="right").tolist()
    assert turns == [0, 1, 0, 0, 2, 1, 0, 0, 1, 0, 0, 1], "runs that were started before resume in this order"


def test_every_stretch_holds_each_source_by_its_weight(mixed: DataConfig) -> None:
    dataset = opened(mixed)
    order = MixedOrder(dataset, seed=3)
    ids = order.ids(0, count=20_000)
    for end in (10, 100, 999, 10_000, 12_345, 20_000):
        counts = [int(np.isin(ids[:end], within).sum()) for within in dataset.parts.values()]
        assert counts == order.drawn(end)
        assert np.abs(np.array(counts) - end * np.array(list(WEIGHTS.values()))).max() <= 1
    assert order.drawn(10_000) == [6000, 3000, 1000]


def test_a_source_gives_each_sample_once_an_epoch_and_then_repeats(mixed: DataConfig) -> None:
    dataset = opened(mixed)
    ids = MixedOrder(dataset, seed=3).ids(0, count=5000)
    for within in dataset.parts.values():
        own = ids[np.isin(ids, within)]
        epochs = [own[first : first + len(within)] for first in range(0, len(own), len(within))]
        assert all(sorted(epoch) == list(within) for epoch in epochs[:-1])
        assert len(epochs) < 3 or list(epochs[0]) != list(epochs[1])
    said = describe(dataset, samples=2000, seed=3)
    size = len(dataset.parts["web"])
    assert said[0] == f"data web: 1,200 of 2,000 samples, from {size}: it repeats, {1200 / size:.2f} epochs"
    order = order_of(dataset, seed=3)
    row = drawn(order, 1000, dataset)
    assert row["source_tokens_books"] == 300 * LENGTH
    assert row["source_epochs_web"] == pytest.approx(600 / size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_global_batch_is_the_same_at_any_world_size(mixed: DataConfig, world_size: int) -> None:
    dataset = opened(mixed)
    order = order_of(dataset, seed=5)
    parts = [
        micro_batch(
            dataset, order, consumed_samples=80, micro_step=step, rank=rank, world_size=world_size,
            micro_sequences=2,
        )
        for step in range(8 // world_size)
        for rank in range(world_size)
    ]  # fmt: skip
    expected = dataset.samples(MixedOrder(dataset, seed=5).ids(80, count=16))
    assert np.concatenate(parts).tolist() == expected.tolist()


def test_a_mixture_is_a_folder_of_links_with_the_tokenizer_of_its_first_source(mixed: DataConfig) -> None:
    folder = prepare(mixed, report=silent)
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    assert [source.name for source in manifest.sources] == list(WEIGHTS)
    for source in manifest.sources:
        own = Manifest.read(Path(source.folder))
        assert own.fingerprint == source.fingerprint and own.tokenizer_sha256 == manifest.tokenizer_sha256
        assert (folder / f"{source.name}-train-00000.bin").samefile(Path(source.folder) / "train-00000.bin")
    assert sum(len(opened(mixed, split=split).parts) for split in ("train", "validation")) == 6
    lines: list[str] = []
    assert prepare(mixed, report=lines.append) == folder
    assert lines[-1].startswith("reusing: ")
    heavier = change(mixed, sources=(*mixed.sources[:2], mixed.sources[2].replace("@0.1", "@0.2")))
    assert Manifest.read(prepare(heavier, report=silent)).fingerprint != manifest.fingerprint
    for name in ("web-train-00000.bin", "tokenizer.json"):
        (folder / name).unlink()
        assert prepare(mixed, report=lines.append) == folder
        assert lines[-1].startswith("ready: ")
    (folder / "tokenizer.json").write_text("{}")
    prepare(mixed, report=lines.append)
    assert lines[-1].startswith("ready: ")
    manifest.verify(folder)


def test_each_file_of_a_mixture_is_hashed_once(mixed: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def sha256_of(path: Path) -> str:
        hashed.append(path)
        return files.sha256_of(path)

    monkeypatch.setattr(readers, "sha256_of", sha256_of)
    prepare(mixed, report=silent)
    assert sorted(path.name for path in hashed) == ["books.jsonl", "code.jsonl", "web.jsonl"]


def test_a_prepared_folder_is_a_source_and_another_tokenizer_is_refused_by_name(
    mixed: DataConfig, config: DataConfig
) -> None:
    ready = prepare(change(config, vocab_size=310), report=silent)
    both = change(mixed, sources=(f"ready={ready}@2", mixed.sources[1]))
    assert Manifest.read(prepare(both, report=silent)).vocab_size == 310
    with pytest.raises(
        DataError, match=rf"ready \({ready}\) has another tokenizer than books .*; prepare both"
    ):
        prepare(change(mixed, sources=(mixed.sources[1], f"ready={ready}@2")), report=silent)


def test_a_source_that_cannot_be_mixed_is_refused_by_name(
    mixed: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = change(mixed, sources=(*mixed.sources[:2], mixed.sources[2].replace("@0.1", "@0.00001")))
    with pytest.raises(DataError, match=r"data\.sources: code has less than 1/10000 of the weight"):
        prepare(tiny, report=silent)
    folder = prepare(mixed, report=silent)
    shard = Manifest.read(folder).validation.shards[0]
    assert shard.file.startswith("web-")
    with pytest.raises(DataError, match="the validation shards of web are shorter than one sample"):
        TokenDataset.open(folder, split="validation", sequence_length=shard.tokens)
    gone = change(mixed, sources=(mixed.sources[0], "b=/no/such/file"))
    with pytest.raises(DataError, match="/no/such/file"):
        prepare(gone, report=silent)


def test_the_command_prepares_a_mixture(mixed: DataConfig, capsys: pytest.CaptureFixture) -> None:
    sources = ",".join(f'"{source}"' for source in mixed.sources)
    keys = [f"data.sources=[{sources}]", f"data.directory={mixed.directory}", "data.vocab_size=320"]
    assert main(["--dry-run", *keys]) == 0
    assert f"mixture: {', '.join(mixed.sources)}\nfolder: " in capsys.readouterr().out
    assert not Path(mixed.directory).exists()
    assert mixture.quotas([1, 1, 1]) == [3334, 3333, 3333]
