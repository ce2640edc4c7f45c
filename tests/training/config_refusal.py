"""A small schema, and the message of a refused configuration, for tests."""

import dataclasses
from pathlib import Path

import pytest

from cluster import config as layered
from cluster.config import ConfigError, key, require
from training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = key(1, "a size")
    rate: float = key(0.5, "a rate")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = key("x", "a name")
    flag: bool = key(False, "a flag")
    limit: int | None = key(None, "a limit")
    words: tuple[str, ...] = key(("a",), "some words")
    inner: Inner = key(Inner, "")

    def __post_init__(self) -> None:
        require(self.name != "bad", "name", "must not be bad")


def load_text(folder: Path, text: str, *dotlist: str) -> Outer:
    file = folder / "c.yaml"
    file.write_text(text)
    return layered.load(Outer, file=file, dotlist=dotlist)


def refusal(*dotlist: str, file: Path | None = None, schema: type = TrainConfig) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as raised:
        layered.load(schema, file=file, dotlist=dotlist)
    return str(raised.value)
