"""Calls native.cpp, the step of bf16 updates. It needs a CPU with AVX2 or better, and a C++ compiler.

Without them everything runs on torch alone, and `unsupported` says why; see `cluster.machine.compiled`.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.machine import compiled
from optim.kernels.passes import SegmentTable, check_adamw_pass, check_apply_pass, check_momentum_pass

SOURCE = Path(__file__).with_suffix(".cpp")
TIERS = tuple(name for name in compiled.TIERS if name != compiled.TILES)  # that it is compiled for
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled step cannot run there, in one sentence; None if it can. The first call compiles."""
    if device.type != "cpu":
        return f"{device.type} is no CPU"
    if dtype != torch.bfloat16:
        return f"products of {dtype} stay with torch"
    return _library()[1]


def tier() -> str | None:
    """Which vectors it computes with, such as "AVX2"; None if it cannot run on this CPU."""
    chosen = compiled.choose_tier()[0]
    return "AVX-512 BF16" if chosen == compiled.TILES else chosen  # nothing here computes with tiles


def products_by_onednn() -> bool:
    """Whether torch multiplies faster: by AMX tiles. Then only the passes over the shard are compiled."""
    return compiled.choose_tier()[0] == compiled.TILES


def describe() -> str:
    """What runs where `unsupported` is None, for the record."""
    return f"used ({tier()}{', products by oneDNN with AMX' if products_by_onednn() else ''})"


def orthogonalize_(
    x: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    *,
    factors: Tensor | None = None,
    restart: int | None = None,
) -> Tensor:
    """Newton-Schulz iterations on a batch of matrices, in place, on torch's number of threads.

    As the two forms in `optim.polar`, and nearer to the exact polynomials: fewer results are rounded.

    Args:
        x: [B, r, c], bf16, contiguous; times its factor, of singular values of at most 1.
        factors: [B], fp32; None: ones.
        coefficients: (a, b, c) of each iteration.
        restart: the Gram form, anew after so many of them where products are bf16; None: the standard form.

    Returns:
        x.

    Raises:
        ValueError: dtype, device or layout do not fit, there is nothing after `restart`, or `unsupported`.
    """
    library = _loaded()
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.dim() != 3 or not x.is_contiguous():
        raise ValueError("x must be a contiguous batch of bf16 matrices on the CPU")
    factors = torch.ones(len(x)) if factors is None else factors
    if factors.shape != x.shape[:1] or factors.dtype != torch.float32 or not factors.is_contiguous():
        raise ValueError("factors must be one number in fp32 for each matrix")
    if restart is not None and not 0 < restart < len(coefficients):
        raise ValueError(f"restart: {restart} must lie between the first and the last of the iterations")
    flat = [value for each in coefficients for value in each]
    library.orthogonalize(
        x.data_ptr(), factors.data_ptr(), *x.shape, (ctypes.c_float * len(flat))(*flat), len(coefficients),
        restart or 0, torch.get_num_threads(),
    )  # fmt: skip
    return x


def momentum_pass(
    gradient: Tensor, momentum: Tensor, out: Tensor, squares: Tensor, table: SegmentTable, *, beta: float,
    nesterov: bool,
) -> None:  # fmt: skip
    """As `optim.kernels.gpu.momentum_pass`, with `out` in bf16."""
    check_momentum_pass(gradient, momentum, out, squares, table)
    library = _checked(out)
    partials = torch.empty(len(table.sources), dtype=torch.float64)
    library.momentum_pass(
        gradient.data_ptr(), gradient.dtype == torch.bfloat16, momentum.data_ptr(), out.data_ptr(),
        partials.data_ptr(), *_blocks(table), beta, nesterov, torch.get_num_threads(),
    )  # fmt: skip
    table.sum_blocks(partials, out=squares)


def apply_pass(
    weight: Tensor, update: Tensor, table: SegmentTable, *, decay: float, factor: float,
    ahead: float = 0.0, model: Tensor | None = None,
) -> None:  # fmt: skip
    """As `optim.kernels.gpu.apply_pass`, with `update` in bf16."""
    check_apply_pass(weight, update, table, model)
    library = _checked(update)
    bf16 = model is not None and model.dtype == torch.bfloat16
    library.apply_pass(
        weight.data_ptr(), update.data_ptr(), None if model is None else model.data_ptr(), bf16,
        *_blocks(table), decay, factor, ahead, torch.get_num_threads(),
    )  # fmt: skip


def adamw_pass(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, beta1: float, beta2: float,
    eps: float, step: int, decay: float, factor: float, model: Tensor | None = None,
) -> None:  # fmt: skip
    """As `optim.kernels.gpu.adamw_pass`."""
    check_adamw_pass(weight, gradient, first, second, model)
    library = _loaded()
    bf16 = model is not None and model.dtype == torch.bfloat16
    library.adamw_pass(
        weight.data_ptr(), gradient.data_ptr(), gradient.dtype == torch.bfloat16, first.data_ptr(),
        second.data_ptr(), None if model is None else model.data_ptr(), bf16, len(weight), 1 - beta1, beta2,
        1 - beta2, 1 - beta1**step, 1 - beta2**step, eps, decay, factor, torch.get_num_threads(),
    )  # fmt: skip


def add(total: Tensor, gradient: Tensor) -> None:
    """total += gradient, in the same bits as torch's. Both flat and contiguous, fp32 and bf16."""
    library = _checked(gradient)
    if total.dtype != torch.float32 or not (total.is_contiguous() and gradient.is_contiguous()):
        raise ValueError("total must be fp32, and both contiguous")
    if total.numel() != gradient.numel():
        raise ValueError(f"a gradient of {gradient.numel()} elements does not fit a sum of {total.numel()}")
    library.add(total.data_ptr(), gradient.data_ptr(), total.numel(), torch.get_num_threads())


def _blocks(table: SegmentTable) -> tuple[int, int, int, int]:
    return (
        table.sources.data_ptr(), table.targets.data_ptr(), table.numels.data_ptr(), len(table.sources)
    )  # fmt: skip


def _checked(packed: Tensor) -> Any:
    """The library, if the packed buffer is one of its kind."""
    if reason := unsupported(packed.device, packed.dtype):
        raise ValueError(reason)
    return _library()[0]


def _loaded() -> Any:
    """The library. Raises `ValueError`: there is none."""
    library, reason = _library()
    if library is None:
        raise ValueError(reason)
    return library


def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    # It finds torch's OpenMP, not the compiler's: another pool of threads would spin on this one's cores.
    library, reason = compiled.load(SOURCE, flags=("-fopenmp",), tier=tier())
    return library and _declared(library), reason


@cache
def _declared(library: Any) -> Any:
    """The library, with the types of its functions."""
    library.orthogonalize.argtypes = (_POINTER, _POINTER, *[_LONG] * 3, _POINTER, *[_LONG] * 3)
    table = (_POINTER, _POINTER, _POINTER, _LONG)
    library.momentum_pass.argtypes = (
        _POINTER, _LONG, _POINTER, _POINTER, _POINTER, *table, _FLOAT, _LONG, _LONG
    )  # fmt: skip
    library.apply_pass.argtypes = (
        _POINTER, _POINTER, _POINTER, _LONG, *table, _FLOAT, _FLOAT, _FLOAT, _LONG
    )  # fmt: skip
    library.adamw_pass.argtypes = (
        _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG, *[_FLOAT] * 8, _LONG
    )  # fmt: skip
    library.add.argtypes = (_POINTER, _POINTER, _LONG, _LONG)
    for name in ("orthogonalize", "momentum_pass", "apply_pass", "adamw_pass", "add"):
        getattr(library, name).restype = None
    return library
