"""Gradient noise in a run: several micro-batches' gradients of each hidden matrix, at the same weights.

`torch.autograd.grad` takes the gradients. It accumulates, reduces and counts nothing, so the run stays the
same, bit for bit. Every rank measures its share of the matrices on
micro-batches of its own. That needs whole weights on every rank, hence ZeRO stages 0 to 2.
"""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from optim import noise
from optim.geometry import Norm
from optim.groups import Member
from training.run.context import Context


def measure_noise(
    module: nn.Module,
    members: Iterable[Member],
    batches: Sequence[tuple[Any, ...]],
    *,
    norm: Norm,
    context: Context,
) -> dict[str, Any]:
    """Noise of one micro-batch's gradient, for a row of the record. Collective.

    Args:
        module: the model itself, (inputs, targets, ...) -> mean loss.
        members: the partition; its hidden matrices are measured.
        batches: of this rank, two or more: `training.run.batches.Batches.micro_batch`.

    Returns:
        noise: parameter -> what `optim.noise.measure` returns; noise_tail_index_median and
        noise_to_signal_dual_median over the parameters.
    """
    matrices = [member for member in members if member.kind == "matrix"]
    mine = matrices[context.rank :: context.world_size]
    parameters = [member.parameter for member in mine]
    found = {}
    if mine:
        with torch.enable_grad():
            gradients = [torch.autograd.grad(module(*batch), parameters) for batch in batches]
        found = {
            member.name: noise.measure(list(of_batches), norm=norm)
            for member, of_batches in zip(mine, zip(*gradients, strict=True), strict=True)
        }
    everyone: dict[str, dict[str, float]] = {}
    for part in context.gather(found):
        everyone |= part
    ordered = {member.name: everyone[member.name] for member in matrices}
    return {
        "noise_tail_index_median": median(one["tail_index"] for one in ordered.values()),
        "noise_to_signal_dual_median": median(one["noise_to_signal_dual"] for one in ordered.values()),
        "noise": ordered,
    }
