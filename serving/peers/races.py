"""Our engine against transformers and vLLM: the same requests, the same weights and threads, in turns.

Each contender is a process of its own (`serving.peers.contenders`), so peers can use other environments.
During one's turn the others are stopped: some wait by polling and would take a core. `serving.peers.command`
reports the race.
"""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import RunError, UserError, sigterm_as_interrupt
from cluster.measure import benchmark
from cluster.measure.turns import DISTURBING_CORES, quietest, turns
from cluster.progress import Progress
from serving.peers.contender_process import OURS, PEERS, ContenderProcess, RaceTurn, Times, Work, running
from training.model.shapes import LlamaShape, resolve, to_hf_config

DTYPE = "bfloat16"
TINY = LlamaShape(  # 100M parameters: two CPU cores still serve it fluently
    vocab_size=32_000,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=2048,
    tied=True,
)

WARM_UP_ROUNDS = 1  # compilers, allocations
LEAST_AGREEMENT = 0.8  # of first tokens: 0.9 to 1 with bf16 in another order, at most 0.2 with other weights


@dataclass(frozen=True)
class RaceCase:
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

    def rate(self, times: Times, prompts: Sequence[Sequence[int]]) -> float:
        """Tokens per second: of the prompts in "prefill", else new ones."""
        if self.measured == "prefill":
            return prefill_rate(times, sum(map(len, prompts)))
        return decode_rate(times) if self.measured == "decode" else request_rate(times)


def decode_case(batch: int, *, prompt_tokens: int = 64, new_tokens: int = 128) -> RaceCase:
    """A batch of equal requests that decode together."""
    what = f"decoding, batch {batch}, prompts of {prompt_tokens}, {new_tokens} new tokens"
    return RaceCase(what, batch, batch, (prompt_tokens,) * 2, (new_tokens,) * 2, "decode")


CASES = {
    "decode_b1": decode_case(1),
    "decode_b8": decode_case(8),
    "decode_b32": decode_case(32),
    "requests_c16": RaceCase(
        "whole requests, 16 at once, prompts of 64 to 512, 48 to 80 new tokens",
        48,
        16,
        (64, 512),
        (48, 80),
        "requests",
    ),
    "prefill_b4": RaceCase("prefilling, batch 4, prompts of 512", 4, 4, (512, 512), (1, 1), "prefill"),
}

# --- what is asked, and what is made of the answers -------------------------------------------------------


def work(name: str, case: RaceCase, *, vocab_size: int, round_number: int) -> Work:
    """The requests of a round. The case sets lengths; ids are new in each round, so no cache helps."""
    lengths, ids = random.Random(name), random.Random(f"{name} {round_number}")
    sizes = [lengths.randint(*case.prompt_tokens) for _ in range(case.num_requests)]
    num_new = [lengths.randint(*case.new_tokens) for _ in range(case.num_requests)]
    return [[ids.randrange(vocab_size) for _ in range(size)] for size in sizes], num_new


