"""Ceilings, shares and the table from numbers chosen by hand."""

import pytest

from serving.bench.plots import plot
from serving.bench.report import answer, ceilings, combined, faults, intervals_table, shares, table

INFO = {
    "weight_bytes": 2_000_000_000, "kv_bytes_per_token": 100_000, "flops_per_token": 2_000_000_000,
    "head_flops": 300_000_000, "last_token_flops": 200_000_000, "attention_flops": 40_000,
    "last_attention_flops": 10_000,
}  # fmt: skip


def test_a_known_gpu_has_its_datasheet_s_ceilings():
    found = ceilings(INFO, {"device": "NVIDIA A40"})
    assert (found["product_tflops"], found["gb_per_s"]) == (149.7, 696)
    assert found["step_ms"] == pytest.approx(2000 / 696)
    assert found["decode_tokens_per_second"] == pytest.approx(348)
    assert found["prefill_tokens_per_second"] == pytest.approx(149.7e12 / 1.5e9)
    assert "a40-nvidia" in found["source"] or "a40" in found["source"]


def test_any_other_device_has_measured_ones_and_says_so():
    found = ceilings(
        INFO,
        {"device": "cpu, 2 threads", "product_dtype": "float32", "product_tflops": 0.4, "read_gb_per_s": 40},
    )
    assert (found["product_tflops"], found["gb_per_s"]) == (0.4, 40)
    assert found["step_ms"] == 50 and found["source"].startswith("measured here")
    assert found["product_dtype"] == "float32"


def test_shares_of_a_closed_loop():
    """50 steps of 40 ms that give 50 tokens, each after 120; a prompt of 100 in 400 ms."""
    ceiling = {"gb_per_s": 100, "product_tflops": 1.0}
    point = {
        "concurrency": 1, "ttft_p50_ms": 400.0, "prompt_tokens_p50": 100,
        "decode_seconds": 2.0, "decode_steps": 50.0, "decode_context_tokens": 50 * 120,
    }  # fmt: skip
    found = shares(point, INFO, ceiling)
    assert found["mbu"] == pytest.approx((2e9 + 120 * 1e5) / 0.04 / 100e9)
    attention = 100**2 / 2 * 30_000 + 100 * 10_000
    assert found["prefill_mfu"] == pytest.approx((100 * 1.5e9 + 0.5e9 + attention) / 0.4 / 1e12)
    eight = point | {"concurrency": 8, "decode_context_tokens": 8 * 50 * 120}
    assert shares(eight, INFO, ceiling) == {"mbu": pytest.approx((2e9 + 8 * 120 * 1e5) / 0.04 / 100e9)}
    over_two = shares(eight, INFO, ceiling, replicas=2)
    assert over_two == {"mbu": pytest.approx((2e9 + 4 * 120 * 1e5) / 0.04 / 100e9)}
    assert shares(point, INFO, ceiling, replicas=2) == found  # one of them is idle
    assert shares(eight | {"concurrency": None}, INFO, ceiling) == shares(eight, INFO, ceiling)
    assert shares(point | {"decode_seconds": 0.0}, INFO, ceiling) == {}


POINTS = [
    {
        "load": "1 in flight",
        "counts": "9/10",
        "rate": None,
        "ttft_p50_ms": 12.34,
        "attainment": 0.9,
        "mbu": 0.5,
    },
    {"load": "2.00/s poisson", "counts": "refused", "rate": 2.0, "ttft_p50_ms": None},
]


def test_the_table_shows_a_dash_for_what_was_not_measured_and_no_empty_columns():
    lines = str(table(POINTS)).splitlines()
    assert lines[0].split() == ["load", "ok/all", "TTFT", "p50", "SLO", "met", "MBU"]
    assert lines[1].split() == ["1", "in", "flight", "9/10", "12.3", "90%", "50.0%"]
    assert lines[2].split() == ["2.00/s", "poisson", "refused", "-", "-", "-"]
    assert len({len(line) for line in lines}) == 1


def repeat(load: str, value: float, **others: object) -> dict:
    figures = {"output_tokens_per_second": value, "ttft_p50_ms": 1e3 / value, "mbu": 0.4, "attainment": 1.0}
    counts = {"requests": 10, "succeeded": 9, "short_answers": 1, "rate": None}
    counts |= {"errors": {"timeout": 1}, "first_error": "timeout"}
    return {"load": load, "counts": "9/10"} | figures | counts | others


