"""Round trips, splits and shards of small corpora; reuse, rebuild, kill, a full disk; every refusal."""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer

from tests.training.data.small_corpus import change, silent, texts, visible, write_jsonl
from training.data import corpora
from training.data import prepare as preparation
from training.data.config import DataConfig
from training.data.corpora import Corpus
from training.data.dataset import DataError, Manifest, TokenDataset
from training.data.prepare import main, prepare
from training.data.tokenizer import train_tokenizer


def read_split(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded from its shards."""
    manifest = Manifest.read(folder)
    tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer_file))
    shards = [
        np.fromfile(folder / shard.file, dtype=manifest.dtype) for shard in manifest.split(split).shards
    ]
    tokens = np.concatenate(shards)
    ends = np.flatnonzero(tokens == manifest.end_of_text_id)
    assert ends[-1] == len(tokens) - 1
    documents = np.split(tokens, ends + 1)[:-1]
    return [tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False) for document in documents]


# --- content ------------------------------------------------------------------------------------------


def test_the_shards_hold_every_document_once_and_in_order(config: DataConfig) -> None:
    documents = texts(400)
    folder = prepare(config, report=silent)
    train, validation = read_split(folder, "train"), read_split(folder, "validation")
    assert sorted(train + validation) == sorted(documents)
    assert [text for text in documents if text in set(train)] == train
    manifest = Manifest.read(folder)
    assert (manifest.train.documents, manifest.validation.documents) == (len(train), len(validation))
    assert manifest.train.text_bytes == sum(len(text.encode()) for text in train)
    assert 0.05 < len(validation) / 400 < 0.15
    assert re.fullmatch(r"corpus-[0-9a-f]{12}", folder.name)
    assert TokenDataset.open(folder, split="train", sequence_length=64).num_samples > 100


def test_shards_are_cut_at_shard_tokens_and_join_to_the_same_stream(config: DataConfig) -> None:
    whole = prepare(config, report=silent)
    cut = prepare(change(config, shard_tokens=1000), report=silent)
    shards = Manifest.read(cut).train.shards
    assert [shard.tokens for shard in shards[:-1]] == [1000] * (len(shards) - 1)
    assert len(shards) > 2 and 0 < shards[-1].tokens <= 1000
    assert [shard.file for shard in shards[:2]] == ["train-00000.bin", "train-00001.bin"]
    joined = b"".join((cut / shard.file).read_bytes() for shard in shards)
    assert joined == (whole / "train-00000.bin").read_bytes()
    Manifest.read(cut).verify(cut)


def test_two_machines_prepare_the_same_bytes(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config, report=silent)
    source = write_jsonl(tmp_path / "elsewhere" / "corpus.jsonl", texts(400))
    second = prepare(change(config, source=str(source), directory=str(tmp_path / "other")), report=silent)
    assert second.name == first.name
    assert Manifest.read(second).fingerprint == Manifest.read(first).fingerprint


def test_txt_jsonl_and_parquet_of_the_same_documents_give_the_same_tokens(
    config: DataConfig, tmp_path: Path
) -> None:
    documents = texts(60)
    for number, text in enumerate(documents):
        path = tmp_path / "txt" / f"{number // 30}" / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    write_jsonl(tmp_path / "jsonl" / "a.jsonl", documents[:25])
    write_jsonl(tmp_path / "jsonl" / "b.jsonl", documents[25:])
    (tmp_path / "parquet").mkdir()
    table = pa.table({"id": range(60), "text": documents})
    parquet.write_table(table, tmp_path / "parquet" / "all.parquet", row_group_size=7)
    config = change(config, validation_fraction=0.3)
    prints = [
        Manifest.read(prepare(change(config, source=str(tmp_path / source)), report=silent)).fingerprint
        for source in ("txt", "jsonl", "parquet", "txt/**/*.txt", "jsonl/*.jsonl")
    ]
    assert len(set(prints)) == 1


def test_empty_documents_are_left_out(config: DataConfig) -> None:
    write_jsonl(Path(config.source), ["", " \n", *texts(150)])
    manifest = Manifest.read(prepare(config, report=silent))
    assert manifest.train.documents + manifest.validation.documents == 150


def test_the_tokenizer_sample_is_bounded_and_spread_over_the_corpus() -> None:
    corpus = Corpus("x", "x", "x", lambda _: [f"{i:010}" for i in range(10_000)])
    sample = preparation._sample(corpus.documents(), max_bytes=20_000)
    numbers = [int(document.text) for document in sample]
    assert len(set(numbers)) == 2000
    assert 4700 < np.mean(numbers) < 5300


# --- tokenizer ----------------------------------------------------------------------------------------


def test_a_trained_tokenizer_decodes_every_text_exactly() -> None:
    tokenizer = train_tokenizer(texts(100), vocab_size=400)
    strange = [
        "naïve café — “quotes”",
        "👩‍👩‍👧‍👦 🇵🇾 🚢🚢",
        "  leading, doubled  and trailing  ",
        "\ttab\r\nline\n\n\n\u00a0no-break\u2003em\u200bzero\ufeffmark",
        "\x00\x01\x7f controls",
        "日本語のテキスト עברית العربية",
        "def f(x):\n    return x ** 2  # ok",
        "\U0010ffff\ue000",
    ]
    for text in strange:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_the_name_of_a_special_token_in_a_text_does_not_end_the_document(config: DataConfig) -> None:
    documents = [f"{text} <|endoftext|> more" for text in texts(150)]
    write_jsonl(Path(config.source), documents)
    folder = prepare(config, report=silent)
    assert sorted(read_split(folder, "train") + read_split(folder, "validation")) == sorted(documents)


@pytest.mark.parametrize("name", ["<|end_of_text|>", "</s>", "<|eot_id|>"])
def test_a_given_tokenizer_is_copied_and_its_end_of_text_found(
    config: DataConfig, tmp_path: Path, name: str
) -> None:
    tokenizer = train_tokenizer(texts(50), vocab_size=300)
    given = tmp_path / "given.json"
    given.write_text(tokenizer.to_str().replace("<|endoftext|>", name))
    folder = prepare(change(config, tokenizer=str(given)), report=silent)
    assert (folder / "tokenizer.json").read_bytes() == given.read_bytes()
    assert sorted(read_split(folder, "train") + read_split(folder, "validation")) == sorted(texts(400))


def test_a_vocabulary_above_65536_is_kept_in_uint32(config: DataConfig, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(texts(50), vocab_size=300)
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(2**16 - 300)])
    given = tmp_path / "given.json"
    for extra, dtype in ((0, "uint16"), (1, "uint32")):
        tokenizer.add_tokens(["<one more>"] * extra)
        given.write_text(tokenizer.to_str())
        folder = prepare(change(config, tokenizer=str(given)), report=silent)
        manifest = Manifest.read(folder)
        assert (manifest.vocab_size, manifest.dtype) == (2**16 + extra, dtype)
        assert len(read_split(folder, "train")) == manifest.train.documents


# --- reuse, rebuild, interruption ---------------------------------------------------------------------


def test_prepared_data_of_the_embedded_corpus_need_no_botocore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(directory=str(tmp_path), vocab_size=320, validation_fraction=0.1)
    assert config.source == "botocore"
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "botocore_texts", lambda folder: texts(200))  # in place of its 27 MB
        folder = prepare(config)

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    lines: list[str] = []
    assert prepare(config, report=lines.append) == folder
    assert lines == [f"reusing {folder}, from botocore {corpora.BOTOCORE_VERSION}"]
    with pytest.raises(DataError, match="botocore is not installed; run `pip install --no-deps botocore=="):
        prepare(dataclasses.replace(config, vocab_size=321))
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [folder]


def test_a_second_run_reuses_the_folder_and_a_changed_request_does_not(config: DataConfig) -> None:
    folder = prepare(config, report=silent)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines: list[str] = []
    assert prepare(config, report=lines.append) == folder
    assert len(lines) == 1 and lines[0].startswith(f"reusing {folder}")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    changes = [
        {"end_of_text": "e"},
        {"vocab_size": 330},
        {"validation_fraction": 0.2},
        {"shard_tokens": 5000},
    ]
    others = [prepare(change(config, **values), report=silent) for values in changes]
    write_jsonl(Path(config.source), texts(401))
    others.append(prepare(config, report=silent))
    assert len({folder, *others}) == 6


@pytest.mark.parametrize("file", ["train-00000.bin", "tokenizer.json", "manifest.json"])
def test_a_damaged_folder_is_rebuilt_with_a_word_about_it(config: DataConfig, file: str) -> None:
    folder = prepare(config, report=silent)
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    damaged = bytearray(intact[file])
    damaged[0] ^= 1
    (folder / file).write_bytes(damaged)
    lines: list[str] = []
    assert prepare(config, report=lines.append) == folder
    assert lines[0].startswith(f"rebuilding {folder}: {folder / file}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact
    assert visible(folder.parent) == [folder.name]


def test_concurrent_prepares_build_once(config: DataConfig) -> None:
    lines: list[str] = []
    threads = [
        threading.Thread(target=prepare, args=(config,), kwargs={"report": lines.append}) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(line.startswith(word) for line in lines) for word in ("ready", "reusing")] == [1, 2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(config: DataConfig, small_disk: Path) -> None:
    write_jsonl(Path(config.source), texts(2000))
    with pytest.raises(DataError, match=rf"{small_disk}: cannot be written \(No space left on device\)"):
        prepare(change(config, directory=str(small_disk)), report=silent)
    assert visible(small_disk) == []


def test_what_a_read_only_mount_holds_is_used_and_nothing_else_can_be_made(
    config: DataConfig, small_disk: Path
) -> None:
    there = change(config, directory=str(small_disk))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    made = prepare(there, report=silent)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert prepare(there, report=silent) == made
    with pytest.raises(DataError, match=r"cannot be written \(Read-only file system\); set data\.directory$"):
        prepare(change(there, vocab_size=330), report=silent)


def test_a_data_directory_that_is_a_file_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written .*data\.directory"):
        prepare(change(config, directory=str(tmp_path / "file")), report=silent)


# --- refused sources ----------------------------------------------------------------------------------

GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "matches no file"),
        ({"a.csv": b"x"}, r"a\.csv: cannot read \.csv; only \.txt \.jsonl \.json \.parquet"),
        ({"README": b"x"}, "README: cannot read files without extension"),
        ({"a.txt": b"x", "b.jsonl": GOOD}, r"mixes \.jsonl and \.txt"),
        ({"a.txt": b"", "b.txt": b" \n"}, "gives 0 train and 0 validation documents"),
        ({"a.jsonl": GOOD}, "documents; both need some: add documents or change data.validation_fraction"),
        ({"a.txt": b"ok \xff\xfe"}, r"a\.txt: not valid UTF-8"),
        ({"a.jsonl": GOOD + b"\n" + b'{"text": \n'}, r"a\.jsonl:3: not JSON"),
        ({"a.jsonl": GOOD + b'{"text": "\xff"}\n'}, r"a\.jsonl:2: not valid UTF-8"),
        (
            {"a.jsonl": GOOD + b'{"body": "x", "id": 1}\n'},
            r"a\.jsonl:2: no text in 'text' \(fields: body, id\)",
        ),
        ({"a.jsonl": GOOD + b'{"text": null}\n'}, r"a\.jsonl:2: no text in 'text'"),
        ({"a.jsonl": b'["text"]\n'}, r"a\.jsonl:1: no text in 'text' \(fields: none, it is not an object\)"),
        ({"a.jsonl": b'{"text": "\\ud800"}\n'}, r"a\.jsonl:1: 'text' holds half a surrogate pair"),
        ({"a.parquet": b"PAR1 not really"}, r"a\.parquet: not a readable Parquet file"),
        ({"a.parquet": b""}, r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_an_unusable_source_is_refused_by_name(
    config: DataConfig, tmp_path: Path, files: dict[str, bytes], problem: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        prepare(change(config, source=str(source)), report=silent)
    directory = Path(config.directory)
    assert not directory.exists() or visible(directory) == []


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ({"body": ["x"]}, "no column 'text' among body"),
        ({"text": [1, 2]}, "column 'text' holds int64, not strings"),
        ({"text": ["x", "y", None]}, "row 3: no text in 'text'"),
    ],
)
def test_an_unusable_parquet_column_is_refused(
    config: DataConfig, tmp_path: Path, column: dict, problem: str
) -> None:
    parquet.write_table(pa.table(column), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: {problem}"):
        prepare(change(config, source=str(tmp_path / "a.parquet")), report=silent)


def test_an_unusable_tokenizer_is_refused(config: DataConfig, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    with pytest.raises(DataError, match=r"given\.json: cannot be read"):
        prepare(change(config, tokenizer=str(given)), report=silent)
    given.write_text("{}")
    with pytest.raises(DataError, match=r"given\.json: not a Hugging Face tokenizer\.json"):
        prepare(change(config, tokenizer=str(given)), report=silent)
    given.write_text(train_tokenizer(texts(10), vocab_size=300).to_str().replace("<|endoftext|>", "<fin>"))
    with pytest.raises(DataError, match=r"no end-of-text token .* <\|endoftext\|> .* data\.end_of_text"):
        prepare(change(config, tokenizer=str(given)), report=silent)
    with pytest.raises(DataError, match=r"data\.end_of_text: the tokenizer has no token '<end>'"):
        prepare(change(config, tokenizer=str(given), end_of_text="<end>"), report=silent)
    named = Manifest.read(prepare(change(config, tokenizer=str(given), end_of_text="<fin>"), report=silent))
    assert named.end_of_text_id == 0


# --- command ------------------------------------------------------------------------------------------


def test_the_command_prepares_and_a_dry_run_writes_nothing(
    config: DataConfig, capsys: pytest.CaptureFixture
) -> None:
    keys = [
        f"data.{field.name}={json.dumps(getattr(config, field.name))}" for field in dataclasses.fields(config)
    ]
    assert main(["--dry-run", *keys]) == 0
    planned = capsys.readouterr().out
    assert "not there yet" in planned
    assert not Path(config.directory).exists()
    assert main(keys) == 0
    folder = prepare(config, report=silent)
    assert f"ready: {folder}\n" in capsys.readouterr().out
    assert f"folder: {folder} (" in planned


def test_the_command_refuses_on_stderr_with_code_2(capsys: pytest.CaptureFixture) -> None:
    for argument in ("data.sauce=x", "data.source=/no/such/file", "data.vocab_size=3"):
        assert main([argument]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert captured.out == ""
