"""Sends a load to an OpenAI-compatible endpoint and notes when each token arrives.

Open loop: requests leave on an absolute schedule, whatever the server does, and latency counts from the
schedule. Closed loop: a fixed number is in flight, and the next leaves when one ends. A client that cannot
keep up would report its own delays as the server's, so it measures its own lag: see `Lag`.
"""

import asyncio
import errno
import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cluster import endpoint_client
from cluster.cli import RunError
from cluster.endpoint_client import Endpoint
from serving.bench.latency import RequestOutcome, percentile
from serving.bench.workload import Planned
from serving.engine.protocol import Engine, EngineFailed, Overloaded, Sampling, Stream

HEARTBEAT_SECONDS = 0.005
OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)  # this machine's own limits
Observe = Callable[[RequestOutcome], None]


@dataclass(frozen=True)
class Lag:
    """How late this process was, in seconds: its event loop and, in an open loop, its sending.

    `loop_p99` is over time: during 99% of it, an arrival was noticed sooner than this.
    """

    loop_p99: float
    send_p99: float

    def require(self, most_seconds: float) -> None:
        """Raise `RunError` if either exceeds `most_seconds`: such a run's latencies are the client's own."""
        worst = max(self.loop_p99, self.send_p99)
        if worst > most_seconds:
            raise RunError(
                f"the load generator lagged by {1e3 * worst:.1f} ms (p99; load.most_lag_ms allows "
                f"{1e3 * most_seconds:g}), so its latencies would not be the server's; lower the load, give "
                "it a core of its own (engine.threads, taskset), or raise load.most_lag_ms and say so"
            )


# Sends a request that was due at `scheduled`, and waits for its end; `start` is time 0 of the outcome. Errors
# are outcomes, except those of this machine, which are a `RunError`.
Send = Callable[[Planned, int, float, float], Awaitable[RequestOutcome]]


