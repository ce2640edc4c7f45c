"""A contender of a race in a process of its own: it is stopped between its turns, and ends with the race."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli import RunError
from cluster.measure.turns import Bystanders
from cluster.process import Child
from cluster.session import ROOT, worker_environment

SCRIPT = Path(__file__).with_name("contenders.py")
PEERS = {  # peer -> environment variables that it needs
    "transformers": {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    "vllm": {
        # By default its engine has a process of its own, which polls. On two cores that costs a quarter to
        # two fifths of the speed: 55, 400 and 790 tokens/s at batch 1, 8 and 32, against 96, 608 and 1073
        # with 0 (measured one after the other, not in turns).
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default it keeps a core for itself
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    },
}
OURS = "ours"

LOAD_SECONDS = 900.0  # vLLM compiles for a minute or two
RUN_SECONDS = 600.0
STOP_SECONDS = 10.0
END_SECONDS = 60.0
LOG_LINES = 12

Times = Sequence[Sequence[float]]  # of each request: seconds at which its new tokens arrived
Work = tuple[list[list[int]], list[int]]  # prompts, and how many new tokens each is to get


@dataclass(frozen=True)
class RaceTurn:
    """What a contender answered.

    Attributes:
        times: of each request, when its new tokens arrived (`serving.peers.contenders`), seconds.
        tokens: of each request, their ids.
        others_cores: cores that all other processes kept busy during the turn, on average.
    """

    times: Times
    tokens: list[list[int]]
    others_cores: float


def environment_of(name: str, *, threads: int) -> dict[str, str]:
    """The environment of a contender's process, without GPUs. Ours sees our code, the peers only theirs."""
    own = {"PYTHONPATH": str(ROOT)} if name == OURS else PEERS[name]
    own = {"CUDA_VISIBLE_DEVICES": "", **own}
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **worker_environment(gpu=False, threads=threads), **own}


@contextmanager
def running(name: str, python: str, *, threads: int, log: Path) -> "Iterator[ContenderProcess]":
    """A contender in a process group of its own, stopped between its turns; it ends with the block."""
    with log.open("wb") as stream:
        # -P: without it Python would look for the modules of libraries in serving/ first
        child = Child(
            [python, "-P", str(SCRIPT), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=environment_of(name, threads=threads),
        )
    try:
        yield ContenderProcess(name, child, log)
    finally:
        child.send_signal(signal.SIGCONT)
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # then it ends, and its own children with it
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        child.end()
        child.stdout.close()


class ContenderProcess:
    """A contender in another process (`serving.peers.contenders`): what is sent to it, and its answers."""

    def __init__(self, name: str, child: Child, log: Path) -> None:
        self._name, self._child, self._log = name, child, log

    def load(self, model: Path, settings: Mapping[str, Any], *, slots: int) -> dict[str, str]:
        """Make it ready. Returns its description of itself."""
        command = {"do": "load", "model": str(model), "settings": dict(settings), "slots": slots}
        return self._ask(command, within_seconds=LOAD_SECONDS)["about"]

    def turn(self, asked: Work, concurrency: int) -> RaceTurn:
        """Its turn. Raises `RunError` if it makes another number of tokens than requested."""
        prompts, num_new = asked
        command = {"do": "run", "prompts": prompts, "num_new": num_new, "concurrency": concurrency}
        bystanders = Bystanders()
        answer = self._ask(command, within_seconds=RUN_SECONDS)
        others = bystanders.cores(answer.pop("cpu_seconds"))
        if [len(ids) for ids in answer["tokens"]] != num_new:
            raise RunError(f"{self._name} did not make as many tokens as it was asked for")
        return RaceTurn(**answer, others_cores=others)

    def _ask(self, command: Mapping[str, Any], *, within_seconds: float) -> dict[str, Any]:
        """Continue the process group, send the command, wait for the line of its answer, stop the group."""
        assert self._child.stdin is not None
        try:
            self._child.send_signal(signal.SIGCONT)
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
            line = self._line(time.monotonic() + within_seconds)
        except BrokenPipeError:
            line = b""
        if line is None or not line.endswith(b"\n"):
            raise self._failure(command["do"], within_seconds, ends=line is not None)
        self._child.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def _line(self, deadline: float) -> bytes | None:
        """What it writes until a line or its output ends. None: the deadline has passed."""
        assert self._child.stdout is not None
        output, parts = self._child.stdout.fileno(), [b""]
        while not parts[-1].endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            parts.append(os.read(output, 1 << 20))
            if not parts[-1]:
                break
        return b"".join(parts)

    def _failure(self, what: str, within_seconds: float, *, ends: bool) -> RunError:
        """`ends`: it has closed its output, so it is about to end, however slow the machine."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(END_SECONDS if ends else 0.0)
        code = self._child.returncode
        how = f"gave no answer in {within_seconds:.0f} s" if code is None else f"ended with exit code {code}"
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        if f"No module named '{self._name}'" in tail:
            tail += f"\nbench.python must be the interpreter of an environment that has {self._name}"
        return RunError(f"{self._name} {how} at {what!r}; its log ends:\n{tail}")
