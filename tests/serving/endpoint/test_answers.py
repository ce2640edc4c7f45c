"""Answers without HTTP and without an engine."""

from typing import Any

import pytest

from serving.endpoint.answers import ChatLayout, CompletionLayout, Piece, model, usage
from serving.endpoint.refusal import Refusal
from serving.engine.protocol import EngineInfo, Score, Token


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_a_refusal_is_openai_s_error_object(status, kind):
    body = Refusal(status, "why", param="p", code="c").body()
    assert body == {"error": {"message": "why", "type": kind, "param": "p", "code": "c"}}


TEXTS = {1: "a", 2: "ñ", 3: "\N{REPLACEMENT CHARACTER}", 4: "\N{REPLACEMENT CHARACTER}", 5: "te", 6: "xt"}


def pieces(*scored: tuple[int, Score | None]) -> list[Piece]:
    return [
        Piece([Token(token, score, None)], TEXTS[token], [i], "stop")
        for i, (token, score) in enumerate(scored)
    ]


def completion(*scored: tuple[int, Score | None], scores: int) -> Any:
    layout = CompletionLayout(model="m", text_of=TEXTS.__getitem__)
    return layout.choice(0, pieces(*scored), scores=scores)["logprobs"]


def test_completions_have_openai_s_layout():
    layout = CompletionLayout(model="m", text_of=TEXTS.__getitem__)
    tokens = [Token(token, Score(value, 5, -0.5), None) for token, value in ((5, -0.5), (6, -1.0))]
    choice = layout.choice(3, [Piece(tokens, "text", [0, 2], "stop")], scores=1)
    told = {
        "tokens": ["te", "xt"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"te": -0.5}, {"te": -0.5, "xt": -1.0}],
        "text_offset": [0, 2],
    }
    assert choice == {"index": 3, "text": "text", "logprobs": told, "finish_reason": "stop"}
    answer = layout.answer([choice], streamed=False)
    assert (
        answer["object"] == "text_completion" and answer["model"] == "m" and answer["id"].startswith("cmpl-")
    )
    assert answer["choices"] == [choice] and layout.answer([], streamed=True) == {**answer, "choices": []}
    assert usage(3, 4) == {"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}


def test_chats_have_openai_s_layout():
    layout = ChatLayout(model="m", text_of=TEXTS.__getitem__)
    [piece] = pieces((2, Score(-0.5, 1, -0.25, ((2, -0.5),))))
    choice = layout.choice(0, [piece, piece], scores=None)
    assert choice["message"] == {"role": "assistant", "content": "ññ", "refusal": None}
    assert choice["logprobs"] is None and choice["finish_reason"] == "stop"
    first, next_ = (layout.change(1, piece, scores=2, first=first) for first in (True, False))
    assert first["delta"] == {"role": "assistant", "content": "ñ"} and next_["delta"] == {"content": "ñ"}
    own = {"token": "ñ", "logprob": -0.5, "bytes": [195, 177]}
    likeliest = {"token": "a", "logprob": -0.25, "bytes": [97]}
    assert first["logprobs"]["content"] == [{**own, "top_logprobs": [likeliest, own]}]
    kinds = [layout.answer([], streamed=streamed)["object"] for streamed in (False, True)]
    assert kinds == ["chat.completion", "chat.completion.chunk"]


def test_the_likeliest_tokens_stand_beside_the_one_that_is_there_and_two_of_one_text_stay_two():
    scored = [(1, None), (2, Score(-0.5, 2, -0.5)), (2, Score(-3.0, 1, -0.25)), (3, Score(-2.0, 4, -0.125))]
    told = completion(*scored, scores=1)
    assert told["token_logprobs"] == [None, -0.5, -3.0, -2.0] and told["text_offset"] == [0, 1, 2, 3]
    assert told["top_logprobs"] == [
        None,
        {"ñ": -0.5},
        {"a": -0.25, "ñ": -3.0},
        {"token_id:4": -0.125, "\N{REPLACEMENT CHARACTER}": -2.0},
    ]
    three = Score(-3.0, 1, -0.25, ((3, -1.0), (4, -2.0)))
    assert completion((2, three), scores=3)["top_logprobs"] == [
        {"a": -0.25, "\N{REPLACEMENT CHARACTER}": -1.0, "token_id:4": -2.0, "ñ": -3.0}
    ]
    assert completion((2, three), scores=0)["top_logprobs"] == [{"ñ": -3.0}]


def test_a_model_is_described_as_it_is_served():
    info = EngineInfo(
        engine="torch", model="m", device="cpu", dtype="float32", context_tokens=64, vocab_size=9,
        num_parameters=1, num_slots=2, most_waiting=6, weight_bytes=3, kv_bytes_per_token=4,
        flops_per_token=5, head_flops=6, attention_flops=7, details={"a": "b"},
    )  # fmt: skip
    listed = model(info, since=12)
    assert listed["id"] == "m" and listed["created"] == 12 and listed["engine_info"]["details"] == {"a": "b"}
