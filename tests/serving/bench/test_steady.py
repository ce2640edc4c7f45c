"""The measured window: its rule by hand, and on the engine whose times are known."""

import asyncio
import random
from itertools import pairwise

import pytest

from serving.bench.latency import GIVEN_UP, RequestOutcome, Slo, joules_per_token, summarise
from serving.bench.loadgen import run_closed, run_open, to_engine
from serving.bench.steady import Steady, queue
from serving.bench.workload import Planned
from tests.lab.paced_engine import Pace, PacedEngine

NO_SLO = Slo(None, None, None)


def outcome(index: int, begin: float, end: float, *tokens: float, error: str | None = None) -> RequestOutcome:
    return RequestOutcome(
        index=index, scheduled=begin, sent=begin, tokens=tokens, ended=end, prompt_tokens=10,
        output_tokens=len(tokens), error=error,
    )  # fmt: skip


def test_a_closed_loop_measures_after_the_warm_up_and_ends_with_the_last_measured_request():
    steady = Steady(warm_up=2, number=3)
    for index in range(6):
        steady.begins(index, 0.1 * index)
    assert [steady.measures(index) for index in range(6)] == [False, False, True, True, True, False]
    for index in (0, 1, 5, 4, 3):
        steady.ends(index)
        assert not steady.over
    steady.ends(2)
    assert steady.over


def test_an_open_loop_waits_until_as_many_have_ended_as_are_in_flight():
    steady = Steady(warm_up=2, number=1, most_seconds=10.0)
    for index in range(5):
        steady.begins(index, 0.1 * index)
    steady.ends(0)
    steady.ends(1)
    steady.begins(5, 1.0)  # 2 have ended, and 3 are in flight
    assert steady.first is None
    steady.ends(2)
    steady.ends(3)
    steady.begins(6, 1.1)
    assert steady.first == 6
    cold = Steady(warm_up=0, number=1, most_seconds=10.0)
    cold.begins(0, 0.0)
    cold.ends(0)
    cold.begins(1, 0.1)
    assert cold.first == 1  # the first request finds no load
    late = Steady(warm_up=2, number=1, most_seconds=10.0)
    late.begins(0, 9.9)
    late.begins(1, 10.0)  # a server that ends nothing is measured all the same
    assert late.first == 1


def test_rates_count_what_arrives_in_the_window_whoever_asked_for_it():
    """From 1 s to 3 s: both tokens of the measured one, one of another, one of one that was given up."""
    measured = [outcome(1, 1.0, 3.0, 2.0, 3.0)]
    beside = [outcome(0, 0.0, 2.0, 0.5, 2.0), outcome(2, 2.0, 3.1, 2.5, 3.05, error=GIVEN_UP)]
    found = summarise(measured, slo=NO_SLO, beside=beside)
    assert found["seconds"] == 2 and found["output_tokens_per_second"] == 4 / 2
    assert found["requests"] == 1 and found["requests_per_second"] == 2 / 2 == found["goodput_per_second"]
    assert found["total_tokens_per_second"] == (4 + 20) / 2
    assert found["decode_seconds"] == 1.0  # of the intervals that lie in the window


def test_a_closed_loop_of_the_paced_engine_is_full_during_the_whole_window():
    told: list[RequestOutcome] = []
    engine = PacedEngine(Pace(first=(0.01, 0.03), gap=(0.004, 0.02)), observe=told.append)
    chance, outcomes = random.Random(0), list[RequestOutcome]()
    plan = [Planned(None, (1, 2), chance.randrange(1, 9)) for _ in range(200)]
    steady = Steady(warm_up=4, number=20)
    asyncio.run(run_closed(plan, to_engine(engine), concurrency=4, observe=outcomes.append, steady=steady))
    engine.close()
    measured = [each for each in outcomes if steady.measures(each.index)]
    assert len(measured) == 20 and all(each.error is None for each in measured)
    beside = [each for each in outcomes if not steady.measures(each.index)]
    opens, closes = min(each.scheduled for each in measured), max(each.ended for each in measured)
    edges = sorted({moment for each in outcomes for moment in (each.scheduled, each.ended)})
    moments = [(a + b) / 2 for a, b in pairwise(edge for edge in edges if opens <= edge <= closes)]
    in_flight = [sum(each.scheduled < moment < each.ended for each in outcomes) for moment in moments]
    assert set(in_flight) <= {3, 4}  # 3 from the end of a request to the sending of the next
    assert sum(each.scheduled < closes < each.ended for each in outcomes) == 3  # beside the last
    found = summarise(measured, slo=NO_SLO, beside=beside)
    inside = sum(opens <= moment <= closes for each in outcomes for moment in each.tokens)
    assert found["output_tokens_in_window"] == pytest.approx(inside)
    assert len(told) == sum(each.error is None for each in outcomes)  # as the engine wrote them down


