"""Text to token shards: `python -m training.prepare [--config FILE] [--dry-run] [key=value ...]`.

Reads a corpus as a stream of documents, trains (or loads) a tokenizer, and writes a folder that
`training.data` maps into memory. The folder's name carries a hash of everything that determines its
content, so a second run reuses it; it appears by one rename, so an interrupted run leaves nothing that
looks complete. Memory is bounded by a batch of documents, a row group and the tokenizer's sample, not
by the corpus; a single .jsonl line or Parquet value must fit in memory.
"""

import argparse
import fcntl
import functools
import glob
import gzip
import hashlib
import heapq
import html
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import config as layered
from cluster.config import ConfigError
from training import config as training_config
from training.config import DataConfig
from training.data import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REMEDY,
    DataError,
    Manifest,
    Shard,
    Split,
    sha256_of,
)

Report = Callable[[str], None]

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "[EOS]")

BOTOCORE_VERSION = "1.44.5"  # as in pyproject.toml
BOTOCORE_MIN_BYTES = 20_000_000
MIN_PARAGRAPH_CHARACTERS = 40

TEXT_PIECE_CHARACTERS = 1 << 20  # a longer .txt file becomes several documents
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096
TOKENIZER_SAMPLE_BYTES = 64 << 20
PROGRESS_SECONDS = 30.0


def prepare(config: DataConfig, *, report: Report = print) -> Path:
    """Make the prepared folder of `config`, or verify and reuse the one that is there.

    A damaged folder is rebuilt. Concurrent calls wait for each other. `report` gets one line per phase.

    Returns:
        The folder, `<data.directory>/<source stem>-<12 hex digits>`.

    Raises:
        DataError: unusable source or tokenizer, an empty split, or a folder that cannot be written.
    """
    request = Request.of(config)
    with _writing(request.target.parent), _locked(request.target, report=report):
        if request.target.exists():
            try:
                Manifest.read(request.target).verify(request.target)
            except DataError as error:
                report(f"rebuilding {request.target}: {str(error).removesuffix(f'; {REMEDY}')}")
            else:
                report(f"reusing {request.target}, from {request.corpus.description}")
                return request.target
        _build(request, report=report)
    return request.target


# --- corpora ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """A source of documents. `documents()` starts the same stream of texts each time it is called."""

    stem: str
    description: str
    identity: Any  # JSON value that determines the documents
    documents: Callable[[], Iterable[str]]

    @classmethod
    def of(cls, config: DataConfig) -> "Corpus":
        """The corpus that `data.source` names. Hashes source files; raises `DataError`."""
        return _botocore() if config.source == "botocore" else _local_files(config)


def _botocore() -> Corpus:
    """The embedded corpus: the English API documentation inside the pinned botocore package (Apache-2.0)."""
    remedy = f"run `pip install --no-deps botocore=={BOTOCORE_VERSION}`"
    try:
        package = importlib.metadata.distribution("botocore")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"data.source: the package botocore is not installed; {remedy}") from error
    if package.version != BOTOCORE_VERSION:
        raise DataError(f"data.source: botocore {package.version} holds another text; {remedy}")
    folder = Path(str(package.locate_file("botocore/data")))
    return Corpus(
        stem="botocore",
        description=f"botocore {package.version}",
        identity=["botocore", package.version],
        documents=functools.cache(lambda: list(botocore_documents(folder))),  # 27 MB, read twice
    )


def botocore_documents(folder: Path) -> Iterator[str]:
    """One document per API operation: its text, then that of the shapes which it is the first to reach.

    Operations read as reference pages (20,206 of 1.3 KB on average, the largest 1% of the text), enough for
    a split by hash; the 471 services (the largest 3%) would not be. A paragraph stays where it first appears.

    Raises:
        DataError: less than 20 MB of text in `folder`.
    """
    seen: set[str] = set()
    num_bytes = 0
    for file in sorted(folder.glob("*/*/service-2.json.gz")):
        with _reading(file):
            service = json.loads(gzip.decompress(file.read_bytes()))
        for page in _pages(service):
            paragraphs = [p for fragment in page for p in html_paragraphs(fragment)]
            fresh = [p for p in dict.fromkeys(paragraphs) if p not in seen]
            if fresh:
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
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape half a pair, UTF-8 cannot hold it


def html_paragraphs(fragment: str) -> Iterator[str]:
    """The paragraphs of an HTML fragment: no tags, whitespace folded, none shorter than 40 characters."""
    for block in _BLOCK_TAG.split(fragment):
        paragraph = " ".join(html.unescape(_TAG.sub("", block)).split())
        if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS:
            yield paragraph


