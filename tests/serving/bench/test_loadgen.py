"""The load generator against servers of known timing, sick ones among them; the whole benchmark on one."""

import asyncio
import os
import resource
import socket
import time
from collections.abc import AsyncIterator

import pytest

from cluster.cli import RunError
from serving.bench.latency import GIVEN_UP, RequestOutcome, percentile
from serving.bench.loadgen import Lag, run_closed, run_open, to_engine
from serving.bench.wire import server_sent_events
from serving.bench.workload import Planned
from tests.fake_engine import Gate, counting_engine
from tests.serving.bench.scripted import FIRST, GAP, Write, client, event, honest, run, server
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.stack


def plan(number: int, *, tokens: int = 5, every: float | None = None) -> list[Planned]:
    return [Planned(None if every is None else every * i, (1, 2, 3), tokens) for i in range(number)]


def test_known_times_are_measured_as_they_are():
    """Each after the server wrote the token, and none later than the run took: seconds from one origin."""
    written: dict[int, list[float]] = {}

    async def noted(body: dict, write: Write) -> None:
        async def note(data: bytes) -> None:
            written.setdefault(body["seed"], []).append(time.perf_counter())
            await write(data)

        await honest(body, note)

    began = time.perf_counter()
    outcomes, lag = run(noted, plan(20, tokens=11, every=0.02))
    took = time.perf_counter() - began
    assert [outcome.index for outcome in outcomes] == list(range(20))
    assert all(outcome.error is None and outcome.output_tokens == 11 for outcome in outcomes)
    assert all(outcome.prompt_tokens == 3 for outcome in outcomes)
    delays = []  # and one constant, the origin of the outcomes' times
    for outcome in outcomes:
        *tokens, _ = written[outcome.index]  # the last is the usage
        delays += [ours - theirs for ours, theirs in zip(outcome.tokens, tokens, strict=True)]
        # asyncio's sleeps are never short
        assert outcome.ttft >= FIRST and outcome.e2e >= FIRST + 10 * GAP
        assert outcome.scheduled <= outcome.sent < outcome.tokens[0] < outcome.ended <= took
    assert max(delays) - min(delays) <= took
    assert [round(outcome.scheduled, 6) for outcome in outcomes] == [
        pytest.approx(outcomes[0].scheduled + 0.02 * i, abs=1e-6) for i in range(20)
    ]
    sent_late = [outcome.sent - outcome.scheduled for outcome in outcomes]
    assert lag.send_p99 == pytest.approx(percentile(sent_late, 99))


def test_a_closed_loop_keeps_so_many_in_flight():
    running = most = 0
    full = asyncio.Event()

    async def counted(body: dict, write: Write) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            full.set()
        await full.wait()  # with fewer it would wait for ever
        await honest(body, write)
        running -= 1

    outcomes, _ = run(counted, plan(12, tokens=2), concurrency=3)
    assert len(outcomes) == 12 and most == 3


def test_a_stalled_server_cannot_hide_in_an_open_loop():
    """It stands still until 30 requests are there. They come all the same, and count how long they wait."""
    waiting, gone = [], asyncio.Event()

    async def stalls(body: dict, write: Write) -> None:
        waiting.append(body["seed"])
        if len(waiting) == 30:
            gone.set()
        await gone.wait()
        await write(event() + b"data: [DONE]\n\n")

    outcomes, _ = run(stalls, plan(40, tokens=1, every=0.02))
    over = max(outcomes[number].sent for number in waiting[:30])  # the server goes on after this
    for number in waiting[:30]:
        assert outcomes[number].tokens[0] > over
        assert outcomes[number].ttft > over - outcomes[number].scheduled >= 0.02 * (29 - number) - 1e-6


ODD_EVENTS = {
    "garbage": b"{oops",
    "a list": b"[1]",
    "a number": b"3",
    "no choices": b"{}",
    "choices that are none": b'{"choices": 1}',
    "a choice that is none": b'{"choices": [1]}',
    "a count that is none": b'{"choices": [], "usage": {"prompt_tokens": "x"}}',
    "bytes that are no text": b"\xff\xfe",
    "nesting": b"[" * 100_000,
}


