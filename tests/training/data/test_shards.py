"""A prepare that was killed or interrupted goes on, and ends with the bytes of an undisturbed one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.files import sha256_of
from tests.commands import ROOT
from tests.training.data.small_corpus import change, silent, texts, visible, write_jsonl
from tests.waiting import PATIENCE_SECONDS
from training.data import shards
from training.data.config import DataConfig
from training.data.dataset import Manifest
from training.data.prepare import prepare


def test_a_killed_prepare_goes_on_where_it_was_and_ends_with_the_same_bytes(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, signal, sys\n"
        "from training.data.config import DataConfig\n"
        "from training.data import shards\n"
        "from training.data.prepare import prepare\n"
        "shards.BATCH_BYTES, shards.SAVE_BYTES = 2000, 5000\n"
        "write, calls = shards.SplitWriter.write, []\n"
        "def killed(*given):\n"
        "    write(*given)\n"
        "    calls.append(1)\n"
        "    if len(calls) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.SplitWriter.write = killed\n"
        f"prepare({config!r}, report=print)\n"
    )
    directory, counts = Path(config.directory), []
    for calls in ("1", "24"):
        child = subprocess.run(
            [sys.executable, "-c", script, calls], cwd=ROOT, timeout=PATIENCE_SECONDS, check=False
        )
        assert child.returncode == -signal.SIGKILL
        [partial] = visible(directory)
        assert partial.endswith(".partial")
        counts.append(
            json.loads((directory / partial / shards.RESUME_FILE).read_text())["splits"]["train"]["documents"]
        )
    assert counts[0] == 0 < counts[1] < 300
    monkeypatch.setattr(shards, "BATCH_BYTES", 3000)  # it may change in between
    lines: list[str] = []
    folder = prepare(config, report=lines.append)
    assert lines[0].startswith("continuing where an earlier call broke off, after ")
    assert visible(directory) == [folder.name]
    assert_same(folder, prepare(change(config, directory=str(tmp_path / "calm")), report=silent))


def assert_same(folder: Path, other: Path) -> None:
    """Two prepared folders hold the same files with the same bytes."""
    first, second = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (folder, other))
    assert first == second and len(first) > 3


@pytest.mark.parametrize("calls", range(1, 20, 3))
def test_an_interrupted_prepare_goes_on_wherever_it_was(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Shards of 1000 tokens: it is also interrupted between two of them."""
    config = change(config, shard_tokens=1000, source=str(write_jsonl(tmp_path / "c.jsonl", texts(80))))
    monkeypatch.setattr(shards, "BATCH_BYTES", 2000)
    monkeypatch.setattr(shards, "SAVE_BYTES", 3000)
    calm = prepare(change(config, directory=str(tmp_path / "calm")), report=silent)
    write, done = shards.SplitWriter.write, []

    def interrupted(*given: object) -> None:
        write(*given)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.SplitWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, report=silent)
    assert_same(prepare(config, report=silent), calm)


@pytest.mark.parametrize("damaged", ["train-00000.bin", "resume.json", "tokenizer.json", "library"])
def test_what_a_killed_prepare_left_is_used_only_if_it_is_whole(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    calm = prepare(change(config, directory=str(tmp_path / "calm")), report=silent)
    partial = Path(config.directory) / f".{calm.name}.partial"
    partial.mkdir(parents=True)
    for name in ("tokenizer.json", "train-00000.bin"):
        (partial / name).write_bytes((calm / name).read_bytes())
    shards.Resume(Manifest.read(calm).request, sha256_of(partial / "tokenizer.json")).save(partial)
    if damaged == "library":
        content = json.loads((partial / "resume.json").read_text())
        (partial / "resume.json").write_text(json.dumps(content | {"library": "0.0"}))
    else:
        (partial / damaged).write_bytes((partial / damaged).read_bytes()[:-3])
    lines: list[str] = []
    folder = prepare(config, report=lines.append)
    assert lines[0].startswith("tokenizer: ")
    assert_same(folder, calm)
