"""Our engine against transformers and vLLM: the same requests, the same weights and threads, in turns.

Each contender is a process of its own (`serving.peers.contenders`), so that peers can live in other
environments. While one has its turn the others are stopped: some wait by polling, and would take a core.
`serving.bench` runs the race and reports it.
"""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import RunError, UserError, sigterm_as_interrupt
from cluster.measure import benchmark
from cluster.measure.turns import DISTURBING_CORES, Bystanders, quietest, turns
from cluster.process import Child
from cluster.session import ROOT, worker_environment
from training.model.shapes import LlamaShape, resolve, to_hf_config

SCRIPT = Path(__file__).with_name("contenders.py")
DTYPE = "bfloat16"
TINY = LlamaShape(  # 100M parameters: as large as two CPU cores serve with some pleasure
    vocab_size=32_000,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=2048,
    tied=True,
)

PEERS = {  # peer -> environment variables that it needs
    "transformers": {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    "vllm": {
        # Its engine in a process of its own, as by default, polls: on two cores that costs a quarter to two
        # fifths of the speed (batch 1, 8, 32: 55, 400 and 790 tokens/s; so 96, 608 and 1073. Not in turns).
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default it keeps a core for itself
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    },
}
OURS = "ours"

WARM_UP_ROUNDS = 1  # compilers, allocations
LEAST_AGREEMENT = 0.8  # of first tokens; bf16 in another order makes 0.9 to 1, other weights 0.2 at the most
LOAD_SECONDS = 900.0  # vLLM compiles: a minute or two
RUN_SECONDS = 600.0
STOP_SECONDS = 10.0
LOG_LINES = 12


@dataclass(frozen=True)
class Case:
    """Requests to answer, `concurrency` at once. Lengths are drawn evenly from least to most.

    Attributes:
        measured: "decode" (`decode_rate`), "prefill" (`prefill_rate`) or "requests" (`request_rate`).
    """

    what: str
    num_requests: int
    concurrency: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]
    measured: str

    def rate(self, times: "Times", prompts: Sequence[Sequence[int]]) -> float:
        """Tokens per second: of the prompts in "prefill", else new ones."""
        if self.measured == "prefill":
            return prefill_rate(times, sum(map(len, prompts)))
        return decode_rate(times) if self.measured == "decode" else request_rate(times)


def decode_case(batch: int, *, prompt_tokens: int = 64, new_tokens: int = 128) -> Case:
    """A batch of equal requests that decode together."""
    what = f"decoding, batch {batch}, prompts of {prompt_tokens}, {new_tokens} new tokens"
    return Case(what, batch, batch, (prompt_tokens,) * 2, (new_tokens,) * 2, "decode")


CASES = {
    "decode_b1": decode_case(1),
    "decode_b8": decode_case(8),
    "decode_b32": decode_case(32),
    "requests_c16": Case(
        "whole requests, 16 at once, prompts of 64 to 512, 48 to 80 new tokens",
        48,
        16,
        (64, 512),
        (48, 80),
        "requests",
    ),
    "prefill_b4": Case("prefilling, batch 4, prompts of 512", 4, 4, (512, 512), (1, 1), "prefill"),
}

Times = Sequence[Sequence[float]]  # of each request: seconds at which its new tokens were there
Work = tuple[list[list[int]], list[int]]  # prompts, and how many new tokens each is to get


# --- what is asked, and what is made of the answers -------------------------------------------------------


def work(name: str, case: Case, *, vocab_size: int, round_number: int) -> Work:
    """The requests of a round: lengths by the case alone, ids new in each round, lest a cache have them."""
    lengths, ids = random.Random(name), random.Random(f"{name} {round_number}")
    sizes = [lengths.randint(*case.prompt_tokens) for _ in range(case.num_requests)]
    num_new = [lengths.randint(*case.new_tokens) for _ in range(case.num_requests)]
    return [[ids.randrange(vocab_size) for _ in range(size)] for size in sizes], num_new


def decode_rate(times: Times) -> float:
    """New tokens per second while all requests decode, and none waits for its prompt.

    The window opens when the last request gets its first token and closes when the first request gets its
    last; the tokens that come in it are divided by its length. Where prompts go through the model at once,
    as in transformers, that is (N - 1)·B tokens. An engine that mixes prompts into its steps has given the
    early requests some tokens by then, and gives the late ones some more in a smaller batch: neither counts.
    """
    opens, closes = max(at[0] for at in times), min(at[-1] for at in times)
    if not opens < closes:
        raise RunError("a request ended before the last one began: use longer answers or a smaller batch")
    return sum(opens < t <= closes for at in times for t in at) / (closes - opens)


def request_rate(times: Times) -> float:
    """New tokens per second of all requests, from the first one's arrival to the last token: prompts too."""
    return sum(map(len, times)) / max(at[-1] for at in times)


def prefill_rate(times: Times, num_tokens: int) -> float:
    """Prompt tokens per second until every request has its first token."""
    return num_tokens / max(at[0] for at in times)


