"""training/model/loss.py: chunks against whole logits, in loss and gradients."""

import pytest
import torch
from torch import Tensor

from tests.compiled_kernels import compiled, problems, run_interpreted
from training.model import loss_kernel, loss_native
from training.model.loss import (
    IGNORED_TARGET,
    chunked,
    losses_and_gradients,
    losses_and_gradients_by_torch,
    whole,
)

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


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("columns", [3, 97, 1040])
@pytest.mark.parametrize("precision", DTYPES)
def test_the_compiled_loss_of_cpus_computes_what_torch_does(precision: str, columns: int, z_loss: float):
    draw = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(20, columns, generator=draw)).to(DTYPES[precision][0])
    targets = torch.randint(columns, (20,), generator=draw)
    targets[::7] = IGNORED_TARGET
    if (reason := loss_native.unsupported(logits)) is not None:
        pytest.skip(reason)
    ours, theirs = logits.clone(), logits.clone()
    share = torch.tensor(1 / 17)
    loss = losses_and_gradients(ours, targets, share, z_loss)
    expected = losses_and_gradients_by_torch(theirs, targets, share, z_loss)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative(ours, theirs) < (1e-6 if precision == "fp32" else 1e-3)
    assert ours[0].count_nonzero() == 0  # which has no target


def test_the_compiled_loss_hides_no_nan_and_reads_no_other_memory():
    logits, targets, share = torch.zeros(2, 50), torch.tensor([1, 2]), torch.tensor(0.5)
    if (reason := loss_native.unsupported(logits)) is not None:
        pytest.skip(reason)
    for value in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[1, 7] = value
        assert losses_and_gradients(broken, targets, share, 0.0).isnan()
        assert broken[0].isfinite().all()
    for target in (50, -1):
        with pytest.raises(IndexError, match="not below 50"):
            losses_and_gradients(logits, torch.tensor([1, target]), share, 0.0)


def test_without_compiled_code_one_chunk_is_the_whole_loss(monkeypatch: pytest.MonkeyPatch):
    hidden, weight, targets = operands(torch.bfloat16)
    monkeypatch.setattr(loss_native, "unsupported", lambda logits: "it was not compiled")
    ours = torch.autograd.grad(chunked(hidden, weight, targets, tokens=TOKENS), (hidden, weight))
    expected = torch.autograd.grad(whole(hidden @ weight.T, targets), (hidden, weight))
    assert all(a.equal(b) for a, b in zip(ours, expected, strict=True))


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
