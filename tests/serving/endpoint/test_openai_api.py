"""OpenAI's completions protocol without HTTP: what is understood, what is refused, how answers look."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.endpoint.openai_api import Answer, CompletionRequest, Refusal, logprobs, models, parse, usage
from serving.engine.protocol import EngineInfo, Sampling, Score, Token


def understood(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "m", "prompt": "a"} | fields).encode())


def refusal(**fields: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        understood(**fields)
    return refused.value


def test_the_defaults_are_openai_s():
    request = understood()
    assert request.sampling() == Sampling(max_tokens=16, temperature=1.0, top_p=1.0)
    assert request.stops == [] and not request.stream and request.logprobs is None
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream", "echo")
    nothing = dict.fromkeys(names)
    assert understood(**nothing).sampling() == request.sampling()


def test_every_field_reaches_the_engine():
    request = understood(
        max_tokens=7, temperature=0, top_p=0.5, seed=-3, ignore_eos=True, logprobs=0, stop=["a"]
    )
    assert request.sampling() == Sampling(
        max_tokens=7, temperature=0.0, top_p=0.5, seed=-3, ignore_eos=True, logprobs=True
    )
    assert request.stops == ["a"] and understood(stop="ab").stops == ["ab"]
    assert understood(echo=True, max_tokens=0).sampling() == Sampling(max_tokens=0, echo=True)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", "a b"),
        (["a b"], "a b"),
        ([5, 6], [5, 6]),
        ([[5, 6]], [5, 6]),
        ([5], [5]),
        ([], []),
        ([[]], []),
    ],
)
def test_one_prompt_in_every_form(prompt, expected):
    assert understood(prompt=prompt).prompt == expected


@pytest.mark.parametrize(
    "prompt", [["a", "b"], [[1], [2]], ["a", 1], [1, "a"], [[[1]]], {}, None, 5, True, [1.0]]
)
def test_any_other_prompt_is_refused(prompt):
    refused = refusal(prompt=prompt)
    assert refused.status == 400 and refused.param == "prompt" and "one text or one list" in str(refused)


@pytest.mark.parametrize(
    "fields",
    [
        # What vLLM's bench, GuideLLM 0.8 and OpenAI's client send.
        {
            "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None, "stream": True, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        },
        {
            "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_tokens": 8, "stop": None, "ignore_eos": True,
        },
        {"n": 1, "best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "user": "somebody"},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1},
        {"n": None, "best_of": None, "echo": None, "logit_bias": None, "presence_penalty": None},
    ],
    ids=["vllm bench", "guidellm", "neutral", "neutral numbers", "null"],
)  # fmt: skip
def test_what_changes_nothing_is_accepted(fields):
    assert understood(**fields).prompt == "a"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("n", True), ("best_of", 2), ("echo", 1), ("suffix", "x"), ("logit_bias", {"5": -100}),
        ("presence_penalty", 1), ("frequency_penalty", -0.1), ("repetition_penalty", 1.1), ("tools", []),
        ("stream_options", {"include_usage": True}), ("temperature", -1), ("top_p", 0.0), ("max_tokens", 0),
        ("stop", ["a"] * 5), ("stop", ["a" * 1001]), ("logprobs", 2), ("seed", 2**63), ("user", 7),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused_by_its_name(field, value):
    refused = refusal(**{field: value})
    assert refused.status == 400 and refused.param == field and str(refused).startswith(f"{field}: ")


@pytest.mark.parametrize("prompt", [["x"] * 500_000, [-1] * 500_000, [["x"] * 500_000]])
def test_a_long_list_of_wrong_ids_is_given_up_at_the_first(prompt):
    """An error object for each would hold up every other client for seconds."""
    refused = refusal(prompt=prompt)
    assert refused.__cause__ is not None
    assert refused.__cause__.error_count() < 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_a_refusal_is_openai_s_error_object(status, kind):
    body = Refusal(status, "why", param="p", code="c").body()
    assert body == {"error": {"message": "why", "type": kind, "param": "p", "code": "c"}}


def test_answers_have_openai_s_layout():
    answer = Answer(model="m")
    tokens = [Token(token, Score(value, 5, -0.5), None) for token, value in ((5, -0.5), (6, -1.0))]
    told = logprobs(tokens, [0, 2], text_of={5: "te", 6: "xt"}.__getitem__, top=False)
    chunk = answer.chunk("text", finish="stop", logprobs=told)
    assert chunk["object"] == "text_completion" and chunk["model"] == "m" and chunk["id"].startswith("cmpl-")
    assert chunk["choices"] == [
        {
            "index": 0,
            "text": "text",
            "logprobs": {
                "tokens": ["te", "xt"],
                "token_logprobs": [-0.5, -1.0],
                "top_logprobs": None,
                "text_offset": [0, 2],
            },
            "finish_reason": "stop",
        }
    ]
    assert answer.nothing() == {**chunk, "choices": []}
    assert usage(3, 4) == {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}


def test_the_likeliest_tokens_stand_beside_the_one_that_is_there_and_two_of_one_text_stay_two():
    texts = {1: "a", 2: "b", 3: "\N{REPLACEMENT CHARACTER}", 4: "\N{REPLACEMENT CHARACTER}"}
    scores = [(1, None), (2, Score(-0.5, 2, -0.5)), (2, Score(-3.0, 1, -0.25)), (3, Score(-2.0, 4, -0.125))]
    tokens = [Token(token, score, None) for token, score in scores]
    told = logprobs(tokens, [0, 1, 2, 3], text_of=texts.__getitem__, top=True)
    assert told["token_logprobs"] == [None, -0.5, -3.0, -2.0] and told["text_offset"] == [0, 1, 2, 3]
    assert told["top_logprobs"] == [
        None,
        {"b": -0.5},
        {"a": -0.25, "b": -3.0},
        {"token_id:4": -0.125, "\N{REPLACEMENT CHARACTER}": -2.0},
    ]


def test_the_list_of_models_says_what_is_served():
    info = EngineInfo(
        engine="torch", model="m", device="cpu", dtype="float32", context_tokens=64, vocab_size=9,
        num_parameters=1, num_slots=2, most_waiting=6, weight_bytes=3, kv_bytes_per_token=4,
        flops_per_token=5, head_flops=6, attention_flops=7, details={"a": "b"},
    )  # fmt: skip
    listed = models(info, since=12)
    assert (
        listed["object"] == "list" and listed["data"][0]["id"] == "m" and listed["data"][0]["created"] == 12
    )
    assert listed["data"][0]["engine_info"]["details"] == {"a": "b"}


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_request_or_a_refusal(body):
    with pytest.raises(Refusal) as refused:
        parse(body)
    assert refused.value.status == 400 and json.dumps(refused.value.body())
