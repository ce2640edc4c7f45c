"""Schedules of learning rate and weight decay: pure functions of the number of applied optimizer steps."""

import math


def lr_factor(
    step: int,
    *,
    num_steps: int,
    warmup_fraction: float,
    decay_fraction: float,
    decay: str,
    final_fraction: float,
) -> float:
    """Share of the peak learning rate for the step that follows `step` applied steps.

    Rises linearly over the first `warmup_fraction` of the steps, stays at 1, and falls over the last
    `decay_fraction` to `final_fraction`, linearly or along half a cosine.

    Args:
        step: applied steps so far, from 0.
        decay: "linear" or "cosine".
    """
    num_warmup = round(warmup_fraction * num_steps)
    num_decay = round(decay_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    remaining = num_steps - step
    if remaining > num_decay:
        return 1.0
    share = max(remaining - 1, 0) / max(num_decay, 1)
    if decay == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return final_fraction + (1 - final_fraction) * share


def decay_factor(step: int, *, num_steps: int, final_fraction: float) -> float:
    """Share of the weight decay for the step that follows `step` applied steps: a straight line from 1."""
    return 1 - (1 - final_fraction) * min(step / max(num_steps - 1, 1), 1.0)