@dataclass(frozen=True)
class Turn:
    """What a contender answered.

    Attributes:
        times: of each request, when its new tokens were there (`serving.peers.contenders`), seconds.
        tokens: of each request, their ids.
        others_cores: how many cores everything else on this machine kept busy meanwhile, on average.
    """

    times: Times
    tokens: list[list[int]]
    others_cores: float


@dataclass
class Race:
    """What was measured.

    Attributes:
        rates: case -> contender -> tokens per second (`Case.rate`), one per round.
        first_tokens: contender -> the first new token of every request, in order.
        others_cores: contender -> `Turn.others_cores`, of every turn.
        about: contender -> what it is and how it is set up.
        load_seconds: contender -> from the start of its process to the end of `load`.
    """

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)
    others_cores: dict[str, list[float]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, case_name: str, contender: str, rate: float, turn: Turn) -> None:
        self.rates.setdefault(case_name, {}).setdefault(contender, []).append(rate)
        self.first_tokens.setdefault(contender, []).extend(ids[0] for ids in turn.tokens)
        self.others_cores.setdefault(contender, []).append(turn.others_cores)

    def agreement(self, peer: str) -> float:
        """The share of requests whose first new token is that of ours."""
        pairs = list(zip(self.first_tokens[OURS], self.first_tokens[peer], strict=True))
        return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def race_result(race: Race) -> dict[str, Any]:
    """Medians with spreads over the rounds: tokens/s of each contender, and each peer's time over ours.

    Raises:
        RunError: a peer's first tokens are not those of ours, so that it does other work.
    """
    samples: dict[str, list[float]] = {}
    peers = [name for name in race.first_tokens if name != OURS]
    for case, rates in race.rates.items():
        samples |= {f"tokens_per_second_{name}_{case}": values for name, values in rates.items()}
        seconds = {name: [1 / rate for rate in values] for name, values in rates.items()}
        samples |= {
            f"speedup_{peer}_{case}": benchmark.ratios(seconds[peer], seconds[OURS]) for peer in peers
        }
    agreements = {peer: race.agreement(peer) for peer in peers}
    for peer, agreement in agreements.items():
        if agreement < LEAST_AGREEMENT:
            raise RunError(
                f"{agreement:.0%} of the first tokens of {peer} are those of ours, less than "
                f"{LEAST_AGREEMENT:.0%}: they do not do the same work, so their times say nothing"
            )
    return {
        **benchmark.medians(samples),
        **benchmark.medians({f"others_cores_{name}": values for name, values in race.others_cores.items()}),
        **{f"first_token_agreement_{peer}": agreement for peer, agreement in agreements.items()},
        "contenders": race.about,
        "load_seconds": race.load_seconds,
    }


# --- the race ---------------------------------------------------------------------------------------------


def race(
    peers: Mapping[str, str],
    *,
    num_rounds: int,
    threads: int,
    report: Callable[[str], None],
    cases: Mapping[str, Case] = CASES,
    model: Path | None = None,
    shape: LlamaShape = TINY,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run it. See `race_result` for what is returned.

    Args:
        peers: name in PEERS -> the Python interpreter that has it.
        threads: compute threads of each contender.
        report: told, one line at a time, how far it is.
        model: a Hugging Face directory; without it, random weights in `shape`, as in a bf16 checkpoint.
        settings: contender -> keys of `serving.config` for "ours", of from_pretrained or of vllm.EngineArgs.

    Raises:
        UserError: an interpreter that does not exist, or an unknown peer.
        RunError: a contender failed or does other work; the message ends with the last lines of its log.
    """
    pythons = {OURS: sys.executable, **peers}
    for name, python in peers.items():
        if name not in PEERS:
            raise UserError(f"bench.compare: {name!r} is not one of: {', '.join(PEERS)}")
        if shutil.which(python) is None:
            raise UserError(f"bench.python: {python} is no program; give the interpreter that has {name}")
    slots = max(case.concurrency for case in cases.values())
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_interrupt())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="race-")))
        if model is None:
            model = folder / "model"
            write_random_model(model, shape, seed=0)
        vocab_size = resolve(model).vocab_size
        best = {"dtype": best_dtype()}
        given: dict[str, dict[str, Any]] = {
            OURS: {"engine.device": "cpu", "engine.threads": threads},
            "transformers": best,
            "vllm": best,
        }
        found, contenders = Race(), {}
        for name, python in pythons.items():
            started = time.monotonic()
            contender = stack.enter_context(running(name, python, threads=threads, log=folder / name))
            options = given.get(name, {}) | dict((settings or {}).get(name, {}))
            answer = contender.load(model, options, slots=slots)
            found.about[name], found.load_seconds[name] = answer, time.monotonic() - started
            report(f"{name} is ready after {found.load_seconds[name]:.0f} s: {_listed(answer)}")
            contenders[name] = contender
        for number in range(-WARM_UP_ROUNDS, num_rounds):
            for case_name, case in cases.items():
                asked = work(case_name, case, vocab_size=vocab_size, round_number=number)
                for name in turns(list(contenders), number):
                    turn = quietest(partial(contenders[name].turn, asked, case.concurrency))
                    rate = case.rate(turn.times, asked[0])
                    which = f"round {number + 1}/{num_rounds}" if number >= 0 else "warming up"
                    others = f", while others used {turn.others_cores:.2f} cores"
                    report(
                        f"{which}, {case_name}, {name}: {rate:.0f} tokens/s"
                        + others * (turn.others_cores > DISTURBING_CORES)
                    )
                    if number >= 0:
                        found.add(case_name, name, rate, turn)
    return race_result(found)


def best_dtype() -> str:
    """What the peers compute in on this CPU: bfloat16, or float32 where it would be slower."""
    import torch

    from optim.precision import compute_dtype

    return str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")


def _listed(about: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


def write_random_model(folder: Path, shape: LlamaShape, *, seed: int) -> None:
    """A Hugging Face directory without a tokenizer: config.json and bf16 weights as training begins with."""
    import torch
    from safetensors.torch import save_file

    from training.model.llama import Llama, initialize

    model = Llama(shape).to(getattr(torch, DTYPE))
    initialize(model, seed=seed)
    state = model.state_dict()
    folder.mkdir(parents=True)
    weights = {name: state[name] for name in shape.parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files.write_json(folder / "config.json", to_hf_config(shape, dtype=DTYPE))


# --- the processes ----------------------------------------------------------------------------------------


def environment_of(name: str, *, threads: int) -> dict[str, str]:
    """The environment of a contender's process, without GPUs. Ours sees our code, the peers only theirs."""
    own = {"PYTHONPATH": str(ROOT)} if name == OURS else PEERS[name]
    own = {"CUDA_VISIBLE_DEVICES": "", **own}
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **worker_environment(gpu=False, threads=threads), **own}


