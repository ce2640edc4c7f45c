"""Sends an endpoint the loads of a configuration: closed loops, open loops, the search for a rate."""

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any, TextIO

from cluster.cli import RunError, UserError
from cluster.display import Table, number, show
from cluster.endpoint_client import Endpoint
from cluster.progress import Progress
from cluster.record.record import Record
from serving.bench.config import ServeBenchConfig
from serving.bench.inputs import draw_requests, from_trace, read_conversations
from serving.bench.latency import RequestOutcome, Slo, joules_per_token, summarise
from serving.bench.loadgen import Lag, run_closed, run_open
from serving.bench.steady import Steady, queue
from serving.bench.wire import Dialect, over_http
from serving.bench.workload import (
    Planned,
    endless_arrivals,
    lengths,
    require_fit,
    synthetic,
)
from serving.checkpoints import find
from serving.endpoint.text import TOKENIZER_FILE, load_tokenizer

ATTEMPTS = 3  # at a measurement, while the load generator lags; a new cluster is still settling at first


def note(text: str | Table) -> None:
    """Report progress on stderr."""
    show(text, file=sys.stderr)


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


@dataclass(frozen=True)
class Load:
    """One load to send.

    Attributes:
        concurrency: of a closed loop.
        rate: of an open loop with drawn arrivals, requests per second.
        trace: of an open loop whose arrivals a file holds; measured whole, as it is.
    """

    label: str
    concurrency: int | None = None
    rate: float | None = None
    trace: Sequence[Planned] | None = None


@dataclass
class Planner:
    """The requests of the loads of a configuration.

    Attributes:
        model: of `Bench`.
    """

    config: ServeBenchConfig
    model: dict[str, Any]
    dialect: Dialect
    _conversations: list[list[Planned]] | None = None

    def loads(self) -> list[Load]:
        """All but those of a search. Raises `ConfigError`: lengths or a file that cannot be used."""
        load = self.config.load
        found = [Load(f"{each} in flight", concurrency=each) for each in load.concurrency]
        found += [self.at_rate(rate) for rate in load.rates]
        if load.trace is not None:
            file = Path(load.trace).expanduser()
            size = {"vocab_size": self.model["vocab_size"], "context_tokens": self.model["max_model_len"]}
            trace = from_trace(file, **size, seed=load.seed, report=note)
            found.append(Load(f"trace {file.name[:32]}", trace=trace))  # a table has room for it
        if load.concurrency or load.rates or self.config.sweep.points:
            self.requests(1, "")
        return found

    def at_rate(self, rate: float) -> Load:
        return Load(f"{rate:.2f}/s {self.config.load.arrivals}", rate=rate)

    def steady(self, load: Load) -> Steady:
        """Which of its requests are measured."""
        keys = self.config.load
        if load.trace is not None:
            return Steady(0, len(load.trace))
        if load.concurrency is not None:
            return Steady(max(keys.warm_up, load.concurrency), keys.requests)
        assert load.rate is not None
        return Steady(keys.warm_up, max(1, round(load.rate * keys.seconds)), most_seconds=keys.seconds)

    def plan(self, load: Load, *, number: int) -> Iterable[Planned]:
        """New prompts for each `number`, so that none is in a server's cache of an earlier load; without end.

        Raises `ConfigError`: a length that does not fit the model, or a file that cannot be used.
        """
        if load.trace is not None:
            return load.trace
        keys, seed = self.config.load, f"{self.config.load.seed}:{number}"
        steady = self.steady(load)
        more = steady.number if load.concurrency is None else max(steady.number, 2 * load.concurrency)
        requests = self.requests(steady.warm_up + steady.number + more, seed)
        if load.rate is None:
            return cycle(requests)
        return _arriving(requests, endless_arrivals(keys.arrivals, rate=load.rate, seed=seed))

    def _read_conversations(self, file: str) -> list[list[Planned]]:
        directory = find(self.config.model).directory
        if directory is None:
            raise UserError(f"load.conversations: needs a model with a {TOKENIZER_FILE}, to count tokens")
        tokenizer = load_tokenizer(directory)
        # A chat's template stands between its turns; else a newline, and special tokens around all of them.
        beside = max(self.dialect.tokens_beside, 1 + tokenizer.num_special_tokens_to_add(False))
        return read_conversations(
            Path(file).expanduser(),
            count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
            context_tokens=self.model["max_model_len"], tokens_beside=math.ceil(beside),
            turns=self.config.load.turns, report=note,
        )  # fmt: skip

    def requests(self, number: int, seed: str) -> list[Planned]:
        load, model = self.config.load, self.model
        if load.conversations is not None:
            self._conversations = self._conversations or self._read_conversations(load.conversations)
            return draw_requests(self._conversations, number, seed=seed)
        prompt_tokens = lengths(load.prompt_tokens, key="load.prompt_tokens")
        output_tokens = lengths(load.output_tokens, key="load.output_tokens")
        require_fit(prompt_tokens, output_tokens, load.prefix_tokens, model["max_model_len"])
        return synthetic(
            number, prompt_tokens=prompt_tokens, output_tokens=output_tokens, vocab_size=model["vocab_size"],
            seed=seed, prefix_tokens=load.prefix_tokens, prefixes=load.prefixes,
        )  # fmt: skip


