"""training/model/loss.py: chunks against whole logits, in loss and gradients."""

import pytest
import torch
from torch import Tensor

from tests.compiled_kernels import compiled, problems, run_interpreted
from training.model import loss_kernel
from training.model.loss import IGNORED_TARGET, chunked, losses_and_gradients_by_torch, whole

TOKENS, HIDDEN, VOCABULARY = 50, 24, 97
DTYPES = {
    "fp32": (torch.float32, 1e-6),
    "bf16": (torch.bfloat16, 1e-2),
}  # and the largest relative difference


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and targets of which some are ignored."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, HIDDEN, generator=draw).to(dtype).requires_grad_() for n in (TOKENS, VOCABULARY)
    )
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    targets[::7] = IGNORED_TARGET
    return hidden, weight, targets


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [1, 16, 25, TOKENS, 1000])
@pytest.mark.parametrize("precision", DTYPES)
def test_chunks_give_the_loss_and_gradients_of_whole_logits(precision: str, tokens: int, z_loss: float):
    dtype, tolerance = DTYPES[precision]
    exact = [t.detach().double().requires_grad_(t.is_floating_point()) for t in operands(dtype)[:2]]
    hidden, weight, targets = operands(dtype)
    expected = whole(exact[0] @ exact[1].T, targets, z_loss=z_loss)
    expected.mul(3).backward()
    loss = chunked(hidden, weight, targets, tokens=tokens, z_loss=z_loss)
    assert loss.dtype == torch.float32 and loss.shape == ()
    loss.mul(3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for own, other in zip((hidden, weight), exact, strict=True):
        assert own.grad is not None and other.grad is not None and own.grad.dtype == dtype
        assert relative(own.grad, other.grad) < tolerance


def test_the_weights_gradient_is_rounded_once_however_many_the_chunks():
    """In bf16, against the same gradients of the logits in fp32: a sum in bf16 would be 3 times as far."""
    hidden, weight, targets = operands(torch.bfloat16)
    gradients = [
        torch.autograd.grad(chunked(hidden, weight, targets, tokens=tokens), weight)[0] for tokens in (50, 1)
    ]
    wide, of = hidden.detach().float(), weight.detach().float().requires_grad_()
    exact = torch.autograd.grad(whole(wide @ of.T, targets), of)[0]
    one, many = (relative(gradient, exact) for gradient in gradients)
    assert many < 1.2 * one


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, targets = operands(torch.float32)
    with torch.no_grad():
        loss = chunked(hidden, weight, targets, tokens=16)
    assert not loss.requires_grad and loss.item() == pytest.approx(whole(hidden @ weight.T, targets).item())
    frozen = chunked(hidden.detach(), weight, targets, tokens=16)
    assert torch.autograd.grad(frozen, weight)[0].shape == weight.shape


def test_a_batch_without_targets_has_no_loss():
    hidden, weight, targets = operands(torch.float32)
    nothing = torch.full_like(targets, IGNORED_TARGET)
    assert whole(hidden @ weight.T, nothing).isnan() and chunked(hidden, weight, nothing, tokens=16).isnan()


def test_no_logits_outlive_the_forward_pass():
    """What autograd keeps is the size of the gradients, whatever the number of tokens."""
    hidden, weight, targets = operands(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked(hidden, weight, targets, tokens=16)
    assert sorted(tuple(t.shape) for t in kept) == [(TOKENS, HIDDEN), (VOCABULARY, HIDDEN)]


# --- the kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", loss_kernel.CAPABILITIES)
def test_the_kernel_fits_the_gpu(capability, tmp_path):
    logits = torch.empty(2, 50304, dtype=torch.bfloat16)
    call = loss_kernel.call(
        logits, torch.zeros(2, dtype=torch.int64), torch.empty(2), torch.ones(()), 1e-4, IGNORED_TARGET
    )
    kernel = compiled(call, capability)
    assert problems(kernel, capability, tmp_path) == []
    assert "st.global.v4" in kernel.asm["ptx"] and "ld.global.v4" in kernel.asm["ptx"]


@pytest.mark.stack
def test_the_kernel_computes_what_torch_does():
    run_interpreted(__file__, passes=6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("columns", [97, loss_kernel.SIZE, loss_kernel.SIZE + 11])
def interpreted_loss_kernel(columns: int, z_loss: float):
    draw = torch.Generator().manual_seed(columns)
    logits = 3 * torch.randn(5, columns, generator=draw)
    targets = torch.tensor([0, columns - 1, IGNORED_TARGET, 7, 50])
    share, exact, losses = torch.tensor(0.25), logits.clone(), torch.empty(5)
    total = losses_and_gradients_by_torch(exact, targets, share, z_loss)
    loss_kernel.call(logits, targets, losses, share, z_loss, IGNORED_TARGET).launch()
    torch.testing.assert_close(losses.sum(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-7)
    assert losses[2] == 0 and not logits[2].any()
