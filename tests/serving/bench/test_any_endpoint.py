"""The benchmark against endpoints of every kind, over real HTTP: what it says, and its exit code."""

import asyncio
import json
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster import endpoint_client
from cluster.cli import UserError
from serving.bench import command as bench
from serving.bench.config import BenchConfig, ServeBenchConfig
from serving.bench.first_request import find_dialect
from serving.bench.latency import RequestOutcome, Slo, summarise
from serving.bench.loadgen import run_closed
from serving.bench.measure import note
from serving.bench.report import prefill_flops
from serving.bench.wire import over_http
from serving.bench.workload import lengths, synthetic
from tests.commands import ROOT

pytestmark = pytest.mark.stack

KEYS = (
    "bench.wandb=disabled", "load.concurrency=[2]", "load.requests=4", "load.warm_up=0",
    "load.prompt_tokens=16", "load.output_tokens=6", "sweep.points=0", "load.most_lag_ms=1e6",
    "load.timeout_seconds=60",
    "slo.ttft_ms=1e6", "slo.tpot_ms=1e6",
)  # fmt: skip
SECRET = "sk-odd"  # too short for the masks that know no names


class Odd(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that is odd in the ways that a test names."""

    protocol_version, wbufsize = "HTTP/1.1", 1 << 16
    odd: frozenset[str]
    bodies: list[dict[str, Any]]
    numbers: Iterator[int]  # of requests

    def do_GET(self) -> None:
        if self._is_closed():
            return
        about: dict[str, Any] = (
            {"id": "m"} if "silent about its context" in self.odd else {"id": "m", "max_model_len": 64}
        )
        if "ours of an earlier version" in self.odd:
            about["engine_info"] = {
                "vocab_size": 9, "flops_per_token": 100, "head_flops": 20, "attention_flops": 4,
            }  # fmt: skip
        if "no list" in self.odd:
            self._json(404, {"detail": "Not Found"})
        else:
            self._json(200, {"data": [] if "an empty list" in self.odd else [about]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        self.number = next(self.numbers)
        if self._is_closed():
            return
        refused = [
            f for f in ("ignore_eos", "stream_options", "seed") if f in body and f"refuses {f}" in self.odd
        ]
        if refused:
            self._error(400, f"Unrecognized request argument supplied: {refused[0]}")
        elif "wants text" in self.odd and not isinstance(body.get("prompt"), str):
            self._error(400, "prompt must be a string")
        elif "wants max_completion_tokens" in self.odd and "max_tokens" in body:
            self._error(400, "Use 'max_completion_tokens' instead.")
        elif "refuses without reason" in self.odd and ("ignore_eos" in body or "stream_options" in body):
            self._error(422, "Unprocessable")
        elif "fails later" in self.odd and self.number > 1:
            self._error(500, f"CUDA out of memory {SECRET}")
        elif "never streams" in self.odd:
            self._json(200, {"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}})
        else:
            self._stream(body)

    def _stream(self, body: dict[str, Any]) -> None:
        num = body.get("max_tokens") or body["max_completion_tokens"]
        chat, num = "messages" in body, num // 2 if "stops early" in self.odd else num
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        size = len(text)
        if isinstance(text, str):
            size = (size + 1 if "counts bytes" in self.odd else 3 * len(text.split())) + (9 if chat else 0)
        chunks = [{"text": "x"}] * num
        if chat:
            chunks = [{"delta": {"role": "assistant", "content": ""}}, *[{"delta": {"content": "x"}}] * num]
        chunks.append(
            {"delta": {}, "finish_reason": "stop"} if chat else {"text": "", "finish_reason": "stop"}
        )
        events: list[Any] = [{"choices": [chunk]} for chunk in chunks]
        if "stream_options" in body and "counts nothing" not in self.odd:
            events.append({"choices": [], "usage": {"prompt_tokens": size, "completion_tokens": num}})
        if "one unreadable answer" in self.odd and self.number == 5:
            events[1] = [3]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in (*events, *(["[DONE]"] if "no [DONE]" not in self.odd else [])):
            data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def _is_closed(self) -> bool:
        closed = "wants a key" in self.odd and self.headers.get("authorization") != f"Bearer {SECRET}"
        if closed:
            self._error(401, f"Incorrect API key provided: {self.headers.get('authorization')}")
        return closed

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message}})

    def _json(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


class Threads(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A load that is over closes connections in the middle of an answer."""


@contextmanager
def endpoint(*odd: str, wrap: Callable[[Any], Any] | None = None) -> Iterator[tuple[str, list[dict]]]:
    """The address of an endpoint, and the bodies that it gets."""
    handler = type("Handler", (Odd,), {"odd": frozenset(odd), "bodies": [], "numbers": count(1)})
    with Threads(("127.0.0.1", 0), handler) as server:
        if wrap is not None:
            server.socket = wrap(server.socket)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", handler.bodies
        server.shutdown()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("odd", "keys", "said"),
    [
        ((), {}, ""),
        (("refuses ignore_eos", "stops early"), {}, "refuses ignore_eos: answers may end early"),
        (("stops early",), {}, ""),
        (("refuses seed", "refuses stream_options"), {}, "refuses stream_options: the server may not count"),
        (("refuses without reason",), {}, "refuses ignore_eos"),
        (("wants text",), {}, "about 3.00 tokens a word, and 0 beside them"),
        (("wants text", "counts nothing"), {}, "does not count their tokens: a word is taken for one"),
        (("counts bytes",), {"api": "chat"}, "tokens a word, and 9 beside them"),
        (("wants max_completion_tokens",), {"api": "chat"}, "about 3.00 tokens a word, and 9 beside them"),
        (("no list",), {"target_model": "m", "target_context_tokens": 64}, ""),
        (("an empty list",), {"target_model": "m", "target_context_tokens": 64}, ""),
        (("silent about its context",), {"target_context_tokens": 64}, ""),
        (("no [DONE]",), {}, ""),
        (("one unreadable answer",), {}, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_an_endpoint_that_can_be_measured_is(capsys, odd, keys, said):
    with endpoint(*odd) as (address, _):
        found = measured(f"http://{address}//v1/", **keys)
    assert said in capsys.readouterr().err
    assert found["succeeded"] == (3 if "one unreadable answer" in odd else 4)
    assert found["mean_output_tokens"] == (3 if "stops early" in odd else 6)
    assert found["short_answers"] == (4 if "stops early" in odd else 0)
    if not {"refuses stream_options", "refuses without reason", "counts bytes"} & {*odd}:
        assert found["mean_prompt_tokens"] in (15, 16)  # of words, as near as may be


def measured(url: str, *, api: str = "completions", **keys: Any) -> dict[str, Any]:
    """The figures of four requests, by the parts of the command. keys: of `bench`."""
    config = ServeBenchConfig(bench=BenchConfig(target=url, **keys))
    found, model, _ = bench._find_model(config, url)
    dialect = find_dialect(found, api=api, timeout_seconds=60, key="bench.target", report=note)
    sizes = {
        name: lengths(size, key=name) for name, size in (("prompt_tokens", "16"), ("output_tokens", "6"))
    }
    plan = synthetic(4, **sizes, vocab_size=model["vocab_size"], seed=0)
    outcomes: list[RequestOutcome] = []

    async def send_all() -> None:
        async with over_http(found, timeout_seconds=60, dialect=dialect) as send:
            await run_closed(plan, send, concurrency=2, observe=outcomes.append)

    asyncio.run(send_all())
    return summarise(outcomes, slo=Slo(None, None, None))


def test_an_endpoint_of_an_earlier_version_that_says_less_of_its_engine_has_shares_all_the_same(capsys):
    with endpoint("ours of an earlier version") as (address, _):
        url = f"http://{address}"
        _, model, _ = bench._find_model(ServeBenchConfig(bench=BenchConfig(target=url)), url)
    assert prefill_flops(model["engine_info"], 10) == (100 - 20) * 10 + 20 + 10**2 / 2 * 4
    assert "is older than this benchmark" in capsys.readouterr().err


def test_one_unreadable_answer_among_good_ones_fails_alone(capsys):
    with endpoint("one unreadable answer") as (address, _):
        assert bench.main([f"bench.target=http://{address}", *KEYS]) == 0
    captured = capsys.readouterr()
    assert "failed: {'malformed event': 1}, the first with malformed event" in captured.err
    assert captured.out.splitlines()[-1].endswith("; 1 of 4 requests failed.")


@pytest.mark.parametrize(
    ("odd", "keys", "code", "said"),
    [
        (("never streams",), [], 1, "does not serve a first request (no stream: "),
        (("wants a key",), [], 2, "refuses the key (401: Incorrect API key provided: "),
        (("an empty list",), [], 2, "lists no model (200: "),
        (("silent about its context",), [], 2, "error: bench.target_context_tokens: http"),
        ((), ["load.prompt_tokens=4096"], 2, "error: load.prompt_tokens: a request may have 4102 tokens"),
        ((), ["load.concurrency=[]"], 1, "error: nothing was measured: name load.concurrency, load.rates or"),
        ((), ["bench.target_context_tokens=65"], 2, "says that m holds 64 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_an_endpoint_of_which_nothing_can_be_measured_is_a_failure(capsys, odd, keys, code, said):
    with endpoint(*odd) as (address, bodies):
        assert bench.main([f"bench.target=http://{address}", *KEYS, *keys]) == code
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert code == 1 or len(bodies) <= 1  # refused before a load is sent


def test_a_failure_is_shown_in_the_server_s_words_without_the_key(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with endpoint("wants a key", "fails later") as (address, _):
        assert bench.main([f"bench.target=http://{address}", *KEYS, "bench.wandb=offline"]) == 1
    captured = capsys.readouterr()
    failed = "too few requests succeeded: 2 in flight: 0/4 succeeded (HTTP 500: CUDA out of memory ***)"
    assert captured.err.splitlines()[-1] == f"error: {failed}"
    assert SECRET not in captured.out + captured.err
    summary = json.loads(Path("outputs/serve-bench/summary.json").read_text())
    assert summary["points"][0]["errors"] == {"HTTP 500": 4}
    assert summary["answer"] == captured.out.splitlines()[-1] == "m: nothing was measured."
    files = [file for file in Path("outputs").rglob("*") if file.is_file()]
    assert len(files) > 5 and not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_chat_has_messages_and_its_role_is_no_token():
    with endpoint() as (address, bodies):
        found = measured(f"http://{address}/v1/chat/completions", api="chat")
    assert all([turn["role"] for turn in body["messages"]] == ["user"] for body in bodies)
    assert found["output_tokens_in_window"] == 4 * 6


def test_https_with_a_certificate_of_ones_own(tmp_path):
    named = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    made = (
        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "key.pem",
        "-out", "cert.pem", "-days", "1",
    )  # fmt: skip
    subprocess.run(["openssl", "req", "-x509", *made, *named], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")

    def wrap(listening: Any) -> Any:
        return context.wrap_socket(listening, server_side=True)

    with endpoint(wrap=wrap) as (address, _):
        with pytest.raises(UserError, match="certificate verify failed"):
            endpoint_client.find(f"https://{address}", model=None)
        command = [sys.executable, "-m", "serving.bench", f"bench.target=https://{address}", *KEYS]
        trusting = {"PYTHONPATH": str(ROOT), "SSL_CERT_FILE": str(tmp_path / "cert.pem")}
        done = subprocess.run(command, env=trusting, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
