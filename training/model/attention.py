"""Scaled dot-product attention by torch, in a dtype that the device multiplies; its kernels and logits."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.precision import product_dtype

# All but cuDNN's. torch prefers that one on sm_90, and it builds a plan for each new shape (0.4 s): worth it
# for the one shape of training, not for a context that grows with every token.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def for_changing_lengths() -> AbstractContextManager[None]:
    """A block in which torch chooses among the attention kernels that need no plan for each shape.

    The choice is the process's, not the thread's. It takes 10 us: once around a step, not in each layer.
    """
    return sdpa_kernel(WITHOUT_PLANS)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√C) v, in q's dtype, with products in `optim.precision.product_dtype`.

    Args:
        q: [B, H, T, C].
        k, v: [B, K, S, C]; H is a multiple of K.
        visible: bool, broadcast to [B, H, T, S]: which keys a query sees; None: its past and itself.
    """
    wide = product_dtype(q.dtype, q.device)
    mixed = F.scaled_dot_product_attention(
        q.to(wide),
        k.to(wide),
        v.to(wide),
        attn_mask=visible,
        is_causal=visible is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed.to(q.dtype)


@torch.no_grad()
def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest q kᵀ/√C of a query and its past or itself, an fp32 scalar. Shapes as in `sdpa`; S is T.

    One head at a time, which saves memory.
    """
    wide, group = product_dtype(q.dtype, q.device), q.shape[1] // k.shape[1]
    q, k = q.to(wide), k.to(wide)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    heads = range(q.shape[1])
    tops = [(q[:, h] @ k[:, h // group].mT).masked_fill_(future, -math.inf).amax() for h in heads]
    return torch.stack(tops).amax().float() / math.sqrt(q.shape[-1])


class LogitProbe:
    """The largest attention logit of each layer, in the newest forward pass of a model that trains.

    Logits that grow make attention collapse to single tokens. Under Muon they have to be watched (Kimi K2,
    arXiv 2507.20534). The probe does not change what the model computes, to the bit.
    """

    def __init__(self, decoder: nn.Module, *, when: Callable[[], bool]) -> None:
        """decoder: `training.model.llama.Decoder`. when: whether to look at the pass that begins now."""
        self._when = when
        self._found: dict[int, Tensor] = {}
        decoder.register_forward_pre_hook(self._join, with_kwargs=True)

    def read(self, gather: Callable[[dict[int, float]], list[dict[int, float]]]) -> dict[str, Any]:
        """Collective, by `gather`. Empty if no pass was looked at; else over all ranks' last micro-batches:

        attention_logit_max, and `attention`: {"layers.<number>": {"attention_logit_max": ...}}.
        """
        ranks = gather({layer: top.item() for layer, top in self._found.items()})
        tops = {layer: max(rank[layer] for rank in ranks) for layer in sorted(ranks[0])}
        if not tops:
            return {}
        layers = {f"layers.{layer}": {"attention_logit_max": top} for layer, top in tops.items()}
        return {"attention_logit_max": max(tops.values()), "attention": layers}

    def _join(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, {**kwargs, "attend": self._attend}) if decoder.training and self._when() else None

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._found[layer] = largest_logit(q, k)
        return sdpa(q, k, v)
