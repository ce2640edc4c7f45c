"""Triton kernels of the optimizer step: products known to be symmetric, and the two passes over a shard.

Written with plain pointers: a kernel with TMA descriptors compiled for an A40 (sm_86) loses its asynchronous
copies and spills. Tiles are fixed per GPU, never tuned at run time: tests/optim/kernels/test_gpu.py compiles
all of `variants` for every GPU in `TILES`, without one. The module imports anywhere, and `unsupported` says
where its kernels run.

Legend: B matrices of a batch, n x n a product, k its inner dimension.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernels' annotations name triton, which may be missing

from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from math import ceil
from typing import Any

import torch
from torch import Tensor

from cluster.machine import triton_calls
from cluster.machine.triton_calls import INTERPRETED, Call, jit
from optim.kernels.passes import (
    BLOCK,
    SegmentTable,
    check_adamw_pass,
    check_apply_pass,
    check_momentum_pass,
    require,
)

if triton_calls.TRITON_MISSING is None:
    import triton.language as tl

PASS_WARPS = 8


@dataclass(frozen=True)
class Tile:
    """What one program computes, n x n in steps of k, with how many warps and pipeline stages."""

    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """A GPU's tiles.

    Attributes:
        num_sms: large tiles are used from one per multiprocessor on. Fewer take as long as one, whatever
            their number, and small ones spread the work over the idle multiprocessors.
    """

    num_sms: int
    small: Tile
    large: Tile


_SMALL = Tile(64, 64, warps=4, stages=3)
TILES = {
    # A40: 101,376 bytes of shared memory per block
    (8, 6): Tiles(84, _SMALL, Tile(128, 64, warps=8, stages=3)),
    # H100: 232,448 bytes; 4 warps are the least that wgmma takes
    (9, 0): Tiles(132, _SMALL, Tile(128, 64, warps=8, stages=4)),
}
PRODUCT_DTYPES = (torch.bfloat16, torch.float16)


@cache
def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on `device` with products of `dtype`, in one sentence; None if they can."""
    known = (*PRODUCT_DTYPES, torch.float32) if INTERPRETED else PRODUCT_DTYPES
    reason = triton_calls.unsupported(device, TILES)
    return reason or (None if dtype in known else f"products of {dtype} stay with torch")


# --- products -----------------------------------------------------------------------------------------------


