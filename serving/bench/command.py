"""`make serve-bench`: throughput and latency of a served model, as a sceptic would measure them.

    python -m serving.bench [--config FILE] [--dry-run] [key=value ...]
    python -m serving.bench bench.target=http://host:8000      any OpenAI-compatible endpoint
    python -m serving.bench bench.compare=transformers         races, as ratios; likewise vllm, and serve

Each closed-loop measurement keeps `load.concurrency` requests in flight; each open-loop one sends
`load.rates` a second, whatever the server does; and a search finds the highest rate that meets the SLO.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cluster import cli, endpoint_client, files, process, provenance
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.endpoint_client import Endpoint
from cluster.measure import benchmark, hardware
from cluster.record import Record
from cluster.session import ROOT
from serving import config as serving_config
from serving.bench import report
from serving.bench.latency import Outcome, Slo, summarise
from serving.bench.loadgen import Lag, over_http, run_closed, run_open
from serving.bench.workload import Planned, arrivals, from_conversations, from_trace, lengths, synthetic
from serving.checkpoints import find
from serving.config import LoadConfig, ServeConfig
from serving.deployment import serving
from serving.endpoint.text import TOKENIZER_FILE, load_tokenizer
from serving.peers import overhead, races
from training.model import shapes

PROBE_SECONDS = 120.0
ATTEMPTS = 3  # at a measurement, while the load generator lags; a new cluster is still settling at first


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("serving.bench", description=__doc__.splitlines()[0], keys=ServeConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = serving_config.load(file=options.config, dotlist=options.overrides)
        if options.dry_run:
            print(f"{layered.to_yaml(config)}\n{describe(config)}")
        elif config.bench.compare == "serve":
            publish(config, overhead.measure(config, report=note))
        elif config.bench.compare is not None:
            publish(config, _race(config, config.bench.compare))
        elif config.bench.target is not None:
            finish(run(config, config.bench.target))
        else:
            with serving(config, report=note) as url:
                summary = run(config, url)
            finish(summary)  # Ray's own last words are on stdout by now

    return cli.run(body)


def note(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def describe(config: ServeConfig) -> str:
    """What would be measured."""
    load = config.load
    if config.bench.compare is not None:
        return f"races against {config.bench.compare}, {config.bench.rounds} rounds"
    lines = [
        f"closed loop: {load.warm_up} + {load.requests} requests, {c} in flight" for c in load.concurrency
    ]
    lines += [f"open loop: {load.seconds:g} s of {rate:g} requests/s, {load.arrivals}" for rate in load.rates]
    lines += [f"open loop: the arrivals of {load.trace}"] * (load.trace is not None)
    if config.sweep.points:
        lines.append(
            f"search for the highest rate that meets the SLO: {config.sweep.points} x {load.seconds:g} s"
        )
    return "\n".join(lines)


# --- one benchmark ----------------------------------------------------------------------------------------


@dataclass
class Search:
    """Rates, requests per second: the highest that met the SLO; the lowest that missed it, or was refused."""

    met: float | None = None
    missed: float | None = None
    lagged: float | None = None

    def following(self, rate: float) -> float:
        """The rate to try after `rate`."""
        above = [bound for bound in (self.missed, self.lagged) if bound is not None]
        return ((self.met or 0.0) + min(above)) / 2 if above else 2 * rate

    def describe(self) -> str:
        if self.met is None and self.missed is None:
            return "no rate could be measured: the load generator lagged"
        best = "none" if self.met is None else f"{self.met:.2f} requests/s"
        beyond = "none missed it" if self.missed is None else f"{self.missed:.2f} missed it"
        if self.lagged is not None:
            beyond += f"; at {self.lagged:.2f} the load generator lagged"
        return f"highest rate that met the SLO: {best}; {beyond}"


@dataclass
class Bench:
    """What has been measured so far, and where it is written."""

    config: ServeConfig
    endpoint: Endpoint
    model: dict[str, Any]
    requests: TextIO
    record: Record
    search: Search = field(default_factory=Search)
    num_asked: int = 0  # points before the search
    points: list[dict[str, Any]] = field(default_factory=list)
    itls: dict[str, list[float]] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)

    @property
    def slo(self) -> Slo:
        slo = self.config.slo
        limits = (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms)
        return Slo(*(None if limit is None else limit / 1e3 for limit in limits))

    def measure(
        self,
        plan: Sequence[Planned],
        label: str,
        *,
        concurrency: int | None = None,
        rate: float | None = None,
    ) -> dict[str, Any]:
        """Send a load, write its requests down, and add what it came to.

        One in which the load generator lagged is sent again, `ATTEMPTS` times in all, before it is refused.
        """
        for attempt in range(1, ATTEMPTS + 1):
            point, counted = self._attempt(plan, label, attempt, concurrency=concurrency, rate=rate)
            if "refused" not in point:
                break
            note(f"{label}, attempt {attempt} of {ATTEMPTS}: {point['refused']}")
        self.rows += [_row(label, outcome) for outcome in counted]
        self.points.append(point)
        flat = {key: value for key, value in point.items() if isinstance(value, int | float | str)}
        self.record.log({"step": len(self.points), **flat})
        return point

    def _attempt(
        self,
        plan: Sequence[Planned],
        label: str,
        attempt: int,
        *,
        concurrency: int | None,
        rate: float | None,
    ) -> tuple[dict[str, Any], list[Outcome]]:
        """What sending the load once came to, and the requests that count."""
        load = self.config.load
        outcomes: list[Outcome] = []

        def observe(outcome: Outcome) -> None:
            outcomes.append(outcome)
            about = {"load": label, "attempt": attempt, "measured": outcome.index >= load.warm_up}
            self.requests.write(json.dumps({**about, **asdict(outcome)}) + "\n")
            self.requests.flush()

        began = time.process_time(), time.perf_counter()
        lag = asyncio.run(_send(plan, self.endpoint, load, concurrency, observe))
        cores = (time.process_time() - began[0]) / (time.perf_counter() - began[1])
        counted = [outcome for outcome in outcomes if outcome.index >= load.warm_up]
        point: dict[str, Any] = {
            "load": label, "concurrency": concurrency, "rate": rate, "attempts": attempt,
        }  # fmt: skip
        point |= {
            "client_cores": cores,
            "client_loop_lag_p99_ms": 1e3 * lag.loop_p99,
            "client_send_lag_p99_ms": 1e3 * lag.send_p99,
        }
        try:
            lag.require(load.most_lag_ms / 1e3)
        except RunError as error:
            point |= {"counts": "refused", "refused": str(error)}
        else:
            point |= summarise(counted, slo=self.slo)
            point["counts"] = f"{point['succeeded']}/{point['requests']}"
            self.itls[label] = [gap for outcome in counted if outcome.error is None for gap in outcome.itls]
            note(report.table([point]))
            if point["errors"]:
                note(f"{label}: {point['errors']}")
        return point, counted


async def _send(
    plan: Sequence[Planned], endpoint: Endpoint, load: LoadConfig, concurrency: int | None, observe: Any
) -> Lag:
    async with over_http(endpoint, timeout_seconds=load.timeout_seconds, greedy=load.greedy) as send:
        if concurrency is None:
            return await run_open(plan, send, observe=observe)
        return await run_closed(plan, send, concurrency=concurrency, observe=observe)


def finish(summary: dict[str, Any]) -> None:
    """The last line on stdout. Raises `RunError` if what was asked for was refused."""
    print(json.dumps(summary))
    if refused := summary["refused"]:
        raise RunError(f"not reported, because the load generator lagged: {', '.join(refused)}")


def run(config: ServeConfig, url: str) -> dict[str, Any]:
    """Measure an endpoint, report, and return the summary."""
    endpoint, model = _find_model(url, config.bench.target_model)
    ceiling = _ceilings(config, model)
    if ceiling is not None:
        print(report.describe(model["engine_info"], ceiling), flush=True)
    directory = (Path(config.bench.directory) / config.bench.name).absolute()
    with _bench(config, endpoint, model, directory) as bench:
        try:
            _measure_all(bench)
        except KeyboardInterrupt:  # what was measured is shown, but no summary.json: that is of whole runs
            _show(bench, _summary(bench, ceiling), directory)
            raise
        summary = _summary(bench, ceiling)
        bench.record.table("requests", ["load", *REQUEST_COLUMNS], bench.rows)
        bench.record.finish(summary)
    _show(bench, summary, directory)
    return summary


def _show(bench: Bench, summary: dict[str, Any], directory: Path) -> None:
    """The table, what it means, and the pictures."""
    plots = report.plot(bench.points, bench.itls, directory / "plots")
    slo = asdict(bench.config.slo)
    limits = ", ".join(f"{name} {value:g}" for name, value in slo.items() if value is not None)
    print(f"\n{report.table(bench.points)}\n\nSLO: {limits}; latencies in ms, from the scheduled arrival")
    print(summary["no_shares"] or report.FORMULAS)
    for fault in summary["ceiling_faults"]:
        print(fault)
    if bench.search != Search():
        print(bench.search.describe())
    print(f"run directory: {directory} ({', '.join(plot.name for plot in plots)})")


@contextmanager
def _bench(
    config: ServeConfig, endpoint: Endpoint, model: dict[str, Any], directory: Path
) -> Iterator[Bench]:
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / "config.yaml", layered.to_yaml(config))
    record = Record.open(
        directory,
        config=layered.to_dict(config),
        provenance=provenance.collect(command=sys.argv, data_fingerprint=None),
        wandb_mode=config.bench.wandb,
        project=config.bench.project,
        group="serving",
        name=config.bench.name,
        resume_step=None,
    )
    with record, (directory / "requests.jsonl").open("w") as requests:
        yield Bench(config, endpoint, model, requests, record)


def _measure_all(bench: Bench) -> None:
    load = bench.config.load
    for concurrency in load.concurrency:
        plan = _plan(bench, load.warm_up + load.requests)
        bench.measure(plan, f"{concurrency} in flight", concurrency=concurrency)
    for rate in load.rates:
        _at_rate(bench, rate)
    if load.trace is not None:
        size = {"vocab_size": bench.model["vocab_size"], "context_tokens": bench.model["max_model_len"]}
        bench.measure(from_trace(Path(load.trace), **size, seed=load.seed), f"trace {Path(load.trace).name}")
    bench.num_asked = len(bench.points)
    if bench.config.sweep.points:
        _search(bench)


def _search(bench: Bench) -> None:
    """Double the rate until it misses the SLO, then bisect; it begins at what a closed loop reached.

    A rate at which the load generator lags bounds the search like one that misses, but says nothing of the
    server: then the answer is the highest rate that could be measured.
    """
    reached = [p["requests_per_second"] for p in bench.points if p.get("concurrency") and "refused" not in p]
    if not reached:
        note("no search: it begins at the request rate of a closed loop, and none was measured")
        return
    rate, search = max(reached), bench.search
    for _ in range(bench.config.sweep.points):
        point = _at_rate(bench, rate)
        if "refused" in point:
            search.lagged = rate
        elif point["attainment"] >= bench.config.slo.attainment:
            search.met = rate
        else:
            search.missed = rate
        rate = search.following(rate)


def _at_rate(bench: Bench, rate: float) -> dict[str, Any]:
    load = bench.config.load
    number = load.warm_up + max(1, round(rate * load.seconds))
    due = arrivals(load.arrivals, rate=rate, number=number, seed=load.seed)
    return bench.measure(_plan(bench, number, due=due), f"{rate:.2f}/s {load.arrivals}", rate=rate)


def _plan(bench: Bench, number: int, *, due: Sequence[float] | None = None) -> list[Planned]:
    """New prompts for every measurement, so that none finds those of an earlier one in a cache."""
    load, model = bench.config.load, bench.model
    seed = f"{load.seed}:{len(bench.points)}"
    if load.conversations is not None:
        tokenizer = _tokenizer(bench.config)
        return from_conversations(
            Path(load.conversations), number,
            count_tokens=lambda text: len(tokenizer.encode(text).ids),
            context_tokens=model["max_model_len"], seed=seed, due=due,
        )  # fmt: skip
    return synthetic(
        number,
        prompt_tokens=lengths(load.prompt_tokens, key="load.prompt_tokens"),
        output_tokens=lengths(load.output_tokens, key="load.output_tokens"),
        vocab_size=model["vocab_size"],
        context_tokens=model["max_model_len"],
        seed=seed,
        due=due,
    )


def _tokenizer(config: ServeConfig) -> Any:
    directory = find(config.model).directory
    if directory is None:
        raise UserError(f"load.conversations: needs a model with a {TOKENIZER_FILE}, to count tokens")
    return load_tokenizer(directory)


# --- about the endpoint -----------------------------------------------------------------------------------


def _find_model(url: str, name: str | None) -> tuple[Endpoint, dict[str, Any]]:
    """The endpoint, and its model: `id`, `max_model_len`, `vocab_size`, `engine_info` (None: not ours)."""
    endpoint, listed = endpoint_client.find(url, model=name, key="bench.target")
    info = listed.get("engine_info")
    # Of a stranger the vocabulary is unknown; the first 256 ids exist in every one.
    return endpoint, {
        "id": endpoint.model,
        "max_model_len": endpoint.context_tokens or 2048,
        "vocab_size": info["vocab_size"] if info else 256,
        "engine_info": info,
    }


def _ceilings(config: ServeConfig, model: dict[str, Any]) -> dict[str, Any] | None:
    """Of the device that serves; None where it is elsewhere and unknown."""
    info = model["engine_info"]
    if info is None:
        return None
    name = info["details"].get("gpu", "cpu")
    if hardware.lookup(name) is not None:
        return report.ceilings(info, {"device": name})
    if config.bench.target is not None or config.session.address != "local":
        return None
    note("measuring this machine's ceilings")
    threads = ["--threads", str(config.engine.threads)] if config.engine.threads else []
    asked = ["--device", info["device"], "--dtype", info["dtype"], *threads]
    try:
        done = process.run(
            [sys.executable, "-m", "cluster.measure.probe", *asked], cwd=ROOT, timeout=PROBE_SECONDS
        )
        done.check_returncode()
        measured = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        measured = {"problems": {"cluster.measure.probe": said}}
    if measured["problems"]:
        for name, reason in measured["problems"].items():
            note(f"{name} could not be measured: {reason}")
        return None
    return report.ceilings(info, measured)


REQUEST_COLUMNS = ("index", "scheduled", "prompt_tokens", "output_tokens", "ttft", "tpot", "e2e", "error")


def _row(label: str, outcome: Outcome) -> list[Any]:
    return [label, *(getattr(outcome, name) for name in REQUEST_COLUMNS)]


def _summary(bench: Bench, ceiling: dict[str, Any] | None) -> dict[str, Any]:
    info, replicas = bench.model["engine_info"], bench.config.deployment
    no_shares = None
    if info is None:
        no_shares = "no MBU or MFU: the endpoint does not say what its model weighs"
    elif ceiling is None:
        no_shares = "no MBU or MFU: the device that serves has no datasheet and could not be measured"
    elif replicas.max_replicas is not None:
        no_shares = "no MBU or MFU: autoscaling changed the number of engines meanwhile"
    else:
        for point in bench.points:
            if "refused" not in point:
                point |= report.shares(point, info, ceiling, replicas=replicas.replicas)
    # What was asked for has to be there; of the search's rates, one that could be measured.
    refused = [point["load"] for point in bench.points[: bench.num_asked] if "refused" in point]
    if bench.search.lagged and bench.search.met is bench.search.missed is None:
        refused.append("the search")
    return {
        "model": bench.model,
        "refused": refused,
        "ceilings": ceiling,
        "no_shares": no_shares,
        "ceiling_faults": report.faults(bench.points),
        "slo": asdict(bench.config.slo),
        "highest_rate_meeting_slo": bench.search.met,
        "lowest_rate_missing_slo": bench.search.missed,
        "lowest_rate_lagged": bench.search.lagged,
        "points": bench.points,
    }


# --- races ------------------------------------------------------------------------------------------------


def _race(config: ServeConfig, peer: str) -> dict[str, Any]:
    threads = config.engine.threads or hardware.describe_host()["cpu_cores"]
    python = config.bench.python or sys.executable
    shape = shapes.resolve(config.model.shape) if config.model.shape else races.TINY
    rounds = config.bench.rounds
    return races.race({peer: python}, num_rounds=rounds, threads=threads, shape=shape, report=note)


def publish(config: ServeConfig, result: dict[str, Any]) -> None:
    """The table, the baseline file, and the last line of a race."""
    print(benchmark.table(result))
    chosen = Path(config.bench.output) if config.bench.output else None
    output = benchmark.prepare_output(chosen, f"serve_{config.bench.compare}")
    benchmark.publish(result, output, data_fingerprint=None)


if __name__ == "__main__":
    sys.exit(main())
