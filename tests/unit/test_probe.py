"""Ceilings are rates of work that was done, in the units that their names say."""

import time

import pytest
import torch

from cluster import probe


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "GEMM_SIZE", 256)
    monkeypatch.setattr(probe, "COPY_BYTES", 1 << 22)


def test_the_best_repeat_lies_at_the_end_of_its_spread(small):
    threads = torch.get_num_threads()
    found = probe.measure(repeats=4)
    for ceiling in (found.product_tflops, found.read_gb_per_s, found.copy_gb_per_s):
        assert 0 < ceiling.spread[0] <= ceiling.spread[1] == ceiling.best
    assert found.device == f"cpu, {threads} threads"


def test_units(small, monkeypatch):
    """With a clock on which everything takes a millisecond."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1e-3)
    found = probe.measure(repeats=2)
    assert found.product_tflops.best == pytest.approx(2 * 256**3 / 1e-3 / 1e12)
    assert found.read_gb_per_s.best == pytest.approx((1 << 22) / 1e-3 / 1e9)
    assert found.copy_gb_per_s.best == pytest.approx(2 * (1 << 22) / 1e-3 / 1e9)


def test_it_runs_on_the_threads_that_it_is_given(small):
    before = torch.get_num_threads()
    try:
        assert probe.measure(num_threads=1, repeats=1).device == "cpu, 1 threads"
    finally:
        torch.set_num_threads(before)