@pytest.mark.parametrize(
    ("behaviour", "status", "error"),
    [
        ("silent", 200, "timeout"),
        ("stops", 200, "broken off"),
        ("closes", 200, "broken off"),
        ("reports", 200, "error event"),
        ("empty", 200, "no tokens"),
        *((name, 200, "malformed event") for name in ODD_EVENTS),
        ("honest", 429, "HTTP 429"),
        ("honest", 500, "HTTP 500"),
    ],
)
def test_whatever_goes_wrong_is_counted_by_its_kind(behaviour, status, error):
    async def misbehave(body: dict, write: Write) -> None:
        if behaviour == "silent":
            await asyncio.sleep(PATIENCE_SECONDS)
        elif behaviour == "empty":
            await write(b"data: [DONE]\n\n")
        elif behaviour in ODD_EVENTS:
            await write(b"data: " + ODD_EVENTS[behaviour] + b"\n\n")
        else:
            await write(event())
            if behaviour == "closes":
                raise ConnectionError
            if behaviour == "reports":
                await write(event(error={"message": "out of memory"}))

    chosen = honest if behaviour == "honest" else misbehave
    patience = 0.4 if behaviour == "silent" else PATIENCE_SECONDS
    outcomes, _ = run(chosen, plan(3), concurrency=3, status=status, timeout=patience)
    assert [outcome.error for outcome in outcomes] == [error] * 3


def test_a_server_that_is_not_there_is_an_error_too():
    outcomes: list[RequestOutcome] = []

    async def body() -> None:
        async with client("http://127.0.0.1:1") as send:
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


@pytest.mark.parametrize(("got", "error"), [(2, None), (6, "6 of 5 tokens")])
def test_an_answer_may_end_early_and_is_reported_as_long_as_it_was(got, error):
    async def other(body: dict, write: Write) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": got}
        await write(event() * got + event(choices=[], usage=usage) + b"data: [DONE]\n\n")

    [outcome], _ = run(other, plan(1, tokens=5), concurrency=1)
    assert (outcome.error, outcome.output_tokens, outcome.asked_tokens) == (error, got, 5)


def test_an_error_while_noting_a_request_ends_the_load_at_once():
    """The second request is due in an hour."""

    def full(outcome: RequestOutcome) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run(honest, plan(2, every=3600.0), observe=full)


def test_a_closed_loop_that_is_cancelled_sends_nothing_more():
    """As Ctrl-C does, when each of three has its first request in flight."""
    asked: list[dict] = []

    async def waits(body: dict, write: Write) -> None:
        asked.append(body)
        await asyncio.sleep(PATIENCE_SECONDS)

    async def body() -> None:
        async with server(waits) as url, client(url) as send:
            load = asyncio.create_task(run_closed(plan(9), send, concurrency=3, observe=outcomes.append))
            while len(asked) < 3:
                await asyncio.sleep(0.01)
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load

    outcomes: list[RequestOutcome] = []
    asyncio.run(body())
    assert len(asked) == 3 and [outcome.error for outcome in outcomes] == [GIVEN_UP] * 3


def test_an_engine_can_be_asked_directly():
    """It answers nothing until one of three, for which it has no slot, has been refused."""
    engine = counting_engine(slots=2, waiting=0, step_seconds=0.01)
    gate = Gate(engine)
    outcomes: list[RequestOutcome] = []

    def observe(outcome: RequestOutcome) -> None:
        outcomes.append(outcome)
        gate.release()

    began = time.perf_counter()
    with gate:
        asyncio.run(run_closed(plan(8), to_engine(engine), concurrency=3, observe=observe))
    took = time.perf_counter() - began
    engine.close()
    good = [outcome for outcome in outcomes if outcome.error is None]
    assert {outcome.error for outcome in outcomes} == {None, "overloaded"} and len(outcomes) == 8
    assert all(len(outcome.tokens) == 5 and 0.05 <= outcome.e2e < took for outcome in good)
