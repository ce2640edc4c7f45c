"""Triton kernels of the optimizer step: products known to be symmetric (`product`), and passes over a shard.

Tiles are fixed per GPU, never tuned at run time: tests/optim/kernels/test_gpu.py compiles all of `variants`
for every GPU in `TILES`, without one. The module imports anywhere, and `unsupported` says where its kernels
run.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernels' annotations name triton, which may be missing

from itertools import product as pairs
from math import ceil
from typing import Any

import torch
from torch import Tensor

from cluster.machine import triton_calls
from cluster.machine.triton_calls import Call, jit
from optim.kernels import product
from optim.kernels.passes import (
    BLOCK,
    SegmentTable,
    check_adamw_pass,
    check_apply_pass,
    check_momentum_pass,
    require,
)
from optim.kernels.product import PRODUCT_DTYPES, TILES, symmetric_product, unsupported

if triton_calls.TRITON_MISSING is None:
    import triton.language as tl

__all__ = [
    "PRODUCT_DTYPES", "TILES", "adamw_pass", "apply_pass", "momentum_pass", "scale_pass",
    "symmetric_product", "unsupported", "variants",
]  # fmt: skip

PASS_WARPS = 8


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


def scale_pass(source: Tensor, factors: Tensor | None, *, out: Tensor) -> None:
    """out[b] ← factors[b]·source[b], in fp32 and rounded once; a cast if there are no factors.

    torch does both more slowly: bandwidth of this kernel in tests/baselines/nvidia-h200_gpu.json, block 2.

    Args:
        source, out: [B, r, c], contiguous; any floating dtypes.
        factors: [B] fp32.

    Raises:
        ValueError: a tensor is not contiguous, or the shapes differ.
    """
    require(source.is_contiguous() and out.is_contiguous(), "source and out must be contiguous")
    require(source.shape == out.shape, f"source is {tuple(source.shape)}, out {tuple(out.shape)}")
    _scale(source, factors, out).launch()


def _scale(source: Tensor, factors: Tensor | None, out: Tensor) -> Call:
    numel = source[0].numel()
    arguments = {"source": source, "factors": factors, "out": out, "numel": numel, "SIZE": BLOCK}
    return Call(_scale_kernel, (ceil(numel / BLOCK), len(source)), arguments, PASS_WARPS, stages=1)


@jit
def _scale_kernel(source, factors, out, numel, SIZE: tl.constexpr):
    matrix = tl.program_id(1)
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first = matrix.to(tl.int64) * numel
    x = tl.load(source + first + i, i < numel).to(tl.float32)
    if factors is not None:
        x *= tl.load(factors + matrix)
    tl.store(out + first + i, x.to(out.dtype.element_ty), i < numel)


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
    calls = product.variants(capability)
    offsets = torch.empty(1, dtype=torch.int64, device="meta")
    table = SegmentTable(offsets, offsets, offsets, offsets, source_stop=1, target_stop=1)
    single, half = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.float32, torch.bfloat16))
    for source, packed, nesterov in pairs((single, half), (single, half), (True, False)):
        tensors = {"gradient": source, "momentum": single, "out": packed, "partials": single.double()}
        call = _pass(_momentum_kernel, table, **tensors, weight=0.1, NESTEROV=nesterov)
        calls[f"momentum, {source.dtype} to {packed.dtype}, {nesterov=}"] = call
    for update, model in pairs((single, half), (half, single, None)):
        tensors = {"weight": single, "update": update}
        call = _pass(_apply_kernel, table, **tensors, model=model, decay=1.0, factor=1.0, ahead=0.1)
        calls[f"apply, {update.dtype}, model={None if model is None else model.dtype}"] = call
    numbers = dict.fromkeys(("lerp", "beta2", "eps", "decay", "factor", "unbias1", "unbias2"), 0.1)
    for gradient, model in pairs((single, half), (half, single, None)):
        call = _adamw(single, gradient, single, single, model, **numbers)
        calls[f"adamw, {gradient.dtype}, model={None if model is None else model.dtype}"] = call
    factors, x = torch.empty(1, device="meta"), torch.empty(1, 16, 16, dtype=torch.bfloat16, device="meta")
    for name, given, dtype in (("scale", factors, torch.bfloat16), ("scale", factors, torch.float16),
                               ("cast", None, torch.float16)):  # fmt: skip
        calls[f"{name}, {dtype}"] = _scale(x, given, x.to(dtype))
    return calls
