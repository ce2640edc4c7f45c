"""A Triton kernel for steps of one row, which take as long as reading the weights takes.

One launch is a product with what stands before and after it in the layer: a norm, and RoPE with the cache's
places, SiLU, or the residual. On sm_90 it begins while the launch before is running, asks for its weights,
and only then waits for its input. It rounds to bf16 where `training.model.llama` does. More rows are
multiplied by cuBLAS: on an H200, 8 rows at 1.4B took longer with a form of this kernel for tensor cores.

Measured on an H200, one row, 1.4B, context 512: WARP_BYTES of 8192 and programs of one warp are slower.
Instructions that bring the next weights into the L2 cache while attention runs, or between other
launches, cost more than they save. So there are none.

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

from cluster.machine.triton_calls import TRITON_MISSING, Call, jit
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

STORE, ADD, SILU, ROPE, LOGITS = "store", "add", "silu", "rope", "logits"  # of its product, in `project`
ROW_WARPS = 4  # of a program, at least
WARP_BYTES = 4096  # of weights that one of its warps holds: a quarter of its registers


def project(
    x: Tensor, weight: Tensor, out: Tensor, *, epilogue: str, half: int, norm: Tensor | None = None,
    eps: float = 0.0, heads: Heads | None = None, best: Best | None = None, pdl: bool = False,
) -> Call:  # fmt: skip
    """The launch of out = epilogue(norm(x) weightᵀ), for one row.

    Args:
        x: [1, K]; K contiguous, as in all operands.
        weight: [N, K].
        out: STORE: [1, N]. ADD: [1, N], to which the product is added. SILU: [1, N/2] of gates and ups. ROPE:
            [1, H·C], queries; keys and values go into the cache. LOGITS: [1, N] fp32, rounded as the model's.
        half: outputs i and i + half are a pair, in each run of 2·half outputs.
        norm: [K], the weight of an RMSNorm of x, whose epsilon is `eps`.
        best: LOGITS: of `project_programs` parts.
        pdl: begin while the launch before is running, and wait for its end where x is read (sm_90).
    """
    tile = _tile(x.shape[1], width=x.element_size())
    arguments: dict[str, Any] = {
        "x": x, "norm": norm, "weight": weight, "out": out, "inner": x.shape[1], "outputs": len(weight),
        "half": half, "eps": eps,
    }  # fmt: skip
    arguments |= NO_HEADS if heads is None else heads.arguments()
    arguments |= dict(zip(("best", "best_id"), best or (None, None), strict=True))
    arguments |= {"EPILOGUE": epilogue, "TILE_N": tile.pairs, "TILE_K": tile.inner, "REST_K": tile.rest}
    arguments |= {"PDL": pdl}
    programs = project_programs(x, outputs=len(weight), half=half)
    return Call(_project_kernel, (programs,), arguments, tile.warps, stages=1, pdl=pdl)


def project_programs(x: Tensor, *, outputs: int, half: int) -> int:
    """Programs of `project`, each of one tile of pairs."""
    return ceil(ceil(outputs / (2 * half)) * half / _tile(x.shape[1], width=x.element_size()).pairs)


@dataclass(frozen=True)
class Tile:
    """What a program of `project` multiplies: `pairs`, of `inner` and then `rest` elements."""

    pairs: int
    inner: int
    rest: int
    warps: int


@cache
def _tile(inner: int, *, width: int) -> Tile:
    """All of K at once, so that every weight is under way before the first is needed."""
    main = 1 << (inner.bit_length() - 1)
    rest = power_of_two(inner - main) if inner > main else 0
    pair = 2 * (main + rest) * width  # bytes
    pairs = max(1, 1 << (ROW_WARPS * WARP_BYTES // pair).bit_length() >> 1)
    return Tile(pairs, main, rest, max(ROW_WARPS, power_of_two(ceil(pair * pairs / WARP_BYTES))))


@jit
def _project_kernel(
    x, norm, weight, out, inner, outputs, half, eps,
    cos, sin, cache, blocks, lengths, table_rows, block_row, values_from, heads, groups, best, best_id,
    EPILOGUE: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, REST_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    first = n // half * (2 * half) + n % half
    second = first + half
    a, b = _products(x, norm, weight, first, second, inner, outputs, eps, TILE_K, REST_K, PDL)
    first = first[None, :]
    second = second[None, :]
    keep = first < outputs
    keep_second = second < outputs
    if EPILOGUE == "store":
        tl.store(out + first, a, keep)
        tl.store(out + second, b, keep_second)
    elif EPILOGUE == "add":
        tl.store(out + first, add_rounded(tl.load(out + first, keep, other=0.0), a), keep)
        tl.store(out + second, add_rounded(tl.load(out + second, keep_second, other=0.0), b), keep_second)
    elif EPILOGUE == "silu":
        tl.store(out + n[None, :], silu_times(a, b), keep)
    elif EPILOGUE == "rope":
        length = tl.load(lengths)
        block = tl.load(blocks + tl.maximum(length - 1, 0) // BLOCK)
        place_heads(
            a, b, first // HEAD_DIM, first % HEAD_DIM, keep, length, block, out, cos, sin, cache,
            values_from, heads, groups, HEAD_DIM, BLOCK,
        )  # fmt: skip
    else:
        tl.store(out + first, a.to(tl.float32), keep)
        tl.store(out + second, b.to(tl.float32), keep_second)
        a_best, a_id = largest_of(a.to(tl.float32), first, keep)
        b_best, b_id = largest_of(b.to(tl.float32), second, keep_second)
        at = tl.program_id(0) + tl.arange(0, 1)
        tl.store(best + at, tl.maximum(a_best, b_best))
        tl.store(best_id + at, tl.where(a_best >= b_best, a_id, b_id))


@jit
def _products(
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
