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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import cli, files
from cluster import config as layered
from cluster.files import sha256_of
from cluster.progress import Progress
from training import config as training_config
from training.config import DataConfig
from training.data.corpora import Corpus, Document, Skipped
from training.data.dataset import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    REMEDY,
    SPLITS,
    DataError,
    Manifest,
    Shard,
    Split,
)
from training.data.readers import reading

Report = Callable[[str], None]

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# of GPT-2 and Qwen, LLaMA 3, DeepSeek, LLaMA 2 and Mistral, Gemma, and others
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's own bars)
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "[EOS]",
)

BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096
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
        given = {"file": options.config, "dotlist": options.overrides}
        config = training_config.load(**given, settle=False).data  # which would import torch
        if options.dry_run:
            print(f"{layered.to_yaml(config)}{DataRequest.of(config).describe()}")
        else:
            prepare(config, report=lambda line: print(line, flush=True))

    return cli.run(body)


def prepare(config: DataConfig, *, report: Report = print) -> Path:
    """Make the prepared folder of `config`, or verify and reuse the one that is there.

    A damaged folder is rebuilt. Concurrent calls wait for each other. `report` gets one line per phase.

    Returns:
        The folder, `<data.directory>/<source stem>-<12 hex digits>`.

    Raises:
        DataError: unusable source or tokenizer, an empty split, or a folder that cannot be written.
    """
    request = DataRequest.of(config)
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
        with files.replace_folder(target) as folder:
            megabytes = _write_tokenizer(request, folder / TOKENIZER_FILE, report=report)
            manifest = _write_shards(request, folder, total_megabytes=megabytes, report=report)
            files.write_text(folder / MANIFEST_FILE, manifest.to_json())
        report(f"ready: {target}")
    return target


