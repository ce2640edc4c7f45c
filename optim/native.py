"""optim/native.cpp, called: whole orthogonalisations. A CPU with AVX-512 BF16 and a C++ compiler needed.

Without either everything runs on torch alone, and `unsupported` says why; see `cluster.compiled`.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `orthogonalize_` cannot run there, in one sentence; None if it can. The first call compiles."""
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if dtype != torch.bfloat16:
        return f"products of {dtype} stay with torch"
    return _library()[1]


def orthogonalize_(
    x: Tensor, coefficients: Sequence[tuple[float, float, float]], *, restart: int | None = None
) -> Tensor:
    """Newton-Schulz iterations on a batch of matrices, in place, on torch's number of threads.

    As the two forms in `optim.polar`, and nearer to the exact polynomials: fewer results are rounded.

    Args:
        x: [B, r, c], bf16, contiguous, singular values of at most 1.
        coefficients: (a, b, c) of each iteration.
        restart: the Gram form, anew after so many of them; None: the standard form.

    Returns:
        x.

    Raises:
        ValueError: dtype, device or layout do not fit, there is nothing after `restart`, or `unsupported`.
    """
    library, reason = _library()
    if library is None:
        raise ValueError(reason)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.dim() != 3 or not x.is_contiguous():
        raise ValueError("x must be a contiguous batch of bf16 matrices on the CPU")
    if restart is not None and not 0 < restart < len(coefficients):
        raise ValueError(f"restart: {restart} must lie between the first and the last of the iterations")
    flat = [value for each in coefficients for value in each]
    library.orthogonalize(
        x.data_ptr(), *x.shape, (ctypes.c_float * len(flat))(*flat), len(coefficients), restart or 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return x


@cache
def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    # It finds torch's OpenMP, not the compiler's: another pool of threads would spin on this one's cores.
    library, reason = compiled.load(SOURCE, flags=("-fopenmp",))
    if library is not None:
        library.orthogonalize.argtypes = (_POINTER, *[_LONG] * 3, _POINTER, *[_LONG] * 3)
        library.orthogonalize.restype = None
    return library, reason
