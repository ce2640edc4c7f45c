"""Where documents come from, the embedded corpus or files (`readers`), and into which split each falls.

Memory is bounded by a record, not by the corpus; only the embedded corpus (27 MB) is held whole. Every
refusal is a `DataError` that names the file and the line.
"""

import functools
import gzip
import hashlib
import html
import importlib.metadata
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from training.data.config import DataConfig
from training.data.dataset import DataError
from training.data.readers import find
from training.data.records import Position, TextOrBad, on_a_line, reading

BOTOCORE_VERSION = "1.44.5"  # as in pyproject.toml
BOTOCORE_MIN_BYTES = 20_000_000
BOTOCORE_BYTES = 26_988_044  # of that version
MIN_PARAGRAPH_CHARACTERS = 40
FEW_HELD_OUT = 10  # with fewer held-out documents, the text is divided instead of the documents


class Document(NamedTuple):
    """A text with its SHA-256, which decides who is drawn into the tokenizer's sample."""

    digest: bytes
    text: str
    num_bytes: int

    @classmethod
    def of(cls, text: str) -> "Document":
        encoded = text.encode()
        return cls(hashlib.sha256(encoded).digest(), text, len(encoded))

    def split(self, validation_fraction: float) -> str:
        """'train' or 'validation'; equal texts fall into the same split."""
        share = int.from_bytes(self.digest[:8], "big") / 2**64
        return "validation" if share < validation_fraction else "train"


class Skipped:
    """Counts the records that cannot be used, and refuses the corpus if they are too many.

    Attributes:
        first: the first few, as "where: problem".
    """

    NAMED = 10

    def __init__(self, max_fraction: float) -> None:
        self.records = self.number = 0
        self.first: list[str] = []
        self._max_fraction = max_fraction

    def texts(self, records: Iterable[TextOrBad]) -> Iterator[str]:
        """The usable texts. Raises `DataError` at the end if too many records cannot be used."""
        for record in records:
            self.records += 1
            if isinstance(record, str):
                yield record
                continue
            self.number += 1
            if len(self.first) < self.NAMED:
                self.first.append(f"{record.where}: {record.problem}")
            if not self._max_fraction:
                break
        if self.number > self._max_fraction * self.records:
            more = f" ({self.number} of {self.records} records cannot be used; data.max_bad_fraction allows "
            raise DataError(f"{self.first[0]}{more}{self._max_fraction:g})")

    def describe(self) -> str:
        """One line for people."""
        return (
            f"skipped {self.number:,} of {self.records:,} records that cannot be used, first {self.first[0]}"
        )


@dataclass(frozen=True)
class Corpus:
    """A source of documents. `records()` starts the same stream each time it is called."""

    stem: str
    description: str
    identity: Any  # JSON value that determines the texts
    records: Callable[[Position], Iterable[TextOrBad]]
    num_bytes: int | None = None  # as `position` counts them
    position: Position = field(default_factory=Position)

    @classmethod
    def of(cls, config: DataConfig) -> "Corpus":
        """The corpus that `data.source` names. Hashes source files; raises `DataError`."""
        return _botocore() if config.source == "botocore" else _files(config)

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        """The texts in order, without those that are empty or only whitespace.

        Args:
            skipped: counts the unusable records; without it none may be.
        """
        self.position.before, self.position.stream = 0, None
        for text in (skipped or Skipped(0.0)).texts(self.records(self.position)):
            if text and not text.isspace():
                yield Document.of(text)

    def divided(self, config: DataConfig, skipped: Skipped) -> Iterator[tuple[str, Document]]:
        """(split, document) of all documents.

        A document's hash decides its split. With few documents that would be a matter of luck, so the last
        `data.validation_fraction` of the text is held out, and the document there is divided at a line.
        """
        fraction = config.validation_fraction
        first = itertools.islice(self.documents(Skipped(1.0)), math.ceil(FEW_HELD_OUT / fraction))
        few = [len(document.text) for document in first]  # the texts may be large
        if len(few) * fraction >= FEW_HELD_OUT:
            for document in self.documents(skipped):
                yield document.split(fraction), document
            return
        left = round((1 - fraction) * sum(few))
        for document in self.documents(skipped):
            cut = len(document.text)
            if left < cut:
                ends = (document.text.rfind(end, 0, left) + 1 for end in ("\n", " "))
                cut = next(filter(None, ends), left) if left else 0
            for split, text in (("train", document.text[:cut]), ("validation", document.text[cut:])):
                if text and not text.isspace():
                    yield split, Document.of(text)
            left = max(left - len(document.text), 0)


# --- the embedded corpus ------------------------------------------------------------------------------


def _botocore() -> Corpus:
    """The embedded corpus: the English API documentation inside the pinned botocore package (Apache-2.0).

    The package is needed for its texts alone: data that were prepared before are found without it.
    """
    texts = functools.cache(lambda: list(botocore_texts(_botocore_folder())))  # 27 MB, asked for twice
    return Corpus(
        stem="botocore",
        description=f"botocore {BOTOCORE_VERSION}",
        identity=["botocore", BOTOCORE_VERSION],
        records=functools.partial(_counted, texts),
        num_bytes=BOTOCORE_BYTES,
    )


def _counted(texts: Callable[[], list[str]], position: Position) -> Iterator[str]:
    for text in texts():
        yield text
        position.before += len(text.encode())


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


def _files(config: DataConfig) -> Corpus:
    files, left_out = find(config.source)
    num_bytes = sum(file.num_bytes for file in files)
    kind, name = files[0].kind, config.text_field
    source = Path(config.source.rstrip("/"))
    stem = files[0].name.partition(".")[0] if len(files) == 1 else source.name
    return Corpus(
        stem=re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "corpus",
        description=f"{on_a_line(config.source)} ({len(files)} .{kind}, {num_bytes / 1e6:.1f} MB{left_out})",
        identity=[
            kind,
            [[file.name, file.num_bytes, file.identity] for file in files],
            name if kind != "txt" else None,
        ],
        records=lambda position: itertools.chain.from_iterable(
            file.records(name, position) for file in files
        ),
        num_bytes=num_bytes,
    )
