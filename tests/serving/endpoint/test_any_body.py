"""Whatever a body holds, the answer is no server error and no slot is kept."""

import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


NAMES = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream", "n"),
    *("stream_options", "ignore_eos", "echo", "suffix", "best_of", "logit_bias", "frequency_penalty", "user"),
)


USUAL = st.fixed_dictionaries(
    {"model": st.just("counting"), "max_tokens": st.integers(0, 2)},
    optional={
        "prompt": st.lists(st.integers(0, VOCABULARY), max_size=70) | st.text(max_size=20),
        "echo": st.booleans(), "logprobs": st.integers(0, 1), "stream": st.booleans(), "stop": st.just("b"),
    },
).map(lambda usual: {"prompt": [1]} | usual)  # fmt: skip


BODIES = st.builds(
    lambda usual, odd: usual | odd, USUAL, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
)


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    made = Server(counting_engine(step_seconds=0.0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def connection(quick: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=quick.url, timeout=PATIENCE_SECONDS) as opened:
        yield opened


@settings(max_examples=1000, deadline=None, suppress_health_check=FIXTURES)
@given(body=BODIES)
def test_no_body_is_a_server_error_or_keeps_a_slot(quick, connection, body):
    if isinstance(body["max_tokens"], int):
        body["max_tokens"] = min(body["max_tokens"], 9)
    headers = {"content-type": "application/json"}
    answer = connection.post("/v1/completions", content=json.dumps(body), headers=headers)
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
