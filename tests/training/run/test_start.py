"""What a start keeps in the run directory."""

from pathlib import Path

from tests.commands import tiny
from tests.training.data.small_corpus import silent, texts, write_jsonl
from training import config as training_config
from training.data.config import DataConfig
from training.data.dataset import TokenDataset
from training.data.prepare import prepare
from training.data.tokenizer import train_tokenizer
from training.run.start import TOKENIZER, _keep_tokenizer, _tidy


def test_the_tokenizer_is_kept_byte_for_byte(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", texts(200))
    given = tmp_path / "tokenizer.json"  # as Windows ends its lines
    text = train_tokenizer(texts(200), vocab_size=300).to_str(pretty=True)
    given.write_bytes(text.replace("\n", "\r\n").encode())
    config = DataConfig(source=str(source), tokenizer=str(given), directory=str(tmp_path / "data"))
    data = TokenDataset.open(prepare(config, report=silent), split="train", sequence_length=16)
    _keep_tokenizer(data, tmp_path / TOKENIZER, given=config.tokenizer)
    kept = (tmp_path / TOKENIZER / data.manifest.tokenizer_file).read_bytes()
    assert kept == (data.directory / data.manifest.tokenizer_file).read_bytes()


def test_what_a_killed_start_left_half_written_is_deleted(tmp_path: Path) -> None:
    config = training_config.load(dotlist=tiny(tmp_path))
    left = [
        config.run_directory / name for name in (".config.yaml.1.tmp", f"{TOKENIZER}/.manifest.json.1.tmp")
    ]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    _tidy(config)
    assert not any(file.exists() for file in left)
