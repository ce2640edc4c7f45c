"""Corpora that are odd as files: huge lines, thousands of files, links in a circle, pipes, devices, names."""

import json
import os
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.data.small_corpus import change, silent, texts, write_jsonl
from training.data import readers, records
from training.data.config import DataConfig
from training.data.dataset import DataError, Manifest
from training.data.prepare import prepare

LIMIT = 1 << 20


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        source=str(tmp_path / "corpus"), directory=str(tmp_path / "data"), vocab_size=300,
        validation_fraction=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_line_longer_than_any_document_is_refused_in_bounded_memory(
    config: DataConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product's limit is 64 MiB; here a smaller one, and a line of twenty times that."""
    monkeypatch.setattr(readers, "LONGEST_LINE", LIMIT)
    file = write_jsonl(Path(config.source) / name, texts(20))
    body = b'{"text": "' + b"x" * (20 * LIMIT) + b'"}'
    file.write_bytes(b"[" + body + b"]" if name == "a.json" else file.read_bytes() + body + b"\n{}\n")
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"a\.json(l:21: a line of more than 1 MiB|.*more than 1 Mi char)"
        ):
            prepare(config, report=silent)
        assert tracemalloc.get_traced_memory()[1] < 10 * LIMIT
    finally:
        tracemalloc.stop()


def test_a_line_of_exactly_the_limit_is_read_and_the_one_after_a_longer_one_too(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": "y" * size}) for size in (987, 988, 989, 5, 3000, 6)]
    Path(config.source).mkdir()
    (Path(config.source) / "a.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(readers, "LONGEST_LINE", 1001)
    [file], _ = readers.find(config.source)
    found = list(file.records("text", records.Position()))
    assert [len(each) if isinstance(each, str) else each.where[-2:] for each in found] == [
        987, 988, ":3", 5, ":5", 6,
    ]  # fmt: skip


def test_a_text_too_long_to_encode_is_refused(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_TEXT", 200)
    write_jsonl(Path(config.source) / "a.jsonl", texts(20))
    with pytest.raises(DataError, match=r"a\.jsonl:1: a text of more than .*, or give it as \.txt"):
        prepare(config, report=silent)


@pytest.fixture
def few_handles() -> Iterator[None]:
    """Room for 30 more open files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_thousand_files_need_few_open_handles(config: DataConfig, few_handles: None) -> None:
    for number, text in enumerate(texts(1000, words=5)):
        path = Path(config.source, str(number % 7), f"{number}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")
    manifest = Manifest.read(prepare(config, report=silent))
    assert manifest.train.documents + manifest.validation.documents == 1000


def test_odd_names_are_read_and_pipes_devices_and_circles_of_links_are_not(config: DataConfig) -> None:
    folder = Path(config.source)
    names = ("a\nb.jsonl", "\x01.jsonl", "$HOME `id` 'x\".jsonl", "\u200b.jsonl")
    for number, name in enumerate(names):
        write_jsonl(folder / name, texts(30 * (number + 1))[30 * number :])
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "circle.jsonl").symlink_to("circle.jsonl")
    (folder / "again").symlink_to(".")
    (folder / "nowhere.jsonl").symlink_to("/no/such/file")
    (folder / "device.jsonl").symlink_to("/dev/zero")
    manifest = Manifest.read(prepare(config, report=silent))
    assert manifest.train.documents + manifest.validation.documents == 120


@pytest.mark.parametrize("key", ["source", "tokenizer"])
@pytest.mark.parametrize("kind", ["pipe", "device", "circle", "folder of nothing", "empty file"])
def test_a_source_or_tokenizer_that_is_no_file_is_refused_at_once(
    config: DataConfig, tmp_path: Path, key: str, kind: str
) -> None:
    place = tmp_path / "odd.json"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder of nothing":
        place.mkdir()
    elif kind == "empty file":
        place.touch()
    else:
        place.symlink_to("/dev/zero" if kind == "device" else "odd.json")
    write_jsonl(Path(config.source) / "a.jsonl", texts(50))
    with pytest.raises(DataError, match=r"odd\.json|data\.source"):
        prepare(change(config, **{key: str(place)}), report=silent)