@contextmanager
def running(name: str, python: str, *, threads: int, log: Path) -> "Iterator[Process]":
    """A contender in a process group of its own, stopped but for its turns; it ends with the block."""
    with log.open("wb") as stream:
        # -P: else Python would look for the modules of libraries in serving/ first
        child = Child(
            [python, "-P", str(SCRIPT), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=environment_of(name, threads=threads),
        )
    try:
        yield Process(name, child, log)
    finally:
        child.send_signal(signal.SIGCONT)
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.close()  # on which it ends, and its own children with it
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        child.end()
        child.stdout.close()


class Process:
    """A contender, seen from here."""

    def __init__(self, name: str, child: Child, log: Path) -> None:
        self._name, self._child, self._log = name, child, log

    def load(self, model: Path, settings: Mapping[str, Any], *, slots: int) -> dict[str, str]:
        """Make it ready. Returns what it says of itself."""
        command = {"do": "load", "model": str(model), "settings": dict(settings), "slots": slots}
        return self._ask(command, within_seconds=LOAD_SECONDS)["about"]

    def turn(self, asked: Work, concurrency: int) -> "Turn":
        """Its turn. Raises `RunError` if it makes more or fewer tokens than it was asked for."""
        prompts, num_new = asked
        command = {"do": "run", "prompts": prompts, "num_new": num_new, "concurrency": concurrency}
        bystanders = Bystanders()
        answer = self._ask(command, within_seconds=RUN_SECONDS)
        others = bystanders.cores(answer.pop("cpu_seconds"))
        if [len(ids) for ids in answer["tokens"]] != num_new:
            raise RunError(f"{self._name} did not make as many tokens as it was asked for")
        return Turn(**answer, others_cores=others)

    def _ask(self, command: Mapping[str, Any], *, within_seconds: float) -> dict[str, Any]:
        """Let the process group go on, send the command, wait for the line of its answer, stop the group."""
        assert self._child.stdin is not None
        try:
            self._child.send_signal(signal.SIGCONT)
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()
            line = self._line(time.monotonic() + within_seconds)
            self._child.send_signal(signal.SIGSTOP)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._failure(command["do"], within_seconds)
        return json.loads(line)

    def _line(self, deadline: float) -> bytes:
        """What it writes up to the end of a line, of its output, or of the time."""
        assert self._child.stdout is not None
        output, parts = self._child.stdout.fileno(), [b""]
        while not parts[-1].endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            parts.append(os.read(output, 1 << 20))
            if not parts[-1]:
                break
        return b"".join(parts)

    def _failure(self, what: str, within_seconds: float) -> RunError:
        # Whoever has closed its output is about to end.
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(1.0)
        code = self._child.returncode
        how = f"gave no answer in {within_seconds:.0f} s" if code is None else f"ended with exit code {code}"
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        if f"No module named '{self._name}'" in tail:
            tail += f"\nbench.python must be the interpreter of an environment that has {self._name}"
        return RunError(f"{self._name} {how} at {what!r}; its log ends:\n{tail}")
