"""A Triton kernel for steps of few rows, which take as long as reading the weights takes.

One launch is a product with what stands before and after it in the layer: a norm, and RoPE with the cache's
places, SiLU, or the residual. On sm_90 it begins while the launch before is running, asks for its weights,
and only then waits for its input. It rounds to bf16 where `training.model.llama` does.

Measured on an H200, one row, 1.4B, context 512: a step takes 1.13 ms with WARP_BYTES of 8192, 1.07 ms with
4096, and 1.09 ms with programs of one warp. Instructions that bring the next weights into the L2 cache while
attention runs cost 0.04 ms, and more between other launches, so there are none.

Legend: as in `serving.engine.gpu.layers`. Two outputs that one program computes together are a pair: the two
halves of a head that RoPE rotates, or gate and up.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernels' annotations name triton, which may be missing

from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

from torch import Tensor

from cluster.machine.triton_calls import INTERPRETED, TRITON_MISSING, Call, jit
from serving.engine.decoder import power_of_two
from serving.engine.gpu.layers import (
    NO_HEADS,
    Best,
    Heads,
    add_rounded,
    largest_of,
    place_heads,
    silu_times,
)

if TRITON_MISSING is None:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_NARROW = 16  # rows of `project`: what one instruction of the tensor cores multiplies
STORE, ADD, SILU, ROPE, LOGITS = "store", "add", "silu", "rope", "logits"  # of its product, in `project`
ROW_WARPS = 4  # of a program that multiplies one row
WARP_BYTES = 4096  # of weights that one of its warps holds: a quarter of its registers


def project(
    x: Tensor, weight: Tensor, out: Tensor, *, epilogue: str, half: int, norm: Tensor | None = None,
    eps: float = 0.0, heads: Heads | None = None, best: Best | None = None, pdl: bool = False,
) -> Call:  # fmt: skip
    """The launch of out = epilogue(norm(x) weightᵀ), for at most MOST_NARROW rows.

    Args:
        x: [M, K]; K contiguous, as in all operands.
        weight: [N, K].
        out: STORE: [M, N]. ADD: [M, N], to which the product is added. SILU: [M, N/2] of gates and ups. ROPE:
            [M, H·C], queries; keys and values go into the cache. LOGITS: [M, N] fp32, rounded as the model's.
        half: outputs i and i + half are a pair, in each run of 2·half outputs.
        norm: [K], the weight of an RMSNorm of x, whose epsilon is `eps`.
        best: LOGITS: of `project_programs` parts.
        pdl: begin while the launch before is running, and wait for its end where x is read (sm_90).
    """
    tile = _tile(*x.shape, width=x.element_size())
    arguments: dict[str, Any] = {
        "x": x, "norm": norm, "weight": weight, "out": out, "num_rows": len(x), "inner": x.shape[1],
        "outputs": len(weight), "half": half, "eps": eps, "x_row": x.stride(0), "out_row": out.stride(0),
    }  # fmt: skip
    arguments |= NO_HEADS if heads is None else heads.arguments()
    arguments |= dict(zip(("best", "best_id"), best or (None, None), strict=True))
    arguments |= {"EPILOGUE": epilogue, "ROWS": tile.rows, "TILE_N": tile.pairs, "TILE_K": tile.inner}
    arguments |= {"REST_K": tile.rest, "WIDEN": INTERPRETED, "PDL": pdl}
    programs = project_programs(x, outputs=len(weight), half=half)
    return Call(_project_kernel, (programs,), arguments, tile.warps, tile.stages, pdl=pdl)


def project_programs(x: Tensor, *, outputs: int, half: int) -> int:
    """Programs of `project`, each of one tile of pairs."""
    return ceil(ceil(outputs / (2 * half)) * half / _tile(*x.shape, width=x.element_size()).pairs)


@dataclass(frozen=True)
class Tile:
    """What a program of `project` multiplies: `rows` with `pairs`, in `inner` and then `rest` elements."""

    rows: int
    pairs: int
    inner: int
    rest: int
    warps: int
    stages: int


@cache
def _tile(num_rows: int, inner: int, *, width: int) -> Tile:
    """One row: all of K at once, so that every weight is under way before the first is needed.

    More rows: the tensor cores' smallest product, so that the programs are many.
    """
    if num_rows > 1:
        return Tile(rows=16, pairs=8, inner=128, rest=0, warps=1, stages=5)
    main = 1 << (inner.bit_length() - 1)
    rest = power_of_two(inner - main) if inner > main else 0
    pair = 2 * (main + rest) * width  # bytes
    pairs = max(1, 1 << (ROW_WARPS * WARP_BYTES // pair).bit_length() >> 1)
    return Tile(1, pairs, main, rest, max(ROW_WARPS, power_of_two(ceil(pair * pairs / WARP_BYTES))), 1)


@jit
def _project_kernel(
    x, norm, weight, out, num_rows, inner, outputs, half, eps, x_row, out_row,
    cos, sin, cache, blocks, lengths, table_rows, block_row, values_from, heads, groups, best, best_id,
    EPILOGUE: tl.constexpr, ROWS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    REST_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    first = n // half * (2 * half) + n % half
    second = first + half
    if ROWS == 1:
        a, b = _one_row(x, norm, weight, first, second, inner, outputs, eps, TILE_K, REST_K, PDL)
    else:
        a, b = _few_rows(
            x, norm, weight, first, second, inner, outputs, eps, num_rows, x_row,
            ROWS, TILE_N, TILE_K, WIDEN, PDL,
        )  # fmt: skip
    m = tl.arange(0, ROWS)[:, None]
    live = m < num_rows
    first = first[None, :]
    second = second[None, :]
    keep = live & (first < outputs)
    keep_second = live & (second < outputs)
    to = out + m * out_row
    if EPILOGUE == "store":
        tl.store(to + first, a, keep)
        tl.store(to + second, b, keep_second)
    elif EPILOGUE == "add":
        tl.store(to + first, add_rounded(tl.load(to + first, keep, other=0.0), a), keep)
        tl.store(to + second, add_rounded(tl.load(to + second, keep_second, other=0.0), b), keep_second)
    elif EPILOGUE == "silu":
        tl.store(to + n[None, :], silu_times(a, b), keep)
    elif EPILOGUE == "rope":
        length = tl.load(lengths + m, live, other=0)
        block = tl.load(blocks + m * block_row + tl.maximum(length - 1, 0) // BLOCK, live, other=0)
        place_heads(
            a, b, first // HEAD_DIM, first % HEAD_DIM, keep, length, block, to, cos, sin, cache,
            values_from, heads, groups, HEAD_DIM, BLOCK,
        )  # fmt: skip
    else:
        tl.store(to + first, a.to(tl.float32), keep)
        tl.store(to + second, b.to(tl.float32), keep_second)
        a_best, a_id = largest_of(a.to(tl.float32), first, keep)
        b_best, b_id = largest_of(b.to(tl.float32), second, keep_second)
        at = tl.arange(0, ROWS) * tl.num_programs(0) + tl.program_id(0)
        inside = tl.arange(0, ROWS) < num_rows
        tl.store(best + at, tl.maximum(a_best, b_best), inside)
        tl.store(best_id + at, tl.where(a_best >= b_best, a_id, b_id), inside)


@jit
def _one_row(
    x, norm, weight, first, second, inner, outputs, eps,
    TILE_K: tl.constexpr, REST_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The products [1, TILE_N] of the row with `first` and `second` of the outputs, rounded.

    Its TILE_K elements and the REST_K after them, of which not all are there. What does not depend on the
    launch before is loaded first.
    """
    dtype = weight.dtype.element_ty
    k = tl.arange(0, TILE_K)
    a_row = weight + first.to(tl.int64)[:, None] * inner
    b_row = weight + second.to(tl.int64)[:, None] * inner
    a_there = (first < outputs)[:, None]
    b_there = (second < outputs)[:, None]
    a_weights = tl.load(a_row + k[None, :], a_there, other=0.0)
    b_weights = tl.load(b_row + k[None, :], b_there, other=0.0)
    if norm is not None:
        scale_by = tl.load(norm + k)
    if REST_K > 0:
        k_rest = TILE_K + tl.arange(0, REST_K)
        within = k_rest < inner
        a_rest = tl.load(a_row + k_rest[None, :], a_there & within[None, :], other=0.0)
        b_rest = tl.load(b_row + k_rest[None, :], b_there & within[None, :], other=0.0)
        if norm is not None:
            scale_by_rest = tl.load(norm + k_rest, within, other=0.0)
    if PDL:
        gdc_wait()
    row = tl.load(x + k).to(tl.float32)
    if REST_K > 0:
        rest = tl.load(x + k_rest, within, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.sum(row * row)
        if REST_K > 0:
            squares += tl.sum(rest * rest)
        scale = tl.rsqrt(squares / inner + eps)
        row = _scaled(row, scale, scale_by)
        if REST_K > 0:
            rest = _scaled(rest, scale, scale_by_rest)
    a = tl.sum(a_weights.to(tl.float32) * row[None, :], 1)
    b = tl.sum(b_weights.to(tl.float32) * row[None, :], 1)
    if REST_K > 0:
        a += tl.sum(a_rest.to(tl.float32) * rest[None, :], 1)
        b += tl.sum(b_rest.to(tl.float32) * rest[None, :], 1)
    return a[None, :].to(dtype), b[None, :].to(dtype)


@jit
def _scaled(wide, scale, weight):
    """RMSNorm of a row [K] fp32, rounded twice to the weight's dtype, as fp32."""
    normed = (wide * scale).to(weight.dtype).to(tl.float32)
    return (weight.to(tl.float32) * normed).to(weight.dtype).to(tl.float32)


@jit
def _few_rows(
    x, norm, weight, first, second, inner, outputs, eps, num_rows, x_row,
    ROWS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_one_row`, [ROWS, TILE_N], on tensor cores."""
    dtype = weight.dtype.element_ty
    k = tl.arange(0, TILE_K)
    m = tl.arange(0, ROWS)
    if PDL:
        gdc_wait()
    rows = x + m[:, None] * x_row + k[None, :]
    live = (m < num_rows)[:, None]
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if norm is not None:
        squares = tl.zeros((ROWS, TILE_K), tl.float32)
        for done in range(0, inner, TILE_K):
            part = tl.load(rows + done, live & (k < inner - done)[None, :], other=0.0).to(tl.float32)
            squares += part * part
        scale = tl.rsqrt(tl.sum(squares, 1) / inner + eps)
    a_tile = weight + first.to(tl.int64)[None, :] * inner + k[:, None]
    b_tile = weight + second.to(tl.int64)[None, :] * inner + k[:, None]
    a = tl.zeros((ROWS, TILE_N), tl.float32)
    b = tl.zeros((ROWS, TILE_N), tl.float32)
    for done in range(0, inner, TILE_K):
        within = k < inner - done
        part = tl.load(rows + done, live & within[None, :], other=0.0)
        if norm is not None:
            scale_by = tl.load(norm + done + k, within, other=0.0).to(tl.float32)
            normed = (part.to(tl.float32) * scale[:, None]).to(dtype).to(tl.float32)
            part = (scale_by[None, :] * normed).to(dtype)
        a_weights = tl.load(a_tile + done, (first < outputs)[None, :] & within[:, None], other=0.0)
        b_weights = tl.load(b_tile + done, (second < outputs)[None, :] & within[:, None], other=0.0)
        if WIDEN:  # the interpreter multiplies the bits of bf16 as integers: triton issue 11584
            part = part.to(tl.float32)
            a_weights = a_weights.to(tl.float32)
            b_weights = b_weights.to(tl.float32)
        a = tl.dot(part, a_weights, a, input_precision="ieee")
        b = tl.dot(part, b_weights, b, input_precision="ieee")
    return a.to(dtype), b.to(dtype)
