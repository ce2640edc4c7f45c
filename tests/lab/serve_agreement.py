"""Does our load generator measure what others do? Ours, GuideLLM's and vLLM's, in turns, on the same load.

    python -m tests.lab.serve_agreement --guidellm PROGRAM --vllm PYTHON [--rounds N] [--output FILE]
    [--dry-run]

The endpoint is ours, over an engine whose tokens come at known times (`tests.lab.paced_engine`), so that each
figure stands beside the truth: the same figure computed from the tokens as the engine delivered them. Every
turn has an endpoint of its own, which has answered one request before, and all requests of the tool count. A
turn that other processes disturb is taken again (`cluster.measure.turns`). The percentiles are those that
each tool itself reports, brought to one definition: from a request's sending to its tokens, TPOT without the
first one.
"""

import argparse
import asyncio
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster import cli, display, endpoint_client, process
from cluster.cli import RunError, UserError, sigterm_as_interrupt
from cluster.endpoint_client import Endpoint
from cluster.measure import benchmark, turns
from cluster.session import ROOT, free_ports
from serving.bench.latency import RequestOutcome, Slo, summarise
from serving.bench.loadgen import Lag, run_closed, run_open
from serving.bench.wire import over_http
from serving.bench.workload import arrivals, synthetic
from tests.lab.paced_engine import MODEL, VOCABULARY
from tests.lab.referees import FIGURES, REFEREES, Figures, LoadCase, require_load, save_tokenizer

WHAT = "serve_agreement"  # in the baseline's name
OURS = "ours"
AGREE_PERCENT, AGREE_MS = 5.0, 2.0  # figures agree within the greater of the two
MOST_LAG_SECONDS = 0.025  # as load.most_lag_ms
NO_SLO = Slo(None, None, None)
REQUEST_SECONDS, TURN_SECONDS = 300.0, 600.0
START_SECONDS, STOP_SECONDS = 300.0, 10.0
LOG_LINES = 12

TOLD = ("ttft_p50_ms", "e2e_p50_ms")  # as it goes


CASES = {"closed": LoadCase(48, concurrency=4), "poisson": LoadCase(48, rate=1.5)}


# --- turns ------------------------------------------------------------------------------------------------


@contextmanager
def paced_endpoint(log: Path) -> Iterator[str]:
    """The URL of an endpoint in a process of its own, for the length of a `with` block.

    It has answered a request, number 0: the first one holds its event loop up, and those beside it.
    """
    [port] = free_ports(1)
    url, said = f"http://127.0.0.1:{port}", log.with_suffix(".stderr")
    command = [sys.executable, "-m", "tests.lab.paced_engine", "--port", str(port), "--log", str(log)]
    with said.open("wb") as stream:
        endpoint = process.Child(command, cwd=ROOT, stderr=stream)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not endpoint_client.answers(f"{url}/health"):
            if endpoint.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"the paced endpoint did not start:\n{_tail(said)}")
            time.sleep(0.05)
        first = {"model": MODEL, "prompt": "hello", "max_tokens": 2, "stream": True}
        endpoint_client.exchange(f"{url}/v1/completions", first, seconds=REQUEST_SECONDS)
        yield url
    finally:
        endpoint.end(STOP_SECONDS)