@dataclass(frozen=True)
class DataRequest:
    """What `prepare` is asked for, and the folder that will hold it."""

    config: DataConfig
    corpus: Corpus
    key: str  # SHA-256 over all that determines the content of the folder

    @classmethod
    def of(cls, config: DataConfig) -> "DataRequest":
        """Hashes the source files and a given tokenizer; writes nothing. Raises `DataError`."""
        corpus = Corpus.of(config)
        if config.tokenizer == "train":
            tokenizer = ["train", config.vocab_size]
        else:
            path = Path(config.tokenizer).expanduser()
            with reading(path):
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
    with reading(path):
        content = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a Hugging Face tokenizer.json ({error}); set data.tokenizer") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id of the token that ends a document: `name`, or the first of its usual names.

    Raises:
        DataError: there is none.
    """
    for each in END_OF_TEXT_NAMES if name is None else (name,):
        if (token := tokenizer.token_to_id(each)) is not None:
            return token
    if name is not None:
        raise DataError(f"data.end_of_text: the tokenizer has no token {name!r}")
    names = " ".join(END_OF_TEXT_NAMES)
    raise DataError(f"data.tokenizer: no end-of-text token of the names {names}; name it by data.end_of_text")


def opening_only(processor: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """A tokenizer.json's `post_processor` without the special tokens after the text, and their names.

    A prompt must not end with them: what ends a document is added by `prepare`. So plain `encode` gives the
    same tokens in training, sampling, the export and serving.

    Raises:
        DataError: the post-processor is for encoder models.
    """
    kind = processor["type"] if processor else None
    if processor and kind == "TemplateProcessing":
        single, closing = list(processor["single"]), list[str]()
        while single and "SpecialToken" in single[-1]:
            closing.append(single.pop()["SpecialToken"]["id"])
        return {**processor, "single": single}, closing
    if processor and kind == "Sequence":
        parts = [opening_only(part) for part in processor["processors"]]
        return {**processor, "processors": [part for part, _ in parts]}, [
            name for _, names in parts for name in names
        ]
    if kind in (None, "ByteLevel"):
        return processor, []
    raise DataError(
        f"data.tokenizer: its post-processor {kind} is for encoder models; set data.add_special_tokens=false"
    )


def _write_tokenizer(request: DataRequest, path: Path, *, report: Report) -> int | None:
    """Train the tokenizer of `request` on its training documents, or copy the given one byte for byte.

    Returns:
        How many MB of text the corpus has, if it was read for this and has any.
    """
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
        return None
    text_bytes = 0

    def documents() -> Iterator[Document]:
        nonlocal text_bytes
        for split, document in corpus.divided(config, Skipped(config.max_bad_fraction)):
            text_bytes += document.num_bytes
            if split == "train":
                yield document

    sample = _sample(documents(), max_bytes=TOKENIZER_SAMPLE_BYTES)
    tokenizer = train_tokenizer((document.text for document in sample), vocab_size=config.vocab_size)
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    megabytes = sum(document.num_bytes for document in sample) / 1e6
    report(
        f"tokenizer: {tokenizer.get_vocab_size():,} tokens, byte-level BPE of {megabytes:.1f} MB from "
        f"{corpus.description}, {time.monotonic() - started:.1f} s"
    )
    return text_bytes // 1_000_000 or None


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


def _write_shards(
    request: DataRequest, folder: Path, *, total_megabytes: int | None, report: Report
) -> Manifest:
    """Encode the corpus with the tokenizer in `folder` and write its shards there."""
    config, started = request.config, time.monotonic()
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    end_id = end_of_text_id(tokenizer, config.end_of_text)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    train, validation = (
        SplitWriter(folder, name, dtype=dtype, shard_tokens=config.shard_tokens) for name in SPLITS
    )
    text_sha256 = hashlib.sha256()
    skipped = Skipped(config.max_bad_fraction)
    with Progress(total_megabytes, unit="MB of text") as progress:
        for batch in _batches(request.corpus.divided(config, skipped)):
            encodings = tokenizer.encode_batch_fast([d.text for _, d in batch])
            encoded = [(split, d, [*e.ids, end_id]) for (split, d), e in zip(batch, encodings, strict=True)]
            for writer in (train, validation):
                writer.write([(d, ids) for split, d, ids in encoded if split == writer.name])
            text_sha256.update(b"".join(document.digest for _, document in batch))
            rate = (train.tokens + validation.tokens) / (time.monotonic() - started)
            megabytes = (train.text_bytes + validation.text_bytes) // 1_000_000
            progress.update({"step": megabytes, "tokens_per_second": rate})
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
        source=request.corpus.description,
        text_sha256=text_sha256.hexdigest(),
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=sha256_of(folder / TOKENIZER_FILE),
        vocab_size=vocab_size,
        end_of_text_id=end_id,
        dtype=dtype,
        train=train.split(),
        validation=validation.split(),
        skipped_records=skipped.number,
        skipped_first=tuple(skipped.first),
    )


def _batches(divided: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """(split, document) in groups of at most 4096, that end once they hold 4 MiB."""
    batch: list[tuple[str, Document]] = []
    num_bytes = 0
    for split, document in divided:
        batch.append((split, document))
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class SplitWriter:
    """Writes the tokens of a split to `<split>-00000.bin`, `<split>-00001.bin`, … of `shard_tokens` each."""

    def __init__(self, folder: Path, name: str, *, dtype: str, shard_tokens: int) -> None:
        self.name, self._folder, self._shard_tokens = name, folder, shard_tokens
        self.documents = self.text_bytes = self.tokens = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def write(self, documents: Sequence[tuple[Document, list[int]]]) -> None:
        """Append documents with their token ids; what a full shard cannot take goes into the next."""
        self.documents += len(documents)
        self.text_bytes += sum(document.num_bytes for document, _ in documents)
        tokens = np.fromiter(chain.from_iterable(ids for _, ids in documents), dtype=self._dtype)
        while len(tokens):
            number, filled = divmod(self.tokens, self._shard_tokens)
            part, tokens = np.split(tokens, [self._shard_tokens - filled])
            with self._file(number).open("ab") as stream:
                stream.write(part.data)
            self.tokens += len(part)

    def split(self) -> Split:
        """What was written, as the manifest records it."""
        shards = []
        for number, first in enumerate(range(0, self.tokens, self._shard_tokens)):
            file, tokens = self._file(number), min(self._shard_tokens, self.tokens - first)
            shards.append(Shard(file.name, tokens, sha256_of(file)))
        return Split(self.documents, self.text_bytes, tuple(shards))

    def _file(self, number: int) -> Path:
        return self._folder / f"{self.name}-{number:05}.bin"


if __name__ == "__main__":
    sys.exit(main())
