"""Commands for which a product of low-precision operands on the CPU is an error.

    GUARD_FOUND=FILE python -m tests.guard MODULE ARGUMENT ... -- MODULE ARGUMENT ...
    python -m tests.guard --one MODULE ARGUMENT ...

A CPU without bf16 arithmetic computes such products 40 to 100 times slower than in fp32. The caller forces
such a CPU by `NO_BF16`, variables that torch, oneDNN and MKL read. A guard is in every thread of a command,
of the workers of a Ray that it starts, and of the modules of Python that it starts.
"""

import os
import runpy
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster import session
from cluster.process import Child

ROOT = Path(__file__).resolve().parents[1]
NO_BF16 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
LOW = (torch.bfloat16, torch.float16)
FOUND = "GUARD_FOUND"  # variable: the file that says it too, as a command may go on when its child fails
PRODUCTS = (  # parts of the names of torch's operators that multiply matrices
    *("::mm", "::bmm", "::mv", "::dot", "::vdot", "::addmm", "::addbmm", "::baddbmm", "::addmv", "::_addmm"),
    *("::linear", "::matmul", "::_int_mm", "convolution", "attention", "linear_pointwise"),
)


class LowPrecisionProduct(AssertionError):
    """A product of bf16 or fp16 operands on the CPU; the message names operator and caller."""


class Guard(TorchDispatchMode):
    """Raises `LowPrecisionProduct` in the thread that enters it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if any(part in name for part in PRODUCTS):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.dtype in LOW:
                    problem = f"{name} of {leaf.dtype} on the CPU, called by {_caller()}"
                    if FOUND in os.environ:
                        Path(os.environ[FOUND]).write_text(problem)
                    raise LowPrecisionProduct(problem)
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line of our code below the guard."""
    frames = [f for f in traceback.extract_stack() if _is_ours(Path(f.filename))]
    if not frames:
        return "code that is not ours"
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}, {frames[-1].name}"


def _is_ours(file: Path) -> bool:
    rooms = (ROOT / room for room in ("cluster", "optim", "training", "serving"))
    return any(file.is_relative_to(room) for room in rooms)


def watch() -> None:
    """Enter a guard in this thread and in all that this process starts from now on."""
    _watch_threads()
    _watch_children()
    _watch_workers()
    Guard().__enter__()


def _watch_threads() -> None:
    run = threading.Thread.run

    def guarded(thread: threading.Thread) -> None:
        with Guard():
            run(thread)

    threading.Thread.run = guarded  # type: ignore[method-assign]


def _watch_children() -> None:
    start = Child.__init__

    def guarded(child: Child, command: Sequence[str], **options: Any) -> None:
        if list(command[:2]) == [sys.executable, "-m"]:
            command = [sys.executable, "-m", "tests.guard", "--one", *command[2:]]
        start(child, command, **options)

    Child.__init__ = guarded  # type: ignore[method-assign]


def _watch_workers() -> None:
    options = session._options

    def guarded(runtime_env: dict[str, Any]) -> dict[str, Any]:
        return options({**runtime_env, "worker_process_setup_hook": "tests.guard.watch"})

    session._options = guarded


def commands(arguments: list[str]) -> Iterator[list[str]]:
    """The command lines between `--`."""
    command: list[str] = []
    for argument in [*arguments, "--"]:
        if argument != "--":
            command.append(argument)
        elif command:
            yield command
            command = []


def main() -> None:
    """Run the commands one after another, each in a fork of this process, which has imported what is slow."""
    if sys.argv[1] == "--one":
        _become(sys.argv[2:])
        return
    import tests.rank_imports  # noqa: F401
    from optim.bench.command import MATRICES, layers

    MATRICES["step_10m"] = layers(64, 160, 2)  # every contender takes every step, in milliseconds
    found = Path(os.environ[FOUND])
    for command in commands(sys.argv[1:]):
        _run(command)
        if found.exists():
            sys.exit(f"guarded: {command[0]}: {found.read_text()}")


def _become(command: list[str]) -> None:
    sys.argv = command
    watch()
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _run(command: list[str]) -> None:
    print(f"guarded: {' '.join(command)}", flush=True)
    child = os.fork()
    if not child:
        code: object = 1
        try:
            _become(command)
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else int(code is not None))  # to take all down takes 1 s
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"guarded: {command[0]} ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
