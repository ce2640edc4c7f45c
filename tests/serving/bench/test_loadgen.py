"""The load generator against servers of known timing, sick ones among them; the whole benchmark on one."""

import asyncio
import os
import resource
import socket
import time
from collections.abc import AsyncIterator

import pytest

from cluster.cli import RunError
from serving.bench.latency import RequestOutcome, percentile
from serving.bench.loadgen import (
    Lag,
    run_closed,
    run_open,
    server_sent_events,
    to_engine,
)
from serving.bench.workload import Planned
from tests.fake_engine import counting_engine
from tests.serving.bench.scripted import FIRST, GAP, Write, client, event, honest, run, server

pytestmark = pytest.mark.stack


def plan(number: int, *, tokens: int = 5, every: float | None = None) -> list[Planned]:
    return [Planned(None if every is None else every * i, (1, 2, 3), tokens) for i in range(number)]


def test_known_times_are_measured_as_they_are():
    outcomes, lag = run(honest, plan(20, tokens=11, every=0.02))
    assert [outcome.index for outcome in outcomes] == list(range(20))
    assert all(outcome.error is None and outcome.output_tokens == 11 for outcome in outcomes)
    assert all(outcome.prompt_tokens == 3 for outcome in outcomes)
    ttft = percentile([outcome.ttft or 0 for outcome in outcomes], 50)
    tpot = percentile([outcome.tpot or 0 for outcome in outcomes], 50)
    # asyncio's sleeps are never short, and a busy machine makes them long; a wrong unit or origin is longer.
    assert FIRST <= ttft < 5 * FIRST and GAP <= tpot < 5 * GAP
    assert [round(outcome.scheduled, 6) for outcome in outcomes] == [
        pytest.approx(outcomes[0].scheduled + 0.02 * i, abs=1e-6) for i in range(20)
    ]
    assert lag.send_p99 < 0.5


def test_a_closed_loop_keeps_so_many_in_flight():
    running = most = 0

    async def counted(body: dict, write: Write) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await honest(body, write)
        running -= 1

    outcomes, _ = run(counted, plan(12, tokens=2), concurrency=3)
    assert len(outcomes) == 12 and most == 3


def test_a_stalled_server_cannot_hide_in_an_open_loop():
    """It answers at once, but stands still for 0.6 s: all that was due meanwhile waited."""
    stalled_until = [0.0]

    async def stalls(body: dict, write: Write) -> None:
        now = time.monotonic()
        if stalled_until[0] == 0.0:
            stalled_until[0] = now + 0.6
        await asyncio.sleep(max(0.0, stalled_until[0] - now))
        await write(event() + b"data: [DONE]\n\n")

    outcomes, _ = run(stalls, plan(40, tokens=1, every=0.02))
    slow = [outcome for outcome in outcomes if (outcome.ttft or 0) > 0.1]
    assert 23 <= len(slow) <= 30  # 0.5 s of arrivals every 20 ms waited longer than 0.1 s


@pytest.mark.parametrize(
    ("behaviour", "status", "error"),
    [
        ("silent", 200, "timeout"),
        ("stops", 200, "broken off"),
        ("closes", 200, "broken off"),
        ("reports", 200, "error event"),
        ("empty", 200, "no tokens"),
        ("garbage", 200, "malformed event"),
        ("honest", 429, "HTTP 429"),
        ("honest", 500, "HTTP 500"),
    ],
)
def test_whatever_goes_wrong_is_counted_by_its_kind(behaviour, status, error):
    async def misbehave(body: dict, write: Write) -> None:
        if behaviour == "silent":
            await asyncio.sleep(1)
        elif behaviour == "empty":
            await write(b"data: [DONE]\n\n")
        elif behaviour == "garbage":
            await write(b"data: {oops\n\n")
        else:
            await write(event())
            if behaviour == "closes":
                raise ConnectionError
            if behaviour == "reports":
                await write(event(error={"message": "out of memory"}))

    chosen = honest if behaviour == "honest" else misbehave
    outcomes, _ = run(chosen, plan(3), concurrency=3, status=status, timeout=0.4)
    assert [outcome.error for outcome in outcomes] == [error] * 3


