"""The endpoint over real HTTP, with an engine that counts: protocol, refusals, clients that leave."""

import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI, RateLimitError

from serving.endpoint import prompts
from serving.endpoint import service as endpoint
from serving.endpoint.bodies import MOST_BODY_BYTES
from serving.endpoint.prompts import Prompts
from serving.engine.protocol import EngineFailed
from tests.fake_engine import CONTEXT, FAILING, VOCABULARY, Gate, counting_engine, idle
from tests.serving.endpoint.server import Server, head
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# The numbered tokenizer has the bytes in the order of their symbols, so that "ab" is two ids apart by one.


def test_the_openai_client_completes(client):
    answer = client.completions.create(model="counting", prompt="ab", max_tokens=4, temperature=0)
    assert answer.choices[0].text == "cdef" and answer.choices[0].finish_reason == "length"
    used = answer.usage
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (2, 4, 6)
    assert answer.object == "text_completion" and answer.model == "counting"
    assert [model.id for model in client.models.list()] == ["counting"]


def test_the_openai_client_streams(client):
    chunks = list(
        client.completions.create(
            model="counting", prompt="ab", max_tokens=5, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == list("cdefg")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_openai_client_is_refused_with_its_own_exceptions(client):
    with pytest.raises(BadRequestError, match="max_tokens") as refused:
        client.completions.create(model="counting", prompt="a", max_tokens=-1)
    assert refused.value.param == "max_tokens" and refused.value.type == "invalid_request_error"
    with pytest.raises(NotFoundError, match="'gpt-9' is not served here; 'counting' is"):
        client.completions.create(model="gpt-9", prompt="a")


def test_a_stream_has_an_event_for_each_token_and_then_done(server):
    events = server.events(prompt="ab", max_tokens=4, temperature=0)
    assert [event["choices"][0]["text"] for event in events[:-1]] == list("cdef")
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize("stop", ["e", ["x", "de"], "cdefghi"])
def test_stop_strings_end_both_kinds_of_answer_and_free_the_slot(server, stop):
    whole = server.post(prompt="ab", max_tokens=60, temperature=0, stop=stop).json()
    events = server.events(prompt="ab", max_tokens=60, temperature=0, stop=stop)
    expected = {"e": "cd", "cdefghi": ""}.get(str(stop), "c")
    assert whole["choices"][0]["text"] == expected and whole["choices"][0]["finish_reason"] == "stop"
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == expected
    assert events[-2]["choices"][0]["finish_reason"] == "stop" and events[-1] == "[DONE]"
    assert whole["usage"]["completion_tokens"] == len(events) - 1
    assert idle(server.engine)


def test_logprobs_are_those_of_the_sampled_tokens(server):
    whole = server.post(prompt="ab", max_tokens=3, logprobs=1, temperature=0).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == list("cde") and whole["text_offset"] == [0, 1, 2]
    assert whole["token_logprobs"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [list(top) for top in whole["top_logprobs"]] == [["c"], ["d"], ["e"]]
    events = server.events(prompt="ab", max_tokens=3, logprobs=0, temperature=0)
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [one["tokens"] for one in streamed] == [["c"], ["d"], ["e"]]
    assert [one["text_offset"] for one in streamed] == [[0], [1], [2]]
    assert server.post().json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("prompt", ["abz", [97 - 33, 98 - 33, 122 - 33]])
def test_echo_scores_the_prompt_and_what_follows(server, prompt):
    answer = server.post(prompt=prompt, max_tokens=2, temperature=0, echo=True, logprobs=1).json()
    [choice] = answer["choices"]
    assert choice["text"] == "abz{|" and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    told = choice["logprobs"]
    assert told["tokens"] == list("abz{|") and told["text_offset"] == [0, 1, 2, 3, 4]
    assert told["token_logprobs"] == [None, *(pytest.approx(v, abs=1e-6) for v in (0, -100, 0, 0))]
    expected = [{"b": 0}, {"c": 0, "z": -100}, {"{": 0}, {"|": 0}]
    assert told["top_logprobs"] == [None, *(pytest.approx(one, abs=1e-6) for one in expected)]


@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_echo_of_a_prompt_alone(server, logprobs):
    answer = server.post(prompt="añz", max_tokens=0, echo=True, logprobs=logprobs).json()
    [choice] = answer["choices"]
    assert choice["text"] == "añz" and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    told = choice["logprobs"]
    assert (told is None) == (logprobs is None)
    if told is not None:
        assert told["text_offset"] == [0, 1, 1, 2] and len(told["token_logprobs"]) == 4
    assert idle(server.engine)


def test_echo_may_fill_the_context_and_no_more(server):
    whole = server.post(prompt=[1] * CONTEXT, max_tokens=0, echo=True, logprobs=1)
    assert len(whole.json()["choices"][0]["logprobs"]["tokens"]) == CONTEXT
    longer = server.post(prompt=[1] * (CONTEXT + 1), max_tokens=0, echo=True, logprobs=1)
    assert longer.status_code == 400 and f"context length is {CONTEXT}" in longer.json()["error"]["message"]


def test_a_stream_echoes_the_prompt_as_its_first_event(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, done = server.events(
        prompt="ab", max_tokens=2, temperature=0, echo=True, logprobs=1, stop="d", stream_options=options
    )
    assert [event["choices"][0]["text"] for event in events] == ["ab", "c", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "stop"]
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in events] == [[0, 1], [2], [3]]
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2]
    assert last["usage"]["prompt_tokens"] == 2 and done == "[DONE]"
    alone, done = server.events(prompt="ab", max_tokens=0, echo=True)
    assert alone["choices"][0]["text"] == "ab" and alone["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97 - 33, 98 - 33], [[97 - 33, 98 - 33]]])
def test_one_prompt_in_every_form_that_openai_takes(server, prompt):
    answer = server.post(prompt=prompt, max_tokens=2, temperature=0).json()
    assert answer["choices"][0]["text"] == "cd" and answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ["a", 1]}, "prompt", "a text, a list of token ids"),
        ({"prompt": []}, "prompt", "is empty"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"prompt": None}, "prompt", "a text"),
        ({"prompt": [VOCABULARY]}, "prompt", f"[0, {VOCABULARY})"),
        ({"prompt": [-1]}, "prompt", "a text"),
        ({"prompt": [2**70]}, "prompt", "a text"),
        ({"prompt": [1.5]}, "prompt", "a text"),
        ({"prompt": [True]}, "prompt", "a text"),
        ({"prompt": [1] * CONTEXT}, "prompt", f"context length is {CONTEXT}"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "greater"),
        ({"temperature": 1e300}, "temperature", "less"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**64}, "seed", "less"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"n": 9}, "prompt", "9 choices at once; this server has room for 8"),
        ({"prompt": ["a"] * 9}, "prompt", "9 choices at once; this server has room for 8"),
        ({"logit_bias": {str(VOCABULARY): 1}}, "logit_bias", f"[0, {VOCABULARY})"),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids", f"[0, {VOCABULARY})"),
        ({"min_tokens": 4}, "min_tokens", "must not exceed max_tokens, which is 3"),
        ({"echo": "yes"}, "echo", "boolean"),
        ({"echo": 1}, "echo", "boolean"),
        ({"echo": False, "max_tokens": 0}, "max_tokens", "or 0 with echo=true"),
        ({"echo": True, "max_tokens": -1}, "max_tokens", "greater"),
        ({"echo": True, "logprobs": 10**30}, "logprobs", "less than or equal to 20"),
        ({"echo": True, "max_tokens": 0, "prompt": ""}, "prompt", "is empty"),
        ({"echo": True, "max_tokens": 0, "prompt": [VOCABULARY]}, "prompt", f"[0, {VOCABULARY})"),
        ({"suffix": "."}, "suffix", "does not do this"),
        ({"logprobs": 25}, "logprobs", "less than or equal to 20"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": ""}, "stop", "of 1 to 1000 characters"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"model": 7}, "model", "string"),
    ],
)
def test_a_bad_field_is_named(server, fields, param, message):
    for stream in (False, True):
        answer = server.post(**{"stream": stream} | fields)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == param and error["type"] == "invalid_request_error"
        assert message in error["message"] and error["message"].startswith(param)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "no valid JSON"),
        (b"", {}, 400, "no valid JSON"),
        (b"[]", {}, 400, "object"),
        (b'{"model": "counting"}', {}, 400, "prompt: "),
        (b'{"model": "counting", "prompt": "\xff"}', {}, 400, "no valid JSON"),
        (b'{"model": "counting", "prompt": "\\ud800"}', {}, 400, "no valid JSON"),
        (b'{"model": "counting", "prompt": "a", "temperature": NaN}', {}, 400, "temperature"),
        (b'{"model": "counting", "prompt": "a", "temperature": Infinity}', {}, 400, "temperature"),
        (b'{"model": "counting", "prompt": ' + b"[" * 5000, {}, 400, ""),
        (b'{"model": "counting", "prompt": "a"}', {"content-type": "text/plain"}, 415, "text/plain"),
        (b" " * (MOST_BODY_BYTES + 1), {}, 413, "shorten the prompt"),
    ],
)
def test_a_bad_body_is_refused(server, body, headers, status, message):
    headers = {"content-type": "application/json"} | headers
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_the_counts_stand_in_every_event_where_they_are_asked_for(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last, done = server.events(prompt="ab", max_tokens=3, temperature=0, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3]
    assert last["choices"] == [] and last["usage"] == events[-1]["usage"] and done == "[DONE]"


def test_offsets_of_logprobs_count_text_that_a_stop_string_holds_back(server):
    fields = {"prompt": "ab", "max_tokens": 4, "temperature": 0, "logprobs": 0, "stop": "cdx"}
    choice = server.post(**fields).json()["choices"][0]
    assert choice["text"] == "cdef" and choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    events = server.events(**fields)[:-1]
    assert [event["choices"][0]["text"] for event in events] == ["", "", "cde", "f"]
    assert [event["choices"][0]["logprobs"]["text_offset"][0] for event in events] == [0, 1, 2, 3]


def test_what_goes_wrong_here_is_an_openai_error_too(server, monkeypatch):
    def broken(body: bytes, kind: type) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(endpoint, "parse", broken)
    answer = server.post()
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_a_client_that_leaves_while_its_prompt_is_encoded_gets_no_slot(monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def encode(self: Prompts, prompt: str, stop: threading.Event, special: bool) -> list[int]:
        begun.set()
        assert stop.wait(PATIENCE_SECONDS)  # it is told to stop
        go_on.set()
        return [1]

    monkeypatch.setattr(Prompts, "_encode", encode)
    monkeypatch.setattr(prompts, "SHORT_CHARACTERS", 100)
    server = Server(counting_engine())
    body = json.dumps({"model": "counting", "prompt": "a" * 300}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head(f"content-length: {len(body)}") + body)
        assert begun.wait(PATIENCE_SECONDS)
    assert go_on.wait(PATIENCE_SECONDS)
    assert server.engine.stats().prompt_tokens == 0 and idle(server.engine)
    server.close()


def test_other_paths_and_methods_have_openai_s_errors_too(server):
    for path, status, message in (
        ("/v1/chat", 404, "there are POST /v1/completions, POST /v1/chat/completions, "),
        ("/v1/completions", 405, "no GET; use POST"),
    ):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == status and message in answer.json()["error"]["message"]
    for path, methods in (("/v1/models/a/b", "GET"), ("/health", "GET, HEAD")):
        answer = httpx.post(f"{server.url}{path}")
        assert answer.status_code == 405 and answer.headers["allow"] == methods
        assert answer.json()["error"]["message"] == f"{path}: no POST; use {methods.replace(',', ' or')}"


def test_health_and_metrics(server):
    server.post()
    assert idle(server.engine)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    head = httpx.head(f"{server.url}/health")
    assert head.status_code == 200 and head.content == b""
    text, label = httpx.get(f"{server.url}/metrics").text, '{model_name="counting"}'
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    stats = server.engine.stats()
    assert float(values[f"vllm:generation_tokens_total{label}"]) == stats.generated_tokens > 0
    assert float(values[f"vllm:e2e_request_latency_seconds_count{label}"]) >= 1
    assert 'vllm:e2e_request_latency_seconds_bucket{le="200.0",model_name="counting"}' in values
    assert float(values[f"vllm:num_requests_running{label}"]) == 0
    counters = [
        line.split()[2] for line in text.splitlines() if line.startswith("# TYPE") and "counter" in line
    ]
    assert len(counters) == 6 and all(name.endswith("_total") for name in counters)
    assert all('model_name="counting"' in name for name in values if not name.startswith("#"))


def test_metrics_of_an_engine_that_does_not_answer_are_one_error(server, monkeypatch):
    def hang() -> None:
        raise EngineFailed("the engine hangs")

    monkeypatch.setattr(server.engine, "stats", hang)
    answer = httpx.get(f"{server.url}/metrics")
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["code"]) == (503, "the engine hangs", "engine_failed")


def test_what_the_model_is_stands_in_the_list_of_models(server):
    [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["max_model_len"] == CONTEXT and model["engine_info"]["num_slots"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_step(stream):
    server = Server(counting_engine())
    gate = Gate(server.engine)
    body = json.dumps({"model": "counting", "prompt": [1], "max_tokens": 400, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + body)
        wait_until(lambda: server.engine.stats().generated_tokens >= 3)
        gate.hold()
        gate.wait()
    left = server.engine.stats().steps
    assert idle(server.engine)  # while the step is still under way
    gate.release()
    stats = wait_until(lambda: (now := server.engine.stats()).steps > left and now)
    assert stats.steps == left + 1 and stats.cancelled == 1
    assert server.post(max_tokens=1).status_code == 200
    server.close()


def test_overload_is_429_with_when_to_retry_and_then_all_is_well():
    server = Server(counting_engine(slots=2, waiting=3))
    gate = Gate(server.engine)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(server.post(max_tokens=30))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    with gate:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answers) == 15)  # the others fit
        assert {answer.status_code for answer in answers} == {429}
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) == 20 and len(refused) == 15
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert idle(server.engine) and server.post().status_code == 200
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    slow = [threading.Thread(target=ask) for _ in range(5)]
    with gate:
        for thread in slow:
            thread.start()
        wait_until(lambda: (stats := server.engine.stats()).running + stats.waiting == 5)
        with pytest.raises(RateLimitError):
            client.completions.create(model="counting", prompt="a")
    for thread in slow:
        thread.join()
    server.close()


DIVERGED = 14


@pytest.fixture(scope="module")
def diverged() -> Iterator[Server]:
    made = Server(counting_engine(nan_from=DIVERGED))
    yield made
    made.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 0}, {"temperature": 0}, {"temperature": 0, "logprobs": 0}, {"top_p": 0.5},
        {"echo": True}, {"prompt": [97, DIVERGED, 97, 98], "logprobs": 0},
        {"prompt": [97, DIVERGED, 97, 98], "echo": True, "logprobs": 1},
        {"prompt": [97, DIVERGED, 97, 98], "echo": True, "logprobs": 1, "max_tokens": 0},
    ],
)  # fmt: skip
def test_logits_that_are_not_numbers_are_one_error_of_that_request(diverged, fields):
    """As of a diverged run's checkpoint: no token of them means anything, and JSON has no NaN."""
    asked = {"prompt": [97, DIVERGED], **fields}
    answer = diverged.post(**asked)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "model_broken")
    assert "logits are not finite numbers: its weights are broken" in error["message"]
    assert diverged.events(**asked) == [{"error": error}]
    assert idle(diverged.engine)
    assert diverged.post().status_code == 200  # others are served
    assert httpx.get(f"{diverged.url}/health").status_code == 200


def test_a_stream_that_turns_into_no_numbers_ends_with_the_error(diverged):
    events = diverged.events(prompt=[DIVERGED - 2], max_tokens=9)  # it counts up to the token
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None]
    assert events[-1]["error"]["code"] == "model_broken"
    assert idle(diverged.engine)


def test_an_engine_that_breaks_ends_the_stream_with_an_error_event(capfd):
    server = Server(counting_engine())
    events = server.events(prompt=FAILING, max_tokens=10)
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * 3
    assert "an unlucky number" in events[-1]["error"]["message"]
    assert events[-1]["error"]["type"] == "server_error"
    whole = server.post()
    assert whole.status_code == 503 and "unlucky" in whole.json()["error"]["message"]
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503 and "unlucky" in health.json()["status"]
    server.close()
    capfd.readouterr()
