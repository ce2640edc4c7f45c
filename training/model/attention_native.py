"""Calls attention_native.cpp, causal attention and its gradient on CPUs. It needs AVX2 and a C++ compiler.

It keeps the logits of 32 queries in the cache. torch's own is slower where this file takes its place.

Shapes: B sequences, T tokens, H query heads, K key/value heads, C head_dim.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.machine import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = {  # tier -> what it takes. Its vectors multiply in bf16 with AVX-512; AMX is not measured.
    "AVX-512 BF16": (torch.bfloat16,),
    "AVX2": (torch.bfloat16, torch.float32),
}


def unsupported(device: torch.device, dtype: torch.dtype, *, heads: int) -> str | None:
    """Why torch attends instead, in one sentence; None if this can. The first call compiles.

    heads: B·K, of which a thread takes one at a time.
    """
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if not torch.backends.cuda.flash_sdp_enabled():  # also a CPU's flash attention
        return "flash attention is turned off"
    tier = compiled.choose_tier()[0]
    if tier is not None and dtype not in DTYPES.get(tier, ()):
        return f"heads of {dtype} stay with torch on {tier}"
    if heads < torch.get_num_threads():
        return f"{heads} heads of keys are fewer than threads"
    return _library()[1]


def describe() -> str:
    """What attends where `unsupported` is None, for the record."""
    return f"flash_attention, compiled ({compiled.choose_tier()[0]})"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√C) v of each token over its past and itself; differentiable. On torch's threads.

    Args:
        q: [B, H, T, C].
        k, v: [B, K, T, C]; H is a multiple of K.

    Returns:
        [B, H, T, C], which lies in memory as [B, T, H, C].
    """
    return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_rows(each) for each in (q, k, v))
        out, log_z = _empty_like(q), torch.empty(q.shape[:3])
        _call("attention_forward", [q, k, v, out], log_z)
        ctx.save_for_backward(q, k, v, out, log_z)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        *read, log_z = ctx.saved_tensors
        written = [_empty_like(each) for each in read[:3]]
        _call("attention_backward", [*read, _rows(gradients[0]), *written], log_z)
        return tuple(written)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _call(name: str, tensors: list[Tensor], log_z: Tensor) -> None:
    q, k = tensors[:2]
    assert q.shape[1] % k.shape[1] == 0 and q.shape[2:] == k.shape[2:] == tensors[2].shape[2:]
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3])
    about = [value for each in tensors for value in (each.data_ptr(), *each.stride()[:3])]
    getattr(_library()[0], name)(
        q.dtype == torch.bfloat16, (ctypes.c_long * 5)(*sizes), (ctypes.c_long * len(about))(*about),
        log_z.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    library, reason = compiled.load(SOURCE, flags=("-fopenmp",))
    return library and _declared(library), reason


@cache
def _declared(library: Any) -> Any:
    """The library, with the types of its functions."""
    pointer, long = ctypes.c_void_p, ctypes.c_long
    for name in ("attention_forward", "attention_backward"):
        function = getattr(library, name)
        function.argtypes, function.restype = (long, pointer, pointer, pointer, long), None
    return library
