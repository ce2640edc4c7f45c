"""The load generator against servers of known timing, sick ones among them; the whole benchmark on one."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import torch

from cluster.cli import RunError
from cluster.endpoint_client import Endpoint
from serving.bench import command as bench
from serving.bench.config import load
from serving.bench.latency import RequestOutcome, percentile
from serving.bench.loadgen import (
    Lag,
    Send,
    over_http,
    run_closed,
    run_open,
    server_sent_events,
    to_engine,
)
from serving.bench.measure import Search
from serving.bench.workload import Planned
from tests.commands import ROOT
from tests.fake_engine import counting_engine

pytestmark = pytest.mark.stack

FIRST, GAP = 0.05, 0.01  # seconds to the first token and between tokens
Write = Callable[[bytes], Awaitable[None]]


def event(**fields: object) -> bytes:
    return (
        b"data: " + json.dumps({"choices": [{"text": "é"}]} | fields, ensure_ascii=False).encode() + b"\n\n"
    )


async def honest(body: dict, write: Write) -> None:
    """So many tokens, at known times, with their count."""
    await asyncio.sleep(FIRST)
    for index in range(body["max_tokens"]):
        await write(event())
        if index + 1 < body["max_tokens"]:
            await asyncio.sleep(GAP)
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    await write(event(choices=[], usage=usage) + b"data: [DONE]\n\n")


Behaviour = Callable[[dict, Write], Awaitable[None]]


@asynccontextmanager
async def server(behaviour: Behaviour, *, status: int = 200) -> AsyncIterator[str]:
    """An HTTP server whose every POST is answered by `behaviour`, chunked; a GET by a list of models."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET"):
                    listed = json.dumps({"data": [{"id": "m"}]}).encode()
                    length = f"content-length: {len(listed)}\r\n\r\n".encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + length + listed)
                    continue
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if b"content-length" in line
                )
                body = json.loads(await reader.readexactly(length))

                async def write(data: bytes) -> None:
                    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    await writer.drain()

                writer.write(f"HTTP/1.1 {status} x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
                await behaviour(body, write)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # the test is over
            pass
        finally:
            writer.close()

    served = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with served:
        yield f"http://127.0.0.1:{served.sockets[0].getsockname()[1]}"
        served.close()


def client(url: str, timeout: float = 5.0) -> AbstractAsyncContextManager[Send]:
    return over_http(Endpoint(f"{url}/v1", "m"), timeout_seconds=timeout)


def plan(number: int, *, tokens: int = 5, every: float | None = None) -> list[Planned]:
    return [Planned(None if every is None else every * i, (1, 2, 3), tokens) for i in range(number)]


def run(
    behaviour: Behaviour, requests: list[Planned], *, concurrency: int | None = None, status: int = 200,
    timeout: float = 5.0, observe: Callable[[RequestOutcome], None] | None = None,
) -> tuple[list[RequestOutcome], Lag]:  # fmt: skip
    outcomes: list[RequestOutcome] = []

    async def body() -> Lag:
        async with server(behaviour, status=status) as url, client(url, timeout) as send:
            tell = observe or outcomes.append
            if concurrency is None:
                return await run_open(requests, send, observe=tell)
            return await run_closed(requests, send, concurrency=concurrency, observe=tell)

    lag = asyncio.run(body())
    return sorted(outcomes, key=lambda outcome: outcome.index), lag


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


KEYS = (
    "bench.wandb=disabled", "load.concurrency=[1,3]", "load.requests=6", "load.warm_up=2", "load.rates=[20]",
    "load.seconds=0.5", "load.output_tokens=4", "load.most_lag_ms=1e6", "sweep.points=2",
)  # fmt: skip


def test_the_benchmark_of_an_endpoint_leaves_its_record(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    async def body() -> int:
        async with server(honest) as url:
            return await asyncio.to_thread(bench.main, [f"bench.target={url}", *KEYS])

    assert asyncio.run(body()) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    run = tmp_path / "outputs/serve-bench"
    assert [point["load"] for point in summary["points"]][:3] == [
        "1 in flight",
        "3 in flight",
        "20.00/s poisson",
    ]
    assert len(summary["points"]) == 5 and summary["ceilings"] is None  # a stranger: no shares
    assert summary["highest_rate_meeting_slo"] > 0
    assert summary["no_shares"] in out and "does not say what its model weighs" in summary["no_shares"]
    assert summary["points"][0]["requests"] == 6 and summary["points"][0]["ttft_p50_ms"] >= 1e3 * FIRST
    rows = [json.loads(line) for line in (run / "requests.jsonl").read_text().splitlines()]
    assert sum(row["load"] == "1 in flight" for row in rows) == 8
    assert sum(row["measured"] for row in rows if row["load"] == "1 in flight") == 6
    assert all(len(row["tokens"]) == 4 for row in rows)
    assert json.loads((run / "summary.json").read_text())["points"] == summary["points"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    assert (run / "plots/latency.png").is_file() and (run / "config.yaml").is_file()
    assert "serve-bench" in out and "TTFT p50" in out


def test_the_search_doubles_then_bisects_and_keeps_a_lagging_client_apart_from_the_server():
    search = Search(met=10.0)
    assert search.following(10.0) == 20.0 and "10.00 requests/s; none missed it" in search.describe()
    search.lagged = 40.0
    assert search.following(40.0) == 25.0 and "none missed it; at 40.00 the load gen" in search.describe()
    search.missed = 20.0
    assert search.following(20.0) == 15.0 and "10.00 requests/s; 20.00 missed it" in search.describe()
    assert "no rate could be measured" in Search(lagged=5.0).describe()


def test_the_search_goes_beyond_the_closed_loop_and_says_what_missed(tmp_path, monkeypatch, capsys):
    """A server that is quick with up to 6 requests at once and slow beyond; the closed loop has one."""
    monkeypatch.chdir(tmp_path)
    running = 0

    async def small(body: dict, write: Write) -> None:
        nonlocal running
        running += 1
        await asyncio.sleep(0.05 if running <= 6 else 0.6)
        running -= 1
        await write(event() + b"data: [DONE]\n\n")

    keys = (
        "load.concurrency=[1]", "load.requests=8", "load.arrivals=constant", "load.seconds=1",
        "sweep.points=6", "load.output_tokens=1", "load.most_lag_ms=1e6", "bench.wandb=disabled",
    )  # fmt: skip

    async def body() -> int:
        async with server(small) as url:
            return await asyncio.to_thread(bench.main, [f"bench.target={url}", *keys])

    assert asyncio.run(body()) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    closed = summary["points"][0]["requests_per_second"]
    met, missed = summary["highest_rate_meeting_slo"], summary["lowest_rate_missing_slo"]
    assert max(point["rate"] or 0 for point in summary["points"]) >= 2 * closed
    assert closed <= met < missed  # 6 at once of 50 ms are 120 a second, six times what one in flight reaches
    assert f"highest rate that met the SLO: {met:.2f} requests/s; {missed:.2f} missed it" in out


def test_ctrl_c_keeps_what_was_measured_and_calls_it_no_whole_run(tmp_path: Path):
    async def body() -> tuple[int, str]:
        async with server(honest) as url:
            keys = [key for key in KEYS if not key.startswith("load.rates")]
            child = subprocess.Popen(
                [sys.executable, "-m", "serving.bench", f"bench.target={url}", *keys, "load.rates=[5]",
                 "load.seconds=60"],
                cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            rows = tmp_path / "outputs/serve-bench/requests.jsonl"
            while not (rows.exists() and "poisson" in rows.read_text()):
                assert child.poll() is None
                await asyncio.sleep(0.05)
            child.send_signal(signal.SIGINT)
            out, _ = await asyncio.to_thread(child.communicate)
            return child.returncode, out

    code, out = asyncio.run(body())
    folder = tmp_path / "outputs/serve-bench"
    assert code == 130 and "3 in flight" in out
    assert not (folder / "summary.json").exists() and (folder / "plots/itl.png").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_lagging_client_s_points_are_named_and_not_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keys = [key for key in KEYS if "lag" not in key] + ["load.most_lag_ms=0.0001"]

    async def body() -> int:
        async with server(honest) as url:
            return await asyncio.to_thread(bench.main, [f"bench.target={url}", *keys])

    assert asyncio.run(body()) == 1
    captured = capsys.readouterr()
    assert "not reported, because the load generator lagged: 1 in flight, 3 in flight" in captured.err
    points = json.loads(captured.out.splitlines()[-1])["points"]
    assert all("ttft_p50_ms" not in point and "refused" in point for point in points)


def test_a_load_of_which_every_request_failed_fails_the_benchmark_and_is_named_last(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    async def body() -> int:
        async with server(honest, status=500) as url:
            keys = [*KEYS, "load.rates=[]", "sweep.points=0"]
            return await asyncio.to_thread(bench.main, [f"bench.target={url}", *keys])

    assert asyncio.run(body()) == 1
    captured = capsys.readouterr()
    failed = "1 in flight (HTTP 500); 3 in flight (HTTP 500); the server's log says why"
    assert captured.err.splitlines()[-1] == f"error: every request failed: {failed}"
    points = json.loads(captured.out.splitlines()[-1])["points"]
    assert [point["errors"] for point in points] == [{"HTTP 500": 6}] * 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["bench.target=http://127.0.0.1:1"],
            "bench.target: http://127.0.0.1:1/v1/models does not answer .*refused",
        ),
        (["load.prompt_tokens=many", "bench.target=URL"], "load.prompt_tokens: 'many' is none of"),
        (["load.rates=[0]"], r"load.rates: must lie in .0, "),
        (["bench.compare=sglang"], "bench.compare: 'sglang' is not one of: serve, transformers, vllm"),
        (
            ["bench.target=URL", "bench.target_model=x"],
            "bench.target_model: 'x' is not served at .*; there are: m",
        ),
        (
            ["load.trace=gone.jsonl", "load.concurrency=[]", "sweep.points=0", "bench.target=URL"],
            "gone.jsonl: cannot",
        ),
    ],
)
def test_bad_input_is_one_message(tmp_path, monkeypatch, capsys, keys, message):
    import re

    monkeypatch.chdir(tmp_path)

    async def body() -> int:
        async with server(honest) as url:
            arguments = [key.replace("URL", url) for key in keys]
            return await asyncio.to_thread(bench.main, ["bench.wandb=disabled", *arguments])

    assert asyncio.run(body()) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ceilings_that_cannot_be_measured_are_missing_and_say_why(capsys):
    model = {"engine_info": {"device": "cuda", "dtype": "bf16", "details": {}}}
    assert bench._ceilings(load(), model) is None
    assert re.search(r"could not be measured: .+", capsys.readouterr().err)
