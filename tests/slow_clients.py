"""Clients that never finish, all at once, and whether the endpoint still serves others meanwhile.

python -m tests.slow_clients URL [--clients N] [--seconds S]      against `make serve`, on this machine
"""

import argparse
import asyncio
import http.client
import json
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from urllib.parse import urlsplit

import psutil

from cluster.process import Child
from tests.commands import ROOT
from tests.waiting import PATIENCE_SECONDS

BYTE_SECONDS = 0.5  # between the bytes of those that send slowly
POST = (
    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
)
PLAIN, HUGE, CHUNKED = "Content-Length: 60000", "Content-Length: 1000000000", "Transfer-Encoding: chunked"
# What each kind sends at once, and then again and again: each byte of it slowly, or all of it at full speed.
KINDS = {
    "half a head": (b"POST /v1/completions HTTP/1.1\r\nHost: local", b"h", "slowly"),
    "no body": (POST.format(length=PLAIN).encode(), b"", "slowly"),
    "slow body": (POST.format(length=PLAIN).encode() + b'{"model":"' + b"x" * 20_000, b"x", "slowly"),
    "slow chunks": (POST.format(length=CHUNKED).encode(), b"1\r\n{\r\n", "slowly"),
    "huge body": (POST.format(length=HUGE).encode(), b"x" * 65_536, "fast"),
    "endless chunks": (POST.format(length=CHUNKED).encode(), b"10000\r\n" + b"[" * 65_536 + b"\r\n", "fast"),
}


@dataclass
class Seen:
    """What came of it.

    Attributes:
        answers: how often each kind of client got which status; "closed": none, "open": not yet.
        health_seconds, completion_seconds: the slowest of those that others asked for meanwhile.
        failures: what they got instead of a 200.
        idle_bytes, peak_bytes: memory of the server's processes, before and at most.
    """

    answers: dict[str, int] = field(default_factory=dict)
    health_seconds: float = 0.0
    completion_seconds: float = 0.0
    num_health: int = 0
    num_completions: int = 0
    failures: dict[str, int] = field(default_factory=Counter)
    idle_bytes: int = 0
    peak_bytes: int = 0


def measure(
    url: str, *, clients: int, seconds: float, server: Sequence[psutil.Process], others: int = 0
) -> Seen:
    """`clients` clients of all KINDS, in a process of their own, and what others see meanwhile.

    Args:
        seconds: after which they give up, and with them the measurement.
        server: the processes whose memory, with that of their descendants, is measured.
        others: as many come, again and again, until so many requests of others of each kind were answered.
    """
    [model] = json.loads(_ask(url, "GET", "/v1/models")[1])["data"]
    completion = json.dumps({"model": model["id"], "prompt": [1], "max_tokens": 2})
    seen = Seen(idle_bytes=memory(server))
    command = [sys.executable, "-m", "tests.slow_clients", url, "--attack"]
    command += ["--clients", str(clients), "--seconds", str(seconds)]
    ended = threading.Event()

    def ask(method: str, path: str, body: str | None) -> None:
        while not ended.is_set():
            start = time.monotonic()
            try:
                status, _ = _ask(url, method, path, body)
                problem = None if status == 200 else f"{path}: {status}"
            except OSError as error:
                problem = f"{path}: {error}"
            if problem is not None:
                seen.failures[problem] = seen.failures.get(problem, 0) + 1
            took = time.monotonic() - start
            if path == "/health":
                seen.health_seconds, seen.num_health = max(seen.health_seconds, took), seen.num_health + 1
            else:
                seen.completion_seconds = max(seen.completion_seconds, took)
                seen.num_completions += 1
            ended.wait(0.05)

    askers = [
        threading.Thread(target=ask, args=("GET", "/health", None)),
        threading.Thread(target=ask, args=("POST", "/v1/completions", completion)),
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with Child(command, cwd=ROOT, text=True, **pipes) as attackers:
        assert attackers.stdin is not None and attackers.stdout is not None
        for asker in askers:
            asker.start()
        while attackers.poll() is None:
            seen.peak_bytes = max(seen.peak_bytes, memory(server))
            if min(seen.num_health, seen.num_completions) >= others:
                attackers.stdin.close()  # this wave is the last one
            time.sleep(0.3)
        ended.set()
        for asker in askers:
            asker.join()
        seen.answers = json.load(attackers.stdout)
    return seen


def memory(server: Sequence[psutil.Process]) -> int:
    """Bytes that processes and their descendants hold: proportional, so that shared pages count once."""
    total = 0
    for top in server:
        with suppress(psutil.Error):
            total += sum(one.memory_full_info().pss for one in [top, *top.children(recursive=True)])
    return total


def _ask(url: str, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    """Over a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# --- the attackers' side ----------------------------------------------------------------------------------


async def attack(url: str, *, clients: int, seconds: float) -> Counter[str]:
    """Waves of `clients` clients of all KINDS until the standard input ends, for at most so long.

    Returns what they got.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, clients + 100)), hard))
    answers: Counter[str] = Counter()
    end = asyncio.get_running_loop().time() + seconds
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while not answers or not told.done():
        async with asyncio.TaskGroup() as group:
            for kind in islice(cycle(KINDS), clients):
                group.create_task(_never_finish(url, kind, end, answers))
    return answers


async def _never_finish(url: str, kind: str, end: float, answers: Counter[str]) -> None:
    first, again, pace = KINDS[kind]
    answer = "open"
    with suppress(TimeoutError):
        async with asyncio.timeout_at(end):
            try:
                address = urlsplit(url)
                reader, writer = await asyncio.open_connection(address.hostname, address.port)
                writer.write(first)
                sending = asyncio.create_task(_send(writer, again, pace))
                try:
                    line = await reader.readline()
                    answer = line.split()[1].decode() if line else "closed"
                finally:
                    sending.cancel()
                    writer.close()
            except OSError:
                answer = "closed"
    answers[f"{kind}: {answer}"] += 1


async def _send(writer: asyncio.StreamWriter, again: bytes, pace: str) -> None:
    with suppress(OSError):
        while again:
            if pace == "slowly":
                await asyncio.sleep(BYTE_SECONDS)
            writer.write(again)
            await writer.drain()


def main() -> int:
    """The command. Prints one JSON object; exit code 1: /health was late, or memory doubled."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow_clients", description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--attack", action="store_true", help="be the clients and measure nothing")
    options = parser.parse_args()
    if options.attack:
        answers = asyncio.run(attack(options.url, clients=options.clients, seconds=options.seconds))
        print(json.dumps(answers))
        return 0
    seen = measure(
        options.url,
        clients=options.clients,
        seconds=options.seconds,
        server=_server(urlsplit(options.url).port),
    )
    print(json.dumps(asdict(seen), indent=1))
    return int(seen.health_seconds > 1 or bool(seen.failures) or seen.peak_bytes > 2 * seen.idle_bytes)


def _server(port: int | None) -> list[psutil.Process]:
    """What listens on this port of this machine (HAProxy), and the replicas of the same command."""
    [pid] = {c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
    listener = psutil.Process(pid)
    commands = [one for one in listener.parents() if any("serving.app" in word for word in one.cmdline())]
    below = commands[-1].children(recursive=True) if commands else []
    return [listener, *(one for one in below if any("ServeReplica" in word for word in one.cmdline()))]


if __name__ == "__main__":
    sys.exit(main())
