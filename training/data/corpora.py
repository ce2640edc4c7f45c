"""Where documents come from: the embedded corpus, and files of text, .jsonl or Parquet.

Memory is bounded by a document, a .jsonl line or a Parquet row group, not by the corpus; only the
embedded corpus (27 MB) is held whole. Every refusal is a `DataError` that names the file and the line.
"""

import functools
import glob
import gzip
import hashlib
import html
import importlib.metadata
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.files import sha256_of
from training.config import DataConfig
from training.data.dataset import DataError

BOTOCORE_VERSION = "1.44.5"  # as in pyproject.toml
BOTOCORE_MIN_BYTES = 20_000_000
MIN_PARAGRAPH_CHARACTERS = 40
TEXT_PIECE_CHARACTERS = 1 << 20  # a longer .txt file becomes several documents


class Document(NamedTuple):
    """A text with its SHA-256, which decides the split and who is drawn into the tokenizer's sample."""

    digest: bytes
    text: str
    num_bytes: int

    def split(self, validation_fraction: float) -> str:
        """'train' or 'validation'; equal texts fall into the same split."""
        share = int.from_bytes(self.digest[:8], "big") / 2**64
        return "validation" if share < validation_fraction else "train"


@dataclass(frozen=True)
class Corpus:
    """A source of documents. `texts()` starts the same stream each time it is called."""

    stem: str
    description: str
    identity: Any  # JSON value that determines the texts
    texts: Callable[[], Iterable[str]]

    @classmethod
    def of(cls, config: DataConfig) -> "Corpus":
        """The corpus that `data.source` names. Hashes source files; raises `DataError`."""
        return _botocore() if config.source == "botocore" else _local_files(config)

    def documents(self) -> Iterator[Document]:
        """The texts in order, without those that are empty or only whitespace."""
        for text in self.texts():
            if text and not text.isspace():
                encoded = text.encode()
                yield Document(hashlib.sha256(encoded).digest(), text, len(encoded))


# --- the embedded corpus ------------------------------------------------------------------------------


def _botocore() -> Corpus:
    """The embedded corpus: the English API documentation inside the pinned botocore package (Apache-2.0).

    The package is needed for its texts alone: data that were prepared before are found without it.
    """
    return Corpus(
        stem="botocore",
        description=f"botocore {BOTOCORE_VERSION}",
        identity=["botocore", BOTOCORE_VERSION],
        texts=functools.cache(lambda: list(botocore_texts(_botocore_folder()))),  # 27 MB, asked for twice
    )


def _botocore_folder() -> Path:
    """Where the pinned package keeps its services. Raises `DataError`: it is missing, or another version."""
    remedy = f"run `pip install --no-deps botocore=={BOTOCORE_VERSION}`"
    try:
        package = importlib.metadata.distribution("botocore")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"data.source: the package botocore is not installed; {remedy}") from error
    if package.version != BOTOCORE_VERSION:
        raise DataError(f"data.source: botocore {package.version} holds another text; {remedy}")
    return Path(str(package.locate_file("botocore/data")))


def botocore_texts(folder: Path) -> Iterator[str]:
    """One text per API operation: its text, then that of the shapes which it is the first to reach.

    Operations read as reference pages (20,206 of 1.3 KB on average, the largest 1% of the text), enough for
    a split by hash; the 471 services (the largest 3%) would not be. A paragraph stays where it first appears.

    Raises:
        DataError: less than 20 MB of text in `folder`.
    """
    seen: set[str] = set()
    num_bytes = 0
    for file in sorted(folder.glob("*/*/service-2.json.gz")):
        with reading(file):
            service = json.loads(gzip.decompress(file.read_bytes()))
        for page in _pages(service):
            paragraphs = (p for fragment in page for p in html_paragraphs(fragment) if p not in seen)
            if fresh := dict.fromkeys(paragraphs):
                seen.update(fresh)
                text = "\n".join(fresh)
                num_bytes += len(text.encode())
                yield text
    if num_bytes < BOTOCORE_MIN_BYTES:
        raise DataError(
            f"{folder}: {num_bytes} bytes of text, expected {BOTOCORE_MIN_BYTES} or more; run "
            f"`pip install --force-reinstall --no-deps botocore=={BOTOCORE_VERSION}`"
        )


def _pages(service: dict[str, Any]) -> Iterator[list[str]]:
    """HTML fragments of the introduction, of each operation, and of the shapes that no operation reaches."""
    shapes = dict(service["shapes"])  # each is taken out by the first page that reaches it
    yield _documentation({k: v for k, v in service.items() if k not in ("operations", "shapes")}, shapes)
    for operation in service.get("operations", {}).values():
        yield _documentation(operation, shapes)
    yield _documentation(dict(shapes), {})


