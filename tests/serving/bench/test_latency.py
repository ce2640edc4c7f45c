"""Latencies of hand-made requests, by hand."""

import numpy as np
import pytest

from serving.bench.latency import RequestOutcome, Slo, percentile, summarise


def outcome(
    index: int = 0, *, scheduled: float = 0.0, sent: float | None = None, tokens: tuple = (1.0, 1.5, 2.5),
    output_tokens: int | None = None, error: str | None = None, ended: float | None = None,
) -> RequestOutcome:  # fmt: skip
    return RequestOutcome(
        index=index,
        scheduled=scheduled,
        sent=scheduled if sent is None else sent,
        tokens=tokens,
        ended=ended if ended is not None else (tokens[-1] if tokens else scheduled),
        prompt_tokens=10,
        output_tokens=len(tokens) if output_tokens is None else output_tokens,
        error=error,
    )


NONE = Slo(None, None, None)


def test_times_of_one_request():
    one = outcome(scheduled=0.25, sent=0.75)
    assert one.ttft == 0.75  # from the schedule, although it was sent late
    assert one.e2e == 2.25
    assert one.tpot == 0.75  # 1.5 s for two tokens
    assert one.itls == [0.5, 1.0]


def test_a_request_of_one_token_has_no_tpot_and_none_has_no_times():
    assert (outcome(tokens=(2.0,)).ttft, outcome(tokens=(2.0,)).tpot, outcome(tokens=(2.0,)).itls) == (
        2.0,
        None,
        [],
    )
    empty = outcome(tokens=(), error="timeout")
    assert (empty.ttft, empty.tpot, empty.e2e) == (None, None, None)


def test_tokens_that_share_an_event_count_in_tpot():
    assert outcome(tokens=(1.0, 2.0), output_tokens=5).tpot == 0.25


@pytest.mark.parametrize("number", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 50, 90, 99, 100])
def test_percentiles_are_numpy_s(number, percent):
    values = np.random.default_rng(number).normal(size=number).tolist()
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
    assert percentile([], percent) is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (NONE, True),
        (Slo(1.0, None, None), True),
        (Slo(0.99, None, None), False),
        (Slo(None, 0.75, 2.5), True),
        (Slo(None, 0.74, None), False),
        (Slo(None, None, 2.49), False),
    ],
)
def test_a_request_meets_the_slo_if_it_meets_every_limit(slo, met):
    assert slo.met_by(outcome()) is met
    assert not slo.met_by(outcome(error="HTTP 500"))
    assert Slo(None, 1e-9, None).met_by(outcome(tokens=(1.0,)))


def test_the_summary_of_four_requests_of_which_two_failed():
    outcomes = [
        outcome(0, scheduled=1.0, tokens=(1.1, 1.2, 1.3)),
        outcome(1, scheduled=2.0, sent=2.01, tokens=(2.4, 2.6)),
        outcome(2, scheduled=2.5, tokens=(), error="HTTP 429", ended=2.6),
        outcome(3, scheduled=3.0, tokens=(3.2,), error="timeout", ended=6.0),
    ]
    found = summarise(outcomes, slo=Slo(0.2, None, None))
    assert found["requests"] == 4 and found["succeeded"] == 2
    assert found["errors"] == {"HTTP 429": 1, "timeout": 1}
    assert found["seconds"] == 5.0  # the timeout is part of the run
    assert found["requests_per_second"] == 0.4 and found["output_tokens_per_second"] == 1.0
    assert found["total_tokens_per_second"] == 5.0
    assert found["attainment"] == 0.25 and found["goodput_per_second"] == 0.2
    assert found["ttft_p50_ms"] == pytest.approx(250)
    assert found["itl_p50_ms"] == pytest.approx(100) and found["itl_p99_ms"] == pytest.approx(198)
    assert found["tpot_p90_ms"] == pytest.approx(190)
    assert found["send_lag_p99_ms"] == pytest.approx(9.7)


def test_when_all_fail_there_are_no_latencies_but_still_a_summary():
    found = summarise([outcome(tokens=(), error="timeout", ended=1.0)], slo=NONE)
    assert found["ttft_p50_ms"] is None and found["output_tokens_per_second"] == 0
    with pytest.raises(ValueError, match="no request was measured"):
        summarise([], slo=NONE)


def test_what_was_decoded_and_in_what_time_by_hand():
    """A answers 1 s to 5 s alone until 3 s, in steps of 1 s; B 3 s to 5 s; nothing until C, 9 s to 10 s."""
    outcomes = [
        outcome(0, tokens=(1.0, 2.0, 3.0, 4.0, 5.0)),
        outcome(1, tokens=(3.0, 4.0, 5.0)),
        outcome(2, tokens=(9.0, 9.5, 10.0)),
        outcome(3, tokens=(6.0,)),  # decodes nothing
        outcome(4, tokens=(1.0, 9.0), error="timeout"),
    ]
    found = summarise(outcomes, slo=NONE)
    assert found["decode_seconds"] == 5.0 and found["decode_steps"] == pytest.approx(4 + 2)
    assert found["decode_context_tokens"] == 4 * 12.5 + 2 * 11.5 + 2 * 11.5
    assert found["prompt_tokens_p50"] == 10
