"""Scaled dot-product attention by torch, in a dtype that the device multiplies, and its choice of kernels."""

from contextlib import AbstractContextManager

import torch.nn.functional as F
from torch import Tensor
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
