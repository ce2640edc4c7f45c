"""An endpoint that answers as a test scripts it, and a load sent to it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from cluster.endpoint_client import Endpoint
from serving.bench.latency import RequestOutcome
from serving.bench.loadgen import Lag, run_closed, run_open
from serving.bench.wire import Send, over_http
from serving.bench.workload import Planned
from tests.waiting import PATIENCE_SECONDS

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
                    listed = json.dumps({"data": [{"id": "m", "max_model_len": 4096}]}).encode()
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


def client(url: str, timeout: float = PATIENCE_SECONDS) -> AbstractAsyncContextManager[Send]:
    return over_http(Endpoint(f"{url}/v1", "m"), timeout_seconds=timeout)


def run(
    behaviour: Behaviour, requests: list[Planned], *, concurrency: int | None = None, status: int = 200,
    timeout: float = PATIENCE_SECONDS, observe: Callable[[RequestOutcome], None] | None = None,
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
