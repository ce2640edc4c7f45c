from pathlib import Path

import pytest

from tests.training.data.small_corpus import texts, write_jsonl
from training.data.config import DataConfig


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    source = write_jsonl(tmp_path / "corpus.jsonl", texts(400))
    return DataConfig(
        source=str(source), directory=str(tmp_path / "data"), vocab_size=320, validation_fraction=0.1
    )
