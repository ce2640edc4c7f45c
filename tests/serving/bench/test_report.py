"""Ceilings, shares and the table from numbers chosen by hand."""

import pytest

from serving.bench.report import ceilings, faults, plot, shares, table

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
    assert shares(point | {"concurrency": None}, INFO, ceiling) == {}
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


def test_pictures_are_of_what_there_is(tmp_path):
    rated = [
        {"rate": rate, **{f"{name}_p{p}_ms": rate * p for name in ("ttft", "tpot") for p in (50, 90, 99)}}
        for rate in (1.0, 2.0)
    ]
    assert [path.name for path in plot(rated, {"a": [0.01, 0.02], "b": []}, tmp_path)] == [
        "latency.png",
        "itl.png",
    ]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("latency.png", "itl.png"))
    assert plot([], {}, tmp_path) == [] and list(tmp_path.iterdir()) == []  # nor of an earlier run


def test_a_share_above_all_of_its_ceiling_is_a_fault_of_the_ceiling():
    points = [{"load": "1 in flight", "mbu": 0.9, "prefill_mfu": 1.64}, {"load": "8 in flight", "mbu": 0.5}]
    assert faults(points) == [
        "peak: 1 in flight reaches 164% of it, so it is no ceiling, and no share of it counts"
    ]
    assert faults(points[1:]) == []
