"""Samples, their order over world sizes and resumes, validation, and every refusal of a damaged folder."""

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from training.data.dataset import (
    FORMAT_VERSION,
    DataError,
    Manifest,
    SampleOrder,
    Shard,
    Split,
    TokenDataset,
    document_starts,
    micro_batch,
    require_tuning_sequences,
    validation_batches,
)

LENGTH = 8


def write_folder(
    directory: Path, *, shard_tokens: tuple[int, ...] = (50, 33), dtype: str = "uint16"
) -> np.ndarray:
    """A prepared folder whose train and validation tokens count up from 0; the tokens of all shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text("{}")
    tokens = np.arange(sum(shard_tokens))
    splits = {}
    for split in ("train", "validation"):
        shards = []
        for number, part in enumerate(np.split(tokens, np.cumsum(shard_tokens)[:-1])):
            content = part.astype(dtype).tobytes()
            (directory / f"{split}-{number}.bin").write_bytes(content)
            shards.append(Shard(f"{split}-{number}.bin", len(part), hashlib.sha256(content).hexdigest()))
        splits[split] = Split(documents=3, text_bytes=100, shards=tuple(shards))
    manifest = Manifest(
        version=FORMAT_VERSION,
        request="0" * 64,
        source="test",
        text_sha256="0" * 64,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        vocab_size=1000,
        end_of_text_id=0,
        dtype=dtype,
        **splits,
        skipped_records=0,
        skipped_first=(),
    )
    (directory / "manifest.json").write_text(manifest.to_json())
    return tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path)
    return tmp_path


def open_train(folder: Path) -> TokenDataset:
    return TokenDataset.open(folder, split="train", sequence_length=LENGTH)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_samples_are_the_raw_tokens_and_never_cross_a_shard(tmp_path: Path, dtype: str) -> None:
    tokens = write_folder(tmp_path, shard_tokens=(50, 33, 8, 9), dtype=dtype)
    dataset = open_train(tmp_path)
    starts = [*range(0, 48, LENGTH), *range(50, 82, LENGTH), 91]  # 6, 4, 0 and 1 samples of 8 + 1 tokens
    assert dataset.num_samples == len(starts)
    for index, start in enumerate(starts):
        sample = dataset.sample(index)
        assert sample.dtype == np.int64
        assert sample.tolist() == tokens[start : start + LENGTH + 1].tolist()


def test_samples_gather_in_the_order_of_the_ids(folder: Path) -> None:
    dataset = open_train(folder)
    assert dataset.samples([6, 0]).tolist() == [dataset.sample(6).tolist(), dataset.sample(0).tolist()]


def test_a_dataset_that_is_handed_on_maps_its_shards_anew_and_checks_them(folder: Path) -> None:
    dataset = open_train(folder)
    handed_on = pickle.dumps(dataset)
    assert dataset.shards[0].tobytes() not in handed_on
    assert pickle.loads(handed_on).sample(9).tolist() == dataset.sample(9).tolist()
    (folder / "train-1.bin").unlink()
    with pytest.raises(DataError, match=r"train-1\.bin: missing shard"):
        _ = pickle.loads(handed_on).shards


def test_manifest_round_trips(folder: Path) -> None:
    manifest = Manifest.read(folder)
    (folder / "manifest.json").write_text(manifest.to_json())
    assert Manifest.read(folder) == manifest
    assert manifest.train.tokens == 83


def test_fingerprint_follows_the_content_and_nothing_else(folder: Path) -> None:
    manifest = Manifest.read(folder)
    elsewhere = dataclasses.replace(manifest, source="the same files, elsewhere")
    assert elsewhere.fingerprint == manifest.fingerprint
    shard = dataclasses.replace(manifest.train.shards[0], sha256="f" * 64)
    train = dataclasses.replace(manifest.train, shards=(shard, *manifest.train.shards[1:]))
    others = [
        dataclasses.replace(manifest, train=train),
        dataclasses.replace(manifest, tokenizer_sha256="f" * 64),
        dataclasses.replace(manifest, dtype="uint32"),
        dataclasses.replace(manifest, train=manifest.validation, validation=train),
    ]
    assert len({manifest.fingerprint, *(other.fingerprint for other in others)}) == 5


# --- order --------------------------------------------------------------------------------------------


def test_each_epoch_is_another_permutation() -> None:
    order = SampleOrder(101, seed=7)
    epochs = [order.ids(epoch * 101, count=101).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(101))


def test_the_order_is_pinned_for_ever() -> None:
    assert SampleOrder(10, seed=1234).ids(0, count=10).tolist() == [8, 9, 7, 3, 0, 1, 4, 2, 5, 6]


def test_seeds_give_other_orders() -> None:
    orders = [SampleOrder(50, seed=seed).ids(0, count=50).tolist() for seed in (0, 1, -1, 2**40)]
    assert len({tuple(order) for order in orders}) == 4


def test_any_start_agrees_with_the_whole_without_history() -> None:
    whole = SampleOrder(13, seed=3).ids(0, count=60)
    shared = SampleOrder(13, seed=3)
    for start in (59, 0, 25, 26, 12, 13, 14, 40, 1):
        count = min(20, 60 - start)
        assert shared.ids(start, count=count).tolist() == whole[start : start + count].tolist()
        assert (
            SampleOrder(13, seed=3).ids(start, count=count).tolist() == whole[start : start + count].tolist()
        )


def global_batches(
    dataset: TokenDataset, *, world_size: int, micro: int, start: int, steps: int
) -> np.ndarray:
    """The first tokens of every row, by step, in order of position: int64 [steps, 12]."""
    size = 12
    order = SampleOrder(dataset.num_samples, seed=5)
    batches = [
        micro_batch(
            dataset,
            order,
            consumed_samples=start + step * size,
            micro_step=micro_step,
            rank=rank,
            world_size=world_size,
            micro_sequences=micro,
        )
        for step in range(steps)
        for micro_step in range(size // (world_size * micro))
        for rank in range(world_size)
    ]
    assert all(batch.shape == (micro, LENGTH + 1) and batch.dtype == np.int64 for batch in batches)
    return np.concatenate(batches)[:, 0].reshape(steps, size)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 4), (2, 2), (2, 3), (3, 4), (3, 1)])
def test_global_batches_do_not_depend_on_the_world(folder: Path, world_size: int, micro: int) -> None:
    dataset = open_train(folder)  # 10 samples: every global batch of 12 crosses an epoch
    expected = global_batches(dataset, world_size=1, micro=12, start=0, steps=5)
    actual = global_batches(dataset, world_size=world_size, micro=micro, start=0, steps=5)
    assert actual.tolist() == expected.tolist()


def test_a_resume_at_another_world_size_continues_the_order(folder: Path) -> None:
    dataset = open_train(folder)
    whole = global_batches(dataset, world_size=2, micro=3, start=0, steps=6)
    for step in range(6):
        rest = global_batches(dataset, world_size=3, micro=2, start=12 * step, steps=6 - step)
        assert rest.tolist() == whole[step:].tolist()


def test_documents_begin_with_a_sequence_and_after_an_end_of_text() -> None:
    inputs = np.array([[3, 0, 4, 4, 0], [0, 0, 5, 5, 5]])
    assert document_starts(inputs, end_of_text=0).tolist() == [0, 2, 5, 6, 7, 10]
    assert document_starts(inputs, end_of_text=9).tolist() == [0, 5, 10]


# --- validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("sequences", [1, 5, 7, 10, 99])
def test_validation_is_each_sample_once_in_batches_of_equal_number(
    folder: Path, world_size: int, micro: int, sequences: int
) -> None:
    dataset = TokenDataset.open(folder, split="validation", sequence_length=LENGTH)
    ranks = [
        list(
            validation_batches(
                dataset, sequences=sequences, rank=rank, world_size=world_size, micro_sequences=micro
            )
        )
        for rank in range(world_size)
    ]
    count = min(sequences, 10)
    assert {len(batches) for batches in ranks} == {-(-count // (world_size * micro))}
    rows = []
    for tokens, weights in (batch for batches in ranks for batch in batches):
        assert tokens.shape == (micro, LENGTH + 1) and tokens.dtype == np.int64
        assert weights.shape == (micro,) and weights.dtype == np.float32
        assert set(weights.tolist()) <= {0.0, 1.0}
        rows += tokens[weights == 1].tolist()
    spaced = [position * 10 // count for position in range(count)]
    assert sorted(rows) == dataset.samples(spaced).tolist()


def test_validation_spans_the_split(folder: Path) -> None:
    dataset = TokenDataset.open(folder, split="validation", sequence_length=LENGTH)
    batches = validation_batches(dataset, sequences=4, rank=0, world_size=1, micro_sequences=4)
    assert [tokens[:, 0].tolist() for tokens, _ in batches] == [dataset.samples([0, 2, 5, 7])[:, 0].tolist()]


@pytest.mark.parametrize(("sequences", "tuning"), [(1, 1), (4, 3), (5, 5), (9, 1)])
def test_tuning_sequences_are_none_of_the_validation_sequences(
    folder: Path, sequences: int, tuning: int
) -> None:
    dataset = TokenDataset.open(folder, split="validation", sequence_length=LENGTH)
    assert dataset.num_samples == 10

    def rows(count: int, apart_from: int) -> list[list[int]]:
        batches = validation_batches(
            dataset, sequences=count, apart_from=apart_from, rank=0, world_size=1, micro_sequences=2
        )
        return [row for tokens, weights in batches for row in tokens[weights == 1].tolist()]

    validation, others = rows(sequences, 0), rows(tuning, sequences)
    assert len(validation) == sequences and len(others) == tuning
    assert not [row for row in others if row in validation]
    require_tuning_sequences(dataset, sequences=sequences, tuning_sequences=tuning)


def test_too_small_a_split_for_tuning_sequences_says_what_to_change(folder: Path) -> None:
    dataset = TokenDataset.open(folder, split="validation", sequence_length=LENGTH)
    require_tuning_sequences(dataset, sequences=99, tuning_sequences=0)
    with pytest.raises(DataError, match=r"tuning_sequences: 4 .*sequences=7.* 10 sequences .*fraction"):
        require_tuning_sequences(dataset, sequences=7, tuning_sequences=4)


# --- refusals -----------------------------------------------------------------------------------------


def test_a_missing_manifest_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: missing.*python -m training\.data\.prepare"):
        open_train(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '{"version": 1}', "\x00"])
def test_a_garbled_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: not a usable manifest"):
        open_train(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 99}, "format version 99, not 2"),
        ({"vocab_size": "many"}, "vocab_size must be of type int"),
        ({"vocab_size": 70_000}, "contradict"),
        ({"end_of_text_id": 1000}, "contradict"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"train": {"documents": 1}}, "train must have exactly the fields documents, text_bytes, shards"),
        ({"train": {"documents": 1, "text_bytes": 1, "shards": {}}}, "shards must be a list"),
        ({"tokenizer_file": "../tokenizer.json"}, "leaves the folder"),
        ({"surprise": 1}, "exactly the fields"),
    ],
)
def test_a_wrong_manifest_says_what_is_wrong(folder: Path, changes: dict, problem: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(DataError, match=problem):
        open_train(folder)


def test_an_unreadable_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        open_train(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "train-1.bin").unlink()
    with pytest.raises(
        DataError, match=r"train-1\.bin: missing shard; run `python -m training\.data\.prepare`"
    ):
        open_train(folder)


@pytest.mark.parametrize("size", [0, 65, 67, 200])
def test_a_shard_of_another_size_is_named(folder: Path, size: int) -> None:
    (folder / "train-1.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"train-1\.bin: {size} bytes, but the manifest says 66"):
        open_train(folder)


def test_verify_finds_a_flipped_bit_that_the_size_hides(folder: Path) -> None:
    manifest = Manifest.read(folder)
    manifest.verify(folder)
    path = folder / "validation-0.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"validation-0\.bin: corrupt"):
        manifest.verify(folder)


def test_verify_finds_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        Manifest.read(folder).verify(folder)


def test_a_split_smaller_than_a_sample_names_the_numbers_and_the_key(folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"longest train shard has 50 tokens.*batch\.sequence_length \+ 1 = 51"
    ):
        TokenDataset.open(folder, split="train", sequence_length=50)
    assert TokenDataset.open(folder, split="train", sequence_length=49).num_samples == 1
