"""`make serve-bench`: throughput and latency of a served model.

    python -m serving.bench [--config FILE] [--dry-run] [key=value ...]
    python -m serving.bench bench.target=http://host:8000      any OpenAI-compatible endpoint
    python -m serving.bench bench.compare=transformers         races, as ratios; also vllm and serve

A closed loop keeps `load.concurrency` requests in flight. An open loop sends `load.rates` requests per
second, whatever the server does. A search finds the highest rate that meets the SLO.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import cli, endpoint_client, files, process
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.display import show
from cluster.endpoint_client import Endpoint
from cluster.measure import hardware
from cluster.measure.usage import joules_of_the_board
from cluster.record import origins, provenance
from cluster.record.origins import Origin
from cluster.record.record import Record
from cluster.session import ROOT
from serving import checkpoints
from serving.bench import config as bench_config
from serving.bench import plots, report
from serving.bench.config import ServeBenchConfig
from serving.bench.first_request import find_dialect
from serving.bench.measure import Bench, Search, note
from serving.bench.wire import Dialect
from serving.deployment import serving

PROBE_SECONDS = 120.0
OF_LAST_TOKEN = dict.fromkeys(("last_token_flops", "last_attention_flops"), 0)  # as `EngineInfo` has them
REQUEST_COLUMNS = ("index", "scheduled", "prompt_tokens", "output_tokens", "ttft", "tpot", "e2e", "error")


def main(
    arguments: Sequence[str] | None = None, *, compare: Callable[[ServeBenchConfig], None] | None = None
) -> int:
    """The command. Returns its exit code (`cluster.cli`).

    Args:
        compare: runs the race that `bench.compare` names. `__main__` hands it in: races use this room.
    """
    parser = cli.make_parser("serving.bench", description=__doc__.splitlines()[0], keys=ServeBenchConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = bench_config.load(file=options.config, dotlist=options.overrides)
        for name in ("trace", "conversations"):  # before anything starts
            given = getattr(config.load, name)
            if given is not None and not Path(given).expanduser().is_file():
                raise UserError(f"load.{name}: {given}: no such file")
        if options.dry_run:
            print(f"{layered.to_yaml(config)}\n{describe(config)}")
        elif config.bench.compare is not None:
            assert compare is not None
            compare(config)
        elif config.bench.target is not None:
            finish(run(config, config.bench.target))
        else:
            with serving(config, report=note) as url:
                result = run(config, url)
            finish(result)  # Ray's own last words are on stdout by now

    return cli.run(body)


def describe(config: ServeBenchConfig) -> str:
    """What would be measured."""
    load = config.load
    if config.bench.compare is not None:
        return f"races against {config.bench.compare}, {config.bench.rounds} rounds"
    lines = [
        f"closed loop: {max(load.warm_up, c)} + {load.requests} requests, {c} in flight"
        for c in load.concurrency
    ]
    lines += [f"open loop: {load.seconds:g} s of {rate:g} requests/s, {load.arrivals}" for rate in load.rates]
    lines += [f"open loop: the arrivals of {load.trace}"] * (load.trace is not None)
    if config.sweep.points:
        lines.append(
            f"search for the highest rate that meets the SLO: {config.sweep.points} x {load.seconds:g} s"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Result:
    """What is said last: the summary's file, the answer, and why figures are missing."""

    file: Path
    answer: str
    problem: str | None


def run(config: ServeBenchConfig, url: str) -> Result:
    """Measure an endpoint and report."""
    endpoint, model, origin = _find_model(config, url)
    dialect = find_dialect(
        endpoint, api=config.load.api, timeout_seconds=config.load.timeout_seconds, key="bench.target",
        report=note,
    )  # fmt: skip
    ceiling = _ceilings(config, model)
    if ceiling is not None:
        show(report.describe(model["engine_info"], ceiling))
    directory = (Path(config.bench.directory).expanduser() / config.bench.name).absolute()
    with _bench(config, endpoint, dialect, model, directory, origin) as bench:
        try:
            bench.measure_all()
        except KeyboardInterrupt:  # show what was measured, but write no summary.json: the run is not whole
            _show(bench, _summary(bench, ceiling), directory, _draw(bench, directory))
            raise
        summary, drawn = _summary(bench, ceiling), _draw(bench, directory)
        rows = [[load, *(getattr(one, name) for name in REQUEST_COLUMNS)] for load, one in bench.rows]
        bench.record.table("requests", ["load", *REQUEST_COLUMNS], rows)
        bench.record.table("loads", *_loads(bench.points))
        for plot in drawn:
            bench.record.image(f"{plot.stem}_plot", plot)
        bench.record.finish(summary)
    _show(bench, summary, directory, drawn)
    problem = None
    if bench.refused:
        problem = f"not reported, because the load generator lagged: {', '.join(bench.refused)}"
    elif bench.failed:
        problem = f"too few requests succeeded: {'; '.join(bench.failed)}"
    elif not any(point.get("succeeded") for point in bench.points):
        problem = "nothing was measured: name load.concurrency, load.rates or load.trace"
    return Result(directory / report.SUMMARY_FILE, summary["answer"], problem)


def finish(result: Result) -> None:
    """Print the last lines on stdout. Raises `RunError` if there is a problem."""
    print(f"summary: {result.file}")
    print(result.answer)
    if result.problem:
        raise RunError(result.problem)


