"""optim/native.cpp, called: symmetric products. A CPU with AVX-512 BF16 and a C++ compiler needed.

Without either everything runs on torch alone, and `unsupported` says why; see `cluster.compiled`.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_MATRIX = (_POINTER, _LONG, _LONG, _LONG)  # data, strides


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `symmetric_product` cannot run there, in one sentence; None if it can. The first call compiles."""
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if dtype != torch.bfloat16:
        return f"products of {dtype} stay with torch"
    return _library()[1]


def symmetric_product(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """alpha·A·Bᵀ + beta·C, known to be symmetric: half of it is computed, and written twice.

    As `optim.kernels.symmetric_product`, on the CPU. Sums are fp32 and rounded once.

    Args:
        a, b: [B, n, k], bf16, any strides. Packing is fastest where rows are contiguous to each other
            (stride(-2) == 1), next where columns are.
        c: [B, n, n], contiguous, symmetric: its upper half is not read.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or `unsupported`.
    """
    library, reason = _library()
    if library is None:
        raise ValueError(reason)
    tensors = (a, b) if c is None else (a, b, c)
    if any(tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError("operands must be bf16, on the CPU")
    size, n, k = a.shape
    if b.shape != a.shape or (c is not None and (c.shape != (size, n, n) or not c.is_contiguous())):
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)} have no symmetric product like C")
    out = a.new_empty(size, n, n)
    library.symmetric_product(
        a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), None if c is None else c.data_ptr(),
        out.data_ptr(), size, n, k, alpha, beta, torch.get_num_threads(),
    )  # fmt: skip
    return out


@cache
def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    library, reason = compiled.load(SOURCE, flags=("-pthread",))
    if library is not None:
        library.symmetric_product.argtypes = (
            *_MATRIX, *_MATRIX, _POINTER, _POINTER, *[_LONG] * 3, _FLOAT, _FLOAT, _LONG
        )  # fmt: skip
        library.symmetric_product.restype = None
    return library, reason
