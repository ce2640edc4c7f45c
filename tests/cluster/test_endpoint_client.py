import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from cluster import endpoint_client
from cluster.cli import UserError
from cluster.endpoint_client import Endpoint

REPLIES = {
    "/v1/models": (200, {"data": [{"id": "a", "max_model_len": 64}, {"id": "b"}]}),
    "/closed/v1/models": (401, {"error": {"message": "no\nkey"}}),
    "/text": (200, "plain"),
    "/cut": (500, "half of it"),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, answer = REPLIES.get(self.path, (404, {"detail": "Not Found"}))
        self.reply(status, answer if isinstance(answer, str) else json.dumps(answer))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.reply(200, json.dumps([json.loads(body), self.headers.get("authorization")]))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        if self.path == "/cut":
            self.send_header("content-length", "100")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("end", ["", "/", "/v1", "//v1//", "/v1/completions", "/v1/chat/completions/"])
def test_an_endpoint_is_found_by_any_form_of_its_url(url, end):
    assert endpoint_client.find(url + end, model=None) == (
        Endpoint(f"{url}/v1", "a", 64),
        {"id": "a", "max_model_len": 64},
    )
    assert endpoint_client.find(url + end, model="b")[0] == Endpoint(f"{url}/v1", "b", None)


def test_an_endpoint_without_a_list_is_found_by_the_name_of_its_model(url):
    found, about = endpoint_client.find(f"{url}/gone", model="x", context_tokens=99)
    assert (found, about) == (Endpoint(f"{url}/gone/v1", "x", 99), {})
    assert endpoint_client.base_of("https://a.b/x/v1beta/") == "https://a.b/x/v1beta"
    with pytest.raises(UserError, match=r"endpoint_context_tokens: .* says that a holds 64 tokens"):
        endpoint_client.find(url, model=None, context_tokens=65)


def test_what_is_wrong_names_the_key(url):
    for address, model, message in (
        (url, "c", "bench.target_model: 'c' is not served at .*; there are: a, b"),
        (f"{url}/closed", None, "bench.target: .* refuses the key .401: no key.; .* OPENAI_API_KEY"),
        (f"{url}/gone", None, "bench.target: .* lists no model .404: .*; .* by bench.target_model"),
        ("http://127.0.0.1:1", None, "bench.target: http://127.0.0.1:1/v1/models does not answer .*refused"),
        ("nonsense", None, "bench.target: nonsense/v1/models does not answer .*unknown url type"),
    ):
        with pytest.raises(UserError, match=message):
            endpoint_client.find(address, model=model, key="bench.target")


def test_a_request_carries_json_and_the_key(url, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert endpoint_client.exchange(url, {"x": 1}) == (200, [{"x": 1}, None])
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    assert endpoint_client.exchange(url, {}) == (200, [{}, "Bearer abc"])
    assert endpoint_client.exchange(f"{url}/text") == (200, "plain")
    assert endpoint_client.reason(*endpoint_client.exchange(f"{url}/gone")) == "404: {'detail': 'Not Found'}"


def test_a_key_that_no_header_carries_is_named_and_not_shown(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "abc\r\n")  # as from a file with Windows line ends
    assert endpoint_client.exchange(url, {}) == (200, [{}, "Bearer abc"])
    for broken in ("abc\ndef", "abc\u2026"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        with pytest.raises(UserError, match="OPENAI_API_KEY: has") as refused:
            endpoint_client.find(url, model=None)
        assert "abc" not in str(refused.value)


def test_a_refusal_that_breaks_off_is_no_answer(url):
    with pytest.raises(UserError, match=r"endpoint: .*/cut does not answer"):
        endpoint_client.exchange(f"{url}/cut")


def test_whether_it_answers(url):
    assert endpoint_client.answers(f"{url}/text")
    assert not endpoint_client.answers(f"{url}/gone") and not endpoint_client.answers("http://127.0.0.1:1")
