"""What the sources give as documents, how these are split, and the embedded corpus that was reviewed.

The refusals of damaged files are in `test_prepare`, where they must also leave nothing behind.
"""

import tomllib
import tracemalloc
from pathlib import Path

import pytest

from tests.commands import ROOT
from training.data import corpora, readers
from training.data.config import DataConfig
from training.data.corpora import Corpus, Skipped
from training.data.dataset import DataError
from training.data.records import Position


def test_a_long_text_file_becomes_pieces_that_end_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "TEXT_PIECE_CHARACTERS", 500)
    text = "".join(f"line {i} of the — long — file\r\n" for i in range(1000))
    source = tmp_path / "book.txt"
    source.write_bytes(text.encode())
    corpus = Corpus.of(DataConfig(source=str(source)))
    pieces = list(corpus.records(Position()))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000
    assert all(piece.endswith("\n") for piece in pieces)
    source.write_text("ñ" * 3000)  # one line longer than a piece
    pieces = list(Corpus.of(DataConfig(source=str(source))).records(Position()))
    assert [len(piece) for piece in pieces] == [1000, 1000, 1000]


def test_equal_documents_share_a_split_and_the_share_is_close_to_the_fraction() -> None:
    corpus = Corpus("x", "x", "x", lambda _: [f"document {i % 20_000}" for i in range(40_000)])
    splits = [document.split(0.05) for document in corpus.documents()]
    assert splits[:20_000] == splits[20_000:]
    assert 0.045 < splits.count("validation") / 40_000 < 0.055


# --- botocore -----------------------------------------------------------------------------------------


def test_botocore_is_pinned_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"botocore=={corpora.BOTOCORE_VERSION}" in project["dependencies"]


def test_another_botocore_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "BOTOCORE_VERSION", "0.0.1")
    corpus = Corpus.of(DataConfig(source="botocore"))
    with pytest.raises(DataError, match=r"pip install --no-deps botocore==0\.0\.1"):
        next(corpus.documents())


def test_html_becomes_folded_paragraphs_of_at_least_40_characters() -> None:
    fragment = (
        "<p>Returns the  <code>Name</code>\n of the &lt;bucket&gt; &amp; nothing else.</p>"
        "<ul><li><p>Too short.</p></li><li>If x < 3 and y > 2, the <a href='x'>call</a> is refused.</ul>"
    )
    assert list(corpora.html_paragraphs(fragment)) == [
        "Returns the Name of the <bucket> & nothing else.",
        "If x < 3 and y > 2, the call is refused.",
    ]


def test_a_page_is_an_operation_with_the_shapes_it_reaches_first() -> None:
    service = {
        "documentation": "intro",
        "operations": {
            "Get": {
                "name": "Get",
                "input": {"shape": "In"},
                "output": {"shape": "Out"},
                "documentation": "get",
            },
            "Put": {"name": "Put", "input": {"shape": "In"}, "documentation": "put"},
        },
        "shapes": {
            "In": {"members": {"Key": {"shape": "Key", "documentation": "the key"}}},
            "Out": {"members": {"More": {"shape": "Out"}}, "documentation": "out"},
            "Key": {"type": "string", "documentation": "key shape"},
            "Orphan": {"documentation": "orphan"},
        },
    }
    assert list(corpora._pages(service)) == [
        ["intro"],
        ["get", "the key", "key shape", "out"],
        ["put"],
        ["orphan"],
    ]


def test_the_embedded_corpus_is_the_one_that_was_reviewed() -> None:
    documents = list(Corpus.of(DataConfig()).documents())
    num_bytes = sum(document.num_bytes for document in documents)
    assert num_bytes == 26_988_044
    assert len(documents) == 20_206
    held_out = sum(document.num_bytes for document in documents if document.split(0.01) == "validation")
    assert 0.005 < held_out / num_bytes < 0.02
    assert max(document.num_bytes for document in documents) < 0.02 * num_bytes
    paragraphs = [line for document in documents for line in document.text.split("\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert min(map(len, paragraphs)) >= 40


def test_too_little_embedded_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 bytes of text, expected 20000000 or more"):
        list(corpora.botocore_texts(tmp_path))


def test_few_large_texts_are_not_held_to_divide_them() -> None:
    corpus = Corpus("x", "x", "x", lambda _: (f"{number} " * 500_000 for number in range(40)))  # 1 to 1.5 MB
    tracemalloc.start()
    try:
        num = sum(1 for _ in corpus.divided(DataConfig(), Skipped(0.0)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num >= 40
    assert peak < 15e6
