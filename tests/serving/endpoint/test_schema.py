"""What a request may contain, without HTTP: what is understood, what is refused and how."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.endpoint.refusal import Refusal
from serving.endpoint.schema import ChatRequest, CompletionRequest, parse
from serving.engine.protocol import Sampling


def understood(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"model": "m", "prompt": "a"} | fields).encode(), CompletionRequest)[0]


def sampled(**fields: Any) -> Sampling:
    return understood(**fields).sampling(room=50)


def chat(**fields: Any) -> ChatRequest:
    given = {"model": "m", "messages": [{"role": "user", "content": "a"}]} | fields
    return parse(json.dumps(given).encode(), ChatRequest)[0]


def refusal(make: Any = understood, **fields: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        make(**fields)
    return refused.value


def test_the_defaults_are_openai_s():
    request = understood()
    assert sampled() == Sampling(max_tokens=16, temperature=1.0, top_p=1.0)
    assert request.stops == [] and not request.stream and request.logprobs is None and request.num_drawn == 1
    required = ("model", "prompt")
    nothing = {name: None for name in CompletionRequest.model_fields if name not in required}
    assert sampled(**nothing) == sampled()
    assert chat().sampling(room=50) == Sampling(max_tokens=50)  # what the context has left


def test_every_field_reaches_the_engine():
    fields = {
        "max_tokens": 7.0, "min_tokens": 2, "temperature": 0, "min_p": 0.1, "top_k": 5, "top_p": 0.5,
        "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "seed": -3,
        "ignore_eos": True,
    }  # fmt: skip
    more = {"logit_bias": {"5": -100, "6": 1.5}, "stop_token_ids": [4], "logprobs": 3, "echo": True}
    assert sampled(**fields, **more) == Sampling(
        **fields, logit_bias=((5, -100.0), (6, 1.5)), stop_ids=frozenset({4}), logprobs=True,
        num_likeliest=3, echo=True,
    )  # fmt: skip
    both = chat(**fields, logit_bias={}, logprobs=True, top_logprobs=4).sampling(room=50)
    assert both == Sampling(**fields, logprobs=True, num_likeliest=4)
    assert sampled(logprobs=0) == Sampling(max_tokens=16, logprobs=True)
    assert sampled(best_of=3).logprobs and understood(best_of=3, n=2).num_drawn == 3
    assert sampled(top_k=-1) == sampled() and sampled(echo=True, max_tokens=0).max_tokens == 0
    assert understood(stop=["a"]).stops == ["a"] and understood(stop="ab").stops == ["ab"]
    assert chat(max_completion_tokens=3, max_tokens=4).sampling(room=50).max_tokens == 3
    assert chat(max_tokens=4).sampling(room=50).max_tokens == 4
    assert not chat(top_logprobs=0).sampling(room=50).logprobs


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", ["a b"]),
        (["a b"], ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6]], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ([5], [[5]]),
        ([], [[]]),
        ([[]], [[]]),
    ],
)
def test_prompts_in_every_form(prompt, expected):
    assert understood(prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [["a", 1], [1, "a"], ["a", [1]], [[[1]]], {}, None, 5, True, [1.0]])
def test_any_other_prompt_is_refused(prompt):
    refused = refusal(prompt=prompt)
    assert (
        refused.status == 400 and refused.param == "prompt" and "a text, a list of token ids" in str(refused)
    )


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
        {"suffix": "", "logit_bias": {}, "user": "somebody", "metadata": {"a": "b"}, "stop": list("abcde")},
        {"response_format": {"type": "text"}, "skip_special_tokens": True, "length_penalty": 1},
    ],
    ids=["vllm bench", "guidellm", "clients", "neutral"],
)  # fmt: skip
def test_what_clients_always_send_is_accepted(fields):
    assert understood(**fields).prompt == ["a"]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("suffix", "x", "unsupported_value"),
        ("response_format", {"type": "json_object"}, "unsupported_value"),
        ("use_beam_search", True, "unsupported_value"), ("length_penalty", True, "unsupported_value"),
        ("prompt", None, "invalid_type"), ("echo", 1, "invalid_type"), ("n", True, "invalid_type"),
        ("n", 0, "integer_below_min_value"), ("best_of", 1000, "integer_above_max_value"),
        ("temperature", -0.1, "decimal_below_min_value"), ("max_tokens", 1.5, "invalid_type"),
        ("max_tokens", 0, "integer_below_min_value"), ("max_tokens", 10**30, "integer_above_max_value"),
        ("presence_penalty", 3, "decimal_above_max_value"), ("logprobs", 21, "integer_above_max_value"),
        ("stop", ["a"] * 65, "invalid_value"), ("stop", ["a" * 1001], None), ("stop", "", None),
        ("stop", [], ""), ("logit_bias", {"5": 101}, "invalid_type"), ("logit_bias", {"x": 1}, None),
        ("logit_bias", {str(i): 0 for i in range(2000)}, None), ("stop_token_ids", [1] * 2000, None),
        ("top_k", -2, None), ("min_p", 1.5, None), ("repetition_penalty", 0, None), ("seed", 2**63, None),
        ("user", 7, "invalid_type"), ("stream_options", {"include_usage": True}, None), ("top_p", 0, None),
        ("stream_options", {"include_usage": 1}, None), ("stop_token_ids", [-1], None),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_fits_no_bound_is_refused_by_its_name(field, value, code):
    if code == "":
        assert understood(**{field: value})
        return
    refused = refusal(**{field: value})
    assert refused.status == 400 and str(refused.param).partition("[")[0] == field
    assert str(refused).startswith(field) and code in (None, refused.code)


def test_choices_that_cannot_be_ranked_are_refused():
    assert refusal(best_of=1, n=2).param == "best_of"
    assert refusal(best_of=2, stream=True).param == "best_of"
    assert understood(best_of=2, n=2, stream=True).num_drawn == 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'developer', 'system'"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content", "text parts",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "does not do"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
            "messages[0].function_call", "does not do",
        ),
        ({"messages": [{"role": "user"}] * 20_000}, "messages", "at most 16384"),
        ({"tools": [{"type": "function"}]}, "tools", "does not do this"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not do this"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs=true"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
    ],
)  # fmt: skip
def test_what_a_chat_cannot_contain_is_named(fields, param, message):
    refused = refusal(chat, **fields)
    assert refused.param == param and str(refused).startswith(param) and message in str(refused)


def test_the_text_of_a_message_in_every_form():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    contents = ["a", parts, None, []]
    request = chat(messages=[{"role": "user", "content": content} for content in contents], tools=[])
    assert [message.content for message in request.messages] == ["a", "a\nb", "", ""]


def test_unknown_names_are_handed_on_and_a_missing_one_is_named():
    request, unknown = parse(b'{"model": "m", "prompt": "a", "foo": 1, "b\\u00e4r": [2]}', CompletionRequest)
    assert request.prompt == ["a"] and unknown == ["foo", "bär"]
    for body, param in ((b'{"model": "m"}', "prompt"), (b'{"prompt": "a"}', "model")):
        with pytest.raises(Refusal, match=f"{param}: missing") as refused:
            parse(body, CompletionRequest)
        assert (refused.value.param, refused.value.code) == (param, "missing_required_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [-1] * 500_000}, {"prompt": [["x"] * 500_000]},
        {"messages": [5] * 500_000}, {"messages": [{"role": "user", "content": [5] * 500_000}]},
    ],
    ids=["ids", "nested", "messages", "parts"],
)  # fmt: skip
def test_a_long_list_of_what_is_wrong_is_given_up_at_the_first(fields):
    """An error object for each would hold up every other client for seconds."""
    refused = refusal(chat if "messages" in fields else understood, **fields)
    assert refused.__cause__ is not None
    assert refused.__cause__.error_count() < 8  # type: ignore[attr-defined]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_request_or_a_refusal(body):
    with pytest.raises(Refusal) as refused:
        parse(body, CompletionRequest)
    assert refused.value.status == 400 and json.dumps(refused.value.body())
