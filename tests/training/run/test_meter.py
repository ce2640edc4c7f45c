"""Rates of a run: MFU against the datasheet and against what was measured."""

from types import SimpleNamespace

import pytest

from cluster.record.wandb_keys import wandb_key
from tests.cluster.review.panel_keys import shown_by
from training.run import meter as module
from training.run.meter import Meter


def meter(device_name, measured_tflops=None):
    return Meter(
        tokens_per_step=1000,
        flops_per_token=10**9,
        num_devices=2,
        device_name=device_name,
        measured_tflops=measured_tflops,
    )


def test_mfu_is_a_share_of_the_datasheet_and_of_the_measured_ceiling():
    rates = meter("NVIDIA A40", measured_tflops=100.0).rates(step_seconds=0.01)
    assert rates["tokens_per_second"] == 100_000  # 1e14 FLOP/s over two devices
    assert rates["mfu"] == pytest.approx(50 / 149.7)
    assert rates["mfu_of_measured"] == pytest.approx(0.5)
    assert ("history", wandb_key("mfu_of_measured")) in shown_by("training")


def test_an_unknown_device_has_no_mfu_but_a_reason_and_may_have_a_measured_one():
    rates = meter("NVIDIA Z1", measured_tflops=200.0).rates(step_seconds=0.01)
    assert rates["mfu"] is None and "no datasheet peak for NVIDIA Z1" in rates["mfu_reason"]
    assert rates["mfu_of_measured"] == pytest.approx(0.25)


def test_what_was_not_measured_is_not_said():
    assert "mfu_of_measured" not in meter("NVIDIA A40").rates(step_seconds=0.01)


def test_a_pause_between_two_lines_takes_neither_time_nor_steps(monkeypatch):
    """3 steps, a checkpoint of 50 s, 2 steps, each of 1 s; then a line, and one of 4 steps of 2 s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    timed = meter("NVIDIA A40")
    for seconds, num_steps in ((1.0, 3), (1.0, 2)):
        timed.start()
        for _ in range(num_steps):
            clock.now += seconds
            timed.count_step()
        timed.pause()
        clock.now += 50
    assert timed.line()["step_seconds"] == 1.0
    timed.start()
    for _ in range(4):
        for part, seconds in (("data", 0.5), ("compute", 1.0), ("optimizer", 0.5)):
            with timed.phase(part):
                clock.now += seconds
        timed.count_step()
    timed.pause()
    assert timed.line() == {"step_seconds": 2.0, "data_wait_seconds": 0.5, **timed.rates(2.0)}
    assert timed.step_seconds == [1.0] * 5 + [2.0] * 4
    assert timed.summary()["median_step_seconds"] == 1.0
