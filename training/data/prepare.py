"""Text to token shards: `python -m training.data.prepare [--config FILE] [--dry-run] [key=value ...]`.

Trains (or loads) a tokenizer for a corpus (`training.data.corpora`) and writes a folder that
`training.data.dataset` maps into memory. The folder's name carries a hash of everything that determines its
content, so a second run reuses it; it appears by one rename, so an interrupted run leaves nothing that looks
complete. Memory is bounded by a batch of documents and the tokenizer's sample, not by the corpus.
"""

import errno
import fcntl
import hashlib
import heapq
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import cli, files
from cluster import config as layered
from cluster.files import sha256_of
from cluster.progress import Progress
from training import config as training_config
from training.data.config import DataConfig
from training.data.corpora import Corpus, Document, Skipped
from training.data.dataset import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REMEDY,
    SPLITS,
    DataError,
    Manifest,
)
from training.data.mixture import MixtureRequest, prepare_sources, write_mixture
from training.data.records import reading, require_file
from training.data.shards import RESUME_FILE, TOKENIZER_FILE, Resume, ShardWriter
from training.data.tokenizer import (
    encoding_with,
    end_of_text_id,
    load_tokenizer,
    opening_only,
    train_tokenizer,
)

Report = Callable[[str], None]

TOKENIZER_SAMPLE_BYTES = 64 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser(
        "training.data.prepare",
        description="Turn a corpus into token shards under data.directory, or reuse those that are there.",
        keys=DataConfig(),
        prefix="data.",
    )
    options = parser.parse_args(arguments)

    def body() -> None:
        # settle=False, because settling would import torch
        config = training_config.load(file=options.config, dotlist=options.overrides, settle=False).data
        if options.dry_run:
            print(f"{layered.to_yaml(config)}{request_of(config).describe()}")
        else:
            prepare(config, report=lambda line: print(line, flush=True))

    return cli.run(body)


def prepare(config: DataConfig, *, report: Report = print) -> Path:
    """Make the prepared folder of `config`, or verify and reuse the one that is there.

    A damaged folder is rebuilt. Concurrent calls wait for each other. `report` gets one line per phase.

    Returns:
        The folder, `<data.directory>/<source stem>-<12 hex digits>`; of `data.sources` a mixture's.

    Raises:
        DataError: unusable source or tokenizer, an empty split, or a folder that cannot be written.
    """
    return _prepare(request_of(config), report=report)


def _prepare(request: "DataRequest | MixtureRequest", *, report: Report) -> Path:
    if isinstance(request, MixtureRequest):
        return _prepare_mixture(request, report=report)
    target = request.target
    with _writing(target, report=report) as read_only:
        if target.exists():
            try:
                Manifest.read(target).verify(target)
            except DataError as error:
                if read_only:
                    raise
                report(f"rebuilding {target}: {str(error).removesuffix(f'; {REMEDY}')}")
            else:
                report(f"reusing {target}, from {request.corpus.description}")
                return target
        with files.replace_folder(target, resumable=True) as folder:
            resume = Resume.of(folder, request.key)
            if resume.tokenizer_sha256:
                tokens = sum(split.tokens for split in resume.splits.values())
                report(f"continuing where an earlier call broke off, after {tokens:,} tokens")
            else:
                _write_tokenizer(request, folder / TOKENIZER_FILE, report=report)
                resume.tokenizer_sha256 = sha256_of(folder / TOKENIZER_FILE)
                resume.save(folder)
            manifest = _write_shards(request, folder, resume, report=report)
            (folder / RESUME_FILE).unlink()
            files.write_text(folder / MANIFEST_FILE, manifest.to_json())
        report(f"ready: {target}")
    return target


def _prepare_mixture(request: MixtureRequest, *, report: Report) -> Path:
    def prepare_source(config: DataConfig, corpus: Corpus) -> Path:
        return _prepare(DataRequest.of(config, corpus), report=report)

    folders = prepare_sources(request, prepare_source)
    with _writing(request.target, report=report):
        made = write_mixture(request, folders)
        report(f"{'ready' if made else 'reusing'}: {request.target}, a mixture of {len(folders)} sources")
    return request.target


@dataclass(frozen=True)
class DataRequest:
    """What `prepare` is asked for, and the folder that will hold it."""

    config: DataConfig
    corpus: Corpus
    key: str  # SHA-256 over all that determines the content of the folder

    @classmethod
    def of(cls, config: DataConfig, corpus: Corpus | None = None) -> "DataRequest":
        """Hashes a given tokenizer and, without `corpus`, the source files. Raises `DataError`."""
        corpus = corpus or Corpus.of(config)
        if config.tokenizer == "train":
            tokenizer = ["train", config.vocab_size, *([config.end_of_text] if config.end_of_text else [])]
        else:
            path = Path(config.tokenizer).expanduser()
            with reading(path):
                require_file(path)
                tokenizer = ["file", sha256_of(path), config.add_special_tokens, config.end_of_text]
        asked = [FORMAT_VERSION, corpus.identity, tokenizer, config.validation_fraction, config.shard_tokens]
        if config.max_bad_fraction != DataConfig.max_bad_fraction:
            asked.append(config.max_bad_fraction)
        return cls(config, corpus, hashlib.sha256(json.dumps(asked).encode()).hexdigest())

    @property
    def target(self) -> Path:
        """`<data.directory>/<source stem>-<12 hex digits of the key>`."""
        return Path(self.config.directory).expanduser() / f"{self.corpus.stem}-{self.key[:12]}"

    def describe(self) -> str:
        """Two lines for people: the corpus, the folder and its state."""
        state = "there; would be verified and reused" if self.target.exists() else "not there yet"
        return f"corpus: {self.corpus.description}\nfolder: {self.target} ({state})"


