"""What Ray Serve adds: the same requests through the endpoint, and to an equal engine in this process.

The two engines take turns; the waiting one sleeps. The difference is HTTP, Serve's ingress and the way to the
engine's process and back. Both clients are asyncio loops in this process, so their own cost is on both sides,
except for the parsing of HTTP.

The phase in which requests meet the engine's steps must not depend on the way. In a plain closed loop it
does: a client in this process is back before the next step begins; through Serve it misses that step and
waits for a whole one. Requests of one length also run in waves. So lengths are drawn, each request is sent
after a drawn pause, and the first ones, which start together, do not count.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.cli import RunError
from cluster.endpoint_client import Endpoint
from cluster.measure import benchmark
from serving import checkpoints
from serving.bench.config import ServeBenchConfig
from serving.bench.latency import RequestOutcome, Slo, summarise
from serving.bench.loadgen import run_closed, to_engine
from serving.bench.wire import Send, over_http
from serving.bench.workload import Planned, lengths, synthetic
from serving.deployment import serving
from serving.engine.process import make_engine
from serving.engine.protocol import Engine, EngineInfo

NO_SLO = Slo(None, None, None)


@dataclass(frozen=True)
class OverheadCase:
    """`num_requests` in all from `concurrency` clients; lengths as in `serving.bench.workload.lengths`."""

    concurrency: int
    num_requests: int
    prompt_tokens: str = "64"
    output_tokens: str = "uniform(24,72)"


PAUSE_SECONDS = 0.1  # at the most; longer than a step
CASES = (OverheadCase(1, 13), OverheadCase(8, 56), OverheadCase(32, 128))


def measure(
    config: ServeBenchConfig, *, report: Callable[[str], None], cases: tuple[OverheadCase, ...] = CASES
) -> dict[str, Any]:
    """Medians and spreads over `bench.rounds`, by concurrency c.

    Keys: `added_ttft_ms_c<c>`, the difference of the median TTFTs of a round in milliseconds;
    `speedup_direct_c<c>`, throughput through Serve / direct, of a round; `ttft_ms_<way>_c<c>` and
    `tokens_per_second_<way>_c<c>` of both ways.

    Raises:
        RunError: a request failed.
    """
    served = checkpoints.find(config.model)
    checkpoints.export_if_stale(served, report=report)
    samples: dict[str, list[float]] = {}
    engine = make_engine(config, served)
    try:
        with serving(config, report=report) as url:
            for number in range(-1, config.bench.rounds):  # the first warms up
                for case in cases:
                    plan = _plan(case, engine.info, seed=number)
                    ways = {"serve": url, "direct": None}
                    for way in sorted(ways, reverse=number % 2 == 0):
                        found = asyncio.run(_round(plan, case, engine, ways[way], served.name))
                        report(
                            f"round {number + 1}/{config.bench.rounds}, {case.concurrency} at once, {way}: "
                            f"TTFT {found['ttft_p50_ms']:.1f} ms, "
                            f"{found['output_tokens_per_second']:.0f} tokens/s"
                        )
                        if number >= 0:
                            end = f"{way}_c{case.concurrency}"
                            samples.setdefault(f"ttft_ms_{end}", []).append(found["ttft_p50_ms"])
                            rate = found["output_tokens_per_second"]
                            samples.setdefault(f"tokens_per_second_{end}", []).append(rate)
    finally:
        engine.close()
    for case in cases:
        end = f"c{case.concurrency}"
        pairs = zip(samples[f"ttft_ms_serve_{end}"], samples[f"ttft_ms_direct_{end}"], strict=True)
        samples[f"added_ttft_ms_{end}"] = [serve - direct for serve, direct in pairs]
        rates = (samples[f"tokens_per_second_{way}_{end}"] for way in ("serve", "direct"))
        samples[f"speedup_direct_{end}"] = [serve / direct for serve, direct in zip(*rates, strict=True)]
    info = {"engine": engine.info.engine, "model": served.name, **engine.info.details}
    return {**benchmark.medians(samples), "about": info}


async def _round(
    plan: list[Planned], case: OverheadCase, engine: Engine, url: str | None, model: str
) -> dict[str, Any]:
    outcomes: list[RequestOutcome] = []

    draw = random.Random("pauses")

    async def run(send: Send) -> None:
        async def after_a_pause(
            planned: Planned, index: int, scheduled: float, start: float
        ) -> RequestOutcome:
            await asyncio.sleep(draw.uniform(0, PAUSE_SECONDS))
            return await send(planned, index, time.perf_counter(), start)

        await run_closed(plan, after_a_pause, concurrency=case.concurrency, observe=outcomes.append)

    if url is None:
        await run(to_engine(engine))
    else:
        async with over_http(Endpoint(f"{url}/v1", model), timeout_seconds=300.0) as send:
            await run(send)
    if errors := {outcome.error for outcome in outcomes if outcome.error is not None}:
        way = "directly" if url is None else "through Serve"
        raise RunError(f"requests failed {way}, {case.concurrency} at once: {', '.join(errors)}")
    return summarise([each for each in outcomes if each.index >= case.concurrency], slo=NO_SLO)


def _plan(case: OverheadCase, info: EngineInfo, *, seed: int) -> list[Planned]:
    return synthetic(
        case.num_requests,
        prompt_tokens=lengths(case.prompt_tokens, key="prompt_tokens"),
        output_tokens=lengths(case.output_tokens, key="output_tokens"),
        vocab_size=info.vocab_size,
        seed=seed,
    )
