"""A shard's bytes are those of safetensors, in pieces that are counted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cluster import files
from training.run.state import shard


def test_its_bytes_are_those_of_safetensors_and_each_piece_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "PIECE_BYTES", 64)
    tensors = {
        "b|momentum|0": torch.randn(50).bfloat16(),
        "é|master|0": torch.randn(100)[::2],
        "a|master|7": torch.randn(3),
        "c|master|0": torch.zeros(0),
    }
    pieces: list[int] = []
    sha256 = shard.write(tmp_path / "file", tensors, moved=pieces.append)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert (tmp_path / "file").read_bytes() == content
    assert sha256 == files.sha256_of(tmp_path / "file")
    assert sum(pieces) == len(content) and max(pieces[1:]) == 64
