"""Products by Triton's interpreter, for `test_gpu.py`: the functions named `interpreted_*`."""

from dataclasses import replace

import pytest
import torch

from optim.kernels import product
from optim.kernels.product import symmetric_product

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
each_shape = pytest.mark.parametrize("shape", [(2, 96, 200), (1, 33, 70), (2, 1, 5)])


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def framed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of NaN and, in the midst of it, a copy of x [B, r, c], laid out as x."""
    tall = x.stride(-1) > x.stride(-2)
    buffer = torch.full([size + 2 for size in (x.mT if tall else x).shape], torch.nan, dtype=x.dtype)
    inside = buffer.mT[1:-1, 1:-1, 1:-1] if tall else buffer[1:-1, 1:-1, 1:-1]
    return buffer, inside.copy_(x)


def assert_rounded_once(result: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """`result` is `exact` [fp64] rounded once, but for fp32 sums of terms of `magnitude`."""
    units = 1.0 if result.dtype == torch.bfloat16 else 0.5  # in the last place: the interpreter truncates
    bound = exact.abs() * torch.finfo(result.dtype).eps * units + 1e-6 * magnitude
    assert ((result.double() - exact).abs() <= bound).all()


@each_dtype
@each_shape
def interpreted_symmetric_product(shape, dtype):
    size, n, k = shape
    a, b = random(size, n, k, dtype=dtype, seed=0), random(size, n, k, dtype=dtype, seed=1)
    lower = random(size, n, n, dtype=dtype, seed=2).tril()
    c = lower + torch.full_like(lower, torch.nan).triu(1)  # whose upper half is not read
    for left, right in ((a, a), (b.mT.contiguous().mT, b.mT.contiguous().mT), (a, framed(b)[1])):
        for alpha, addend, beta, diagonal in ((1.0, None, 0.0, 0.0), (0.5, c, -2.0, 3.0)):
            frame, out = framed(torch.zeros(size, n, n, dtype=dtype))
            options = {"alpha": alpha, "c": addend, "beta": beta, "diagonal": diagonal}
            result = symmetric_product(left, right, **options, out=out)
            assert result is out and torch.equal(result, result.mT)
            assert frame.isnan().sum() == frame.numel() - out.numel()  # nothing was written beside it
            plus = beta * lower.double() + diagonal * torch.eye(n, dtype=torch.float64)
            exact = alpha * left.double() @ right.double().mT + plus
            magnitude = left.double().abs() @ right.double().abs().mT + plus.abs()
            assert_rounded_once(result.tril(), exact.tril(), magnitude)
    assert torch.equal(symmetric_product(left, right, **options), result)


@each_dtype
def interpreted_product_through_descriptors(dtype, monkeypatch):
    """With small tiles: wide and tall operands, ragged edges, an addend, a batch of more than one."""
    tiles = replace(product.TILES[9, 0], num_sms=1, described=product.Tile(16, 32, 16, warps=8, stages=3))
    monkeypatch.setitem(product.TILES, (9, 0), tiles)
    for size, n, k in ((2, 96, 40), (1, 24, 16), (2, 72, 56)):
        for tall in (False, True):
            x = random(size, n, k, dtype=dtype, seed=0)
            x = x.mT.contiguous().mT if tall else x
            c = random(size, n, n, dtype=dtype, seed=1).tril()
            frame, out = framed(torch.zeros(size, n, n, dtype=dtype))
            call = product.call(x, x, c, out, 0.5, -2.0, 3.0, capability=(9, 0))
            assert call.kernel is product._described_product_kernel and call.arguments["TALL_A"] is tall
            call.launch()
            assert torch.equal(out, out.mT) and frame.isnan().sum() == frame.numel() - out.numel()
            plus = -2 * c.double() + 3 * torch.eye(n, dtype=torch.float64)
            exact = 0.5 * x.double() @ x.double().mT + plus
            magnitude = x.double().abs() @ x.double().abs().mT + plus.abs()
            assert_rounded_once(out.tril(), exact.tril(), magnitude)


def interpreted_large_tiles(monkeypatch):
    tiles = replace(product.TILES[8, 6], num_sms=1)
    monkeypatch.setitem(product.TILES, (8, 6), tiles)
    x = random(1, 130, 70, dtype=torch.float32, seed=70)
    call = product.call(x, x, None, x.new_empty(1, 130, 130), 1.0, 0.0, 0.0, capability=(8, 6))
    assert call.arguments["TILE_N"] == tiles.large.n == 128
    gram = x.double() @ x.double().mT
    assert_rounded_once(symmetric_product(x, x), gram, x.double().abs() @ x.double().abs().mT)


def interpreted_many_tiles():
    """An odd number of rows of tiles, the last one ragged."""
    x = random(1, 10 * 64 + 1, 70, dtype=torch.float32, seed=70)
    gram = x.double() @ x.double().mT
    assert_rounded_once(symmetric_product(x, x), gram, x.double().abs() @ x.double().abs().mT)
