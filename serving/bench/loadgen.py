"""Sends a load, over HTTP (`serving.bench.wire`) or to an engine here, and notes when each token arrives.

Open loop: requests leave on an absolute schedule, whatever the server does, and latency counts from the
schedule. Closed loop: a fixed number is in flight, and the next leaves when one ends. A client that cannot
keep up would report its own delays as the server's, so it measures its own lag: see `Lag`.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.cli import RunError
from serving.bench.latency import GIVEN_UP, RequestOutcome, percentile
from serving.bench.steady import Steady
from serving.bench.wire import Send
from serving.bench.workload import Planned
from serving.engine.protocol import Engine, EngineFailed, Overloaded, Sampling, Stream

HEARTBEAT_SECONDS = 0.005
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


async def run_open(
    plan: Iterable[Planned], send: Send, *, observe: Observe, steady: Steady | None = None
) -> Lag:
    """Send each request of `plan` at its time, and turns that follow it when it has ended.

    Ends when the last has ended, or once `steady` is over.
    """
    async with _Heart() as heart:
        start = time.perf_counter() + 0.05
        async with _Load(send, observe, steady, start) as load:

            async def arrive() -> None:
                for chain in _chains(plan):
                    assert chain[0].at is not None
                    scheduled = start + chain[0].at
                    if (wait := scheduled - time.perf_counter()) > 0:
                        await asyncio.sleep(wait)
                    load.begin(load.follow(chain, scheduled))

            load.begin(arrive())
    return heart.lag(load.lags)


async def run_closed(
    plan: Iterable[Planned], send: Send, *, concurrency: int, observe: Observe, steady: Steady | None = None
) -> Lag:
    """Keep `concurrency` requests of `plan` in flight until there are no more, or `steady` is over."""
    queue = _chains(plan)
    async with _Heart() as heart, _Load(send, observe, steady, time.perf_counter()) as load:

        async def work() -> None:
            for chain in queue:
                await load.follow(chain, None)
                if load.over:
                    return

        for _ in range(concurrency):
            load.begin(work())
    return heart.lag([])


def _chains(plan: Iterable[Planned]) -> Iterator[list[Planned]]:
    """Each request with the turns of its conversation that follow it in the plan."""
    chain: list[Planned] = []
    for planned in plan:
        if chain and not planned.follows:
            yield chain
            chain = []
        chain.append(planned)
    if chain:
        yield chain


class _Load:
    """The tasks of one load. Requests are numbered as they are sent.

    Attributes:
        lags: how late each request was sent, seconds.
        over: the measured requests have ended, or the load was cancelled; nothing more is sent.
    """

    def __init__(self, send: Send, observe: Observe, steady: Steady | None, start: float) -> None:
        self._send, self._observe, self._steady, self._start = send, observe, steady, start
        self._group, self._tasks, self._num_sent = _Together(), set[asyncio.Task[None]](), 0
        self.lags: list[float] = []
        self.over = False

    async def __aenter__(self) -> "_Load":
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *about: Any) -> None:
        await self._group.__aexit__(*about)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def follow(self, chain: Sequence[Planned], scheduled: float | None) -> None:
        """Send the requests of a chain, each when the one before it has ended; the first now if not said."""
        for planned in chain:
            index, due = self._num_sent, scheduled or time.perf_counter()
            self._num_sent, scheduled = index + 1, None
            if self._steady is not None:
                self._steady.begins(index, due - self._start)
            outcome = await self._send(planned, index, due, self._start)
            self.lags.append(outcome.sent - outcome.scheduled)
            self._observe(outcome)
            if self._steady is not None:
                self._steady.ends(index)
                if self._steady.over and not self.over:
                    self.over = True
                    for task in self._tasks:
                        task.cancel()
            self.over = self.over or outcome.error == GIVEN_UP  # cancelled: Ctrl-C, or another task failed
            if self.over:
                return


def to_engine(engine: Engine) -> Send:
    """Sends requests to an engine in this process, without HTTP."""

    async def send(planned: Planned, index: int, scheduled: float, start: float) -> RequestOutcome:
        assert not isinstance(planned.prompt, str)
        sampling = Sampling(max_tokens=planned.max_tokens, temperature=0.0, ignore_eos=True)
        sent, tokens, error, stream = time.perf_counter(), [], None, None
        try:
            stream = Stream(engine, planned.prompt, sampling)
            async for arrived in stream:
                tokens += [time.perf_counter() - start] * len(arrived)
        except asyncio.CancelledError:  # the load is over; what has arrived counts
            error = GIVEN_UP
            if stream is not None:
                stream.cancel()
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
            asked_tokens=planned.max_tokens,
            error=error,
        )

    return send


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
