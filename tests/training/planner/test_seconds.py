"""Planned seconds against those an H100 and an H200 took, and what the plan does without a measurement."""

import json
from pathlib import Path

import pytest

from cluster.measure import hardware
from tests.training.planner.test_memory import SHAPE, alone, measured, on_one_gpu
from training.planner.memory import Form
from training.planner.seconds import SHEET_PRODUCTS, micro_batch_seconds, rates_of, step_seconds

WITHIN = 0.15  # of what was measured
WITHIN_LAUNCHES = 0.35  # where starting kernels sets the pace: the plan does not know the host's speed
DEVICE = hardware.lookup("NVIDIA H200")
RATES = rates_of(DEVICE)


@pytest.mark.parametrize(("card", "row"), measured("5", "ms"))
def test_seconds_of_forward_and_backward_on_gpus_are_those_planned(card, row) -> None:
    micro, form = alone(row)
    planned = micro_batch_seconds(SHAPE, 2048 * micro, 2048, form, rates_of(hardware.lookup(card)))
    within = WITHIN_LAUNCHES if planned["launches"] > 0.1 * sum(planned.values()) else WITHIN
    assert 1e3 * sum(planned.values()) == pytest.approx(row["ms"], rel=within)


@pytest.mark.parametrize(("card", "row"), measured("3", "tokens_per_second"))
def test_seconds_of_a_training_step_on_gpus_are_those_planned(card, row) -> None:
    rates = rates_of(hardware.lookup(card))
    planned = step_seconds(on_one_gpu(*row["keys"].split()), SHAPE, rates, num_workers=1)
    assert 1e3 * sum(planned.values()) == pytest.approx(row["ms"], rel=WITHIN)
    assert planned["matrix products"] == max(planned.values()) and planned["exchange"] == 0


def test_the_largest_logits_cost_a_product_of_every_query_and_key_in_each_pass() -> None:
    """With all layers recomputed there are two forward passes."""
    for keys, passes in (((), 1), (("model.activation_checkpointing=true",), 2)):
        plain, clipped = (
            step_seconds(on_one_gpu(f"optim.qk_clip={clip}", *keys), SHAPE, RATES, num_workers=1)
            for clip in (0, 100)
        )
        seconds = clipped.pop("attention logits")
        assert clipped == plain
        logits = passes * 24 * 16 * 2048 * 16384
        least = 2 * 128 * logits / RATES.product_flops + 9 * logits / RATES.bytes_per_s
        assert least < seconds < 2 * least


def test_recomputing_layers_takes_a_quarter_to_a_third_more() -> None:
    plain, again = (
        sum(micro_batch_seconds(SHAPE, 8192, 2048, Form(2, checkpointing=each), RATES).values())
        for each in (False, True)
    )
    assert 1.25 < again / plain < 1.37


def test_ceilings_are_measured_ones_where_there_is_a_file_of_the_card(tmp_path: Path) -> None:
    assert RATES.source == "measured: nvidia-h200_gpu.json"
    assert 0.7 < RATES.product_flops / (DEVICE.bf16_tflops * 1e12) < 1
    estimated = rates_of(DEVICE, folder=tmp_path)
    assert estimated.product_flops == SHEET_PRODUCTS * DEVICE.bf16_tflops * 1e12
    assert "not measured" in estimated.source
    (tmp_path / "nvidia-h200_gpu.json").write_text(json.dumps({"blocks": {}}))  # block 1 has not run
    assert rates_of(DEVICE, folder=tmp_path) == estimated