def truth(log: Path, case: LoadCase) -> Figures:
    """What the engine itself wrote down. Raises `RunError` if it was asked for another load."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    outcomes = [RequestOutcome(**row) for row in rows if row["index"] > 0]  # 0 was `paced_endpoint`'s own
    require_load("the engine", case, len(outcomes), {outcome.output_tokens for outcome in outcomes})
    return _figures(outcomes)


def ours(case: LoadCase, url: str, *, seed: int) -> tuple[Figures, Lag]:
    """What our load generator reports. Raises `RunError` if a request failed."""
    number, rate = case.num_requests, case.rate
    plan = synthetic(
        number,
        prompt_tokens=lambda draw: case.prompt_tokens,
        output_tokens=lambda draw: case.output_tokens,
        vocab_size=VOCABULARY,
        seed=seed,
        due=None if rate is None else arrivals("poisson", rate=rate, number=number, seed=seed),
    )
    outcomes: list[RequestOutcome] = []

    async def load() -> Lag:
        async with over_http(Endpoint(f"{url}/v1", MODEL), timeout_seconds=REQUEST_SECONDS) as send:
            if case.concurrency is None:
                return await run_open(plan, send, observe=outcomes.append)
            return await run_closed(plan, send, concurrency=case.concurrency, observe=outcomes.append)

    lag = asyncio.run(load())
    if errors := [outcome.error for outcome in outcomes if outcome.error is not None]:
        raise RunError(f"{len(errors)} of our requests failed, the first with: {errors[0]}")
    # `scheduled` is what we report from; the others report from the sending.
    return _figures([replace(outcome, scheduled=outcome.sent) for outcome in outcomes]), lag


def _figures(outcomes: Sequence[RequestOutcome]) -> Figures:
    found = summarise(outcomes, slo=NO_SLO)
    return {figure: found[figure] for figure in FIGURES}


def theirs(name: str, program: str, case: LoadCase, url: str, *, tokenizer: Path, folder: Path) -> Figures:
    """What a referee reports. Raises `RunError` with the end of what it said."""
    referee, report, said = REFEREES[name], folder / "report.json", folder / "referee.log"
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    command = referee.command(program, case, url=url, tokenizer=tokenizer, report=report)
    kept |= referee.environment
    code: int | None = None
    with said.open("wb") as stream, suppress(subprocess.TimeoutExpired):
        pipes = {"stdout": stream, "stderr": subprocess.STDOUT}
        code = process.run(command, cwd=folder, env=kept, timeout=TURN_SECONDS, **pipes).returncode
    if code != 0 or not report.is_file():
        how = f"did not end in {TURN_SECONDS:.0f} s" if code is None else f"ended with exit code {code}"
        raise RunError(f"{name} {how}; its log ends:\n{_tail(said)}")
    return referee.figures(json.loads(report.read_text()), case)


@dataclass(frozen=True)
class ToolTurn:
    """What a tool reports, and what the engine wrote down meanwhile.

    Attributes:
        lag: of ours.
        others_cores: how many cores everything else on this machine kept busy meanwhile, on average.
    """

    figures: Figures
    true: Figures
    lag: Lag | None
    others_cores: float


def take_turn(
    name: str, program: str | None, case: LoadCase, *, seed: int, tokenizer: Path, place: Path
) -> ToolTurn:
    """One turn: of ours, where there is no program. `place` is for its files. Raises `RunError`."""
    folder = Path(tempfile.mkdtemp(dir=place))
    log = folder / "engine.jsonl"
    bystanders, own = turns.Bystanders(), _own_cpu_seconds()
    with paced_endpoint(log) as url:
        if program is None:
            figures, lag = ours(case, url, seed=seed)
        else:
            figures, lag = theirs(name, program, case, url, tokenizer=tokenizer, folder=folder), None
    return ToolTurn(figures, truth(log, case), lag, bystanders.cores(_own_cpu_seconds() - own))


def _own_cpu_seconds() -> float:
    """Of this process and of all that it started and that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))


def quietest(take: Callable[[], ToolTurn]) -> ToolTurn:
    """As `turns.quietest`. Raises `RunError`: our load generator lagged even then."""
    best = turns.quietest(take)
    if best.lag is not None:
        best.lag.require(MOST_LAG_SECONDS)
    return best


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


# --- the comparison ---------------------------------------------------------------------------------------


def measure(programs: Mapping[str, str], *, num_rounds: int) -> dict[str, Any]:
    """Medians with spreads over the rounds, and `compare`'s rows of them.

    Keys: `<figure>_<tool>_<case>`; the same with `_true` behind it, for the engine's own in that turn; and
    `others_cores_<tool>_<case>` (`ToolTurn`).

    Args:
        programs: referee -> its program.

    Raises:
        RunError: a tool failed, or put another load than it was asked for.
    """
    samples: dict[str, list[float]] = {}
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="agreement-") as place:
        tokenizer = Path(place) / "tokenizer"
        tokenizer.mkdir()
        save_tokenizer(tokenizer, vocab_size=VOCABULARY)
        for number, case_name in ((n, name) for n in range(num_rounds) for name in CASES):
            case = CASES[case_name]
            for name in turns.turns([OURS, *programs], number):
                turn = quietest(
                    partial(
                        take_turn, name, programs.get(name), case,
                        seed=number, tokenizer=tokenizer, place=Path(place),
                    )
                )  # fmt: skip
                found = turn.figures
                for key, value in found.items():
                    samples.setdefault(f"{key}_{name}_{case_name}", []).append(value)
                    samples.setdefault(f"{key}_{name}_{case_name}_true", []).append(turn.true[key])
                samples.setdefault(f"others_cores_{name}_{case_name}", []).append(turn.others_cores)
                told = (f"{key} {found[key]:.1f} (true {turn.true[key]:.1f})" for key in TOLD)
                others = f", while others used {turn.others_cores:.2f} cores"
                which = f"round {number + 1}/{num_rounds}, {case_name}, {name}"
                print(f"{which}: {', '.join(told)}{others}", file=sys.stderr, flush=True)
    medians = benchmark.medians(samples)
    rows = compare(medians, list(programs))
    return {
        "bench": WHAT,
        "rounds": num_rounds,
        "cases": {name: str(case) for name, case in CASES.items()},
        "agree_percent": AGREE_PERCENT,
        "agree_ms": AGREE_MS,
        "compared": len(rows),
        "agreeing": sum(row["agrees"] for row in rows),
        "rows": rows,
        **medians,
    }