async def run_open(plan: Sequence[Planned], send: Send, *, observe: Observe) -> Lag:
    """Send each request of `plan` at its time. Ends when the last has ended."""
    async with _Heart() as heart:
        start = time.perf_counter() + 0.05
        lags: list[float] = []

        async def work(index: int, planned: Planned, scheduled: float) -> None:
            outcome = await send(planned, index, scheduled, start)
            lags.append(outcome.sent - outcome.scheduled)
            observe(outcome)

        async with _Together() as group:
            for index, planned in enumerate(plan):
                assert planned.at is not None
                scheduled = start + planned.at
                if (wait := scheduled - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(work(index, planned, scheduled))
    return heart.lag(lags)


async def run_closed(plan: Sequence[Planned], send: Send, *, concurrency: int, observe: Observe) -> Lag:
    """Keep `concurrency` requests of `plan` in flight until there are no more."""
    queue = iter(enumerate(plan))
    async with _Heart() as heart:
        start = time.perf_counter()

        async def work() -> None:
            for index, planned in queue:
                observe(await send(planned, index, time.perf_counter(), start))

        async with _Together() as group:
            for _ in range(concurrency):
                group.create_task(work())
    return heart.lag([])


@asynccontextmanager
async def over_http(
    endpoint: Endpoint, *, timeout_seconds: float, greedy: bool = True
) -> AsyncIterator[Send]:
    """Sends requests to an endpoint over connections that are kept open.

    Args:
        timeout_seconds: for one request, from its sending to its end.
        greedy: temperature 0; else 1 with a seed for each request.
    """
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # aiohttp would queue what exceeds 100 connections
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        headers=endpoint_client.headers(),
        read_bufsize=1 << 20,
    )
    async with session:

        async def send(planned: Planned, index: int, scheduled: float, start: float) -> RequestOutcome:
            body = {
                "model": endpoint.model,
                "prompt": planned.prompt if isinstance(planned.prompt, str) else list(planned.prompt),
                "max_tokens": planned.max_tokens,
                "temperature": 0 if greedy else 1,
                "seed": index,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
            sent = time.perf_counter()
            answer = await _post(session, f"{endpoint.url}/completions", body)
            return _outcome(planned, index, answer, scheduled=scheduled, sent=sent, start=start)

        yield send


def to_engine(engine: Engine) -> Send:
    """Sends requests to an engine in this process, without HTTP."""

    async def send(planned: Planned, index: int, scheduled: float, start: float) -> RequestOutcome:
        assert not isinstance(planned.prompt, str)
        sampling = Sampling(max_tokens=planned.max_tokens, temperature=0.0, ignore_eos=True)
        sent, tokens, error = time.perf_counter(), [], None
        try:
            async for arrived in Stream(engine, planned.prompt, sampling):
                tokens += [time.perf_counter() - start] * len(arrived)
        except Overloaded:
            error = "overloaded"
        except EngineFailed:
            error = "engine failed"
        return RequestOutcome(
            index=index,
            scheduled=scheduled - start,
            sent=sent - start,
            tokens=tuple(tokens),
            ended=time.perf_counter() - start,
            prompt_tokens=len(planned.prompt),
            output_tokens=len(tokens),
            error=error,
        )

    return send


@dataclass
class _Streamed:
    """An answer as it came: when each token arrived, the server's counts, what went wrong, when it ended."""

    tokens: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    ended: float = 0.0


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> _Streamed:
    """Send one request and read its answer. Raises `RunError`: this machine has no connection left."""
    streamed = _Streamed()
    try:
        async with session.post(url, json=body) as answer:
            if answer.status != 200:
                streamed.error = f"HTTP {answer.status}"
            else:
                streamed.error = await _read(answer, streamed.tokens, streamed.usage)
    except TimeoutError:
        streamed.error = "timeout"
    except (aiohttp.ClientPayloadError, ConnectionError):
        streamed.error = "broken off"
    except (ValueError, KeyError):
        streamed.error = "malformed event"
    except aiohttp.ClientError as problem:
        if isinstance(problem, OSError) and problem.errno in OURS:
            raise RunError(
                f"the load generator cannot open another connection ({problem.strerror}), which is no fault "
                "of the server; raise the limit (ulimit -n), or lower the load"
            ) from problem
        streamed.error = f"connection: {type(problem).__name__}"
    streamed.ended = time.perf_counter()
    return streamed


def _outcome(
    planned: Planned, index: int, answer: _Streamed, *, scheduled: float, sent: float, start: float
) -> RequestOutcome:
    asked, got = planned.max_tokens, answer.usage.get("completion_tokens", planned.max_tokens)
    error = answer.error
    if error is None and got != asked:  # ignore_eos was set, so that lengths are exact
        error = f"{got} of {asked} tokens"
    size = len(planned.prompt) if not isinstance(planned.prompt, str) else 0
    return RequestOutcome(
        index=index,
        scheduled=scheduled - start,
        sent=sent - start,
        tokens=tuple(moment - start for moment in answer.tokens),
        ended=answer.ended - start,
        prompt_tokens=answer.usage.get("prompt_tokens", size),
        output_tokens=answer.usage.get("completion_tokens", len(answer.tokens)),
        error=error,
    )


async def _read(answer: aiohttp.ClientResponse, tokens: list[float], usage: dict[str, int]) -> str | None:
    """Note the times of an answer's tokens. Returns what is wrong with it, if anything."""
    async for moment, data in server_sent_events(answer.content.iter_any()):
        if data == b"[DONE]":
            return None if tokens else "no tokens"
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            return "error event"
        if event.get("usage"):
            usage.update(event["usage"])
        if event["choices"]:
            tokens.append(moment)
    return "broken off"


async def server_sent_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, bytes]]:
    """(when its last byte arrived, data) of each event, however the chunks cut them.

    https://html.spec.whatwg.org/multipage/server-sent-events.html, without multi-line data, which no
    OpenAI-compatible server sends.
    """
    held = b""
    async for chunk in chunks:
        moment = time.perf_counter()
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield moment, line[5:].strip()


class _Together(asyncio.TaskGroup):
    """A task group that raises the first failure itself, not a group of one."""

    async def __aexit__(self, *about: Any) -> None:
        try:
            await super().__aexit__(*about)
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None


class _Heart:
    """Measures every few milliseconds how late the event loop is. Freezes the garbage collector."""

    def __init__(self) -> None:
        self._late: list[float] = []

    async def __aenter__(self) -> "_Heart":
        gc.collect()
        gc.freeze()  # a full collection during the load would delay this client
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        gc.unfreeze()

    async def _beat(self) -> None:
        due = time.perf_counter() + HEARTBEAT_SECONDS
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            # Count the beats that a blocked loop has missed: one long block would otherwise count as one.
            while (late := time.perf_counter() - due) >= 0:
                self._late.append(late)
                due += HEARTBEAT_SECONDS

    def lag(self, sending: Sequence[float]) -> Lag:
        return Lag(loop_p99=percentile(self._late, 99) or 0.0, send_p99=percentile(sending, 99) or 0.0)