def decode_rate(times: Times) -> float:
    """New tokens per second while all requests decode, and none waits for its prompt.

    The window opens when the last request gets its first token and closes when the first request gets its
    last; the tokens that come in it are divided by its length. Where prompts go through the model at once,
    as in transformers, that is (N - 1)·B tokens. An engine that mixes prompts into its steps has given the
    early requests some tokens by then, and later gives the last ones some in a smaller batch: neither counts.
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


@dataclass
class Race:
    """What was measured.

    Attributes:
        rates: case -> contender -> tokens per second (`RaceCase.rate`), one per round.
        first_tokens: contender -> the first new token of every request, in order.
        others_cores: contender -> `RaceTurn.others_cores`, of every turn.
        about: contender -> what it is and how it is set up.
        load_seconds: contender -> from the start of its process to the end of `load`.
    """

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)
    others_cores: dict[str, list[float]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)

    def add(self, case_name: str, contender: str, rate: float, turn: RaceTurn) -> None:
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
        RunError: a peer's first tokens are not ours, so it does other work.
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
    cases: Mapping[str, RaceCase] = CASES,
    model: Path | None = None,
    shape: LlamaShape = TINY,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Race our engine against `peers`. Returns `race_result`.

    Args:
        peers: name in PEERS -> the Python interpreter that has it.
        threads: compute threads of each contender.
        report: called with one line of progress at a time.
        model: a Hugging Face directory; without it, random weights in `shape`, as in a bf16 checkpoint.
        settings: contender -> keys of `serving.config` for "ours", of from_pretrained or of vllm.EngineArgs.

    Raises:
        UserError: an interpreter that does not exist, or an unknown peer.
        RunError: a contender failed or does other work; the message ends with the last lines of its log.
    """
    _check(peers)
    best = {"dtype": best_dtype()}
    options: dict[str, dict[str, Any]] = {
        OURS: {"engine.device": "cpu", "engine.threads": threads},
        "transformers": best,
        "vllm": best,
    }
    slots = max(case.concurrency for case in cases.values())
    results, contenders = Race(), {}
    with ExitStack() as stack:
        stack.enter_context(sigterm_as_interrupt())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="race-")))
        if model is None:
            model = folder / "model"
            write_random_model(model, shape, seed=0)
        for name, python in {OURS: sys.executable, **peers}.items():
            started = time.monotonic()
            contender = stack.enter_context(running(name, python, threads=threads, log=folder / name))
            keys = options.get(name, {}) | dict((settings or {}).get(name, {}))
            about = contender.load(model, keys, slots=slots)
            results.about[name], results.load_seconds[name] = about, time.monotonic() - started
            listed = ", ".join(f"{key} {value}" for key, value in about.items())
            report(f"{name} is ready after {results.load_seconds[name]:.0f} s: {listed}")
            contenders[name] = contender
        _take_turns(
            results, contenders, cases, vocab_size=resolve(model).vocab_size, num_rounds=num_rounds,
            report=report,
        )  # fmt: skip
    return race_result(results)


def _take_turns(
    results: Race,
    contenders: Mapping[str, ContenderProcess],
    cases: Mapping[str, RaceCase],
    *,
    vocab_size: int,
    num_rounds: int,
    report: Callable[[str], None],
) -> None:
    """Every contender in every case, in turns; what the warm-up measures is left out of `results`."""
    with Progress((WARM_UP_ROUNDS + num_rounds) * len(cases) * len(contenders), unit="turn") as progress:
        for number in range(-WARM_UP_ROUNDS, num_rounds):
            which = f"round {number + 1}/{num_rounds}" if number >= 0 else "warming up"
            for case_name, case in cases.items():
                requests = work(case_name, case, vocab_size=vocab_size, round_number=number)
                for name in turns(list(contenders), number):
                    progress.advance(f"{case_name}, {name}", by=0)
                    turn = quietest(partial(contenders[name].turn, requests, case.concurrency))
                    rate = case.rate(turn.times, requests[0])
                    report(f"{which}, {case_name}, {name}: {rate:,.0f} tokens/s{_disturbed(turn)}")
                    progress.advance()
                    if number >= 0:
                        results.add(case_name, name, rate, turn)


def _check(peers: Mapping[str, str]) -> None:
    """Raise `UserError` about a peer that is unknown, or whose interpreter does not exist."""
    for name, python in peers.items():
        if name not in PEERS:
            raise UserError(f"bench.compare: {name!r} is not one of: {', '.join(PEERS)}")
        if shutil.which(python) is None:
            raise UserError(f"bench.python: {python} is no program; give the interpreter that has {name}")


def _disturbed(turn: RaceTurn) -> str:
    if turn.others_cores <= DISTURBING_CORES:
        return ""
    return f", while others used {turn.others_cores:.2f} cores"


def best_dtype() -> str:
    """What the peers compute in on this CPU: bfloat16, or float32 if bfloat16 would be slower."""
    import torch

    from optim.precision import compute_dtype

    return str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")


def write_random_model(folder: Path, shape: LlamaShape, *, seed: int) -> None:
    """A Hugging Face directory without a tokenizer: config.json and bf16 weights as training begins."""
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
