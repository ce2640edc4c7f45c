"""Ceilings are rates of work that was done, in the units that their names say."""

import time

import pytest
import torch

from cluster.measure import probe


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


def test_products_are_measured_in_what_the_device_multiplies(small, monkeypatch):
    """bf16 on a CPU without such arithmetic is fp32's work, and the ceiling says so."""
    measured = []
    product = torch.mm

    def noted(left, right, *, out):
        measured.append(left.dtype)
        return product(left, right, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    for has_bf16, dtype, expected in ((True, "bfloat16", "bfloat16"), (False, "bfloat16", "float32"),
                                      (True, "float32", "float32")):  # fmt: skip
        monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        measured.clear()
        assert probe.measure(dtype=dtype, repeats=1).product_dtype == expected
        assert {str(each) for each in measured} == {f"torch.{expected}"}


def test_a_slow_cpu_gets_smaller_products_and_fewer_repeats(monkeypatch):
    seven_in_time = probe.CPU_SECONDS / 8  # seconds that each of 7 repeats and one uncounted may take
    for size, seconds in ((2048, 0.9 * seven_in_time), (512, 0.9 * 64 * seven_in_time), (256, 1e4)):
        assert probe._affordable_size(2048, 7, 2 * 2048**3 / seconds) == size
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 1.0)  # everything takes a second
    assert len(probe._seconds(lambda: None, 7, gpu=False, within=2.5)) == 2  # of three, one not counted
    assert len(probe._seconds(lambda: None, 7, gpu=False, within=0.1)) == 1


@pytest.mark.parametrize(("speed", "rows"), [(1e12, 1000), (6e6, 406), (1e3, probe.LEAST_ROWS)])
def test_the_products_of_a_model_take_as_many_rows_as_the_cpu_can(speed, rows, monkeypatch):
    """6e6 FLOP/s for 2.5 s are 3 x 406 rows of 6 x 64 x 32 FLOPs."""
    monkeypatch.setattr(probe, "_pilot_flops", lambda dtype: speed)
    monkeypatch.setattr(probe, "_seconds", lambda body, repeats, **_: [1.0] * repeats)
    found = probe.measure_products({(64, 32): 5}, num_rows=1000, device="cpu", repeats=2, within=2.5)
    assert found.best == pytest.approx(6 * 64 * 32 * rows / 1e12)  # each takes a second, all five take five


def test_what_cannot_be_measured_is_missing_with_its_reason(small, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(torch, "mm", refuse)
    found = probe.measure(repeats=1)
    assert found.product_tflops is None and found.read_gb_per_s is not None
    assert found.problems == {"product_tflops": "DefaultCPUAllocator: can't allocate memory"}
