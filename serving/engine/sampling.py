"""The next tokens of many requests from their logits, each drawn with its own random numbers; scores.

A row does not depend on other rows: the sums that decide a draw are of integers, so exact in any order.
"""

import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.protocol import Sampling, Score

BROKEN = -1  # in place of a token's id
LEAST_TEMPERATURE = 1e-5  # below it the likeliest token is taken
WEIGHT_OF_ONE = 2.0**48  # a probability of 1 as an integer; sums stay below 2**53, exact in fp64 too


def choose(
    logits: Tensor,
    samplings: Sequence[Sampling],
    chances: Sequence[random.Random],
    changed: Mapping[int, Tensor] | None = None,
) -> tuple[list[int], list[Score | None]]:
    """One token for each row: its id, and its score if log-probabilities are requested.

    Scores are of `logits`. A row's token and score depend only on its own logits, sampling and random
    numbers: to the bit on a CPU; this is not checked on a GPU. Of equal logits the lowest id comes first. The
    token is BROKEN where the largest logit is not a finite number: torch takes NaN for the largest.

    Args:
        logits: [S, V], fp32, any device.
        samplings, chances: of each row.
        changed: row -> logits [V] to choose from instead (`serving.engine.adjust`).
    """
    largest, ids = logits.max(dim=-1)
    used = logits
    if changed:
        rows, used = [*changed], logits.clone()
        used[rows] = torch.stack([*changed.values()])
        ids[rows] = used[rows].argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= LEAST_TEMPERATURE]
    if drawn:
        tensor = partial(torch.tensor, device=logits.device)
        cut = {i: samplings[row] for i, row in enumerate(drawn) if samplings[row].cuts}
        ids[drawn] = draw(
            used[drawn],
            temperatures=tensor([samplings[row].temperature for row in drawn]),
            uniforms=tensor([chances[row].random() for row in drawn], dtype=torch.float64),
            cuts=Cuts.of([*cut.values()], rows=[*cut]).to(logits.device) if cut else None,
        )
    scores: list[Score | None] = [None] * len(samplings)
    asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs]
    if asked:
        most = max(samplings[row].num_likeliest for row in asked)
        for row, found in zip(asked, score(logits[asked], ids[asked], num_likeliest=most), strict=True):
            scores[row] = found._replace(others=found.others[: samplings[row].num_likeliest - 1])
    return torch.where(largest.isfinite(), ids, BROKEN).tolist(), scores


class Cuts(NamedTuple):
    """Of which tokens some rows are drawn: `min_p`, `top_k` and `top_p` of `Sampling`.

    Attributes:
        values: [3, rows], fp64: min_p, top_k and top_p.
        rows: [rows], int64, which they are; None: all.
    """

    values: Tensor
    rows: Tensor | None = None

    @classmethod
    def of(cls, samplings: Sequence[Sampling], *, rows: Sequence[int]) -> "Cuts":
        values = [[each.min_p, each.top_k, each.top_p] for each in samplings]
        return cls(torch.tensor(values, dtype=torch.float64).T, torch.tensor(rows))

    def to(self, device: torch.device) -> "Cuts":
        return Cuts(self.values.to(device), None if self.rows is None else self.rows.to(device))


def score(logits: Tensor, ids: Tensor, *, num_likeliest: int = 1) -> list[Score]:
    """How likely each of `ids` [R], int64, is by its row of `logits` [R, V], fp32, on the same device."""
    normed = logits.log_softmax(dim=-1)
    own = normed.gather(1, ids[:, None])[:, 0].tolist()
    likeliest = logits.argmax(dim=-1)
    top = normed.gather(1, likeliest[:, None])[:, 0].tolist()
    following = [()] * len(own) if num_likeliest == 1 else others(normed, likeliest, number=num_likeliest - 1)
    return [Score(*each) for each in zip(own, likeliest.tolist(), top, following, strict=True)]


def others(normed: Tensor, likeliest: Tensor, *, number: int) -> list[tuple[tuple[int, float], ...]]:
    """(id, log-probability) of the `number` likeliest tokens of each row after `likeliest` [R].

    Args:
        normed: [R, V], log-probabilities.
    """
    rest = normed.scatter(1, likeliest.long().clamp_min(0)[:, None], -math.inf)
    values, ids = rest.topk(min(number, normed.shape[-1] - 1), dim=-1)
    return [
        tuple(zip(of_row, logprobs, strict=True))
        for of_row, logprobs in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def draw(logits: Tensor, *, temperatures: Tensor, uniforms: Tensor, cuts: Cuts | None) -> Tensor:
    """Ids [S], int64, by inverting the cumulative weights of the tokens, in order of id, at u in [0, 1).

    Args:
        logits: [S, V], fp32, any device; the other tensors are there, too.
        temperatures: [S], fp32, at least LEAST_TEMPERATURE.
        uniforms: [S], fp64.
    """
    below = logits - logits.amax(dim=-1, keepdim=True)  # else dividing large logits could overflow
    probabilities = (below / temperatures[:, None]).softmax(dim=-1)
    weights = (probabilities.double() * WEIGHT_OF_ONE).long()
    if cuts is not None and cuts.rows is None:
        weights = _cut(weights, *cuts.values)
    elif cuts is not None:
        weights[cuts.rows] = _cut(weights[cuts.rows], *cuts.values)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    targets = (uniforms[:, None] * total).long()
    places = torch.searchsorted(cumulative, targets.minimum(total - 1), right=True)
    return places.clamp_max(logits.shape[-1] - 1)[:, 0]  # beyond the last only where logits are not numbers


def _cut(weights: Tensor, min_ps: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """`weights` [S, V], int64, with 0 for tokens that are not drawn.

    In vLLM's order: `min_p`, `top_k`, `top_p`. The values of no cut (0, 0 and 1) keep all, because sums of
    integers are exact. Of equals the lowest ids come first.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(weights.shape[-1], device=weights.device)
    unlikely = ordered < min_ps[:, None] * ordered[:, :1]
    kept = ordered.masked_fill(unlikely | (places >= top_ks[:, None]) & (top_ks > 0)[:, None], 0)
    before = kept.cumsum(dim=-1) - kept
    reached = before >= top_ps[:, None] * kept.sum(dim=-1, keepdim=True)
    return weights.scatter(-1, order, kept.masked_fill(reached, 0))
