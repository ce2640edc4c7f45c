"""The mean cross-entropy of next tokens: of whole logits, or of a chunk of tokens at a time.

`chunked` is the idea of Liger Kernel's fused linear cross-entropy (https://github.com/linkedin/Liger-Kernel,
arXiv 2410.10989): the forward pass computes a chunk's logits, its loss and at once both gradients, so no
logits are kept and none are computed again. What it holds is a chunk of logits in the weights' dtype, the
gradients of the hidden states and of the weight, and for more than one chunk an fp32 sum of the latter.

Shapes: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.precision import product_dtype
from training.model import loss_kernel, loss_native

IGNORED_TARGET = -100


def whole(logits: Tensor, targets: Tensor, *, z_loss: float = 0.0) -> Tensor:
    """Mean over the targets that are not `IGNORED_TARGET` of -log p(target) + z_loss * log(Z)^2, in nats.

    Z is the sum of the exponentials of a token's logits; z_loss keeps it near 1 (PaLM, arXiv 2204.02311).

    Args:
        logits: [N, V], of any dtype; computed with in fp32.
        targets: int64 [N].

    Returns:
        An fp32 scalar; NaN if every target is ignored.
    """
    wide = logits.float()
    loss = F.cross_entropy(wide, targets, ignore_index=IGNORED_TARGET)
    if z_loss:
        counts = targets != IGNORED_TARGET
        loss = loss + z_loss * (wide.logsumexp(-1).square() * counts).sum() / counts.sum()
    return loss


def chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tokens: int,
    z_loss: float = 0.0,
) -> Tensor:
    """`whole` of the logits `hidden @ weight.T`, of which this many tokens' are in memory at one time.

    In bf16 the gradients are those of `whole` but for the order of sums: the weight's is summed in fp32 over
    the chunks and rounded once.

    Args:
        hidden: [N, D].
        weight: [V, D].
    """
    if len(hidden) <= tokens and hidden.device.type == "cpu" and loss_native.unsupported(weight) is not None:
        # One chunk by torch alone: autograd's gradients take less time.
        wide = product_dtype(weight.dtype, weight.device)
        logits = F.linear(hidden.to(wide), weight.to(wide)).to(hidden.dtype)
        return whole(logits, targets, z_loss=z_loss)
    return _Chunked.apply(hidden, weight, targets, tokens, z_loss)


def losses_and_gradients(logits: Tensor, targets: Tensor, share: Tensor, z_loss: float) -> Tensor:
    """Sum of the rows' losses times `share`; the logits are replaced by its gradient. Compiled where it can.

    Args:
        logits: [rows, V].
        targets: int64 [rows].
        share: fp32 scalar, 1 / (number of targets that count).
    """
    losses = torch.empty(len(logits), device=logits.device)
    if loss_native.unsupported(logits) is None:
        loss_native.losses_and_gradients(logits, targets, losses, share, z_loss, IGNORED_TARGET)
        return losses.sum() * share
    if loss_kernel.unsupported(logits.device) is not None:
        return losses_and_gradients_by_torch(logits, targets, share, z_loss)
    loss_kernel.call(logits, targets, losses, share, z_loss, IGNORED_TARGET).launch()
    return losses.sum()


def losses_and_gradients_by_torch(logits: Tensor, targets: Tensor, share: Tensor, z_loss: float) -> Tensor:
    """`losses_and_gradients` where the kernel does not run. Three copies of the logits in fp32."""
    wide, column = logits.float(), targets[:, None]
    log_z = wide.logsumexp(-1, keepdim=True)
    counts = column != IGNORED_TARGET
    target_logit = wide.gather(-1, column.clamp_min(0))
    losses = log_z - target_logit + z_loss * log_z.square()
    chances = (wide - log_z).exp() * (1 + 2 * z_loss * log_z)
    is_target = torch.arange(logits.shape[1], device=logits.device) == column
    gradient = (chances - is_target.float()) * share
    logits.copy_(torch.where(counts, gradient, 0.0))
    return torch.where(counts, losses, 0.0).sum() * share


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tokens: int, z_loss: float
    ) -> Tensor:
        wide = product_dtype(weight.dtype, hidden.device)
        rows, matrix = hidden.to(wide), weight.to(wide)
        share = (targets != IGNORED_TARGET).sum().float().reciprocal()
        of_hidden = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        of_weight, once = None, len(rows) <= tokens
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(rows), tokens):
            part = slice(start, start + tokens)
            logits = (rows[part] @ matrix.T).to(weight.dtype)
            total += losses_and_gradients(logits, targets[part], share, z_loss)
            gradient = logits.to(wide)
            if of_hidden is not None:
                torch.mm(gradient, matrix, out=of_hidden[part])
            if ctx.needs_input_grad[1]:
                of_weight = (
                    gradient.T @ rows[part] if once else _add_product(of_weight, gradient.T, rows[part])
                )
        ctx.save_for_backward(
            None if of_hidden is None else of_hidden.to(hidden.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [scale] = gradients
        scaled = (None if own is None else own * scale.to(own.dtype) for own in ctx.saved_tensors)
        return (*scaled, None, None, None)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32; the sum replaces `total`."""
    if a.device.type != "cuda" or a.dtype == torch.float32:  # no products of bf16 that end in fp32
        product = (a @ b).float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, torch.float32)
    return torch.addmm(total, a, b, torch.float32, out=total)
