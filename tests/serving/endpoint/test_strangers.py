"""Clients and pages that nobody trusts: unfinished and oversized bodies, foreign hosts and origins."""

import socket
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from serving.endpoint import bodies
from tests.fake_engine import counting_engine
from tests.serving.endpoint.server import Server, head
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.stack


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_SECONDS)


def received(sock: socket.socket) -> bytes:
    """What comes back until the server closes the connection."""
    answer = b""
    with suppress(ConnectionResetError):
        while part := sock.recv(65536):
            answer += part
    return answer


def raw(server: Server, request: bytes) -> bytes:
    with connect(server) as sock:
        with suppress(ConnectionError):  # it may close before it has read everything
            sock.sendall(request)
        return received(sock)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    made = Server(counting_engine(), body_seconds=0.5)
    yield made
    made.close()


def begin_many(server: Server) -> list[socket.socket]:
    """Connections on which a body begins that never ends."""
    starts = (
        head("content-length: 100"),
        head("content-length: 100") + b"{",
        head("transfer-encoding: chunked"),
    )
    sockets = [connect(server) for _ in range(300)]
    for number, sock in enumerate(sockets):
        sock.sendall(starts[number % len(starts)])
    return sockets


@pytest.fixture
def patient() -> Iterator[Server]:
    made = Server(counting_engine(), body_seconds=2 * PATIENCE_SECONDS)
    yield made
    made.close()


def test_unfinished_bodies_hold_up_nobody(patient):
    sockets = begin_many(patient)
    assert httpx.get(f"{patient.url}/health").status_code == 200
    assert patient.post().status_code == 200
    for sock in sockets:
        sock.close()


def test_unfinished_bodies_are_408(hasty):
    for sock in begin_many(hasty):
        answer = received(sock)
        sock.close()
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"type":"invalid_request_error"' in answer


def test_a_body_that_comes_slowly_is_408_too(hasty):
    with connect(hasty) as sock:
        sock.sendall(head("content-length: 1000"))
        sock.settimeout(0.05)
        answer = b""
        for _ in range(999):  # it never ends, and has 50 s
            with suppress(ConnectionError):
                sock.sendall(b" ")
            with suppress(TimeoutError):
                answer = sock.recv(65536)
                break
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "request_",
    [
        head("content-length: 100000000"),
        head("content-length: 99999999999999999999999999"),
        head("transfer-encoding: chunked") + b"30000\r\n" + b"[" * 0x30000 + b"\r\n",
    ],
)
def test_a_body_that_no_prompt_of_this_context_needs_is_refused_before_it_has_arrived(server, request_):
    answer = raw(server, request_)
    status = int(answer.split()[1])
    assert (
        status == 413 and b"shorten the prompt" in answer
    ) or status == 400  # no number of that size is one


def test_bodies_that_hold_too_much_push_out_the_oldest_and_not_the_newest(monkeypatch):
    monkeypatch.setattr(bodies, "MOST_HELD_BYTES", 50_000)
    made: list[bodies.Bodies] = []
    make = bodies.Bodies.__init__

    def noted(self: bodies.Bodies, **options: object) -> None:
        made.append(self)
        make(self, **options)

    monkeypatch.setattr(bodies.Bodies, "__init__", noted)
    server = Server(counting_engine(), body_seconds=2 * PATIENCE_SECONDS)
    [held] = made
    stalled = []
    for number in range(4):
        stalled.append(connect(server))
        stalled[-1].sendall(head("content-length: 30000") + b" " * 20_000)
        if number > 1:  # the one before it, and no other, has to go
            answer = received(stalled[number - 2])
            assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1" in answer
        wait_until(lambda number=number: held._held == 20_000 * min(number + 1, 2))
    assert server.post(user="x" * 5_000).status_code == 200
    body = b'{"model":"counting","prompt":[1],"max_tokens":1}'.ljust(10_000)
    stalled[3].sendall(body)
    assert stalled[3].recv(65536).startswith(b"HTTP/1.1 200 ")
    for sock in stalled:
        sock.close()
    server.close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "LocalHost", "origin": "http://localhost:3000"}, 200),
        ({"host": "rebound.example:8000"}, 403),
        ({"host": "127.0.0.1.rebound.example"}, 403),
        ({"host": "localhost@rebound.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost", "origin": "https://page.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
    ],
)
def test_another_site_s_page_gets_nothing_from_a_browser_on_this_machine(server, headers, status):
    answers = [
        httpx.get(f"{server.url}{path}", headers=headers) for path in ("/health", "/v1/models", "/metrics")
    ]
    answers.append(
        httpx.post(
            f"{server.url}/v1/completions", json={"model": "counting", "prompt": [1], "max_tokens": 1},
            headers=headers,
        )
    )  # fmt: skip
    assert [answer.status_code for answer in answers] == [status] * 4
    if status == 403:
        assert all(answer.json()["error"]["code"] == "host_not_allowed" for answer in answers)
    assert not any(name.startswith("access-control") for answer in answers for name in answer.headers)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "x" * 10_000])
def test_what_a_browser_sends_unasked_is_no_request(server, kind):
    headers = {} if kind is None else {"content-type": kind}
    body = b'{"model": "counting", "prompt": "a"}'
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    assert len(answer.content) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a " * 20_000},
        {"prompt": [1] * 20_000},
        {"prompt": [[1]] * 10_000},
        {"prompt": [[[]]] * 10_000},
        {"prompt": [{}] * 10_000},
        {"prompt": ["a"] * 10_000},
        {"model": "m" * 50_000},
        {"stop": ["a"] * 10_000},
        {"stop": [["a"] * 10_000]},
        {"stream_options": {str(number): 1 for number in range(5_000)}},
        {"logit_bias": {str(number): 1 for number in range(5_000)}},
    ],
)
def test_a_large_body_is_refused_in_few_words(server, fields):
    answer = server.post(**fields)
    assert answer.status_code in (400, 404) and len(answer.content) < 700


@pytest.mark.parametrize(
    "number", ["9" * 50_000, "-" + "9" * 50_000, "1e999999", "0." + "1" * 50_000, "1" * 400]
)
def test_a_huge_number_is_refused(server, number):
    body = b'{"model": "counting", "prompt": "a", "max_tokens": ' + number.encode() + b"}"
    answer = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and len(answer.content) < 500