def test_a_server_that_is_not_there_is_an_error_too():
    outcomes: list[RequestOutcome] = []

    async def body() -> None:
        async with client("http://127.0.0.1:1", 1.0) as send:
            await run_closed(plan(2), send, concurrency=1, observe=outcomes.append)

    asyncio.run(body())
    assert [outcome.error for outcome in outcomes] == ["connection: ClientConnectorError"] * 2


def test_several_tokens_in_one_chunk_and_one_token_in_several_chunks():
    async def odd(body: dict, write: Write) -> None:
        whole = event() * 3
        for cut in (whole[:70], whole[70:71], whole[71:]):  # within the two bytes of é, and between newlines
            await write(cut)
            await asyncio.sleep(0.01)
        await write(event() * 2 + b"data: [DO")
        await write(b"NE]\n\n")

    [outcome], _ = run(odd, plan(1), concurrency=1)
    assert outcome.error is None and len(outcome.tokens) == 5
    assert outcome.tokens[-1] == outcome.tokens[-2]


def test_events_survive_any_cut():
    text = (event() + b": a comment\n\n" + event(x=1) + b"data: [DONE]\n\n").replace(b"\n", b"\r\n")

    async def chunks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async def read(size: int) -> list[bytes]:
        return [data async for _, data in server_sent_events(chunks(size))]

    found = {size: asyncio.run(read(size)) for size in (1, 2, 7, 50, 1000)}
    assert all(events == found[1000] and len(events) == 3 for events in found.values())


def test_a_client_that_lags_is_refused():
    """Its own callback holds the event loop up."""

    def hog(outcome: RequestOutcome) -> None:
        time.sleep(0.06)

    _, lag = run(honest, plan(20, every=0.01), observe=hog)
    with pytest.raises(
        RunError, match=r"the load generator lagged by \d+\.\d ms .* load.most_lag_ms allows 25"
    ):
        lag.require(0.025)
    Lag(0.001, 0.002).require(0.025)


def test_a_client_that_stands_still_for_a_tenth_of_the_time_is_refused_however_seldom():
    """One long block in many heartbeats, and no schedule that would show it."""

    async def body() -> Lag:
        async def hog() -> None:
            await asyncio.sleep(0.9)
            time.sleep(0.3)

        async with server(honest) as url, client(url) as send:
            blocking = asyncio.create_task(hog())
            lag = await run_closed(plan(20, tokens=15), send, concurrency=2, observe=lambda outcome: None)
            await blocking
            return lag

    assert asyncio.run(body()).loop_p99 > 0.1


def test_a_machine_out_of_connections_is_no_fault_of_the_server():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def body() -> None:
        with socket.socket() as mute:  # it takes connections without a descriptor of this process
            mute.bind(("127.0.0.1", 0))
            mute.listen(100)
            async with client(f"http://127.0.0.1:{mute.getsockname()[1]}") as send:
                limit = len(os.listdir("/proc/self/fd")) + 20
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                try:
                    await run_open(plan(60, every=0.0005), send, observe=lambda outcome: None)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with pytest.raises(RunError, match=r"connection \(Too many open files\), .*ulimit -n"):
        asyncio.run(body())


def test_an_answer_that_ends_early_is_an_error_although_it_ends_well():
    async def short(body: dict, write: Write) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        await write(event() * 2 + event(choices=[], usage=usage) + b"data: [DONE]\n\n")

    [outcome], _ = run(short, plan(1, tokens=5), concurrency=1)
    assert outcome.error == "2 of 5 tokens"


def test_an_error_while_noting_a_request_ends_the_load_at_once():
    def full(outcome: RequestOutcome) -> None:
        raise OSError(28, "No space left on device")

    started = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        run(honest, plan(100, every=0.1), observe=full)
    assert time.monotonic() - started < 5  # of 10 s


def test_an_engine_can_be_asked_directly():
    engine = counting_engine(slots=2, waiting=0, step_seconds=0.01)
    outcomes: list[RequestOutcome] = []
    asyncio.run(run_closed(plan(8), to_engine(engine), concurrency=3, observe=outcomes.append))
    engine.close()
    good = [outcome for outcome in outcomes if outcome.error is None]
    assert {outcome.error for outcome in outcomes} == {None, "overloaded"} and len(outcomes) == 8
    assert all(len(outcome.tokens) == 5 and 0.03 < (outcome.e2e or 0) < 1 for outcome in good)
