"""Calls loss_native.cpp, the loss and its gradient on CPUs. It needs AVX2 or better, and a C++ compiler."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.machine import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.bfloat16, torch.float32)


def unsupported(logits: Tensor) -> str | None:
    """Why it cannot take these logits, in one sentence; None if it can. The first call compiles."""
    if logits.device.type != "cpu":
        return f"{logits.device.type} is no CPU"
    if logits.dtype not in DTYPES:
        return f"logits of {logits.dtype} stay with torch"
    return _library()[1]


def losses_and_gradients(
    logits: Tensor, targets: Tensor, losses: Tensor, share: Tensor, z_loss: float, ignored: int
) -> None:
    """As `training.model.loss_kernel.call`, on torch's number of threads.

    Raises:
        IndexError: a target is neither `ignored` nor below V.
    """
    assert logits.is_contiguous() and targets.is_contiguous() and targets.dtype == torch.int64
    beyond = (targets < 0) | (targets >= logits.shape[1])
    if (beyond & (targets != ignored)).any():
        raise IndexError(f"a target is not below {logits.shape[1]}, the size of the vocabulary")
    _library()[0].losses_and_gradients(
        logits.data_ptr(), logits.dtype == torch.bfloat16, targets.data_ptr(), losses.data_ptr(),
        *logits.shape, share.item(), z_loss, ignored, torch.get_num_threads(),
    )  # fmt: skip


def _library() -> tuple[Any, str | None]:
    """(the library, None) or (None, why there is none)."""
    chosen = compiled.choose_tier()[0]
    tier = "AVX-512 BF16" if chosen == compiled.TILES else chosen  # nothing here computes with tiles
    library, reason = compiled.load(SOURCE, flags=("-fopenmp",), tier=tier)
    return library and _declared(library), reason


@cache
def _declared(library: Any) -> Any:
    """The library, with the types of its function."""
    pointer, long, single = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    function = library.losses_and_gradients
    function.argtypes = (pointer, long, pointer, pointer, long, long, single, single, long, long)
    function.restype = None
    return library
