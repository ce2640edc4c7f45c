"""The rounds of `bench.compare=serve`, on an engine that counts and without Serve."""

import asyncio

import pytest

from cluster.cli import RunError
from serving.peers import overhead
from serving.peers.overhead import OverheadCase
from tests.fake_engine import FAILING, counting_engine

CASE = OverheadCase(2, 7, prompt_tokens="8", output_tokens="uniform(3,6)")


def test_a_round_leaves_out_the_requests_that_start_at_once_and_draws_lengths():
    engine = counting_engine(step_seconds=0.001)
    try:
        plan = overhead._plan(CASE, engine.info, seed=3)
        found = asyncio.run(overhead._round(plan, CASE, engine, None, "counting"))
    finally:
        engine.close()
    assert len({request.max_tokens for request in plan}) > 1
    assert found["requests"] == found["succeeded"] == 5
    assert found["mean_output_tokens"] == sum(request.max_tokens for request in plan[2:]) / 5


def test_a_request_that_fails_ends_the_comparison():
    engine = counting_engine(step_seconds=0.001)
    try:
        plan = overhead._plan(CASE, engine.info, seed=3)
        plan[1] = type(plan[1])(None, (*FAILING, *plan[1].prompt), 4)  # among those that would not count
        with pytest.raises(RunError, match="requests failed directly, 2 at once: "):
            asyncio.run(overhead._round(plan, CASE, engine, None, "counting"))
    finally:
        engine.close()
