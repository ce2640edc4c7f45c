"""The GPU kit: checks and measurements of everything that needs a GPU, block by block, in minutes.

    python -m tests.gpu [--blocks 1,2,...] [--out FOLDER] [--device cpu] [--limit-seconds N]

Each block runs in a process of its own, so a crash, a CUDA error or a hang ends that block alone. The result
is one file, <card>_gpu.json, written anew after every row: what ran counts when a later block fails or this
process is killed. `--device cpu` rehearses the same code on small sizes. tests/gpu/README.md says how to use
a GPU that is lent for fifteen minutes.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster.cli import RunError, UserError
from cluster.machine.host import describe_host
from cluster.process import Child
from cluster.record import provenance
from cluster.session import ROOT, set_defaults, worker_environment

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "transformers", "tokenizers", "safetensors")
LIMIT_SECONDS = 570.0  # of all blocks: a command on a lent machine ends after 600
SLOWER = 20  # a rehearsal may take so many times a block's limit: its machine may be busy, and costs nothing
POLL_SECONDS = 0.25
LOG_LINES = 25  # of a failed block's output that the result keeps
UNKNOWN = "unknown gpu"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """A block: its modules' `measure` one after the other, in one process.

    Attributes:
        limit_seconds: after which it is ended: about twice what it takes on an H200.
        rehearsal: environment variables of its process on a CPU.
    """

    what: str
    modules: tuple[str, ...]
    limit_seconds: float
    rehearsal: Mapping[str, str] = field(default_factory=dict)


def _block(what: str, *modules: str, limit: float, **rehearsal: str) -> Block:
    return Block(what, tuple(f"tests.gpu.{name}" for name in modules), limit, rehearsal)


BLOCKS = {
    1: _block("versions, ceilings, attention backends", "ceilings", limit=45),
    2: _block("kernels, and replay of graphs", "kernels", "paged", "replay", limit=80, TRITON_INTERPRET="1"),
    3: _block("training steps of 1.4B, ZeRO-1", "train_step", limit=130),
    4: _block("the optimizer step against torch.optim.Muon", "optimizer", limit=45),
    5: _block("forward and backward", "sweep", limit=90),
    6: _block("decoding and prefilling", "decoding", limit=60),
    7: _block("where the time of a decoding step goes", "profiles", limit=45),
    8: _block("each technique off in turn", "ablation", limit=90),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`); 1 when a block failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", metavar="N,N", help=f"of {', '.join(map(str, BLOCKS))}; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: tests/baselines, or outputs in a rehearsal"
    )
    parser.add_argument(
        "--limit-seconds", type=float, default=LIMIT_SECONDS, metavar="N", help="of all blocks together"
    )
    parser.add_argument("--child", nargs=2, metavar=("MODULES", "ROWS"), help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.child:
            modules, rows = options.child
            be_a_block(modules.split(","), Path(rows), device=options.device, ceilings=options.ceilings)
            return
        with cli.sigterm_as_interrupt():
            run(
                choose(options.blocks), device=options.device, folder=options.out,
                limit_seconds=options.limit_seconds,
            )  # fmt: skip

    return cli.run(body)


def choose(given: str | None) -> list[int]:
    """The blocks to run, in order. Raises `UserError`."""
    asked = given.split(",") if given else [str(number) for number in BLOCKS]
    known = {str(number): number for number in BLOCKS}
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--blocks: {unknown[0]!r} is not one of: {', '.join(known)}")
    return sorted({known[name] for name in asked})


# --- the parent ---------------------------------------------------------------------------------------------


def run(numbers: Sequence[int], *, device: str, folder: Path | None, limit_seconds: float) -> None:
    """Run the blocks, write the result, print tables. Raises `RunError`: a block failed."""
    host = describe_host()
    card = card_of(host, device)
    file = output_file(card, folder, device)
    result = begin(card, file, host)
    ends = time.monotonic() + limit_seconds

    for number in numbers:
        block = BLOCKS[number]
        print(f"\nblock {number}: {block.what}", flush=True)
        entry = result["blocks"].setdefault(str(number), {})
        entry.clear()
        entry |= {"what": block.what, "ok": False, "problem": "was still running when this was written"}
        entry |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), **provenance.code_version()}
        entry |= {"packages": provenance.versions(PACKAGES), "seconds": 0.0, "rows": []}
        patience = block.limit_seconds * (1 if device == "cuda" else SLOWER)
        limit = min(patience, ends - time.monotonic())
        write = partial(files.write_json, file, result)
        write()
        run_block(block, device=device, ceilings=ceilings_of(result), limit=limit, entry=entry, changed=write)
        write()
        print(table(entry["rows"]))
        verdict = "ok" if entry["ok"] else f"FAILED: {entry['problem']}"
        print(f"block {number}: {entry['seconds']:.1f} s, {verdict}", flush=True)

    print(f"\nwritten to {file}")
    for number in numbers:
        for row in result["blocks"][str(number)]["rows"]:
            if "fault" in row:
                print(f"fault of a ceiling, block {number}, {row['case']}: {row['fault']}")
    failed = [number for number in numbers if not result["blocks"][str(number)]["ok"]]
    print(json.dumps({"output": str(file), "blocks": list(numbers), "failed": failed}), flush=True)
    if failed:
        raise RunError(f"failed blocks: {', '.join(map(str, failed))}; {file} says why, and has the others")


def card_of(host: Mapping[str, Any], device: str) -> str:
    """The name of the result: the GPU's, by NVML. This process starts no CUDA, which takes memory."""
    if device == "cpu":
        return "rehearsal"
    return host["gpus"][0] if host["gpus"] else UNKNOWN