def _local_files(config: DataConfig) -> Corpus:
    """The corpus of a file, a folder (recursively, without hidden files) or a glob, in order of path."""
    path = Path(config.source).expanduser()
    pattern = f"{glob.escape(str(path))}/**/*" if path.is_dir() else str(path)
    candidates = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [file for file in candidates if file.is_file()]
    if not files:
        raise DataError(
            f"data.source: {config.source!r} matches no file; give 'botocore', or a file, folder or glob of "
            f"{' '.join(READERS)}"
        )
    extensions = {file.suffix: file for file in files}
    for extension, file in extensions.items():
        if extension not in READERS:
            raise DataError(
                f"{file}: cannot read {extension or 'files without extension'}; only {' '.join(READERS)}"
            )
    if len(extensions) > 1:
        raise DataError(
            f"data.source: {config.source!r} mixes {' and '.join(sorted(extensions))}; choose with a glob"
        )

    root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    num_bytes, hashes = 0, []
    for file in files:
        with _reading(file):
            size = file.stat().st_size
            hashes.append([str(file.absolute().relative_to(root)), size, sha256_of(file)])
            num_bytes += size
    read = READERS[files[0].suffix]
    return Corpus(
        stem=re.sub(r"[^\w.-]+", "-", path.stem if path.is_file() else root.name).strip(".-") or "corpus",
        description=f"{config.source} ({len(files)} {files[0].suffix}, {num_bytes / 1e6:.1f} MB)",
        identity=["files", hashes, None if read is _read_txt else config.text_field],
        documents=lambda: itertools.chain.from_iterable(read(file, config.text_field) for file in files),
    )


def _read_txt(file: Path, _text_field: str) -> Iterator[str]:
    """The whole file as one document; a long one in pieces of 1 to 2 Mi characters that end with a line."""
    with _reading(file), file.open(encoding="utf-8", newline="") as stream:
        while text := stream.read(TEXT_PIECE_CHARACTERS) + stream.readline(TEXT_PIECE_CHARACTERS):
            yield text


def _read_jsonl(file: Path, text_field: str) -> Iterator[str]:
    with _reading(file), file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _jsonl_text(line, text_field, where=f"{file}:{number}")


def _jsonl_text(line: bytes, text_field: str, *, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 ({error.reason}); fix or remove the line") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); fix or remove the line"
        ) from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else "none, it is not an object"
        raise DataError(
            f"{where}: no text in {text_field!r} (fields: {keys}); set data.text_field or fix the line"
        )
    if _SURROGATE.search(text):
        raise DataError(f"{where}: {text_field!r} holds half a surrogate pair; fix or remove the line")
    return text