def compare(medians: Mapping[str, Any], referees: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each figure that a referee has: its own and ours, and how far each is from its turns' truth.

    They agree if they differ by at most AGREE_PERCENT of the referee's, or by AGREE_MS.
    """
    rows = []
    for case, referee, figure in itertools.product(CASES, referees, FIGURES):
        our_key, their_key = f"{figure}_{OURS}_{case}", f"{figure}_{referee}_{case}"
        if their_key not in medians:
            continue
        our, their = medians[our_key], medians[their_key]
        rows.append(
            {
                "case": case,
                "referee": referee,
                "figure": figure.removesuffix("_ms"),
                "ours_ms": our,
                "ours_less_true_ms": our - medians[f"{our_key}_true"],
                "referee_ms": their,
                "referee_less_true_ms": their - medians[f"{their_key}_true"],
                "difference_ms": our - their,
                "difference_percent": 100 * (our - their) / their,
                "agrees": abs(our - their) <= max(AGREE_PERCENT / 100 * their, AGREE_MS),
            }
        )
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The rows of `compare`, for people."""
    cases = [f"{name}: {case}" for name, case in result["cases"].items()]
    heads = ("ms", "ours", "- true", "referee", "- true", "ours - referee", "in %", "agree")
    rows = [
        (
            f"{row['case']} {row['referee']} {row['figure']}",
            f"{row['ours_ms']:.1f}",
            f"{row['ours_less_true_ms']:+.1f}",
            f"{row['referee_ms']:.1f}",
            f"{row['referee_less_true_ms']:+.1f}",
            f"{row['difference_ms']:+.1f}",
            f"{row['difference_percent']:+.2f}%",
            "yes" if row["agrees"] else "NO",
        )
        for row in result["rows"]
    ]
    within = f"within {result['agree_percent']:g}% or {result['agree_ms']:g} ms"
    agreeing = f"{result['agreeing']} of {result['compared']} agree {within}"
    return "\n".join([*cases, "", str(display.table(heads, rows, left=(0, -1))), agreeing])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.serve_agreement", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--guidellm", metavar="PROGRAM", help="bin/guidellm of an environment that has GuideLLM"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="bin/python of an environment that has vLLM")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    benchmark.add_options(parser, what=WHAT, rounds=3, rounds_help="turns of each tool at each load")
    options = parser.parse_args(arguments)

    def body() -> None:
        benchmark.require_rounds(options.rounds)
        given = {name: getattr(options, name) for name in REFEREES}
        programs = {name: program for name, program in given.items() if program is not None}
        if not programs:
            ways = "; ".join(f"--{name}: {referee.remedy}" for name, referee in REFEREES.items())
            raise UserError(f"no referee was given. {ways}")
        if options.dry_run:
            print(_plan(programs, options.rounds))
            return
        found = {name: _program(name, program) for name, program in programs.items()}
        output = benchmark.prepare_output(options.output, WHAT)
        load = benchmark.load_average()
        result = {"load_average_before": load, **measure(found, num_rounds=options.rounds)}
        print(table(result))
        benchmark.publish(result, output, job_type="race", wandb_mode=options.wandb, data_fingerprint=None)

    return cli.run(body)


def _program(name: str, program: str) -> str:
    """Its absolute path; a link stays one, as an interpreter finds its environment by it."""
    found = shutil.which(program)
    if found is None:
        raise UserError(f"--{name}: {program} is no program; {REFEREES[name].remedy}")
    return os.path.abspath(found)


def _plan(programs: Mapping[str, str], num_rounds: int) -> str:
    lines = []
    for name, case in CASES.items():
        lines.append(f"{num_rounds} rounds of {name}: {case}; ours, and in turns with it")
        for referee, program in programs.items():
            command = REFEREES[referee].command(
                program, case, url="URL", tokenizer=Path("TOKENIZER"), report=Path("REPORT")
            )
            lines.append(f"  {' '.join(command)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
