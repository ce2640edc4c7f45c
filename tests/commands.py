"""The project's commands as subprocesses, on a model and a corpus small enough for tests."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import PATIENCE_SECONDS

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
    *arguments: object, ranks: int = 0, timeout: float = 4 * PATIENCE_SECONDS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m <arguments>`, or torchrun with `ranks` processes, from the project's root, to its end.

    The process is forked from one that has imported DeepSpeed, as ranks are: that saves 2 s of CPU time.
    """
    from tests.ranks import forkserver

    line = command(*arguments, ranks=ranks)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        variables = {**os.environ, **environment}
        process = forkserver().Process(target=_become, args=(line[2:], variables, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(line, timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(line, process.exitcode, out.read_text(), err.read_text())


def _become(
    line: list[str],
    variables: dict[str, str],
    out: Path,
    err: Path,
    command: Callable[[list[str]], None] | None = None,
) -> None:
    """Run `python -m <line>` in this process, or `command` with its arguments."""
    for number, file in ((1, out), (2, err)):
        with file.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = line
    if command:
        command(line[1:])
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)


@contextmanager
def started(*arguments: object, ranks: int = 0, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The same in the background: a new interpreter in a session of its own, killed when the block ends."""
    with subprocess.Popen(
        command(*arguments, ranks=ranks), cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def command(*arguments: object, ranks: int = 0) -> list[str]:
    """The command line of `python`."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return [*launcher, *map(str, arguments)]
