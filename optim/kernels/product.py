"""Triton kernels of products known to be symmetric: half of each is computed, and written twice.

On an H100 (sm_90) large products load their operands through tensor descriptors (TMA). Compiled for an A40
(sm_86) such a kernel loses its asynchronous copies and spills; there all load through plain pointers.

Legend: B matrices of a batch, n x n a product, k its inner dimension.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernels' annotations name triton, which may be missing

from dataclasses import dataclass
from functools import cache, partial
from itertools import product as pairs
from math import ceil
from typing import Any

import torch
from torch import Tensor

from cluster.machine import triton_calls
from cluster.machine.triton_calls import INTERPRETED, Call, jit
from optim.kernels.passes import require

if triton_calls.TRITON_MISSING is None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tile:
    """What one program computes, m x n in steps of k, with how many warps and pipeline stages."""

    m: int
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
        described: as `large`, where operands come through tensor descriptors. Twice as wide as high: it reads
            three quarters of what a square one reads for as many products.
    """

    num_sms: int
    small: Tile
    large: Tile
    described: Tile | None = None


_SMALL = Tile(64, 64, 64, warps=4, stages=3)
TILES = {
    # A40: 101,376 bytes of shared memory per block
    (8, 6): Tiles(84, _SMALL, Tile(128, 128, 64, warps=8, stages=3)),
    # H100: 232,448 bytes; 4 warps are the least that wgmma takes
    (9, 0): Tiles(
        132, _SMALL, Tile(128, 128, 64, warps=8, stages=4), described=Tile(128, 256, 64, warps=8, stages=3)
    ),
}
PRODUCT_DTYPES = (torch.bfloat16, torch.float16)


@cache
def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on `device` with products of `dtype`, in one sentence; None if they can."""
    known = (*PRODUCT_DTYPES, torch.float32) if INTERPRETED else PRODUCT_DTYPES
    reason = triton_calls.unsupported(device, TILES)
    return reason or (None if dtype in known else f"products of {dtype} stay with torch")


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
    call(a, b, c, out, alpha, beta, diagonal, capability=capability).launch()
    return out


def call(
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

    tile, programs = _choose_tile(TILES[capability], operands)
    arguments: dict[str, Any] = {"a": a, "b": b, "c": c, "out": out, "n": n, "k": k}
    # as floats: an integer 1 would be compiled in
    arguments |= {"alpha": float(alpha), "beta": float(beta), "diagonal": float(diagonal)}
    for name, tensor in (("a", a), ("b", b), ("c", out if c is None else c), ("out", out)):
        strides = (f"{name}_batch", f"{name}_row", f"{name}_col")
        arguments |= dict(zip(strides, tensor.stride(), strict=True))
    arguments |= {"WIDEN": INTERPRETED, "TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k}
    kernel = _product_kernel
    if tile is TILES[capability].described:
        kernel = _described_product_kernel
        arguments |= {"a": _describe(a, tile.m, tile.k), "b": _describe(b, tile.n, tile.k)}
        arguments |= {"TALL_A": a.stride(2) != 1, "TALL_B": b.stride(2) != 1}
        unused = [f"{name}_{side}" for name in "ab" for side in ("batch", "row", "col")]
        arguments = {name: value for name, value in arguments.items() if name not in unused}
    return Call(kernel, (programs, size), arguments, tile.warps, tile.stages)


def _choose_tile(tiles: Tiles, operands: list[Tensor]) -> tuple[Tile, int]:
    """The tile, and how many of it cover the lower half of one product."""
    size, n, _ = operands[0].shape
    described = [tiles.described] if tiles.described and all(map(_describable, operands[:2])) else []
    for tile in (*described, tiles.large, tiles.small):
        blocks = ceil(n / tile.n)
        programs = blocks * (blocks + 1) // 2 * (tile.n // tile.m)
        if size * programs >= tiles.num_sms:
            break
    return tile, programs


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor holds it: one stride is 1, the others and the address 16-byte aligned."""
    along = 2 if x.stride(2) == 1 else 1
    apart = (x.stride(dim) * x.itemsize % 16 for dim in range(3) if dim != along)
    return x.stride(along) == 1 and not any(apart) and x.storage_offset() * x.itemsize % 16 == 0


def _describe(x: Tensor, rows: int, cols: int) -> Any:
    """A descriptor of tiles [rows, cols] of each matrix; [cols, rows] of its transpose if x is tall."""
    if x.stride(2) != 1:
        return TensorDescriptor.from_tensor(x.mT, [1, cols, rows])
    return TensorDescriptor.from_tensor(x, [1, rows, cols])