def symmetric_product(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, c: Tensor | None = None, beta: float = 0.0,
    diagonal: float = 0.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """alpha·A·Bᵀ + beta·C + diagonal·I, known to be symmetric: half of it is computed, and written twice.

    That is the Gram matrix AAᵀ, and the product of commuting symmetric matrices such as polynomials of one
    Gram matrix. The result is exactly symmetric; sums are fp32 and rounded once.

    Args:
        a, b: [B, n, k], bf16 or fp16, on a device that `unsupported` lets through. Any strides.
        c: [B, n, n], symmetric: its upper half is not read.
        out: [B, n, n], none of the operands; a new tensor if None.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the kernels do not run there.
    """
    reason = unsupported(a.device, a.dtype)
    require(reason is None, str(reason))
    capability = (8, 6) if INTERPRETED else torch.cuda.get_device_capability(a.device)
    out = a.new_empty(len(a), a.size(1), a.size(1)) if out is None else out
    _product(a, b, c, out, alpha, beta, diagonal, capability=capability).launch()
    return out


def _product(
    a: Tensor, b: Tensor, c: Tensor | None, out: Tensor, alpha: float, beta: float, diagonal: float, *,
    capability: tuple[int, int],
) -> Call:  # fmt: skip
    """The launch that writes alpha·A·Bᵀ + beta·C + diagonal·I to `out`."""
    size, n, k = a.shape
    operands = [tensor for tensor in (a, b, c, out) if tensor is not None]
    require(a.shape == b.shape, f"{tuple(a.shape)} times the transpose of {tuple(b.shape)} is not symmetric")
    for tensor in operands[2:]:
        require(tensor.shape == (size, n, n), f"the product is {(size, n, n)}, not {tuple(tensor.shape)}")
    require(len({(t.dtype, t.device) for t in operands}) == 1, "operands differ in dtype or device")

    tiles = TILES[capability]
    for tile in (tiles.large, tiles.small):
        rows = ceil(n / tile.n)
        programs = rows * (rows + 1) // 2
        if size * programs >= tiles.num_sms:
            break
    arguments: dict[str, Any] = {"a": a, "b": b, "c": c, "out": out, "n": n, "k": k}
    # as floats: an integer 1 would be compiled in
    arguments |= {"alpha": float(alpha), "beta": float(beta), "diagonal": float(diagonal)}
    for name, tensor in (("a", a), ("b", b), ("c", out if c is None else c), ("out", out)):
        strides = (f"{name}_batch", f"{name}_row", f"{name}_col")
        arguments |= dict(zip(strides, tensor.stride(), strict=True))
    arguments |= {"WIDEN": INTERPRETED, "TILE_N": tile.n, "TILE_K": tile.k}
    return Call(_product_kernel, (programs, size), arguments, tile.warps, tile.stages)


@jit
def _product_kernel(
    a, b, c, out, alpha, beta, diagonal, n, k,
    a_batch, a_row, a_col, b_batch, b_row, b_col, c_batch, c_row, c_col, out_batch, out_row, out_col,
    WIDEN: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    num_rows = tl.cdiv(n, TILE_N)
    # Rows i and R - 1 - i of the lower half, laid end to end, have R + 1 tiles for every i.
    row = tl.program_id(0) // (num_rows + 1)
    col = tl.program_id(0) % (num_rows + 1)
    beyond = col > row
    col = tl.where(beyond, col - row - 1, col)
    row = tl.where(beyond, num_rows - 1 - row, row)
    top = (row * TILE_N).to(tl.int64)  # 64 bits up to the tile, 32 inside
    left = (col * TILE_N).to(tl.int64)
    i = tl.arange(0, TILE_N)[:, None]
    j = tl.arange(0, TILE_N)[None, :]
    a += batch * a_batch + top * a_row + i * a_row + tl.arange(0, TILE_K)[None, :] * a_col
    b += batch * b_batch + left * b_row + j * b_row + tl.arange(0, TILE_K)[:, None] * b_col
    inside_rows = row * TILE_N + i < n
    inside_cols = col * TILE_N + j < n

    total = tl.zeros((TILE_N, TILE_N), tl.float32)
    for done in range(0, k, TILE_K):
        a_tile = tl.load(a, inside_rows & (tl.arange(0, TILE_K)[None, :] < k - done), other=0.0)
        b_tile = tl.load(b, inside_cols & (tl.arange(0, TILE_K)[:, None] < k - done), other=0.0)
        if WIDEN:  # the interpreter multiplies the bits of bf16 as integers: triton issue 11584
            a_tile = a_tile.to(tl.float32)
            b_tile = b_tile.to(tl.float32)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += TILE_K * a_col
        b += TILE_K * b_col

    total *= alpha
    inside = inside_rows & inside_cols
    if c is not None:
        c += batch * c_batch + top * c_row + left * c_col
        total += beta * tl.load(c + i * c_row + j * c_col, inside).to(tl.float32)
    total += tl.where(row * TILE_N + i == col * TILE_N + j, diagonal, 0.0)
    result = total.to(out.dtype.element_ty)
    out += batch * out_batch
    straight = out + top * out_row + left * out_col + i * out_row + j * out_col
    mirrored = out + left * out_row + top * out_col + j * out_row + i * out_col
    if row == col:  # apart, because a triangular mask makes stores element by element
        tl.store(straight, result, inside & (i >= j))
        tl.store(mirrored, result, inside & (i > j))
    else:
        tl.store(straight, result, inside)
        tl.store(mirrored, result, inside)


# --- passes over a shard ------------------------------------------------------------------------------------


def momentum_pass(
    gradient: Tensor, momentum: Tensor, out: Tensor, squares: Tensor, table: SegmentTable, *, beta: float,
    nesterov: bool,
) -> None:  # fmt: skip
    """Momentum, Nesterov, cast and norm in one pass: m ← βm + (1-β)g, out ← u = βm + (1-β)g or m.

    Args:
        gradient: flat, fp32 or bf16.
        momentum: flat, fp32, laid out as `gradient`; updated in place.
        out: packed, fp32 or bf16; written where the table says.
        squares: [segments] fp64, overwritten with the sum of u² over each segment, taken before the cast and
            in fp64: no gradient's scale overflows it. The same bits every time.

    Raises:
        ValueError: a tensor is not flat and contiguous, is too short for the table, or of another dtype.
    """
    check_momentum_pass(gradient, momentum, out, squares, table)
    partials = torch.empty(len(table.sources), dtype=torch.float64, device=squares.device)
    tensors = {"gradient": gradient, "momentum": momentum, "out": out, "partials": partials}
    _pass(_momentum_kernel, table, **tensors, weight=1 - beta, NESTEROV=nesterov).launch()
    table.sum_blocks(partials, out=squares)


def apply_pass(
    weight: Tensor, update: Tensor, table: SegmentTable, *, decay: float, factor: float,
    ahead: float = 0.0, model: Tensor | None = None,
) -> None:  # fmt: skip
    """w' ← decay·w - factor·update, and the model's copy ← w' + ahead·(w' - w), in one pass.

    Args:
        weight: flat, fp32; updated in place in the table's segments.
        update: packed, fp32 or bf16.
        model: flat, bf16 or fp32, laid out as `weight`; gets the point, rounded once.

    Raises:
        ValueError: a tensor is not flat and contiguous, is too short for the table, or of another dtype.
    """
    check_apply_pass(weight, update, table, model)
    tensors = {"weight": weight, "update": update}
    _pass(_apply_kernel, table, **tensors, model=model, decay=decay, factor=factor, ahead=ahead).launch()


def adamw_pass(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, *, beta1: float, beta2: float,
    eps: float, step: int, decay: float, factor: float, model: Tensor | None = None,
) -> None:  # fmt: skip
    """AdamW in one pass: both moments, the update, w' ← decay·w - factor·update, and the model's copy ← w'.

    m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  update = m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε) in step t, from 1.
    https://arxiv.org/abs/1711.05101, algorithm 2

    Args:
        weight, first, second: flat, fp32, of one length; updated in place.
        gradient: as long; fp32 or bf16.
        model: as long; bf16 or fp32, rounded once.

    Raises:
        ValueError: a tensor is not flat and contiguous, is too short, or of another dtype.
    """
    check_adamw_pass(weight, gradient, first, second, model)
    _adamw(
        weight, gradient, first, second, model, lerp=1 - beta1, beta2=beta2, eps=eps, decay=decay,
        factor=factor, unbias1=1 / (1 - beta1**step), unbias2=1 / (1 - beta2**step),
    ).launch()  # fmt: skip


def _adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, model: Tensor | None, **numbers: float
) -> Call:
    tensors = {"weight": weight, "gradient": gradient, "first": first, "second": second, "model": model}
    arguments = tensors | numbers | {"numel": len(weight), "SIZE": BLOCK}
    return Call(_adamw_kernel, (ceil(len(weight) / BLOCK),), arguments, PASS_WARPS, stages=1)


@jit
def _adamw_kernel(
    weight, gradient, first, second, model, lerp, beta2, eps, decay, factor, unbias1, unbias2, numel,
    SIZE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < numel
    g = tl.load(gradient + i, inside, other=0.0).to(tl.float32)
    m = _lerp(tl.load(first + i, inside, other=0.0), g, lerp)
    v = tl.load(second + i, inside, other=0.0) * beta2 + (1 - beta2) * (g * g)
    tl.store(first + i, m, inside)
    tl.store(second + i, v, inside)
    update = m * unbias1 / (tl.sqrt(v * unbias2) + eps)
    w = tl.load(weight + i, inside, other=0.0) * decay - factor * update
    tl.store(weight + i, w, inside)
    if model is not None:
        tl.store(model + i, w.to(model.dtype.element_ty), inside)


def _pass(kernel: Any, table: SegmentTable, **arguments: Any) -> Call:
    arguments |= {"sources": table.sources, "targets": table.targets, "numels": table.numels}
    return Call(kernel, (len(table.sources),), arguments | {"SIZE": BLOCK}, PASS_WARPS, stages=1)


@jit
def _momentum_kernel(
    gradient, momentum, out, partials, sources, targets, numels, weight,
    NESTEROV: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    i = tl.arange(0, SIZE)
    inside = i < tl.load(numels + block)
    source = tl.load(sources + block) + i
    g = tl.load(gradient + source, inside, other=0.0).to(tl.float32)
    m = _lerp(tl.load(momentum + source, inside, other=0.0), g, weight)
    tl.store(momentum + source, m, inside)
    update = _lerp(m, g, weight) if NESTEROV else m
    tl.store(out + tl.load(targets + block) + i, update.to(out.dtype.element_ty), inside)
    wide = update.to(tl.float64)
    tl.store(partials + block, tl.sum(wide * wide))


@jit
def _lerp(start, end, weight):
    """As torch.lerp: from the nearer end, so that weight 1 gives `end` exactly."""
    near = weight < 0.5
    return tl.where(near, start, end) + tl.where(near, weight, weight - 1.0) * (end - start)


@jit
def _apply_kernel(
    weight, update, model, sources, targets, numels, decay, factor, ahead, SIZE: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    i = tl.arange(0, SIZE)
    inside = i < tl.load(numels + block)
    source = tl.load(sources + block) + i
    u = tl.load(update + tl.load(targets + block) + i, inside).to(tl.float32)
    before = tl.load(weight + source, inside)
    w = before * decay - factor * u
    tl.store(weight + source, w, inside)
    if model is not None:
        tl.store(model + source, (w + ahead * (w - before)).to(model.dtype.element_ty), inside)


# --- for the tests ------------------------------------------------------------------------------------------


def variants(capability: tuple[int, int]) -> dict[str, Call]:
    """Every kernel with every tile, dtype and layout that the optimizer launches, by name, on meta tensors.

    Sizes and strides are multiples of 16. With others, copies are element by element and large tiles spill.
    """
    calls = {}
    multiply = partial(_product, alpha=1.0, beta=1.0, diagonal=1.0, capability=capability)
    for size, dtype in product((64, 4096), PRODUCT_DTYPES):  # small tiles, large tiles
        square = torch.empty(1, size, size, dtype=dtype, device="meta")
        wide = torch.empty(1, size, 2 * size, dtype=dtype, device="meta")
        tall = torch.empty(1, 2 * size, size, dtype=dtype, device="meta").mT
        kind = f"{dtype} {size}"
        calls[f"A², {kind}"] = multiply(square, square, square, square)
        for layout, x in (("wide", wide), ("tall", tall)):
            calls[f"XXᵀ, {layout} {kind}"] = multiply(x, x, None, square)
    offsets = torch.empty(1, dtype=torch.int64, device="meta")
    table = SegmentTable(offsets, offsets, offsets, offsets, source_stop=1, target_stop=1)
    single, half = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bfloat16))
    for source, packed, nesterov in product((single, half), (single, half), (True, False)):
        tensors = {"gradient": source, "momentum": single, "out": packed, "partials": single.double()}
        call = _pass(_momentum_kernel, table, **tensors, weight=0.1, NESTEROV=nesterov)
        calls[f"momentum, {source.dtype} to {packed.dtype}, {nesterov=}"] = call
    for update, model in product((single, half), (half, single, None)):
        tensors = {"weight": single, "update": update}
        call = _pass(_apply_kernel, table, **tensors, model=model, decay=1.0, factor=1.0, ahead=0.1)
        calls[f"apply, {update.dtype}, model={None if model is None else model.dtype}"] = call
    numbers = dict.fromkeys(("lerp", "beta2", "eps", "decay", "factor", "unbias1", "unbias2"), 0.1)
    for gradient, model in product((single, half), (half, single, None)):
        call = _adamw(single, gradient, single, single, model, **numbers)
        calls[f"adamw, {gradient.dtype}, model={None if model is None else model.dtype}"] = call
    return calls
