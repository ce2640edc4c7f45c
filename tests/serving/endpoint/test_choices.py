"""Several choices of one request, and the sampling options that clients send, over HTTP."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.fake_engine import Gate, counting_engine, idle
from tests.serving.endpoint.server import Server
from tests.waiting import wait_until

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    made = Server(counting_engine(step_seconds=0.0))
    yield made
    made.close()


def texts(answer: httpx.Response) -> list[str]:
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def text(server: Server, **fields: Any) -> str:
    [found] = texts(server.post(**{"prompt": "ab", "temperature": 0, "max_tokens": 4} | fields))
    return found


def test_every_prompt_gets_n_choices_in_order(quick):
    answer = quick.post(prompt=["ab", "mn"], n=2, max_tokens=2, temperature=0)
    assert texts(answer) == ["cd", "cd", "op", "op"]
    assert answer.json()["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert texts(quick.post(prompt=[[64, 65], [70]], max_tokens=1, temperature=0)) == ["c", "h"]
    echoed = quick.post(prompt=["ab", "mn"], max_tokens=1, temperature=0, echo=True, logprobs=2).json()
    assert [choice["text"] for choice in echoed["choices"]] == ["abc", "mno"]
    assert [choice["logprobs"]["text_offset"] for choice in echoed["choices"]] == [[0, 1, 2]] * 2
    assert echoed["usage"]["completion_tokens"] == 2
    assert idle(quick.engine)


def test_choices_of_a_stream_say_whose_each_event_is(quick):
    *events, last, done = quick.events(
        prompt=["ab", "mn"], n=2, max_tokens=9, temperature=0, stop=["f", "p"],
        stream_options={"include_usage": True},
    )  # fmt: skip
    found: dict[int, str] = {}
    for event in events:
        [choice] = event["choices"]
        found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    assert found == {0: "cde", 1: "cde", 2: "o", 3: "o"} and done == "[DONE]"
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 2 * (4 + 2), "total_tokens": 16}
    assert sum(event["choices"][0]["finish_reason"] == "stop" for event in events) == 4
    assert idle(quick.engine)


def test_choice_i_has_the_seed_plus_i_and_the_best_are_those_with_the_largest_mean_score(quick):
    hot = {"prompt": "ab", "max_tokens": 4, "temperature": 2, "logit_bias": {"66": -90}}
    each = [texts(quick.post(**hot, seed=seed))[0] for seed in (5, 6, 7)]
    answer = quick.post(**hot, seed=5, n=3, logprobs=1).json()
    assert [choice["text"] for choice in answer["choices"]] == each
    means = [sum(choice["logprobs"]["token_logprobs"]) / 4 for choice in answer["choices"]]
    assert len(set(means)) == 2
    ranked = [each[index] for index in sorted(range(3), key=means.__getitem__, reverse=True)]
    best = quick.post(**hot, seed=5, n=2, best_of=3)
    assert texts(best) == ranked[:2] and best.json()["choices"][0]["logprobs"] is None
    assert best.json()["usage"]["completion_tokens"] == 12
    # The likeliest ends at once. Its mean with an unlikely prompt's scores would be the lowest.
    ends = {"prompt": "az", "max_tokens": 5, "temperature": 2, "logit_bias": {"90": -90}}
    ends |= {"stop_token_ids": [90], "seed": 5, "best_of": 6, "echo": True}
    assert texts(quick.post(**ends)) == ["az"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "cdef"),
        ({"logit_bias": {"66": -100, "80": 50}}, "qrst"),  # c is 66, q is 80
        ({"stop_token_ids": [68]}, "cd"),  # e, which is no text of the answer
        ({"stop_token_ids": [68], "ignore_eos": True}, "cd"),
        ({"stop": "d", "min_tokens": 3, "max_tokens": 9}, "cdefghijk"),
        ({"stop": "f", "min_tokens": 3, "max_tokens": 9}, "cde"),
        ({"stop": [*"zyxwvu", "f"], "max_tokens": 9}, "cde"),
        ({"temperature": 2, "top_k": 1}, "cdef"),
        ({"temperature": 2, "min_p": 1}, "cdef"),
        ({"max_tokens": 4.0, "n": 1, "best_of": 1, "suffix": "", "user": "u", "metadata": {}}, "cdef"),
    ],
)
def test_what_an_option_does(quick, fields, expected):
    assert text(quick, **fields) == expected


def test_the_openai_client_finds_the_likeliest_tokens(quick):
    client = OpenAI(base_url=f"{quick.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="counting", prompt="ab", max_tokens=2, temperature=0, logprobs=5)
    tops = answer.choices[0].logprobs.top_logprobs
    assert [len(top) for top in tops] == [5, 5] and [max(top, key=top.get) for top in tops] == ["c", "d"]


def num_open(server: Server) -> int:
    stats = server.engine.stats()
    return stats.running + stats.waiting


def test_choices_fill_the_queue_and_none_of_a_request_runs_if_some_find_no_room():
    server = Server(counting_engine(slots=2, waiting=2))
    with Gate(server.engine):
        thread = threading.Thread(target=server.post, kwargs={"n": 2, "max_tokens": 2})
        thread.start()
        wait_until(lambda: num_open(server) == 2)
        assert server.post(n=3).status_code == 429 and num_open(server) == 2
    thread.join()
    assert server.post(n=4, max_tokens=1).status_code == 200 and idle(server.engine)
    server.close()


def test_unknown_parameters_are_named_or_refused(quick):
    answer = quick.post(foo=1, bär=2, model="counting")
    assert answer.status_code == 200 and answer.headers["x-ignored-parameters"] == "foo, b%C3%A4r"
    assert "x-ignored-parameters" not in quick.post().headers
    many = quick.post(**{f"{number}é" * 50: 1 for number in range(300)})
    assert many.status_code == 200 and len(many.headers["x-ignored-parameters"]) == 500
    with httpx.stream(
        "POST", f"{quick.url}/v1/completions",
        json={"model": "counting", "prompt": "a", "stream": True, "foo": 1},
    ) as streamed:  # fmt: skip
        assert streamed.headers["x-ignored-parameters"] == "foo"
    strict = Server(counting_engine(), refuses_unknown=True)
    error = strict.post(foo=1).json()["error"]
    assert (error["param"], error["code"]) == ("foo", "unknown_parameter")
    strict.close()


def test_one_model_and_the_version_and_the_schema(quick):
    assert httpx.get(f"{quick.url}/v1/models/counting").json()["id"] == "counting"
    missing = httpx.get(f"{quick.url}/v1/models/a/b")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    schema = httpx.get(f"{quick.url}/openapi.json").json()
    assert httpx.get(f"{quick.url}/version").json() == {"version": schema["info"]["version"]}
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].removeprefix("#/components/schemas/")
    fields = schema["components"]["schemas"][name]["properties"]
    assert fields["tools"]["enum"] == [[], None] and fields["top_k"]["anyOf"][0]["minimum"] == -1
    assert {"Message", "StreamOptions"} <= set(schema["components"]["schemas"])