def output_file(card: str, folder: Path | None, device: str) -> Path:
    """<folder>/<card>_gpu.json; the folder is made. A rehearsal is no baseline. Raises `UserError`."""
    if card == UNKNOWN and folder is None:
        raise UserError("NVML names no GPU here; use --device cpu to rehearse, or --out to try all the same")
    folder = folder or ROOT / ("outputs" if device == "cpu" else "tests/baselines")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{files.slug(card)}_gpu.json"


def begin(card: str, file: Path, host: Mapping[str, Any]) -> dict[str, Any]:
    """The result so far: of `file`, or of the committed file of this card, whose other blocks are kept."""
    result: dict[str, Any] = {"bench": "gpu", "card": card, "host": dict(host), "blocks": {}}
    for earlier in (file, ROOT / "tests" / "baselines" / file.name):
        if earlier.is_file() and (found := files.read_json(earlier)).get("card") == card:
            result["blocks"] = found["blocks"]
            break
    return result


def ceilings_of(result: Mapping[str, Any]) -> dict[str, float]:
    """What block 1 measured, by name (`tests.gpu.block.Run.ceilings`)."""
    rows = result["blocks"].get("1", {}).get("rows", [])
    return {row["ceiling"]: row[row["ceiling"]] for row in rows if "ceiling" in row}


def run_block(
    block: Block, *, device: str, ceilings: Mapping[str, float], limit: float, entry: dict[str, Any],
    changed: Callable[[], None],
) -> None:  # fmt: skip
    """Run a block in a process of its own. Fills `entry`: "rows" as they come, "seconds", "ok", "problem"."""
    if limit < 1:
        entry["problem"] = "not run: no time was left"
        return
    environment = {**os.environ, **(block.rehearsal if device == "cpu" else {})}
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "tests.gpu", "--device", device, "--ceilings", json.dumps(ceilings)]
        command += ["--child", ",".join(block.modules), str(rows)]
        started = time.monotonic()
        with (
            log.open("w") as output,
            Child(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):  # fmt: skip
            while process.poll() is None and (taken := time.monotonic() - started) < limit:
                time.sleep(POLL_SECONDS)
                if len(found := read_rows(rows)) > len(entry["rows"]):
                    entry |= {"rows": found, "seconds": taken}
                    changed()
            code = process.poll()
        entry |= {"rows": read_rows(rows), "seconds": time.monotonic() - started}
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    problem = end_of(code, lines, limit) or problem_of(entry["rows"])
    entry |= {"ok": problem is None, "problem": problem}
    if problem is not None:
        entry["log"] = lines[-LOG_LINES:]
        print("\n".join(entry["log"]), file=sys.stderr)


def end_of(code: int | None, lines: Sequence[str], limit: float) -> str | None:
    """Why a process did not end by itself and well; None where it did."""
    if code is None:
        return f"did not end within {limit:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}: {lines[-1] if lines else 'no message'}"
    return f"exit code {code}: {lines[-1] if lines else 'no message'}" if code else None


def problem_of(rows: Rows) -> str | None:
    """What the rows say is wrong; None if nothing is."""
    wrong = [f"{row['case']}: {row['problem']}" for row in rows if "problem" in row]
    return "; ".join(wrong) or None if rows else "no rows"


def read_rows(file: Path) -> Rows:
    """The whole lines of the file, which its writer may not have finished."""
    if not file.is_file():
        return []
    whole, _, _ = file.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def table(rows: Rows) -> str:
    """The rows for people: neighbours with the same figures stand below one another."""
    lines = []
    for keys, together in groupby(rows, key=tuple):
        cells = [list(keys)] + [[_cell(row[key]) for key in keys] for row in together]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            first, *others = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(["  " + first, *others]).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


# --- the child ----------------------------------------------------------------------------------------------


def be_a_block(modules: Sequence[str], rows: Path, *, device: str, ceilings: Mapping[str, float]) -> None:
    """Run the modules one after the other; each one's rows go to the file. Raises what they raise."""
    set_defaults(worker_environment(gpu=device == "cuda", threads=1))
    import torch

    from tests.gpu.block import Run

    if device == "cuda":
        if not torch.cuda.is_available():
            raise RunError(f"torch {torch.__version__} finds no CUDA device; --device cpu rehearses")
        torch.cuda.init()  # statistics of memory cannot be reset before
    with rows.open("w") as stream:
        given = Run(torch.device(device), stream, ceilings)
        given.attempt(*(importlib.import_module(name).measure for name in modules))