def request_of(config: DataConfig) -> DataRequest | MixtureRequest:
    """What `config` asks `prepare` for. Raises `DataError`."""
    if config.sources:
        return MixtureRequest.of(config, DataRequest.of)
    return DataRequest.of(config)


@contextmanager
def _writing(target: Path, *, report: Report) -> Iterator[bool]:
    """The sole right to write `target`. The kernel frees the lock of a process that dies.

    Gives whether nothing can be written there, as on a read-only mount, and `target` has to do as it is.
    """
    folder = target.parent
    try:
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((folder / f".{target.name}.lock").open("w"))
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not target.exists():
                    raise
                yield True
                return
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting for another prepare of {target}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield False
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"{'free some space or ' if full else ''}set data.directory"
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); {remedy}") from error


# --- tokenizer ----------------------------------------------------------------------------------------


def _write_tokenizer(request: DataRequest, path: Path, *, report: Report) -> None:
    """Train the tokenizer of `request` on its training documents, or copy the given one byte for byte."""
    config, corpus, started = request.config, request.corpus, time.monotonic()
    if config.tokenizer != "train":
        given = Path(config.tokenizer).expanduser()
        load_tokenizer(given)  # so that a refusal names this file, not the copy
        shutil.copyfile(given, path)
        content = json.loads(given.read_bytes())
        processor, closing = content.get("post_processor"), list[str]()
        if config.add_special_tokens:
            processor, closing = opening_only(processor)
        elif (processor or {}).get("type") != "ByteLevel":
            processor = None
        if processor != content.get("post_processor"):
            path.write_text(json.dumps({**content, "post_processor": processor}, ensure_ascii=False), "utf-8")
        report(f"tokenizer: {given}{', without the closing ' + ' '.join(closing) if closing else ''}")
        return

    def documents() -> Iterator[Document]:
        with _progress(corpus) as progress:
            for number, (split, document) in enumerate(corpus.divided(config, skipped)):
                if number % 1000 == 0:
                    progress.update(
                        {"step": corpus.position.num_bytes // 1_000_000, "doing": "reading for the tokenizer"}
                    )
                if split == "train":
                    yield document

    skipped = Skipped(config.max_bad_fraction)
    sample = _sample(documents(), max_bytes=TOKENIZER_SAMPLE_BYTES)
    tokenizer = train_tokenizer((document.text for document in sample), vocab_size=config.vocab_size)
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    megabytes = sum(document.num_bytes for document in sample) / 1e6
    report(
        f"tokenizer: {tokenizer.get_vocab_size():,} tokens, byte-level BPE of {megabytes:.1f} MB from "
        f"{corpus.description}, {time.monotonic() - started:.1f} s"
    )


def _sample(documents: Iterable[Document], *, max_bytes: int) -> list[Document]:
    """The documents with the largest digests, `max_bytes` in all or one document. Bounded memory."""
    heap: list[Document] = []
    num_bytes = 0
    for document in documents:
        heapq.heappush(heap, document)
        num_bytes += document.num_bytes
        while num_bytes > max_bytes and len(heap) > 1:
            num_bytes -= heapq.heappop(heap).num_bytes
    return heap


# --- shards -------------------------------------------------------------------------------------------


def _write_shards(request: DataRequest, folder: Path, resume: Resume, *, report: Report) -> Manifest:
    """Encode the corpus with the tokenizer in `folder` and write its shards there."""
    config, corpus, started = request.config, request.corpus, time.monotonic()
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    end_id = end_of_text_id(tokenizer, config.end_of_text)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    writer = ShardWriter(folder, end_id=end_id, dtype=dtype, shard_tokens=config.shard_tokens, resume=resume)
    skipped, tokens_before = Skipped(config.max_bad_fraction), writer.tokens
    with _progress(corpus) as progress, encoding_with(config.tokenizer):
        for position in writer.write(corpus.divided(config, skipped), corpus.position):
            rate = (writer.tokens - tokens_before) / (time.monotonic() - started)
            progress.update({"step": position // 1_000_000, "tokens_per_second": rate})
    train, validation = (writer.splits[name].split() for name in SPLITS)
    if not (train.documents and validation.documents):
        raise DataError(
            f"data.source: {config.source!r} gives {train.documents} train and {validation.documents} "
            "validation documents; both need some: add documents or change data.validation_fraction"
        )
    if skipped.number:
        report(skipped.describe())
    text_bytes = train.text_bytes + validation.text_bytes
    report(
        f"tokens: {train.tokens:,} train, {validation.tokens:,} validation "
        f"({validation.text_bytes / text_bytes:.2%} of {text_bytes / 1e6:.1f} MB), "
        f"{train.documents + validation.documents:,} documents, {time.monotonic() - started:.1f} s"
    )
    return Manifest(
        version=FORMAT_VERSION,
        request=request.key,
        source=corpus.description,
        text_sha256=writer.text_sha256.hexdigest(),
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
        vocab_size=vocab_size,
        end_of_text_id=end_id,
        dtype=dtype,
        train=train,
        validation=validation,
        skipped_records=skipped.number,
        skipped_first=tuple(skipped.first),
    )


def _progress(corpus: Corpus) -> Progress:
    return Progress(corpus.num_bytes and max(corpus.num_bytes // 1_000_000, 1), unit="MB")


if __name__ == "__main__":
    sys.exit(main())
