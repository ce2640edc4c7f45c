"""Scaled dot-product attention by torch, in a dtype that the device multiplies; its kernels and logits.

Shapes: B sequences, T tokens, S keys, H query heads, K key/value heads, C head_dim.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.precision import product_dtype
from training.model import attention_native
from training.model.shapes import LlamaShape

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q [B, H, T, C], k, v [B, K, T, C] -> mixed
Kept = Tensor | None  # int64 [N], the tokens whose result is wanted; None: all

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
        visible: broadcast to [B, H, T, S]: which keys a query sees, as bool or as 0 and -inf, which are added
            to its logits; None: its past and itself.
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


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` of each token to its past and itself: an `Attend`. On CPUs by compiled code where it can."""
    if attention_native.unsupported(q.device, q.dtype, heads=len(k) * k.shape[1]) is None:
        return attention_native.attention(q, k, v)
    return sdpa(q, k, v)


class DocumentAttention:
    """An `Attend` of each token to its past and itself, within its document.

    By flash attention over pieces of any length (`torch.nn.attention.varlen`), or where `varlen_unsupported`
    gives a reason by a mask, B·T² elements for all layers. RoPE need not begin again with a document, because
    attention depends on differences of positions alone.
    """

    def __init__(self, starts: Tensor, *, batch: int, length: int, longest: int | None = None) -> None:
        """The documents of B sequences of T tokens.

        Args:
            starts: int32 [N + 1], where documents begin in B·T tokens, and B·T. A sequence begins one.
            longest: tokens of a document, at most, as the host knows it; default: T. Flash attention starts
                as many programs for each document as the longest one needs.
        """
        self._starts, self._size, self._longest = starts, (batch, length), longest or length
        self._bias: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if varlen_unsupported(q.device, q.dtype, q.shape[-1]) is None:
            return self._within_pieces(q, k, v)
        if self._bias is None:
            visible, wide = self.visible, product_dtype(q.dtype, q.device)
            self._bias = torch.zeros(visible.shape, dtype=wide, device=q.device)
            self._bias.masked_fill_(~visible, -math.inf)
        return sdpa(q, k, v, visible=self._bias)

    @property
    def visible(self) -> Tensor:
        """bool [B, 1, T, T]: which tokens a token sees."""
        tokens = torch.arange(math.prod(self._size), dtype=torch.int32, device=self._starts.device)
        document = torch.bucketize(tokens, self._starts, right=True).view(self._size)
        return (document[:, None, :, None] == document[:, None, None, :]).tril_()

    def _within_pieces(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = _varlen()
        q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q, k, v))
        starts, longest = self._starts, self._longest
        mixed = attend(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        return mixed.unflatten(0, self._size).transpose(1, 2)


@cache
def _varlen() -> Callable[..., Tensor]:
    """`varlen_attn`, for grouped heads too. torch 2.11 asks for no option there."""
    from torch.nn.attention.varlen import varlen_attn

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if asks else varlen_attn  # type: ignore[return-value]


@cache
def varlen_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash attention over pieces of any length cannot run, in one sentence; None if it can."""
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention does not compute in {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"flash attention does not compute heads of {head_dim}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without flash attention"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"flash attention needs compute capability 8.0, not {capability}"
    return None


def kernel(
    shape: LlamaShape, *, batch: int, length: int, dtype: torch.dtype, device: torch.device, documents: bool
) -> str:
    """In words, the kernel that attends in training: torch chooses it by the tensors, outside of any block.

    documents: `DocumentAttention` attends. If it needs a mask, the text says why.
    """
    heads = batch * shape.num_kv_heads
    if not documents and attention_native.unsupported(device, dtype, heads=heads) is None:
        return attention_native.describe()
    reason = varlen_unsupported(device, dtype, shape.head_dim) if documents else None
    if documents and reason is None:
        return "flash_attention over pieces of any length"
    like = torch.empty(0, dtype=dtype, device=device, requires_grad=True)
    wide = product_dtype(dtype, device)
    mask = torch.empty(1, 1, length, length, dtype=wide, device=device) if documents else None
    name = chosen(shape, like, queries=length, keys=length, mask=mask)
    return f"{name} with a mask: {reason}" if documents else name


def chosen(shape: LlamaShape, like: Tensor, *, queries: int, keys: int, mask: Tensor | None = None) -> str:
    """The kernel that torch chooses for `sdpa` of so many tokens, with the device and dtype of `like`."""
    wide = product_dtype(like.dtype, like.device)
    q, k = (
        like.new_empty(1, size, heads, shape.head_dim, dtype=wide, requires_grad=like.requires_grad)
        for size, heads in ((queries, shape.num_heads), (keys, shape.num_kv_heads))
    )
    q, k, grouped = q.transpose(1, 2), k.transpose(1, 2), shape.num_heads != shape.num_kv_heads
    choice = torch._fused_sdp_choice(q, k, k, mask, 0.0, mask is None, enable_gqa=grouped)
    return SDPBackend(choice).name.lower()


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, *, visible: Tensor | None = None) -> Tensor:
    """Of each head the largest q kᵀ/√C of a query and a key that it sees, fp32 [H]. As in `sdpa`; S is T.

    One head at a time, which saves memory. visible: bool [B, 1, T, T]; None: its past and itself.
    """
    wide, group = product_dtype(q.dtype, q.device), q.shape[1] // k.shape[1]
    q, k = q.to(wide), k.to(wide)
    if visible is None:
        visible = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    hidden = ~visible[:, 0]
    heads = range(q.shape[1])
    tops = [(q[:, h] @ k[:, h // group].mT).masked_fill_(hidden, -math.inf).amax() for h in heads]
    return torch.stack(tops).float() / math.sqrt(q.shape[-1])


class LogitProbe:
    """The largest attention logit of each layer, in the newest forward pass of a model that trains.

    Logits that grow make attention collapse to single tokens. Under Muon they have to be watched (Kimi K2,
    arXiv 2507.20534). The probe does not change what the model computes, to the bit.
    """

    def __init__(self, decoder: nn.Module, *, when: Callable[[], bool], clip: float = 0.0) -> None:
        """What to look at.

        Args:
            decoder: `training.model.llama.Decoder`.
            when: whether to look at the pass that begins now.
            clip: above 0: look at every pass, for `row_factors`.
        """
        self._when, self._clip, self._shape = when, clip, getattr(decoder, "shape", None)
        self._found: dict[int, Tensor] = {}  # [H] of each layer
        self._largest: dict[int, Tensor] = {}  # the same, over the passes since `row_factors`
        self._clipped = 0  # heads
        decoder.register_forward_pre_hook(self._join, with_kwargs=True)

    def read(self, gather: Callable[[dict[int, float]], list[dict[int, float]]]) -> dict[str, Any]:
        """Collective, by `gather`. Empty if no pass was looked at; else over all ranks' last micro-batches:

        attention_logit_max, and `attention`: {"layers.<number>": {"attention_logit_max": ...}}; with a clip
        also attention_heads_clipped, in the last step.
        """
        ranks = gather({layer: tops.amax().item() for layer, tops in self._found.items()})
        tops = {layer: max(rank[layer] for rank in ranks) for layer in sorted(ranks[0])}
        if not tops:
            return {}
        layers = {f"layers.{layer}": {"attention_logit_max": top} for layer, top in tops.items()}
        clipped = {"attention_heads_clipped": self._clipped} if self._clip else {}
        return {"attention_logit_max": max(tops.values()), **clipped, "attention": layers}

    def row_factors(self, most: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Query and key weights -> factor of each row, fp32, that brings every head's logits down to `clip`.

        γ = min(1, clip/largest), over all passes since the last call and, by `most`, over all ranks; queries
        and keys get √γ each. Heads that share a key share the smallest γ. Collective; empty without a clip.
        """
        if not self._largest:
            return {}
        tops = most(torch.stack([self._largest[layer] for layer in sorted(self._largest)]))
        self._largest, shape = {}, self._shape
        assert isinstance(shape, LlamaShape)
        self._clipped = int((tops > self._clip).sum())
        if not self._clipped:
            return {}
        shared = (self._clip / tops).nan_to_num(1.0).clamp(0, 1).view(len(tops), shape.num_kv_heads, -1)
        keys = shared.amin(-1).sqrt()  # [layers, K]
        factors: dict[str, Tensor] = {}
        for layer, factor in enumerate(keys.repeat_interleave(shape.head_dim, dim=1)):
            groups = keys[layer].repeat_interleave(shape.num_heads // shape.num_kv_heads * shape.head_dim)
            name = f"model.layers.{layer}.self_attn"
            factors |= {f"{name}.q_proj.weight": groups, f"{name}.k_proj.weight": factor}
        return factors

    def _join(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not (decoder.training and (self._clip > 0 or self._when())):
            return None
        attend = partial(self._attend, kwargs.get("attend", causal_attention))
        return args, {**kwargs, "attend": attend}

    def _attend(self, attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = attend.visible if isinstance(attend, DocumentAttention) else None
        self._found[layer] = tops = largest_logits(q, k, visible=visible)
        if self._clip:
            self._largest[layer] = torch.maximum(self._largest.get(layer, tops), tops)
        return attend(layer, q, k, v)
