"""A corpus small enough for a test, and its configuration."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from training.data.config import DataConfig

WORDS = (
    "the",
    "lamp",
    "of",
    "harbour",
    "ships",
    "wait",
    "Asunción",
    "—",
    "🚢\t",
    "",
    "late",
    "then\r\n",
    "go",
)


def texts(count: int, *, words: int = 60) -> list[str]:
    """Different documents of some 250 bytes, with emoji, tabs, doubled spaces and line ends."""
    random = np.random.default_rng(0)
    return [f"{i}: " + " ".join(random.choice(WORDS, size=words)) for i in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def silent(_line: str) -> None:
    pass


def change(config: DataConfig, **values: object) -> DataConfig:
    return dataclasses.replace(config, **values)  # type: ignore[arg-type]


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")