def _read_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow  # here, because it takes half a second
    from pyarrow import parquet

    try:
        with _reading(file), parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            if text_field not in schema.names:
                raise DataError(
                    f"{file}: no column {text_field!r} among {', '.join(schema.names)}; set data.text_field"
                )
            kind = schema.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(
                    f"{file}: column {text_field!r} holds {kind}, not strings; set data.text_field"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is None:
                        raise DataError(f"{file}: row {row} has no {text_field!r}; remove the row")
                    yield text
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file ({error}); write it again") from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not valid UTF-8 ({error.reason}); convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


class Document(NamedTuple):
    """A text with the SHA-256 that decides its split and whether the tokenizer is trained on it."""

    draw: int  # 64 bits of the digest; the largest are drawn into the tokenizer's sample
    text: str
    num_bytes: int
    digest: bytes

    @classmethod
    def stream(cls, corpus: Corpus) -> Iterator["Document"]:
        """The documents of `corpus` in order, without those that are empty or only whitespace."""
        for text in corpus.documents():
            if text and not text.isspace():
                encoded = text.encode("utf-8")
                digest = hashlib.sha256(encoded).digest()
                yield cls(int.from_bytes(digest[8:16], "big"), text, len(encoded), digest)

    def split(self, validation_fraction: float) -> str:
        """'train' or 'validation'; equal texts fall into the same split."""
        share = int.from_bytes(self.digest[:8], "big") / 2**64
        return "validation" if share < validation_fraction else "train"


# --- tokenizer ----------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's scheme) with `<|endoftext|>` as id 0. Decodes every text exactly.

    Has fewer than `vocab_size` tokens when the texts run out of pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The Hugging Face tokenizer in `path`, set to encode plain text as it stands, whatever its length.

    A text that happens to contain the name of a special token is encoded as ordinary characters.

    Raises:
        DataError: unreadable, or not a tokenizer.json.
    """
    with _reading(path):
        content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a Hugging Face tokenizer.json ({error}); set data.tokenizer") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document, by its usual names. Raises `DataError` if there is none."""
    ids = [tokenizer.token_to_id(name) for name in END_OF_TEXT_NAMES]
    if found := [token for token in ids if token is not None]:
        return found[0]
    raise DataError(
        f"data.tokenizer: no end-of-text token; add one of {' '.join(END_OF_TEXT_NAMES)} to its added_tokens"
    )


def _sample(documents: Iterable[Document], *, max_bytes: int) -> list[Document]:
    """A pseudorandom choice of documents, `max_bytes` in all or one document: one pass, bounded memory."""
    heap: list[Document] = []
    num_bytes = 0
    for document in documents:
        heapq.heappush(heap, document)
        num_bytes += document.num_bytes
        while num_bytes > max_bytes and len(heap) > 1:
            num_bytes -= heapq.heappop(heap).num_bytes
    return heap


# --- from documents to a folder -----------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is asked of `prepare`, and the folder that answers it."""

    config: DataConfig
    corpus: Corpus
    key: str  # SHA-256 over all that determines the content of the folder

    @classmethod
    def of(cls, config: DataConfig) -> "Request":
        """Hashes the source files and a given tokenizer; writes nothing. Raises `DataError`."""
        corpus = Corpus.of(config)
        if config.tokenizer == "train":
            tokenizer = ["train", config.vocab_size]
        else:
            path = Path(config.tokenizer).expanduser()
            with _reading(path):
                tokenizer = ["file", sha256_of(path)]
        asked = [FORMAT_VERSION, corpus.identity, tokenizer, config.validation_fraction, config.shard_tokens]
        return cls(config, corpus, hashlib.sha256(json.dumps(asked).encode()).hexdigest())

    @property
    def target(self) -> Path:
        """`<data.directory>/<source stem>-<12 hex digits of the key>`."""
        return Path(self.config.directory).expanduser() / f"{self.corpus.stem}-{self.key[:12]}"


def _build(request: Request, *, report: Report) -> None:
    """Write the folder beside its place, then rename it there."""
    target = request.target
    _remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir()
        manifest = _write_tokens(request, partial, report=report)
        _write_file(partial / MANIFEST_FILE, manifest.to_json().encode())
        _sync_folder(partial)
        if target.exists():
            target.rename(partial.with_suffix(".old.partial"))
        partial.rename(target)
        _sync_folder(target.parent)
    finally:
        _remove_leftovers(target)
    report(f"ready: {target}")


def _write_tokens(request: Request, folder: Path, *, report: Report) -> Manifest:
    """Write the tokenizer and the shards of both splits to `folder`."""
    _write_tokenizer(request, folder / TOKENIZER_FILE, report=report)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    end_id = end_of_text_id(tokenizer)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    writer = functools.partial(ShardWriter, folder, dtype=dtype, shard_tokens=request.config.shard_tokens)
    with closing(writer(split="train")) as train, closing(writer(split="validation")) as validation:
        writers = {"train": train, "validation": validation}
        text_sha256 = _encode(request, tokenizer, writers=writers, end_id=end_id, report=report)
        return Manifest(
            version=FORMAT_VERSION,
            request=request.key,
            source=request.corpus.description,
            text_sha256=text_sha256,
            tokenizer_file=TOKENIZER_FILE,
            tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
            vocab_size=vocab_size,
            end_of_text_id=end_id,
            dtype=dtype,
            train=train.finish(),
            validation=validation.finish(),
        )


def _encode(
    request: Request, tokenizer: Tokenizer, *, writers: dict[str, "ShardWriter"], end_id: int, report: Report
) -> str:
    """Send each document's tokens and `end_id` to the writer of its split; the SHA-256 over the digests."""
    config = request.config
    started = reported = time.monotonic()
    digests = hashlib.sha256()
    for batch in _batches(Document.stream(request.corpus)):
        encodings = tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            digests.update(document.digest)
            writer = writers[document.split(config.validation_fraction)]
            writer.add([*encoding.ids, end_id], text_bytes=document.num_bytes)
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            tokens = sum(writer.tokens for writer in writers.values())
            report(f"tokens: {tokens:,} so far, {tokens / (reported - started):,.0f} per second")
    train, validation = writers["train"], writers["validation"]
    if not (train.documents and validation.documents):
        raise DataError(
            f"data.source: {config.source!r} gives {train.documents} train and {validation.documents} "
            "validation documents; both need some: add documents or change data.validation_fraction"
        )
    text_bytes = train.text_bytes + validation.text_bytes
    report(
        f"tokens: {train.tokens:,} train, {validation.tokens:,} validation "
        f"({validation.text_bytes / text_bytes:.2%} of {text_bytes / 1e6:.1f} MB), "
        f"{train.documents + validation.documents:,} documents, {time.monotonic() - started:.1f} s"
    )
    return digests.hexdigest()


def _write_tokenizer(request: Request, path: Path, *, report: Report) -> None:
    """Train the tokenizer of `request` on its training documents, or copy the given one byte for byte."""
    config, started = request.config, time.monotonic()
    if config.tokenizer != "train":
        given = Path(config.tokenizer).expanduser()
        load_tokenizer(given)  # so that a refusal names this file, not the copy
        _write_file(path, given.read_bytes())
        report(f"tokenizer: {given}")
        return
    documents = (d for d in Document.stream(request.corpus) if d.split(config.validation_fraction) == "train")
    sample = _sample(documents, max_bytes=TOKENIZER_SAMPLE_BYTES)
    tokenizer = train_tokenizer((document.text for document in sample), vocab_size=config.vocab_size)
    _write_file(path, tokenizer.to_str(pretty=True).encode())
    num_bytes = sum(document.num_bytes for document in sample)
    report(
        f"tokenizer: {tokenizer.get_vocab_size():,} tokens, byte-level BPE of {num_bytes / 1e6:.1f} MB from "
        f"{request.corpus.description}, {time.monotonic() - started:.1f} s"
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of at most 4096, that end once they hold 4 MiB."""
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class ShardWriter:
    """Writes the tokens of a split to `<split>-00000.bin`, `<split>-00001.bin`, … of `shard_tokens` each."""

    def __init__(self, folder: Path, *, split: str, dtype: str, shard_tokens: int) -> None:
        self.tokens = 0
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.documents = self.text_bytes = 0
        self._shards: list[Shard] = []
        self._stream: BinaryIO | None = None  # the open shard, of which:
        self._hash = hashlib.sha256()
        self._room = 0

    def add(self, ids: Sequence[int], *, text_bytes: int) -> None:
        """Append a document's token ids; what a full shard cannot take goes into the next."""
        tokens = np.array(ids, dtype=self._dtype)
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += len(tokens)
        while len(tokens):
            stream = self._stream or self._open_shard()
            part, tokens = tokens[: self._room].tobytes(), tokens[self._room :]
            stream.write(part)
            self._hash.update(part)
            self._room -= len(part) // self._dtype.itemsize
            if self._room == 0:
                self._finish_shard(stream)

    def finish(self) -> Split:
        """Make the last shard durable; the split as the manifest records it."""
        if self._stream:
            self._finish_shard(self._stream)
        return Split(self.documents, self.text_bytes, tuple(self._shards))

    def close(self) -> None:
        """Close the open shard, if any, as it is."""
        if self._stream:
            self._stream.close()

    def _open_shard(self) -> BinaryIO:
        self._stream = (self._folder / f"{self._split}-{len(self._shards):05}.bin").open("wb")
        self._hash = hashlib.sha256()
        self._room = self._shard_tokens
        return self._stream

    def _finish_shard(self, stream: BinaryIO) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        self._stream = None
        file = f"{self._split}-{len(self._shards):05}.bin"
        self._shards.append(Shard(file, self._shard_tokens - self._room, self._hash.hexdigest()))


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove what unfinished runs left beside `target`; only the holder of its lock may."""
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(leftover)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{folder}: cannot be written ({reason}); free some space or set data.directory"
        ) from error


@contextmanager
def _locked(target: Path, *, report: Report) -> Iterator[None]:
    """The sole right to write `target`. The kernel frees the lock of a process that dies."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another prepare of {target}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- command ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, or 2 for a configuration or corpus that cannot be used."""
    keys = [f"  data.{name}={value}\n      {doc}" for name, value, doc in layered.walk(DataConfig())]
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare",
        description="Turn a corpus into token shards under data.directory, or reuse those that are there.",
        epilog="\n".join(["keys and defaults:", *keys]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file, as for `make train`")
    parser.add_argument("--dry-run", action="store_true", help="print what would be prepared, and where")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys that replace those of the file"
    )
    options = parser.parse_args(arguments)
    try:
        config = training_config.load(file=options.config, dotlist=options.overrides).data
        if options.dry_run:
            request = Request.of(config)
            state = "there; would be verified and reused" if request.target.exists() else "not there yet"
            print(layered.to_yaml(config), end="")
            print(f"corpus: {request.corpus.description}\nfolder: {request.target} ({state})")
        else:
            prepare(config, report=lambda line: print(line, flush=True))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
