"""Adding a bf16 gradient to an fp32 sum in one pass of 10 bytes a parameter, or 6 for the first.

torch's `add_` and `copy_` give the same sums, but reach less of a GPU's memory bandwidth; on a CPU `add_`
writes an fp32 copy of the gradient first.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernel's annotations name triton, which may be missing

from functools import cache

import torch
from torch import Tensor

from cluster.machine import triton_calls
from cluster.machine.triton_calls import Call, jit
from optim.kernels import native

if triton_calls.TRITON_MISSING is None:
    import triton.language as tl

CAPABILITIES = ((8, 6), (9, 0))
BLOCK, WARPS = 4096, 8  # elements of a program: two loads of 16 bytes a thread


@cache
def unsupported(device: torch.device) -> str | None:
    """Why the kernel cannot run on `device`, in one sentence; None if it can."""
    return triton_calls.unsupported(device, CAPABILITIES)


def add(total: Tensor, gradient: Tensor, *, overwrite: bool) -> None:
    """total += gradient, or total = gradient; by compiled code where it runs, else by torch. The same bits.

    Args:
        total: fp32, flat, contiguous.
        gradient: of as many elements, bf16 or fp32, flat, contiguous.
    """
    if unsupported(total.device) is None:
        call(total, gradient, overwrite=overwrite).launch()
    elif overwrite:
        total.copy_(gradient)
    elif native.unsupported(total.device, gradient.dtype) is None:
        native.add(total, gradient)
    else:
        total.add_(gradient)


def call(total: Tensor, gradient: Tensor, *, overwrite: bool) -> Call:
    """The launch. Raises `ValueError`: the tensors are not as in `add`."""
    count = total.numel()
    if gradient.numel() != count or not (total.is_contiguous() and gradient.is_contiguous()):
        raise ValueError(f"a gradient of {gradient.numel()} elements does not lie as a sum of {count}")
    arguments = {"total": total, "gradient": gradient, "count": count, "OVERWRITE": overwrite, "SIZE": BLOCK}
    return Call(_add_kernel, (-(-count // BLOCK),), arguments, WARPS, stages=1)


@jit
def _add_kernel(total, gradient, count, OVERWRITE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < count
    value = tl.load(gradient + i, inside, other=0.0).to(tl.float32)
    if not OVERWRITE:
        value += tl.load(total + i, inside, other=0.0)
    tl.store(total + i, value, inside)