@contextmanager
def _bench(
    config: ServeBenchConfig,
    endpoint: Endpoint,
    dialect: Dialect,
    model: dict[str, Any],
    directory: Path,
    origin: Origin,
) -> Iterator[Bench]:
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / "config.yaml", layered.to_yaml(config))
    record = Record.open(
        directory,
        config=layered.to_dict(config),
        provenance=provenance.collect(
            command=sys.argv, data_fingerprint=None, config_changes=layered.changes(config)
        ),
        wandb_mode=config.bench.wandb,
        project=config.bench.project,
        group="serving",
        job_type="serve-bench",
        name=config.bench.name,
        resume_step=None,
        inputs=[origin],
    )
    with record, (directory / "requests.jsonl").open("w") as requests:
        yield Bench(config, endpoint, dialect, model, requests, record, energy=_energy(config, model))


def _energy(config: ServeBenchConfig, model: dict[str, Any]) -> Callable[[], float] | None:
    """Reads the energy of the board that serves, if it is this machine's and NVML answers."""
    info = model["engine_info"]
    if info is None or info["device"] != "cuda" or config.bench.target is not None:
        return None
    read, reason = joules_of_the_board()
    if reason is not None:
        note(f"no joules per token: {reason}")
    return read


def _draw(bench: Bench, directory: Path) -> list[Path]:
    rows, slo = report.combined(bench.points), asdict(bench.config.slo)
    return plots.plot(rows, bench.itls, directory / "plots", model=bench.model["id"], slo=slo)


def _loads(points: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table with every figure of every load."""
    flat = [{key: value for key, value in point.items() if not isinstance(value, dict)} for point in points]
    columns = list(dict.fromkeys(key for point in flat for key in point))
    return columns, [[point.get(column) for column in columns] for point in flat]


def _show(bench: Bench, summary: dict[str, Any], directory: Path, drawn: Sequence[Path]) -> None:
    """Print the table and what it means."""
    slo = asdict(bench.config.slo)
    limits = ", ".join(f"{name} {value:g}" for name, value in slo.items() if value is not None)
    rows = report.combined(bench.points)
    show("", report.table(rows), "")
    if (bounds := report.intervals_table(rows)) is not None:
        show(bounds, "")
    print(f"SLO: {limits}; latencies in ms, from the scheduled arrival")
    print(summary["no_shares"] or report.FORMULAS)
    for fault in summary["ceiling_faults"]:
        print(fault)
    if bench.search != Search():
        print(bench.search.describe())
    print(f"run directory: {directory} ({', '.join(plot.name for plot in drawn)})")


def _find_model(config: ServeBenchConfig, url: str) -> tuple[Endpoint, dict[str, Any], Origin]:
    """The endpoint, its model and where that comes from.

    The model: `id`, `max_model_len`, `vocab_size`, `engine_info` (None: not ours).
    """
    bench = config.bench
    endpoint, listed = endpoint_client.find(
        url, model=bench.target_model, key="bench.target", context_tokens=bench.target_context_tokens
    )
    if endpoint.context_tokens is None:
        raise UserError(
            f"bench.target_context_tokens: {endpoint.url} does not say how many tokens of prompt and answer "
            f"{endpoint.model} holds; give the number"
        )
    origin = origins.of_endpoint(endpoint.model, endpoint.url, listed.get("lineage"))
    if config.bench.target is None:  # here its folder is known too; a newer run than the one served is not it
        ours = checkpoints.origin_of(config.model, checkpoints.find(config.model))
        origin = ours if origin.get("fingerprint") in (None, ours["fingerprint"]) else origin
    info = listed.get("engine_info")
    if info is not None and not OF_LAST_TOKEN.keys() <= info.keys():
        note(f"{endpoint.url} is older than this benchmark: its MFU counts too many FLOPs of a prompt")
        info = OF_LAST_TOKEN | info
    # Of a stranger the vocabulary is unknown; the first 256 ids exist in every one.
    about = {
        "id": endpoint.model,
        "max_model_len": endpoint.context_tokens,
        "vocab_size": info["vocab_size"] if info else 256,
        "engine_info": info,
    }
    return endpoint, about, origin


def _ceilings(config: ServeBenchConfig, model: dict[str, Any]) -> dict[str, Any] | None:
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


def _summary(bench: Bench, ceiling: dict[str, Any] | None) -> dict[str, Any]:
    info, replicas = bench.model["engine_info"], bench.config.deployment
    no_shares = None
    if info is None:
        no_shares = "no MBU or MFU: the endpoint does not say what its model weighs"
    elif ceiling is None:
        no_shares = "no MBU or MFU: the device that serves has no datasheet and could not be measured"
    elif replicas.max_replicas is not None:
        no_shares = "no MBU or MFU: autoscaling changed the number of engines during the measurement"
    else:
        for point in bench.points:
            if "refused" not in point:
                point |= report.shares(point, info, ceiling, replicas=replicas.replicas)
    faults = report.faults(bench.points)
    slo, rows = asdict(bench.config.slo), report.combined(bench.points)
    return {
        "model": bench.model,
        "dialect": {**asdict(bench.dialect), "left_out": sorted(bench.dialect.left_out)},
        "refused": bench.refused,
        "ceilings": ceiling,
        "no_shares": no_shares,
        "ceiling_faults": faults,
        "slo": slo,
        "highest_rate_meeting_slo": bench.search.met,
        "lowest_rate_missing_slo": bench.search.missed,
        "lowest_rate_lagged": bench.search.lagged,
        "points": bench.points,
        "loads": rows,
        "answer": report.answer(bench.model["id"], rows, slo, bench.search.met),
    }
