"""Sends an endpoint the loads of a configuration: closed loops, open loops, the search for a rate."""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cluster.cli import RunError, UserError
from cluster.display import Table, show
from cluster.endpoint_client import Endpoint
from cluster.progress import Progress
from cluster.record.record import Record
from serving.bench import report
from serving.bench.config import LoadConfig, ServeBenchConfig
from serving.bench.latency import RequestOutcome, Slo, summarise
from serving.bench.loadgen import Lag, over_http, run_closed, run_open
from serving.bench.workload import Planned, arrivals, from_conversations, from_trace, lengths, synthetic
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


@dataclass
class Bench:
    """An endpoint, what has been measured of it so far, and where that is written.

    Attributes:
        model: `id`, `max_model_len`, `vocab_size`, `engine_info` (None: the endpoint is not ours).
        num_asked: points before the search.
        itls: load -> gaps between tokens, seconds.
        rows: load and outcome of each request that counts.
    """

    config: ServeBenchConfig
    endpoint: Endpoint
    model: dict[str, Any]
    requests: TextIO
    record: Record
    search: Search = field(default_factory=Search)
    num_asked: int = 0
    points: list[dict[str, Any]] = field(default_factory=list)
    itls: dict[str, list[float]] = field(default_factory=dict)
    rows: list[tuple[str, RequestOutcome]] = field(default_factory=list)

    def measure_all(self) -> None:
        """Everything that the configuration names."""
        load = self.config.load
        for concurrency in load.concurrency:
            plan = self._plan(load.warm_up + load.requests)
            self._measure(plan, f"{concurrency} in flight", concurrency=concurrency)
        for rate in load.rates:
            self._at_rate(rate)
        if load.trace is not None:
            file = Path(load.trace).expanduser()
            size = {"vocab_size": self.model["vocab_size"], "context_tokens": self.model["max_model_len"]}
            self._measure(from_trace(file, **size, seed=load.seed), f"trace {file.name}")
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
        """Loads that the configuration names and of which every request failed, with the errors."""
        failed = [point for point in self.points[: self.num_asked] if point.get("succeeded") == 0]
        return [f"{point['load']} ({', '.join(point['errors'])})" for point in failed]

    def _measure(
        self,
        plan: Sequence[Planned],
        label: str,
        *,
        concurrency: int | None = None,
        rate: float | None = None,
    ) -> dict[str, Any]:
        """Send a load, write its requests down, and add the point that they make.

        If the load generator lagged, the load is sent again, `ATTEMPTS` times in all; then it is refused.
        """
        for attempt in range(1, ATTEMPTS + 1):
            about = {"load": label, "concurrency": concurrency, "rate": rate, "attempts": attempt}
            point, counted = self._attempt(plan, about)
            if "refused" not in point:
                break
            note(f"{label}, attempt {attempt} of {ATTEMPTS}: {point['refused']}")
        self.rows += [(label, outcome) for outcome in counted]
        self.points.append(point)
        flat = {key: value for key, value in point.items() if isinstance(value, int | float | str)}
        self.record.log({"step": len(self.points), **flat})
        return point

    def _attempt(
        self, plan: Sequence[Planned], about: dict[str, Any]
    ) -> tuple[dict[str, Any], list[RequestOutcome]]:
        """Send the load once. Returns `about` with its figures, and the requests that count."""
        load, label = self.config.load, about["load"]
        outcomes: list[RequestOutcome] = []

        def observe(outcome: RequestOutcome) -> None:
            progress.advance()
            outcomes.append(outcome)
            which = {"load": label, "attempt": about["attempts"], "measured": outcome.index >= load.warm_up}
            self.requests.write(json.dumps({**which, **asdict(outcome)}) + "\n")
            self.requests.flush()

        with Progress(len(plan), unit="request") as progress:
            progress.advance(label, by=0)
            began = time.process_time(), time.perf_counter()
            lag = asyncio.run(_send(plan, self.endpoint, load, about["concurrency"], observe))
            cores = (time.process_time() - began[0]) / (time.perf_counter() - began[1])
        counted = [outcome for outcome in outcomes if outcome.index >= load.warm_up]
        point: dict[str, Any] = about | {
            "client_cores": cores,
            "client_loop_lag_p99_ms": 1e3 * lag.loop_p99,
            "client_send_lag_p99_ms": 1e3 * lag.send_p99,
        }
        try:
            lag.require(load.most_lag_ms / 1e3)
        except RunError as error:
            return point | {"counts": "refused", "refused": str(error)}, counted
        slo = self.config.slo
        limits = (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms)
        seconds = Slo(*(None if limit is None else limit / 1e3 for limit in limits))
        point |= summarise(counted, slo=seconds)
        point["counts"] = f"{point['succeeded']}/{point['requests']}"
        self.itls[label] = [gap for outcome in counted if outcome.error is None for gap in outcome.itls]
        note(report.table([point]))
        if point["errors"]:
            note(f"{label}: {point['errors']}")
        return point, counted

    def _search(self) -> None:
        """Double the rate until it misses the SLO, then bisect; start at the rate of the closed loops.

        A rate at which the load generator lags bounds the search like one that misses, but is no statement
        about the server: then the answer is the highest rate that could be measured.
        """
        closed = [p for p in self.points if p.get("concurrency") and "refused" not in p]
        if not closed:
            note("no search: it begins at the request rate of a closed loop, and none was measured")
            return
        rate, search = max(point["requests_per_second"] for point in closed), self.search
        for _ in range(self.config.sweep.points):
            point = self._at_rate(rate)
            if "refused" in point:
                search.lagged = rate
            elif point["attainment"] >= self.config.slo.attainment:
                search.met = rate
            else:
                search.missed = rate
            rate = search.following(rate)

    def _at_rate(self, rate: float) -> dict[str, Any]:
        load = self.config.load
        number = load.warm_up + max(1, round(rate * load.seconds))
        due = arrivals(load.arrivals, rate=rate, number=number, seed=load.seed)
        return self._measure(self._plan(number, due=due), f"{rate:.2f}/s {load.arrivals}", rate=rate)

    def _plan(self, number: int, *, due: Sequence[float] | None = None) -> list[Planned]:
        """New prompts for every measurement, so that none is in a cache of an earlier one."""
        load, model = self.config.load, self.model
        seed = f"{load.seed}:{len(self.points)}"
        if load.conversations is not None:
            directory = find(self.config.model).directory
            if directory is None:
                raise UserError(f"load.conversations: needs a model with a {TOKENIZER_FILE}, to count tokens")
            tokenizer = load_tokenizer(directory)
            return from_conversations(
                Path(load.conversations).expanduser(), number,
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


async def _send(
    plan: Sequence[Planned],
    endpoint: Endpoint,
    load: LoadConfig,
    concurrency: int | None,
    observe: Callable[[RequestOutcome], None],
) -> Lag:
    async with over_http(endpoint, timeout_seconds=load.timeout_seconds, greedy=load.greedy) as send:
        if concurrency is None:
            return await run_open(plan, send, observe=observe)
        return await run_closed(plan, send, concurrency=concurrency, observe=observe)
