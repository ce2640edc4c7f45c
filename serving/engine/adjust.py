"""Logits as a request wants them: penalties for tokens that it has, biases, no end before `min_tokens`.

In vLLM's order: `min_tokens`, `logit_bias`, then the penalties. Each row is computed alone.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from serving.engine.protocol import Sampling


def adjusted(
    logits: Tensor, sampling: Sampling, tokens: Sequence[int], num_prompt: int, *, eos_ids: Collection[int]
) -> Tensor:
    """A copy of one row of `logits` [V], fp32, on any device, adjusted.

    Args:
        tokens: of prompt and continuation so far; the first `num_prompt` are the prompt's.
        eos_ids: tokens that end the text besides `sampling.stop_ids`.
    """
    new, device = logits.clone(), logits.device
    if len(tokens) - num_prompt < sampling.min_tokens:
        ends = sampling.stop_ids.union(() if sampling.ignore_eos else eos_ids)
        new[torch.tensor([*ends], dtype=torch.int64, device=device)] = -math.inf
    if sampling.logit_bias:
        ids, biases = (torch.tensor(each, device=device) for each in zip(*sampling.logit_bias, strict=True))
        new[ids] += biases.to(new.dtype)
    if sampling.penalizes:
        everything = torch.tensor(sorted(set(tokens)), device=device)
        found = new[everything]
        penalty = sampling.repetition_penalty
        new[everything] = torch.where(found > 0, found / penalty, found * penalty)
        if (sampled := tokens[num_prompt:]) and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.tensor(sampled, device=device).unique(return_counts=True)
            new[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return new.clamp_max(torch.finfo(new.dtype).max)  # a penalty below 1 may overflow
