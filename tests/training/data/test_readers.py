"""Corpora as people have them: every kind of file gives the same documents, and bad records are counted."""

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from training.data import readers
from training.data.config import DataConfig
from training.data.corpora import Corpus, Skipped
from training.data.dataset import DataError, Manifest
from training.data.prepare import prepare
from training.data.readers import find

TEXTS = [f"text {number}: día, {'x' * number}" for number in range(7)]
LINES = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS)).encode()
ARRAY = json.dumps([{"text": text, "n": [1.5]} for text in TEXTS], indent=1).encode()
BOM = b"\xef\xbb\xbf"


def documents(source: object, **keys: object) -> list[str]:
    return [document.text for document in Corpus.of(DataConfig(source=str(source), **keys)).documents()]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace(b"\n", b"\r\n")),
        ("A.JSONL", BOM + LINES + b"\n\n"),
        ("a.json", ARRAY),
        ("a.json", BOM + b"\n " + ARRAY),
        ("part-00000-c000.json", LINES),  # as Spark names lines
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES[:100], mtime=0) + gzip.compress(LINES[100:])),
        ("a.JSON.BZ2", bz2.compress(ARRAY)),
        ("a.jsonl.xz", lzma.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])),
    ],
)
def test_the_same_texts_come_out_of_every_kind_of_json(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name) == documents(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.txt.zst"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    content = BOM + b"caf\xc3\xa9\r\nline"
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(content)
    (tmp_path / name).write_bytes(packed)
    assert documents(tmp_path / name) == ["café\r\nline"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_the_same_texts_come_out_of_every_kind_of_column(kind: pa.DataType, tmp_path: Path) -> None:
    plain = pa.array(TEXTS)
    column = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    nested = pa.StructArray.from_arrays([pa.array(range(7)), column], names=["id", "body"])
    parquet.write_table(pa.table({"text": column, "a.b": column, "a": nested}), tmp_path / "a.parquet")
    for field in ("text", "a.body", "a.b"):
        assert documents(tmp_path / "a.parquet", text_field=field) == TEXTS


def test_a_nested_field_is_found_in_json(tmp_path: Path) -> None:
    lines = [{"a": {"b": "one"}}, {"a.b": "two", "a": {"b": "no"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert documents(tmp_path / "a.jsonl", text_field="a.b") == ["one", "two"]


def test_of_a_hub_snapshot_and_a_spark_output_the_other_files_are_left_out_and_said(tmp_path: Path) -> None:
    hub, spark = tmp_path / "hub", tmp_path / "spark"
    (hub / "data").mkdir(parents=True)
    parquet.write_table(
        pa.table({"text": TEXTS * 5000}), hub / "data/train-00000-of-00001.parquet", compression="none"
    )
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", ".gitattributes"):
        (hub / name).write_text("{}")
    spark.mkdir()
    (spark / "part-00000.json").write_bytes(LINES)
    (spark / "part-00001.json").write_bytes(LINES)
    (spark / "_SUCCESS").write_bytes(b"")
    (spark / ".part-00000.json.crc").write_bytes(b"x")
    assert documents(hub) == TEXTS * 5000
    assert "left out 3 other files, such as LICENSE.txt" in Corpus.of(DataConfig(source=str(hub))).description
    assert documents(spark) == TEXTS * 2
    assert "left out 1 other files, such as _SUCCESS" in Corpus.of(DataConfig(source=str(spark))).description


def test_links_are_followed_once(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir(), elsewhere.mkdir()
    (source / "a.jsonl").write_bytes(LINES)
    (elsewhere / "b.jsonl").write_text('{"text": "elsewhere"}')
    (source / "itself").symlink_to(source)
    (source / "there").symlink_to(elsewhere)
    (source / "again.jsonl").symlink_to(source / "a.jsonl")
    (source / "nowhere.jsonl").symlink_to(source / "gone")
    assert sorted(documents(source)) == sorted([*TEXTS, "elsewhere"])


def test_a_url_is_read_like_a_folder() -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/corpus/b.jsonl.gz", gzip.compress(LINES, mtime=0))
    system.pipe("/corpus/a.jsonl", b'{"text": "first"}')
    system.pipe("/corpus/README.md", b"x")
    assert documents("memory://corpus") == ["first", *TEXTS]
    assert documents("memory://corpus/*.gz") == documents("memory://corpus/b.jsonl.gz") == TEXTS
    identities = [file.identity for file in find("memory://corpus")[0]]
    system.pipe("/corpus/a.jsonl", b'{"text": "other"}')
    assert [file.identity for file in find("memory://corpus")[0]] != identities
    for wrong in ("memory://nothing", "nosuch://bucket/x"):
        with pytest.raises(DataError, match=rf"data\.source: '?{wrong}"):
            documents(wrong)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", cut(gzip.compress(LINES, mtime=0))),
        ("a.jsonl.gz", LINES),
        ("a.jsonl.bz2", cut(bz2.compress(LINES))),
        ("a.jsonl.bz2", LINES),
        ("a.jsonl.xz", LINES),
        ("a.jsonl.zst", LINES),
        ("a.json", cut(ARRAY)),
        ("a.json", b'[{"text": "x"}, {"te'),
        ("a.json", b'["\xff"]'),
        ("a.json", b"[" * 200_000),
        ("a.json", b'[{"text": "x"}] y'),
        ("a.parquet", cut(LINES)),
        ("a.parquet", b"PAR1" + LINES + b"\x0f\0\0\0PAR1"),
        ("a.txt.gz", gzip.compress(b"\xff\xff", mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])[:-9]),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0) + b"garbage"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*; ") as error:
        documents(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", gzip.compress(LINES, mtime=0), "holds gzip, not text; give it the ending .gz"),
        ("a.txt", bz2.compress(LINES, 1), "holds bzip2, not text; give it the ending .bz2"),
        ("a.json", zstandard.compress(ARRAY), "holds zstd, not text; give it the ending .zst"),
        ("a.txt", LINES.decode().encode("utf-16"), "holds UTF-16, not UTF-8; convert it"),
        ("a.jsonl", b"PAR1\x15\0", "holds Parquet, not text; give it the ending .parquet"),
        ("a\nb\udcff.txt", lzma.compress(b"x"), r"a\nb\udcff.txt: holds xz, not text"),
        ("a.jsonl", b'{"text": ["x"]}', "'text' holds a list, not a text; set data.text_field"),
        ("a.arrow", b"ARROW1", "cannot read .arrow; only .txt"),
    ],
)
def test_a_file_of_other_content_is_refused_by_name(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "state.json").touch()
    with pytest.raises(DataError) as error:
        documents(tmp_path)
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"])
    parquet.write_table(columns, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="several columns 'text'"):
        documents(tmp_path / "a.parquet")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(LINES)
    corpus = Corpus.of(DataConfig(source=str(source)))
    with source.open("ab") as stream:  # a crawler that still writes
        stream.write(b'{"text": "late"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read; run again"):
        list(corpus.documents())


def test_a_large_window_of_zstd_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(LINES) + stream.flush())
    assert documents(tmp_path) == TEXTS


def test_an_array_is_read_like_json_reads_it_wherever_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"text": 'é🚢\u2028"\\'}, [], {}, -3e-7, 12.5, None, True, float("-inf"), [[{"a": ["x", 7.0]}]]]
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(readers, "JSON_PIECE_CHARACTERS", size)
        for array in (json.dumps(items, indent=1), json.dumps(items, ensure_ascii=False)):
            assert list(readers._items(io.StringIO(f" {array}\n"))) == items
            for place in range(len(array)):  # a letter is taken away
                wrong = array[:place] + array[place + 1 :]
                assert outcome(lambda wrong=wrong: list(readers._items(io.StringIO(wrong)))) == outcome(
                    lambda wrong=wrong: json.loads(wrong, parse_int=float)
                )


def outcome(read: Callable[[], object]) -> object:
    try:
        return found if isinstance(found := read(), list) else "refused"
    except ValueError:
        return "refused"


def test_an_array_may_hold_numbers_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"n": {"9" * 5000}, "x": 1e99999999999999999999, "text": "first"}}]')
    assert documents(tmp_path / "a.json") == ["first"]


