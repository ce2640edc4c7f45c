"""What happens to weights after a rule's step, on this rank's shards: rows scaled, and an average taken."""

from collections.abc import Mapping

import torch
from torch import Tensor

from optim.step.fused import FusedStep

AVERAGE = "average"  # name of the averaged weights beside a rule's state names


@torch.no_grad()
def scale_rows(unit: FusedStep, factors: Mapping[str, Tensor]) -> None:
    """Multiply rows of the weights, and of the points that the model holds under a rule that looks ahead.

    factors: parameter -> what each of its rows is multiplied by, fp32 [rows].
    """
    for fragment in unit.fragments:
        if fragment.name in factors and fragment.start < fragment.stop:
            elements = torch.arange(fragment.start, fragment.stop, device=fragment.flat.device)
            factor = factors[fragment.name].to(elements.device)[elements // fragment.cols]
            weight = fragment.view(fragment.flat.data).mul_(factor)
            if fragment.model is not None:
                model = fragment.view(fragment.model)
                model.copy_(model * factor if unit.rule.looks_ahead else weight)


def start_average(unit: FusedStep) -> None:
    """Keep an average of the weights in the unit's state, under AVERAGE. It begins as the weights."""
    for flat, state in zip(unit.flats, unit.states, strict=True):
        state[AVERAGE] = flat.detach().clone()


@torch.no_grad()
def update_average(unit: FusedStep, decay: float) -> None:
    """average ← d·average + (1-d)·weights, d = min(decay, 1 - 1/step): at first the mean of all steps."""
    for flat, state in zip(unit.flats, unit.states, strict=True):
        state[AVERAGE].lerp_(flat.data, max(1 - decay, 1 / unit.steps))
