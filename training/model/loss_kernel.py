"""The Triton kernel of `training.model.loss`: a row of logits becomes its loss and, in place, its gradient.

A program reads its row twice, the second time mostly from the L2 cache, and writes it once. torch's own
operations make copies of all rows in fp32.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernel's annotations name triton, which may be missing

from functools import cache

import torch
from torch import Tensor

from cluster.machine import triton_calls
from cluster.machine.triton_calls import Call, jit

if triton_calls.TRITON_MISSING is None:
    import triton.language as tl

CAPABILITIES = ((8, 6), (9, 0))
SIZE, WARPS = 4096, 8  # logits that a program holds at one time


@cache
def unsupported(device: torch.device) -> str | None:
    """Why the kernel cannot run on `device`, in one sentence; None if it can."""
    return triton_calls.unsupported(device, CAPABILITIES)


def call(logits: Tensor, targets: Tensor, losses: Tensor, share: Tensor, z_loss: float, ignored: int) -> Call:
    """The launch of what `training.model.loss.losses_and_gradients` describes.

    Args:
        logits: [rows, V], contiguous; replaced by the gradient.
        losses: fp32 [rows], overwritten.
        ignored: the target of rows without a loss.
    """
    assert logits.is_contiguous() and targets.is_contiguous()
    arguments = {
        "logits": logits,
        "targets": targets,
        "losses": losses,
        "share": share,
        "columns": logits.shape[1],
    }
    arguments |= {"z_loss": float(z_loss), "IGNORED": ignored, "SIZE": SIZE}
    return Call(_loss_kernel, (len(logits),), arguments, WARPS, stages=1)


@jit
def _loss_kernel(
    logits, targets, losses, share, columns, z_loss, IGNORED: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    target = tl.load(targets + row)
    counts = target != IGNORED
    target_logit = tl.load(logits + target, counts, other=0.0).to(tl.float32)
    top = -float("inf")
    total = 0.0
    for start in range(0, columns, SIZE):
        i = start + tl.arange(0, SIZE)
        x = tl.load(logits + i, i < columns, other=-float("inf")).to(tl.float32)
        above = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above))
        top = above
    log_z = top + tl.log(total)
    part = tl.where(counts, tl.load(share), 0.0)
    loss = log_z - target_logit + z_loss * log_z * log_z
    tl.store(losses + row, tl.where(counts, loss, 0.0) * tl.load(share))
    slope = 1 + 2 * z_loss * log_z
    for start in range(0, columns, SIZE):
        i = start + tl.arange(0, SIZE)
        x = tl.load(logits + i, i < columns, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - log_z) * slope - tl.where(i == target, 1.0, 0.0)
        gradient = tl.where(counts, gradient * part, 0.0)
        tl.store(logits + i, gradient.to(logits.dtype.element_ty), i < columns)
