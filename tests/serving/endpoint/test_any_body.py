"""Whatever a body holds, the answer is no server error and no slot is kept."""

import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.endpoint.chat import ChatTemplate
from serving.endpoint.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.fake_engine import VOCABULARY, counting_engine, idle
from tests.serving.endpoint.server import Server
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.stack
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


# Anything that JSON can say, near and far from what a request may say.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from([0, 1, -1, 0.5, 2, "counting", "a", "", 2**31, 2**63]),
)  # fmt: skip


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


PATHS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
NAMES = sorted({name for kind in PATHS.values() for name in kind.model_fields})
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer", "assistant", "tool"])},
        optional={"content": st.text(max_size=9) | VALUES, "name": VALUES, "tool_calls": VALUES},
    ),
    max_size=3,
)


USUAL = st.fixed_dictionaries(
    {"model": st.just("counting"), "max_tokens": st.integers(0, 2)},
    optional={
        "prompt": st.lists(st.integers(0, VOCABULARY), max_size=70) | st.text(max_size=20),
        "echo": st.booleans(), "logprobs": st.integers(0, 1), "stream": st.booleans(), "stop": st.just("b"),
        "messages": MESSAGES, "top_k": st.integers(-1, 9), "n": st.integers(1, 3), "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2), "repetition_penalty": st.floats(0.01, 100),
        "logit_bias": st.dictionaries(st.integers(0, VOCABULARY).map(str), st.floats(-100, 100), max_size=3),
        "stop_token_ids": st.lists(st.integers(0, VOCABULARY), max_size=3), "min_tokens": st.integers(0, 3),
    },
).map(lambda usual: {"prompt": [1]} | usual)  # fmt: skip


BODIES = st.builds(
    lambda usual, odd: usual | odd, USUAL, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
)


TEMPLATE = "{% for message in messages %}{{ message.content[:9] + message.name | default('') }}{% endfor %}"


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    made = Server(counting_engine(step_seconds=0.0), template=ChatTemplate(TEMPLATE, {}))
    yield made
    made.close()


@pytest.fixture(scope="module")
def connection(quick: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=quick.url, timeout=PATIENCE_SECONDS) as opened:
        yield opened


@settings(max_examples=500, deadline=None, suppress_health_check=FIXTURES)
@given(path=st.sampled_from([*PATHS]), body=BODIES)
def test_no_body_is_a_server_error_or_keeps_a_slot(quick, connection, path, body):
    for name in ("max_tokens", "max_completion_tokens"):
        if not isinstance(body.get(name), str | list | dict):
            body[name] = 9 if not isinstance(body.get(name), int) else min(body[name], 9)
    headers = {"content-type": "application/json"}
    answer = connection.post(path, content=json.dumps(body), headers=headers)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
    assert quick.engine.failure() is None
    assert idle(quick.engine)


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES)
@given(body=st.binary(max_size=200))
def test_nor_are_any_bytes(connection, body):
    headers = {"content-type": "application/json"}
    answer = connection.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
