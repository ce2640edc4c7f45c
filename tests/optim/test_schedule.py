"""The learning-rate factor against values worked by hand, and its bounds for any fractions."""

import math
import random

import pytest

from optim.schedule import decay_factor, lr_factor


def factors(num_steps: int = 10, **changes) -> list[float]:
    arguments = {"warmup_fraction": 0.2, "decay_fraction": 0.4, "decay": "linear", "final_fraction": 0.2}
    return [lr_factor(step, num_steps=num_steps, **(arguments | changes)) for step in range(num_steps)]


def test_warmup_plateau_and_linear_decay_by_hand():
    assert factors() == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_by_hand():
    quarter = 0.2 + 0.8 * (1 - math.cos(math.pi * 0.75)) / 2
    expected = [0.5, 1, 1, 1, 1, 1, quarter, 0.6, 0.2 + 0.8 * (1 - math.cos(math.pi / 4)) / 2, 0.2]
    assert factors(decay="cosine") == pytest.approx(expected)


def test_without_warmup_or_decay_the_factor_is_one():
    assert factors(warmup_fraction=0.0, decay_fraction=0.0) == [1.0] * 10
    assert factors(warmup_fraction=0.0)[0] == 1.0
    assert factors(decay_fraction=0.0)[-1] == 1.0


def test_all_warmup_and_all_decay():
    assert factors(4, warmup_fraction=1.0, decay_fraction=0.0) == [0.25, 0.5, 0.75, 1.0]
    falling = factors(4, warmup_fraction=0.0, decay_fraction=1.0, final_fraction=0.0)
    assert falling == [0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_it_ends_exactly_at_the_final_fraction_and_stays_there(decay):
    arguments = {"num_steps": 50, "warmup_fraction": 0.1, "decay_fraction": 0.5, "decay": decay}
    for step in (49, 50, 51, 1000):
        assert lr_factor(step, **arguments, final_fraction=0.05) == pytest.approx(0.05, abs=1e-15)


def test_for_any_fractions_it_rises_stays_and_falls_within_bounds():
    for seed in range(300):
        draw = random.Random(seed)
        warmup, num_steps = draw.random(), draw.randint(1, 60)
        decay, final = draw.random() * (1 - warmup), draw.random()
        values = factors(
            num_steps,
            warmup_fraction=warmup,
            decay_fraction=decay,
            decay=draw.choice(["linear", "cosine"]),
            final_fraction=final,
        )
        num_warmup, num_decay = round(warmup * num_steps), round(decay * num_steps)
        rising, falling = values[:num_warmup], values[num_warmup:]
        assert all(0 < value <= 1 for value in values)
        assert rising == sorted(set(rising)) and falling == sorted(falling, reverse=True)
        assert all(value >= final - 1e-15 for value in falling)
        assert falling.count(1.0) >= len(falling) - num_decay
        if num_decay:
            assert values[-1] == pytest.approx(final)


def test_the_weight_decay_falls_on_a_straight_line_or_stays():
    assert [decay_factor(step, num_steps=5, final_fraction=1.0) for step in range(7)] == [1.0] * 7
    falling = [decay_factor(step, num_steps=5, final_fraction=0.2) for step in range(7)]
    assert falling == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