def test_an_open_loop_that_the_server_cannot_keep_up_with_is_over_saturated():
    """One slot, 20 ms a request: 200 a second come, 50 are served at the most, however fast the machine."""
    engine = PacedEngine(Pace(first=(0.02, 0.02), slots=1), observe=lambda told: None)
    outcomes: list[RequestOutcome] = []
    steady = Steady(warm_up=2, number=60, most_seconds=0.1)
    plan = [Planned(index / 200, (1, 2), 1) for index in range(90)]
    asyncio.run(run_open(plan, to_engine(engine), observe=outcomes.append, steady=steady))
    engine.close()
    measured = [each for each in outcomes if steady.measures(each.index)]
    beside = [each for each in outcomes if not steady.measures(each.index)]
    found = queue(measured, beside)
    assert len(measured) == 60 and found["over_saturated"] and found["queue_slope_per_second"] > 50


def simulated(rate: float, *, slots: int, seconds: float, seed: int) -> list[RequestOutcome]:
    """Poisson arrivals at a server with as many slots, each for 0.1 s a request."""
    draw, now, free, found = random.Random(seed), 0.0, [0.0] * slots, []
    while now < seconds:
        now += draw.expovariate(rate)
        free.sort()
        free[0] = max(now, free[0]) + 0.1
        found.append(outcome(len(found), now, free[0], free[0]))
    return found


@pytest.mark.parametrize(("rate", "expected"), [(20.0, False), (32.0, False), (60.0, True), (120.0, True)])
def test_the_slope_of_the_queue_tells_a_stable_server_from_an_over_saturated_one(rate, expected):
    """4 slots serve 40 a second."""
    verdicts = []
    for seed in range(40):
        outcomes = simulated(rate, slots=4, seconds=12.0, seed=seed)
        measured = [each for each in outcomes if each.scheduled >= 2.0]
        verdicts.append(queue(measured, outcomes[: -len(measured)])["over_saturated"])
    assert verdicts.count(expected) >= 39


def test_requests_that_are_turned_away_are_a_queue_that_grows_too():
    measured = [outcome(i, 0.1 * i, 0.1 * i + 0.05, error="HTTP 429" if i % 2 else None) for i in range(40)]
    assert queue(measured, [])["over_saturated"] and not queue(measured[::2], [])["over_saturated"]


def test_energy_counts_the_tokens_between_the_first_and_the_last_reading():
    outcomes = [outcome(0, 0.0, 1.0, 0.5, 1.0), outcome(1, 0.0, 2.0, 1.5, 2.0)]
    assert joules_per_token([(1.0, 40.0), (2.0, 46.0)], outcomes) == 6 / 3
    assert (
        joules_per_token([(1.0, 40.0), (1.4, 46.0)], outcomes) is None
        and joules_per_token([], outcomes) is None
    )


def test_turns_of_a_conversation_follow_each_other_in_both_loops():
    engine = PacedEngine(Pace(first=(0.005, 0.01), gap=(0.001, 0.002)), observe=lambda told: None)
    plan = [Planned(0.01 * index if index % 3 == 0 else None, (index,), 2, follows=index % 3 > 0)
            for index in range(12)]  # fmt: skip
    for concurrency in (None, 3):
        asked: dict[int, tuple[float, float]] = {}

        async def run(concurrency: int | None = concurrency, asked: dict = asked) -> None:
            send = to_engine(engine)

            async def noted(planned: Planned, index: int, scheduled: float, start: float) -> RequestOutcome:
                done = await send(planned, index, scheduled, start)
                asked[planned.prompt[0]] = (done.scheduled, done.ended)
                return done

            loop = {} if concurrency is None else {"concurrency": concurrency}
            await (run_closed if loop else run_open)(plan, noted, observe=lambda done: None, **loop)

        asyncio.run(run())
        assert len(asked) == 12
        assert all(asked[i][0] >= asked[i - 1][1] for i in range(12) if i % 3)
    engine.close()