def _documentation(root: Any, shapes: dict[str, Any]) -> list[str]:
    """Every `documentation` text under `root` in reading order, then under the shapes that it refers to."""
    fragments = []
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(text := node.get("documentation"), str):
                fragments.append(text)
            if isinstance(name := node.get("shape"), str) and name in shapes:
                stack.append(shapes.pop(name))
            stack.extend(reversed(node.values()))
        elif isinstance(node, list):
            stack.extend(reversed(node))
    return fragments


_BLOCK_TAG = re.compile(
    r"</?(?:p|li|ul|ol|dl|dt|dd|h[1-6]|div|note|important|br|pre|table|tr|td|th|fullname)\b[^<>]*>", re.I
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


def html_paragraphs(fragment: str) -> Iterator[str]:
    """The paragraphs of an HTML fragment: no tags, whitespace folded, none shorter than 40 characters."""
    for block in _BLOCK_TAG.split(fragment):
        paragraph = " ".join(html.unescape(_TAG.sub("", block)).split())
        if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS:
            yield paragraph


# --- files --------------------------------------------------------------------------------------------


def _local_files(config: DataConfig) -> Corpus:
    """The corpus of a file, a folder (recursively, without hidden files) or a glob, in order of path."""
    path, field = Path(config.source).expanduser(), config.text_field
    pattern = f"{glob.escape(str(path))}/**/*" if path.is_dir() else str(path)
    candidates = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [file for file in candidates if file.is_file()]
    extensions = sorted({file.suffix for file in files})
    for file in files:
        if file.suffix not in READERS:
            kind = file.suffix or "files without extension"
            raise DataError(f"{file}: cannot read {kind}; only {' '.join(READERS)}")
    if len(extensions) != 1:
        problem = f"mixes {' and '.join(extensions)}; choose with a glob"
        if not files:
            problem = f"matches no file; give 'botocore', or a file, folder or glob of {' '.join(READERS)}"
        raise DataError(f"data.source: {config.source!r} {problem}")

    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    hashes = []
    for file in files:
        with reading(file):
            name = str(file.absolute().relative_to(root))
            hashes.append((name, file.stat().st_size, sha256_of(file)))
    num_bytes = sum(size for _, size, _ in hashes)
    read = READERS[extensions[0]]
    return Corpus(
        stem=re.sub(r"[^\w.-]+", "-", path.stem if path.is_file() else root.name).strip(".-") or "corpus",
        description=f"{config.source} ({len(files)} {extensions[0]}, {num_bytes / 1e6:.1f} MB)",
        identity=["files", hashes, None if read is _read_txt else field],
        texts=lambda: itertools.chain.from_iterable(read(file, field) for file in files),
    )


def _read_txt(file: Path, _field: str) -> Iterator[str]:
    """The whole file as one text; a long one in pieces of 1 to 2 Mi characters that end with a line."""
    with reading(file), file.open(encoding="utf-8", newline="") as stream:
        while text := stream.read(TEXT_PIECE_CHARACTERS) + stream.readline(TEXT_PIECE_CHARACTERS):
            yield text


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    with reading(file), file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _jsonl_text(line, field, where=f"{file}:{number}")


_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half a pair, UTF-8 cannot hold it


def _jsonl_text(line: bytes, field: str, *, where: str) -> str:
    remedy = "fix or remove the line"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 ({error.reason}); {remedy}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); {remedy}") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else "none, it is not an object"
        raise DataError(f"{where}: no text in {field!r} (fields: {fields}); set data.text_field, or {remedy}")
    if _SURROGATE.search(text):
        raise DataError(f"{where}: {field!r} holds half a surrogate pair; {remedy}")
    return text


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow  # here, because it takes half a second
    from pyarrow import parquet

    remedy = "set data.text_field"
    try:
        with reading(file), parquet.ParquetFile(file) as table:
            columns = {column.name: str(column.type) for column in table.schema_arrow}
            if field not in columns:
                raise DataError(f"{file}: no column {field!r} among {', '.join(columns)}; {remedy}")
            if columns[field] not in ("string", "large_string"):
                raise DataError(f"{file}: column {field!r} holds {columns[field]}, not strings; {remedy}")
            batches = table.iter_batches(batch_size=1024, columns=[field])
            rows = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, text in enumerate(rows, start=1):
                if text is None:
                    raise DataError(f"{file}: row {number} has no {field!r}; remove the row")
                yield text
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}); write it again") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what goes wrong while `file` is read into a `DataError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        remedy = "convert it, for example with iconv"
        raise DataError(f"{file}: not valid UTF-8 ({error.reason}); {remedy}") from error
    except OSError as error:
        problem, remedy = error.strerror or error, "check the path and its permissions"
        raise DataError(f"{file}: cannot be read ({problem}); {remedy}") from error
