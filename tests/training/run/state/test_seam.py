"""Where a run goes on with another schedule, its learning rate is said before it moves."""

import re

import pytest

from training import config as training_config
from training.run.state.seam import _rate, describe_seam

STEP = "batch.tokens=4096"


def config(*keys: str) -> training_config.TrainConfig:
    return training_config.load(dotlist=[STEP, *keys], settle=False)


def test_a_finished_run_with_more_tokens_says_that_its_rate_jumps_and_how_it_would_not():
    done, more = config("schedule.tokens=409600"), config("schedule.tokens=819200")
    text = describe_seam(done, more, applied_steps=100)
    assert text is not None and text.startswith(
        "schedule.tokens was 409,600 and is 819,200: the learning rate (optim.matrix.lr) goes from 0.001 in "
        "step 100 to 0.0198 in step 101, ends at 0.001 in step 200; to let it fall on from 0.001 instead"
    )
    advice = re.findall(r"[a-z._]+=[\d.e-]+", text)
    assert [each.partition("=")[0] for each in advice] == [
        "schedule.decay_fraction", "optim.matrix.lr", "optim.vector.lr",
    ]  # fmt: skip
    smooth = config("schedule.tokens=819200", *advice)
    assert _rate(smooth, 100) == pytest.approx(_rate(done, 99), rel=0.02)
    rates = [_rate(smooth, step) for step in range(100, 200)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 10
    said = describe_seam(done, smooth, applied_steps=100)
    assert said is not None and "instead" not in said


def test_a_rate_that_fell_to_zero_is_not_advised_as_a_peak():
    to_zero = "schedule.final_fraction=0"
    done, more = config("schedule.tokens=409600", to_zero), config("schedule.tokens=819200", to_zero)
    text = describe_seam(done, more, applied_steps=100)
    assert text is not None and "goes from 0 in step 100 to" in text and "optim.vector.lr=" not in text
    assert text.endswith(
        "; to avoid the jump, go on from a checkpoint before its fall (checkpoint.keep_every_steps)"
    )


def test_the_phases_that_are_left_are_named_and_nothing_if_nothing_changes():
    before = config("schedule.tokens=409600")
    longer = describe_seam(before, config("schedule.tokens=4096000"), applied_steps=20)
    assert longer is not None and "rises to step 30, stays until step 500, ends at" in longer
    assert describe_seam(before, before, applied_steps=20) is None
    lower = describe_seam(before, config("schedule.tokens=409600", "optim.matrix.lr=0.01"), applied_steps=20)
    assert lower is not None and lower.startswith("the schedule: ") and "0.02 in step 20 to 0.01" in lower