@jit
def _product_kernel(
    a, b, c, out, alpha, beta, diagonal, n, k,
    a_batch, a_row, a_col, b_batch, b_row, b_col, c_batch, c_row, c_col, out_batch, out_row, out_col,
    WIDEN: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    row, col = _tile_below_diagonal(n, TILE_M, TILE_N)
    i = tl.arange(0, TILE_M)[:, None]
    j = tl.arange(0, TILE_N)[None, :]
    # 64 bits up to the tile, 32 inside
    a += batch * a_batch + row.to(tl.int64) * a_row + i * a_row + tl.arange(0, TILE_K)[None, :] * a_col
    b += batch * b_batch + col.to(tl.int64) * b_row + j * b_row + tl.arange(0, TILE_K)[:, None] * b_col
    inside_rows = row + i < n
    inside_cols = col + j < n

    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for done in range(0, k, TILE_K):
        a_tile = tl.load(a, inside_rows & (tl.arange(0, TILE_K)[None, :] < k - done), other=0.0)
        b_tile = tl.load(b, inside_cols & (tl.arange(0, TILE_K)[:, None] < k - done), other=0.0)
        if WIDEN:  # the interpreter multiplies the bits of bf16 as integers: triton issue 11584
            a_tile = a_tile.to(tl.float32)
            b_tile = b_tile.to(tl.float32)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += TILE_K * a_col
        b += TILE_K * b_col
    if c is not None:
        c += batch * c_batch
    _write_twice(
        total, c, out + batch * out_batch, alpha, beta, diagonal, n, row, col, c_row, c_col, out_row, out_col
    )


@jit
def _described_product_kernel(
    a, b, c, out, alpha, beta, diagonal, n, k,
    c_batch, c_row, c_col, out_batch, out_row, out_col,
    WIDEN: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TALL_A: tl.constexpr, TALL_B: tl.constexpr,
):  # fmt: skip
    """Descriptors give zeros beyond the matrix, and the loop computes neither addresses nor masks."""
    batch = tl.program_id(1)
    row, col = _tile_below_diagonal(n, TILE_M, TILE_N)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for done in range(0, k, TILE_K):
        if TALL_A:
            a_tile = a.load([batch, done, row]).reshape(TILE_K, TILE_M).T
        else:
            a_tile = a.load([batch, row, done]).reshape(TILE_M, TILE_K)
        if TALL_B:
            b_tile = b.load([batch, done, col]).reshape(TILE_K, TILE_N)
        else:
            b_tile = b.load([batch, col, done]).reshape(TILE_N, TILE_K).T
        if WIDEN:
            a_tile = a_tile.to(tl.float32)
            b_tile = b_tile.to(tl.float32)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
    if c is not None:
        c += batch.to(tl.int64) * c_batch
    out += batch.to(tl.int64) * out_batch
    _write_twice(total, c, out, alpha, beta, diagonal, n, row, col, c_row, c_col, out_row, out_col)


@jit
def _tile_below_diagonal(n, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """First row and column of this program's tile. The lower half is cut into squares, these into rows."""
    parts: tl.constexpr = TILE_N // TILE_M
    num_rows = tl.cdiv(n, TILE_N)
    square = tl.program_id(0) // parts
    # Rows i and R - 1 - i of the lower half, laid end to end, have R + 1 squares for every i.
    row = square // (num_rows + 1)
    col = square % (num_rows + 1)
    beyond = col > row
    col = tl.where(beyond, col - row - 1, col)
    row = tl.where(beyond, num_rows - 1 - row, row)
    return row * TILE_N + tl.program_id(0) % parts * TILE_M, col * TILE_N


@jit
def _write_twice(total, c, out, alpha, beta, diagonal, n, row, col, c_row, c_col, out_row, out_col):
    """alpha·total + beta·C + diagonal·I, the tile at (row, col), and its transpose at (col, row)."""
    i = tl.arange(0, total.shape[0])[:, None]
    j = tl.arange(0, total.shape[1])[None, :]
    top, left = row.to(tl.int64), col.to(tl.int64)  # 64 bits up to the tile, 32 inside
    total *= alpha
    if c is not None:
        c += top * c_row + left * c_col
        total += beta * tl.load(c + i * c_row + j * c_col, (row + i < n) & (col + j < n)).to(tl.float32)
    total += tl.where(row + i == col + j, diagonal, 0.0)
    result = total.to(out.dtype.element_ty)
    straight = out + top * out_row + left * out_col
    mirrored = out + left * out_row + top * out_col
    if col + total.shape[1] > row:  # apart, because a triangular mask makes stores element by element
        inside = (row + i < n) & (col + j < n)
        tl.store(straight + i * out_row + j * out_col, result, inside & (row + i >= col + j))
        tl.store(mirrored + j * out_row + i * out_col, result, inside & (row + i > col + j))
    else:
        inside = (row + i < n) & (col + j < n)
        tl.store(straight + i * out_row + j * out_col, result, inside)
        tl.store(mirrored + j * out_row + i * out_col, result, inside)


# --- for the tests ------------------------------------------------------------------------------------------


def variants(capability: tuple[int, int]) -> dict[str, Call]:
    """Every kernel with every tile, dtype and layout that the optimizer launches, by name, on meta tensors.

    Sizes and strides are multiples of 16. With others, copies are element by element and large tiles spill.
    """
    calls = {}
    multiply = partial(call, alpha=1.0, beta=1.0, diagonal=1.0, capability=capability)
    for size, dtype in pairs((64, 2048, 4096), PRODUCT_DTYPES):  # small tiles, large ones, described
        square = torch.empty(1, size, size, dtype=dtype, device="meta")
        wide = torch.empty(1, size, 2 * size, dtype=dtype, device="meta")
        tall = torch.empty(1, 2 * size, size, dtype=dtype, device="meta").mT
        kind = f"{dtype} {size}"
        calls[f"A², {kind}"] = multiply(square, square, square, square)
        for layout, x in (("wide", wide), ("tall", tall)):
            calls[f"XXᵀ, {layout} {kind}"] = multiply(x, x, None, square)
    return calls