def test_repeats_are_one_row_with_intervals_and_rows_are_sorted():
    points = [
        repeat("4.00/s poisson", 50.0, rate=4.0),
        repeat("2.00/s poisson", 40.0, rate=2.0),
        *(repeat("8 in flight", value, concurrency=8) for value in (100.0, 400.0)),
        {"load": "8 in flight", "concurrency": 8, "counts": "refused", "refused": "it lagged"},
        repeat("1 in flight", 20.0, concurrency=1),
    ]
    rows = combined(points)
    assert [row["load"] for row in rows] == ["1 in flight", "8 in flight", "2.00/s poisson", "4.00/s poisson"]
    eight = rows[1]
    assert eight["output_tokens_per_second"] == pytest.approx(200) and eight["counts"] == "18/20"
    assert eight["errors"] == {"timeout": 2}
    centre, low, high = eight["intervals"]["output_tokens_per_second"]
    assert low < centre < high and low * high == pytest.approx(centre**2)
    assert "8 in flight" in str(intervals_table(rows)) and intervals_table(rows[:1]) is None
    near = [repeat("0.05/s poisson", 1.0, rate=rate) for rate in (0.046, 0.054)]  # of a search, with one name
    assert [row["rate"] for row in combined(near)] == [0.046, 0.054]


def test_a_figure_that_one_repeat_lacks_is_not_shown_as_that_of_all():
    both = [repeat("8 in flight", 100.0, mbu=mbu) for mbu in (0.4, None)]
    assert combined(both)[0]["mbu"] is None and combined(both[:1] * 2)[0]["mbu"] == pytest.approx(0.4)


def test_the_table_never_exceeds_120_columns():
    point = {key: 123456.0 for name in ("ttft", "tpot", "itl", "e2e") for key in
             (f"{name}_p50_ms", f"{name}_p99_ms")}  # fmt: skip
    row = repeat(
        "10000.00/s poisson", 1e6, **point, prefill_mfu=0.5, joules_per_token=0.123, goodput_per_second=9e5
    )
    lines = str(table([row])).splitlines()
    assert max(map(len, lines)) <= 120 and "J/token" in lines[0] and "TTFT p99" in lines[0]
    lines = str(intervals_table(combined([row, row]))).splitlines()
    assert max(map(len, lines)) <= 120 and "TTFT p99" in lines[0] and "10000.00/s" in lines[1]


def test_the_answer_is_one_sentence():
    slo = {"ttft_ms": 200.0, "tpot_ms": None, "e2e_ms": None, "attainment": 0.95}
    rows = [
        repeat("8 in flight", 900.0, concurrency=8),
        repeat("2.00/s poisson", 40.0, rate=2.0, ttft_p99_ms=12.0, joules_per_token=0.25),
        repeat("4.00/s poisson", 50.0, rate=4.0, over_saturated=True),
    ]
    assert answer("m", rows, slo, 2.0) == (
        "m meets the SLO (TTFT 200 ms, by 95% of requests) up to 2.00 requests/s: 40 output tokens/s, "
        "TTFT p99 12.0 ms, MBU 40.0%, 0.25 J per output token; over-saturated (its queue grew) at 4.00/s "
        "poisson; 3 of 30 requests failed; 3 answers ended before the length that was asked for."
    )
    assert "m meets the SLO (which has no limits) up to" in answer("m", rows, slo | {"ttft_ms": None}, 2.0)
    assert answer("m", rows, slo, None).startswith("m was fastest at 8 in flight: 900 output tokens/s")
    assert answer("m", [repeat("a", 1.0, succeeded=0)], slo, None) == "m: nothing was measured."


def test_pictures_are_of_what_there_is(tmp_path):
    rated = [
        {"rate": rate, "requests": 4, "succeeded": 4 - failed, "attainment": 1 - failed / 4}
        | {f"{name}_p{p}_ms": rate * p for name in ("ttft", "tpot") for p in (50, 90, 99)}
        for rate, failed in ((1.0, 0), (2.0, 1))
    ]
    all_failed = {"rate": 3.0, "requests": 4, "succeeded": 0, "attainment": 0.0, "ttft_p50_ms": None}
    about = {"model": "m", "slo": {"ttft_ms": 200.0, "tpot_ms": None, "attainment": 0.95}}
    drawn = plot([*rated, all_failed], {"a": [0.01, 0.02], "b": []}, tmp_path, **about)
    assert [path.name for path in drawn] == ["latency.png", "itl.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("latency.png", "itl.png"))
    assert plot([], {}, tmp_path, **about) == [] and list(tmp_path.iterdir()) == []  # nor of an earlier run


def test_a_share_above_all_of_its_ceiling_is_a_fault_of_the_ceiling_and_voids_its_shares():
    points = [{"load": "1 in flight", "mbu": 0.9, "prefill_mfu": 1.64}, {"load": "8 in flight", "mbu": 0.5}]
    points.append({"load": "1 in flight", "prefill_mfu": 0.9})  # the same once more
    assert faults(points) == [
        "peak: 1 in flight reaches 164% of it, so it is no ceiling, and no share of it counts"
    ]
    assert points == [
        {"load": "1 in flight", "mbu": 0.9, "prefill_mfu": None},
        {"load": "8 in flight", "mbu": 0.5},
        {"load": "1 in flight", "prefill_mfu": None},
    ]
    assert faults(points) == []
