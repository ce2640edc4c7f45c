"""The keys of the section `data`, and how its values are read."""

import re
from dataclasses import dataclass

from cluster.config import ConfigError, key, require


@dataclass(frozen=True)
class DataConfig:
    source: str = key(
        "botocore",
        "'botocore' (embedded corpus) or a file, folder, glob or URL (s3://, hf://) of .txt .jsonl .json "
        "or .parquet; the first three also compressed",
    )
    sources: tuple[str, ...] = key(
        (),
        "a mixture, in place of data.source: 'name=source@weight', quoted; a source is as data.source, or a "
        "folder that was prepared; all take the tokenizer of the first",
    )
    text_field: str = key("text", "field or column that holds the text; a.b is b inside of a")
    max_bad_fraction: float = key(
        0.001,
        "share of the records that may be unusable; they are skipped, counted and named",
        least=0,
        most=1,
    )
    tokenizer: str = key("train", "'train' (a byte-level BPE on this corpus) or the path of a tokenizer.json")
    vocab_size: int = key(8192, "vocabulary of a trained tokenizer", least=300, most=1_000_000)
    add_special_tokens: bool = key(
        True, "begin each text as the tokenizer's post-processor does; false: without special tokens"
    )
    end_of_text: str | None = key(None, "the token that ends a document; default: found by its usual names")
    validation_fraction: float = key(
        0.01, "share of the documents that is held out, chosen by their hash", above=0, below=0.5
    )
    directory: str = key("data", "where prepared token shards are kept")
    shard_tokens: int = key(100_000_000, "tokens per shard file", least=1000)

    def __post_init__(self) -> None:
        require(bool(self.source.strip()), "data.source", "must not be empty")
        names = [parse_source(entry)[0] for entry in self.sources]
        for name in names:
            require(names.count(name) == 1, "data.sources", f"{name!r} names two sources")


def parse_source(entry: str) -> tuple[str, str, float]:
    """(name, source, weight) of "name=source@weight"; without "@weight" it is 1. Raises `ConfigError`."""
    name, _, rest = entry.partition("=")
    source, at, weight = rest.rpartition("@")
    source, weight = (source, weight) if at else (rest, "1")
    named = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
    require(named and bool(source), "data.sources", f"{entry!r} is not 'name=source@weight'")
    try:
        number = float(weight)
    except ValueError:
        raise ConfigError(f"data.sources: {weight!r} of {entry!r} is not a number") from None
    require(0 < number < 1e9, "data.sources", f"the weight of {entry!r} must be positive")
    return name, source, number
