"""A contender of `serving.peers.races` in its process (`cluster.measure.contender`), and its environment."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli import RunError
from cluster.measure import contender
from cluster.measure.contender import Contender
from cluster.measure.turns import Bystanders

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


@contextmanager
def running(name: str, python: str, *, threads: int, log: Path) -> "Iterator[ContenderProcess]":
    """A contender in its process (`cluster.measure.contender`). Ours sees our code, the peers only theirs."""
    # -P: without it Python would look for the modules of libraries in serving/ first
    command = [python, "-P", str(SCRIPT), name]
    environment = contender.environment(PEERS.get(name, {}), threads=threads, sees_our_code=name == OURS)
    hint = f"bench.python must be the interpreter of an environment that has {name}"
    with contender.running(name, command, environment=environment, log=log, hint=hint) as process:
        yield ContenderProcess(process)


class ContenderProcess:
    """A contender in another process (`serving.peers.contenders`): what is sent to it, and its answers."""

    def __init__(self, process: Contender) -> None:
        self._process = process

    def load(self, model: Path, settings: Mapping[str, Any], *, slots: int) -> dict[str, str]:
        """Make it ready. Returns its description of itself."""
        command = {"do": "load", "model": str(model), "settings": dict(settings), "slots": slots}
        return self._process.ask(command, within_seconds=LOAD_SECONDS)["about"]

    def turn(self, asked: Work, concurrency: int) -> RaceTurn:
        """Its turn. Raises `RunError` if it makes another number of tokens than requested."""
        prompts, num_new = asked
        command = {"do": "run", "prompts": prompts, "num_new": num_new, "concurrency": concurrency}
        bystanders = Bystanders()
        answer = self._process.ask(command, within_seconds=RUN_SECONDS)
        others = bystanders.cores(answer.pop("cpu_seconds"))
        if [len(ids) for ids in answer["tokens"]] != num_new:
            raise RunError(f"{self._process.name} did not make as many tokens as it was asked for")
        return RaceTurn(**answer, others_cores=others)