@dataclass
class Bench:
    """An endpoint, what has been measured of it so far, and where that is written.

    Attributes:
        model: `id`, `max_model_len`, `vocab_size`, `engine_info` (None: the endpoint is not ours).
        energy: reads the joules of the board that serves since some origin; None: not known.
        num_asked: points before the search.
        itls: load -> gaps between tokens, seconds.
        rows: load and outcome of each request that counts.
    """

    config: ServeBenchConfig
    endpoint: Endpoint
    dialect: Dialect
    model: dict[str, Any]
    requests: TextIO
    record: Record
    energy: Callable[[], float] | None = None
    search: Search = field(default_factory=Search)
    num_asked: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)
    itls: dict[str, list[float]] = field(default_factory=dict)
    rows: list[tuple[str, RequestOutcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._planner = Planner(self.config, self.model, self.dialect)
        self._num_sent = 0  # loads, every attempt at one

    def measure_all(self) -> None:
        """Everything that the configuration names."""
        loads = self._planner.loads()  # what cannot be sent is refused before anything is
        for each in loads:
            for repeat in range(self.config.load.repeats):
                self._measure(each, repeat)
        self.num_asked = len(self.points)
        if self.config.sweep.points:
            self._search()

    @property
    def refused(self) -> list[str]:
        """What has no figures because the load generator lagged, though the configuration names it.

        One rate of a search may be refused; the search itself is, if none of its rates could be measured.
        """
        refused = [point["load"] for point in self.points[: self.num_asked] if "refused" in point]
        if self.search.lagged and self.search.met is self.search.missed is None:
            refused.append("the search")
        return refused

    @property
    def failed(self) -> list[str]:
        """Loads of the configuration of which too few requests succeeded, with the first error of each."""
        least, failed = self.config.load.least_succeeded, []
        for point in self.points[: self.num_asked]:
            if "refused" not in point and point["succeeded"] < least * point["requests"]:
                failed.append(f"{point['load']}: {point['counts']} succeeded ({point['first_error']})")
        return failed

    def _measure(self, load: Load, repeat: int = 0) -> dict[str, Any]:
        """Send a load, write its requests down, and add the point that they make.

        If the load generator lagged, the load is sent again, `ATTEMPTS` times in all; then it is refused.
        """
        for attempt in range(1, ATTEMPTS + 1):
            about = {"load": load.label, "concurrency": load.concurrency, "rate": load.rate}
            about |= {"repeat": repeat, "attempts": attempt}
            point, counted = self._attempt(load, about)
            if "refused" not in point:
                break
            note(f"{load.label}, attempt {attempt} of {ATTEMPTS}: {point['refused']}")
        self.rows += [(load.label, outcome) for outcome in counted]
        self.points.append(point)
        flat = {key: value for key, value in point.items() if isinstance(value, int | float | str)}
        self.record.log({"step": len(self.points), **flat})
        return point

    def _attempt(self, load: Load, about: dict[str, Any]) -> tuple[dict[str, Any], list[RequestOutcome]]:
        """Send the load once. Returns `about` with its figures, and the requests that count."""
        keys, steady = self.config.load, self._planner.steady(load)
        outcomes: list[RequestOutcome] = []
        energy: list[tuple[float, float]] = []  # when a measured request ended, joules until then

        def observe(outcome: RequestOutcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) <= steady.warm_up + steady.number:
                progress.advance()
            measured = steady.measures(outcome.index)
            if measured and self.energy is not None:
                energy.append((outcome.ended, self.energy()))
            which = {"load": load.label, "attempt": about["attempts"], "measured": measured}
            self.requests.write(json.dumps({**which, **asdict(outcome)}) + "\n")
            self.requests.flush()

        with Progress(steady.warm_up + steady.number, unit="request") as progress:
            progress.advance(load.label, by=0)
            began = time.process_time(), time.perf_counter()
            lag = asyncio.run(self._send(load, steady, observe))
            cores = (time.process_time() - began[0]) / (time.perf_counter() - began[1])
        counted = [outcome for outcome in outcomes if steady.measures(outcome.index)]
        others = [outcome for outcome in outcomes if not steady.measures(outcome.index)]
        point: dict[str, Any] = about | {
            "client_cores": cores,
            "client_loop_lag_p99_ms": 1e3 * lag.loop_p99,
            "client_send_lag_p99_ms": 1e3 * lag.send_p99,
        }
        try:
            lag.require(keys.most_lag_ms / 1e3)
        except RunError as error:
            return point | {"counts": "refused", "refused": str(error)}, counted
        point |= summarise(counted, slo=self._slo(), beside=others)
        if load.concurrency is None:
            point |= queue(counted, others)
        if self.energy is not None:
            point["joules_per_token"] = joules_per_token(energy, outcomes)
        point["counts"] = f"{point['succeeded']}/{point['requests']}"
        gaps = [gap for outcome in counted if outcome.error is None for gap in outcome.itls]
        self.itls.setdefault(load.label, []).extend(gaps)
        note(_progress_line(point))
        return point, counted

    def _slo(self) -> Slo:
        slo = self.config.slo
        limits = (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms)
        return Slo(*(None if limit is None else limit / 1e3 for limit in limits))

    async def _send(self, load: Load, steady: Steady, observe: Callable[[RequestOutcome], None]) -> Lag:
        keys, plan = self.config.load, self._planner.plan(load, number=self._num_sent)
        self._num_sent += 1
        async with over_http(
            self.endpoint, timeout_seconds=keys.timeout_seconds, greedy=keys.greedy, dialect=self.dialect
        ) as send:
            if load.concurrency is None:
                return await run_open(plan, send, observe=observe, steady=steady)
            return await run_closed(plan, send, concurrency=load.concurrency, observe=observe, steady=steady)

    def _search(self) -> None:
        """Double the rate until it misses the SLO, then bisect; start at the rate of the closed loops.

        A rate at which the load generator lags bounds the search like one that misses, but is no statement
        about the server: then the answer is the highest rate that could be measured.
        """
        closed = [p for p in self.points if p.get("concurrency") and "refused" not in p and p["succeeded"]]
        if not closed:
            note("no search: it begins at the request rate of a closed loop, and none was measured")
            return
        rate, search = max(point["requests_per_second"] for point in closed), self.search
        for _ in range(self.config.sweep.points):
            point = self._measure(self._planner.at_rate(rate))
            if "refused" in point:
                search.lagged = rate
            elif point["attainment"] >= self.config.slo.attainment:
                search.met = rate
            else:
                search.missed = rate
            rate = search.following(rate)


def _arriving(requests: Sequence[Planned], times: Iterator[float]) -> Iterator[Planned]:
    """The requests at these times, over and over; turns that follow others have no time of their own."""
    for planned in cycle(requests):
        yield planned if planned.follows else replace(planned, at=next(times))


def _progress_line(point: dict[str, Any]) -> str:
    """A load that has been measured, while the others still are."""
    line = f"{point['load']}: {point['counts']}, {point['output_tokens_per_second']:,.0f} output tok/s"
    if point["ttft_p50_ms"] is not None:
        line += f", TTFT p50 {number(point['ttft_p50_ms'])} ms"
    if point["first_error"]:
        line += f"; failed: {point['errors']}, the first with {point['first_error']}"
    return line
