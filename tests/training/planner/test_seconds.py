"""Planned seconds against those that an H200 took, and what the plan does without a measurement."""

import json
from pathlib import Path

import pytest

from cluster.measure import hardware
from tests.training.planner.test_memory import FIRST_RESULT, H200, SHAPE, alone, on_one_gpu
from training.planner.memory import Form
from training.planner.seconds import SHEET_PRODUCTS, micro_batch_seconds, rates_of, step_seconds

WITHIN = 0.15  # of what was measured
DEVICE = hardware.lookup("NVIDIA H200")
RATES = rates_of(DEVICE)
TIMED = [row for row in H200["5"]["rows"] if "ms" in row]


@pytest.mark.parametrize("row", TIMED, ids=[row["case"] for row in TIMED])
def test_seconds_of_forward_and_backward_on_an_h200_are_those_planned(row) -> None:
    micro, form = alone(row)
    planned = micro_batch_seconds(SHAPE, 2048 * micro, 2048, form, RATES)
    assert 1e3 * sum(planned.values()) == pytest.approx(row["ms"], rel=WITHIN)


STEPS = [row for row in H200["3"]["rows"] if "tokens_per_second" in row]


@pytest.mark.parametrize("row", STEPS, ids=[row["case"] for row in STEPS])
def test_seconds_of_a_training_step_on_an_h200_are_those_planned(row) -> None:
    keys = row["keys"].split() if "keys" in row else FIRST_RESULT
    planned = step_seconds(on_one_gpu(*keys), SHAPE, RATES, num_workers=1)
    assert 1e3 * sum(planned.values()) == pytest.approx(row["ms"], rel=WITHIN)
    assert planned["matrix products"] == max(planned.values()) and planned["exchange"] == 0


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
