"""The next tokens of many requests from their logits, each drawn with its own random numbers; scores.

A row does not depend on other rows: the sums that decide a draw are of integers, so exact in any order.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from serving.engine.protocol import Sampling, Score

BROKEN = -1  # in place of a token's id
LEAST_TEMPERATURE = 1e-5  # below it the likeliest token is taken
WEIGHT_OF_ONE = 2.0**48  # a probability of 1 as an integer; sums stay below 2**53, exact in fp64 too


def choose(
    logits: Tensor, samplings: Sequence[Sampling], chances: Sequence[random.Random]
) -> tuple[list[int], list[Score | None]]:
    """One token for each row: its id, and its score if log-probabilities are requested.

    A row's token and score depend only on its own logits, sampling and random numbers: to the bit on a CPU;
    this is not checked on a GPU. Of equal logits the lowest id comes first. The
    token is BROKEN where the largest logit is not a finite number: torch takes NaN for the largest.

    Args:
        logits: [S, V], fp32, any device.
        samplings, chances: of each row.
    """
    largest, ids = logits.max(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= LEAST_TEMPERATURE]
    if drawn:
        tensor = partial(torch.tensor, device=logits.device)
        ids[drawn] = draw(
            logits[drawn],
            temperatures=tensor([samplings[row].temperature for row in drawn]),
            uniforms=tensor([chances[row].random() for row in drawn], dtype=torch.float64),
            top_ps={i: samplings[row].top_p for i, row in enumerate(drawn) if samplings[row].top_p < 1},
        )
    scores: list[Score | None] = [None] * len(samplings)
    asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs]
    if asked:
        for row, found in zip(asked, score(logits[asked], ids[asked]), strict=True):
            scores[row] = found
    return torch.where(largest.isfinite(), ids, BROKEN).tolist(), scores


def score(logits: Tensor, ids: Tensor) -> list[Score]:
    """How likely each of `ids` [R], int64, is by its row of `logits` [R, V], fp32, on the same device."""
    likeliest = logits.argmax(dim=-1)
    normed = logits.log_softmax(dim=-1)
    own, top = (normed.gather(1, chosen[:, None])[:, 0].tolist() for chosen in (ids, likeliest))
    return [Score(*each) for each in zip(own, likeliest.tolist(), top, strict=True)]


def draw(
    logits: Tensor, *, temperatures: Tensor, uniforms: Tensor, top_ps: Mapping[int, float] | Tensor
) -> Tensor:
    """Ids [S], int64, by inverting the cumulative weights of the tokens, in order of id, at u in [0, 1).

    Args:
        logits: [S, V], fp32, any device; the other tensors are there, too.
        temperatures: [S], fp32, at least LEAST_TEMPERATURE.
        uniforms: [S], fp64.
        top_ps: of the rows where it is below 1; or of all, [S], fp64.
    """
    device = logits.device
    below = logits - logits.amax(dim=-1, keepdim=True)  # else dividing large logits could overflow
    probabilities = (below / temperatures[:, None]).softmax(dim=-1)
    weights = (probabilities.double() * WEIGHT_OF_ONE).long()
    if isinstance(top_ps, Tensor):
        weights = _nucleus(weights, top_ps)
    elif top_ps:
        cut = torch.tensor([*top_ps], device=device)
        shares = torch.tensor([*top_ps.values()], dtype=torch.float64, device=device)
        weights[cut] = _nucleus(weights[cut], shares)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = (uniforms[:, None] * total).long()
    places = torch.searchsorted(cumulative, targets.minimum(total - 1), right=True)
    return places.clamp_max(logits.shape[-1] - 1)[:, 0]  # beyond the last only where logits are not numbers


def _nucleus(weights: Tensor, top_ps: Tensor) -> Tensor:
    """`weights` [S, V], int64, with 0 for all but the likeliest tokens that first reach a share `top_ps` [S].

    A share of 1 keeps all, because sums of integers are exact.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    reached = before >= top_ps[:, None] * weights.sum(dim=-1, keepdim=True)
    return weights.scatter(-1, order, ordered.masked_fill(reached, 0))
