"""The project's commands as subprocesses, on a model and a corpus small enough for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A model of about 0.1M parameters on a corpus of repeated sentences: a step takes milliseconds.
TINY = {
    "data.vocab_size": 320,
    "data.validation_fraction": 0.2,
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_size": 128,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.vocab_size": 320,
    "batch.tokens": 512,
    "batch.sequence_length": 32,
    "batch.micro_sequences": 2,
    "schedule.tokens": 512 * 8,
    "checkpoint.every_steps": 3,
    "evaluation.every_steps": 4,
    "evaluation.sequences": 5,
    "evaluation.sample_tokens": 4,
    "record.wandb": "disabled",
    "launcher": "torch",
    "workers.count": 1,
}


def write_corpus(folder: Path) -> Path:
    """A .jsonl corpus of 200 short documents."""
    file = folder / "corpus.jsonl"
    lines = (
        f'{{"text": "Document {i}: the quick brown fox number {i % 7} jumps over {i % 11} lazy dogs. '
        f'It then rests for {i % 5} hours, and returns to the {i % 3} hills."}}'
        for i in range(200)
    )
    file.write_text("\n".join(lines) + "\n")
    return file


def tiny(folder: Path, **changes: object) -> list[str]:
    """Arguments of a tiny run under `folder`; keyword `a__b=c` sets the key a.b."""
    keys = {
        **TINY,
        "run.directory": folder / "outputs",
        "data.directory": folder / "data",
        "data.source": folder / "corpus.jsonl",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in keys.items()
    ]


def python(
    *arguments: object, ranks: int = 0, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python -m <arguments>`, or torchrun with `ranks` processes, from the project's root."""
    return subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def command(*arguments: object, ranks: int = 0) -> list[str]:
    """The command line of `python`."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, *map(str, arguments)]
