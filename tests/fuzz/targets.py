"""What reads files of users: for each kind of file some good ones, and a call that reads a damaged one."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import zstandard
from pyarrow import parquet
from safetensors.torch import save

from cluster import cli
from cluster.files import sha256_of
from cluster.laptop import inventory
from cluster.parity.baseline_file import read_side
from cluster.record import lineage, origins
from serving.bench import config as bench_config
from serving.bench.inputs import from_trace, read_conversations
from tests.commands import ROOT
from tests.training.data.small_corpus import silent, texts, visible
from training import config as training_config
from training.data.config import DataConfig
from training.data.dataset import MANIFEST_FILE, Manifest, TokenDataset
from training.data.prepare import prepare
from training.data.tokenizer import train_tokenizer
from training.model import shapes
from training.plan import make_plan
from training.run.checkpoint import FORMAT_VERSION, Checkpoint, newest_sound
from training.study import config as study_config

Read = Callable[[Path, bytes], None]


@dataclass(frozen=True)
class Target:
    """A kind of file: good examples, and what reads `content` below an empty folder."""

    good: Callable[[], list[bytes]]
    read: Read


def outcome(target: Target, folder: Path, content: bytes) -> tuple[int, str]:
    """Exit code and standard error of a command that reads the file."""
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        code = cli.run(lambda: target.read(folder, content))
    return code, errors.getvalue()


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _yaml(pattern: str) -> Callable[[], list[bytes]]:
    return lambda: [path.read_bytes() for path in sorted(ROOT.glob(pattern))]


# --- configuration ------------------------------------------------------------------------------------


def _training(folder: Path, content: bytes) -> None:
    make_plan(training_config.load(file=_file(folder, "a.yaml", content)))


def _dotlist(_folder: Path, content: bytes) -> None:
    words = content.decode(errors="surrogateescape").split("\n")
    training_config.load(dotlist=words, settle=False)


def _study(folder: Path, content: bytes) -> None:
    study_config.load(file=_file(folder, "a.yaml", content))


def _bench(folder: Path, content: bytes) -> None:
    bench_config.load(file=_file(folder, "a.yaml", content))


def _inventory(folder: Path, content: bytes) -> None:
    _file(folder, "site.inventory.yaml", content)
    try:
        inventory.load(folder / "site.yaml")
    except BaseException:
        assert not (folder / "site.yaml").exists(), "half-written"
        raise


# --- corpora ------------------------------------------------------------------------------------------


def _prepared(folder: Path, **keys: Any) -> Path:
    """Prepare, and assert that what is left behind is a whole folder or nothing."""
    data = folder / "data"
    config = DataConfig(directory=str(data), vocab_size=300, validation_fraction=0.2, **keys)
    try:
        made = prepare(config, report=silent)
    except BaseException:
        left = visible(data) if data.exists() else []
        assert left == [], f"half-written: {left}"
        raise
    Manifest.read(made).verify(made)
    return made


def _corpus(name: str, pack: Callable[[bytes], bytes] = bytes) -> Read:
    def read(folder: Path, content: bytes) -> None:
        _prepared(folder, source=str(_file(folder, name, pack(content))))

    return read


def _lines() -> list[bytes]:
    good = [json.dumps({"text": text, "id": 3, "meta": {"a": [1.5, None]}}) for text in texts(30, words=12)]
    return ["\n".join(good).encode(), f"[{','.join(good)}]".encode()]


def _text() -> list[bytes]:
    return ["\n".join(texts(30, words=12)).encode()]


def _table() -> list[bytes]:
    stream = io.BytesIO()
    table = pa.table({"text": texts(30, words=12), "n": range(30)})
    parquet.write_table(table, stream, row_group_size=11)
    return [stream.getvalue()]


def _tokenizer(folder: Path, content: bytes) -> None:
    source = _file(folder, "a.jsonl", _lines()[0])
    _prepared(folder, source=str(source), tokenizer=str(_file(folder, "tokenizer.json", content)))


def _tokenizers() -> list[bytes]:
    tokenizer = train_tokenizer(texts(30), vocab_size=280)
    tokenizer.add_special_tokens(["<s>"])
    content = json.loads(tokenizer.to_str())
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [280], "tokens": ["<s>"]}}
    post = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
    return [json.dumps(content).encode(), json.dumps(content | {"post_processor": post}).encode()]


def _manifest(folder: Path, content: bytes) -> None:
    (folder / "train-00000.bin").write_bytes(np.zeros(500, "<u2").tobytes())
    _file(folder, MANIFEST_FILE, content)
    TokenDataset.open(folder, split="train", sequence_length=16).samples([0])


def _manifests() -> list[bytes]:
    split = {
        "documents": 1,
        "text_bytes": 9,
        "shards": [{"file": "train-00000.bin", "tokens": 500, "sha256": ""}],
    }
    source = {
        "name": "a",
        "weight": 1.0,
        "train_shards": 1,
        "validation_shards": 1,
        "fingerprint": "",
        "folder": "",
    }
    content = {
        "version": 2, "request": "", "source": "", "text_sha256": "", "tokenizer_file": "tokenizer.json",
        "tokenizer_sha256": "", "vocab_size": 300, "end_of_text_id": 0, "dtype": "uint16", "train": split,
        "validation": split, "skipped_records": 0, "skipped_first": ["x"], "sources": [source],
    }  # fmt: skip
    return [json.dumps(content).encode()]


# --- checkpoints, traces, results ---------------------------------------------------------------------


def _shard() -> bytes:
    return save({"w|master|0": torch.zeros(4)})


def _states() -> list[bytes]:
    shard = {"bytes": len(_shard()), "sha256": hashlib.sha256(_shard()).hexdigest()}
    inputs = [origins.origin("run", "r", inputs=[origins.origin("dataset", "d")])]
    about = {"lineage": {"commit": None, "inputs": inputs}, "identity": {"seed": 1}}
    return [json.dumps({"format": FORMAT_VERSION, "step": 5, "files": {"rank-0": shard}, **about}).encode()]


def _checkpoint(folder: Path, content: bytes, *, shard: bytes | None = None) -> None:
    """Its state.json is what COMPLETE says: what was damaged before it was written, or by somebody."""
    path = folder / "step-0000005"
    _file(path, "rank-0", _shard() if shard is None else shard)
    _file(path, "COMPLETE", sha256_of(_file(path, "state.json", content)).encode())
    if newest := newest_sound(folder, report=silent):
        Checkpoint(newest).read("w", "master", 0, 4)


def _shape(folder: Path, content: bytes) -> None:
    _file(folder, "config.json", content)
    make_plan(training_config.load(dotlist=[f"model.shape={folder}"]))


def _shapes() -> list[bytes]:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    about = shapes.to_hf_config(shapes.resolve("llama-5m"), dtype="float32", eos_id=0, bos_id=None)
    theta = about.pop("rope_parameters")["rope_theta"]
    return [json.dumps(about | {"rope_theta": theta, "rope_scaling": each}).encode() for each in (None, rope)]


def _trace(folder: Path, content: bytes) -> None:
    from_trace(_file(folder, "a.jsonl", content), vocab_size=100, context_tokens=4096, seed=0)


def _traces() -> list[bytes]:
    row = {"at_seconds": 0.5, "prompt_tokens": 3, "output_tokens": 2}
    mooncake = {"timestamp": 300, "input_length": 3, "output_length": 2, "hash_ids": [0, 1]}
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,37,4\n"
    ours = "\n".join(json.dumps(row | {"at_seconds": at}) for at in range(5))
    return [ours.encode(), json.dumps(mooncake).encode(), azure.encode()]


def _conversations(folder: Path, content: bytes) -> None:
    file = _file(folder, "a.jsonl", content)
    read_conversations(file, count_tokens=lambda text: len(text.encode()), context_tokens=4096, turns="all")


def _chats() -> list[bytes]:
    turns = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}
    lines = f"{json.dumps(turns)}\n{json.dumps({'prompt': 'a', 'completion': 'b'})}\n"
    return [lines.encode(), json.dumps([turns, {"conversations": []}]).encode()]


def _lineage(folder: Path, content: bytes) -> None:
    lineage.describe(lineage.find(str(_file(folder, "provenance.json", content).parent)))
    lineage.describe(lineage.find(str(_file(folder, "result.json", content))))


def _lineages() -> list[bytes]:
    inputs = [origins.origin("dataset", "d", path=Path("data/d"), fingerprint="0" * 64)]
    about = {"commit": "0" * 40, "dirty": False, "time": "2026-01-01", "inputs": inputs, "earlier_starts": []}
    return [json.dumps({**about, "provenance": about}).encode()]


def _side(folder: Path, content: bytes) -> None:
    read_side(str(_file(folder, "a_baseline.json", content)))


def _baselines() -> list[bytes]:
    return [(ROOT / "tests/baselines/amd-epyc-2-cores_baseline.json").read_bytes()]


def _damaged_shard(folder: Path, content: bytes) -> None:
    _checkpoint(folder, _states()[0], shard=content)


TARGETS = {
    "training configuration": Target(_yaml("training/configs/[alo]*.yaml"), _training),
    "key=value": Target(lambda: [b"batch.tokens=4096\noptim.matrix.lr=0.02\ndata.sources=[a=x@2]"], _dotlist),
    "study": Target(_yaml("training/configs/study*.yaml"), _study),
    "serving configuration": Target(lambda: [b"load:\n  requests: 10\nslo:\n  ttft_ms: 100\n"], _bench),
    "inventory": Target(_yaml("cluster/*.inventory.yaml"), _inventory),
    "jsonl": Target(lambda: _lines()[:1], _corpus("a.jsonl")),
    "json": Target(_lines, _corpus("a.json")),
    "txt": Target(_text, _corpus("a.txt")),
    "parquet": Target(_table, _corpus("a.parquet")),
    "gz": Target(lambda: [gzip.compress(each, mtime=0) for each in _lines()[:1]], _corpus("a.jsonl.gz")),
    "bz2": Target(lambda: [bz2.compress(each) for each in _text()], _corpus("a.txt.bz2")),
    "xz": Target(lambda: [lzma.compress(each) for each in _lines()[1:]], _corpus("a.json.xz")),
    "zst": Target(lambda: [zstandard.compress(each) for each in _text()], _corpus("a.txt.zst")),
    "tokenizer": Target(_tokenizers, _tokenizer),
    "manifest": Target(_manifests, _manifest),
    "checkpoint": Target(_states, _checkpoint),
    "shard": Target(lambda: [_shard()], _damaged_shard),
    "model shape": Target(_shapes, _shape),
    "trace": Target(_traces, _trace),
    "conversations": Target(_chats, _conversations),
    "lineage": Target(_lineages, _lineage),
    "baseline": Target(_baselines, _side),
}
