"""Rates of a run: MFU against the datasheet and against what was measured."""

import pytest

from training.meter import Meter


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


def test_an_unknown_device_has_no_mfu_but_a_reason_and_may_have_a_measured_one():
    rates = meter("NVIDIA Z1", measured_tflops=200.0).rates(step_seconds=0.01)
    assert rates["mfu"] is None and "no datasheet peak for NVIDIA Z1" in rates["mfu_reason"]
    assert rates["mfu_of_measured"] == pytest.approx(0.25)


def test_what_was_not_measured_is_not_said():
    assert "mfu_of_measured" not in meter("NVIDIA A40").rates(step_seconds=0.01)
