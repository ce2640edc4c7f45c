"""The next tokens of many requests from their logits, each drawn from its own source of chance; scores."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine import Sampling, Score

BROKEN = -1  # in place of a token's id
LEAST_TEMPERATURE = 1e-5  # below it the likeliest token is taken: dividing by it would overflow


def choose(
    logits: Tensor, samplings: Sequence[Sampling], chances: Sequence[random.Random]
) -> tuple[list[int], list[Score | None]]:
    """One token for each row: its id, and its score where log-probabilities are asked for.

    A row's token depends on its own logits, sampling and source of chance alone, not on the other rows. It is
    BROKEN where the largest logit is no finite number: torch takes NaN for the largest, and softmax is then
    NaN, so that a draw would mean nothing.

    Args:
        logits: [S, V], fp32, any device.
        samplings, chances: of each row.
    """
    largest, ids = logits.max(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= LEAST_TEMPERATURE]
    if drawn:
        ids[drawn] = _draw(
            logits[drawn],
            temperatures=[samplings[row].temperature for row in drawn],
            top_ps=[samplings[row].top_p for row in drawn],
            uniforms=[chances[row].random() for row in drawn],
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


def _draw(logits: Tensor, *, temperatures: list[float], top_ps: list[float], uniforms: list[float]) -> Tensor:
    """Ids [S], by inverting the cumulative probabilities of the likeliest tokens at u in [0, 1)."""
    device = logits.device
    probabilities = (logits / torch.tensor(temperatures, device=device)[:, None]).softmax(dim=-1)
    nucleus = min(top_ps) < 1
    order = None
    if nucleus:
        probabilities, order = probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= torch.tensor(top_ps, device=device)[:, None], 0)
    cumulative = probabilities.double().cumsum(dim=-1)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, targets, right=True).clamp_max(logits.shape[-1] - 1)
    return (places if order is None else order.gather(1, places))[:, 0]