def test_bad_records_are_skipped_counted_and_named_up_to_a_share(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {number}"}) for number in range(400)]
    bad = [
        "{",
        '{"text": 3}',
        '"text"',
        "null",
        '{"text": "\\ud800"}',
        "[" * 100_000,
        f'{{"\\udc00": {"9" * 5000}}}',
    ]
    for place, line in enumerate(bad):
        lines.insert(50 * place, line)
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(lines))
    config = DataConfig(
        source=str(source), directory=str(tmp_path / "data"), vocab_size=300, validation_fraction=0.1,
        max_bad_fraction=0.02,
    )  # fmt: skip
    reports: list[str] = []
    manifest = Manifest.read(prepare(config, report=reports.append))
    assert manifest.skipped_records == len(bad)
    assert manifest.train.documents + manifest.validation.documents == 400
    assert [first.partition(": ")[0] for first in manifest.skipped_first] == [
        f"{source}:{50 * n + 1}" for n in range(7)
    ]
    assert all(line.encode() for line in (*reports, *manifest.skipped_first))
    assert any(
        line.startswith(f"skipped 7 of 407 records that cannot be used, first {source}:1: ")
        for line in reports
    )
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON .* \(7 of 407 records .* allows 0\.01\)"):
        list(Corpus.of(config).documents(Skipped(0.01)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON .* \(1 of 1 records .* allows 0\)"):
        list(Corpus.of(config).documents())


def shares(source: Path, fraction: float) -> tuple[float, str]:
    """(share of the held-out characters, all texts in order)."""
    divided = list(
        Corpus.of(DataConfig(source=str(source))).divided(
            DataConfig(validation_fraction=fraction), Skipped(0.0)
        )
    )
    size = {split: sum(len(d.text) for s, d in divided if s == split) for split in ("train", "validation")}
    return size["validation"] / sum(size.values()), "".join(document.text for _, document in divided)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("make", ["one text", "three texts", "no lines"])
def test_few_texts_are_divided_by_the_share_of_their_text(make: str, fraction: float, tmp_path: Path) -> None:
    draw = random.Random(0)
    text = "".join(" ".join(draw.choices(["river", "día", "ship"], k=9)) + "\n" for _ in range(3000))
    if make == "no lines":
        text = text.replace("\n", " ").replace(" ", "-")
    parts = (
        [text[: len(text) // 2], text[len(text) // 2 : -1000], text[-1000:]]
        if make == "three texts"
        else [text]
    )
    for number, part in enumerate(parts):
        (tmp_path / f"{number}.txt").write_text(part)
    held_out, whole = shares(tmp_path, fraction)
    assert held_out == pytest.approx(fraction, abs=0.001) and held_out > 0
    assert whole == text


def test_the_first_file_that_everybody_tries(tmp_path: Path) -> None:
    source = tmp_path / "input.txt"
    source.write_text("".join(f"{number} " + "To be, or not to be\n" * 40 + "\n" for number in range(1400)))
    config = DataConfig(source=str(source), directory=str(tmp_path / "data"), vocab_size=300)
    manifest = Manifest.read(prepare(config, report=lambda _: None))
    assert manifest.validation.text_bytes / source.stat().st_size == pytest.approx(0.01, rel=0.02)
