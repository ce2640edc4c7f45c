"""Triton kernels of a decoder step, between products by cuBLAS, and what `project` shares with them.

All round to bf16 where `training.model.llama` does.

Legend: M rows (tokens) of a step, D hidden, K inner dimension, N outputs, H query heads, G key/value heads,
C head_dim, F feed-forward, V vocabulary, P parts of a row.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernels' annotations name triton, which may be missing

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from torch import Tensor

from cluster.machine.triton_calls import TRITON_MISSING, Call, jit
from serving.engine.decoder import power_of_two
from serving.engine.scheduler import BLOCK_TOKENS

if TRITON_MISSING is None:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SCAN = 2048  # logits of a row that a program of `scan` reads


@dataclass(frozen=True)
class Heads:
    """Where a layer's queries, keys and values belong.

    Attributes:
        cos, sin: [context, C/2] fp32, of RoPE.
        cache: [2, blocks, G, BLOCK_TOKENS, C], of the layer.
        blocks: [R, width] int32, the blocks of each request.
        lengths: [M] int32, of each row: the tokens that it sees, itself included. 0: padding.
        table_rows: [M] int32, each row's row of `blocks`; None: the row's own number.
        norms: [2, C], the weights of the RMSNorms of queries and of keys, whose epsilon is `eps`; None: there
            are none. Only `rotate_and_store` applies them.
    """

    cos: Tensor
    sin: Tensor
    cache: Tensor
    blocks: Tensor
    lengths: Tensor
    table_rows: Tensor | None
    num_heads: int
    norms: Tensor | None = None
    eps: float = 0.0

    def of_rows(self, rows: Tensor) -> Heads:
        """Of these rows alone, int32; `table_rows` must be given."""
        assert self.table_rows is not None
        lengths, table_rows = (each.index_select(0, rows) for each in (self.lengths, self.table_rows))
        return replace(self, lengths=lengths, table_rows=table_rows)

    def arguments(self) -> dict[str, Any]:
        cache = self.cache
        return {
            "cos": self.cos, "sin": self.sin, "cache": cache, "blocks": self.blocks,
            "lengths": self.lengths, "table_rows": self.table_rows, "block_row": self.blocks.stride(0),
            "values_from": cache.stride(0), "heads": self.num_heads, "groups": cache.shape[2],
            "HEAD_DIM": cache.shape[4], "BLOCK": BLOCK_TOKENS,
        }  # fmt: skip


NO_HEADS = {
    "cos": None, "sin": None, "cache": None, "blocks": None, "lengths": None, "table_rows": None,
    "block_row": 0, "values_from": 0, "heads": 1, "groups": 1, "HEAD_DIM": 2, "BLOCK": BLOCK_TOKENS,
}  # fmt: skip
Best = tuple[Tensor, Tensor]  # fp32 and int32 [M, P]: the largest of a row's logits in each part, and its id


@jit
def add_rounded(a, b):
    return (a.to(tl.float32) + b.to(tl.float32)).to(b.dtype)


@jit
def silu_times(gate, up):
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(up.dtype)
    return (activated.to(tl.float32) * up.to(tl.float32)).to(up.dtype)


@jit
def place_heads(
    a, b, head, c, keep, length, block, to, cos, sin, cache, values_from, heads, groups,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the halves a and b of heads, and store queries at `to`, keys and values in the cache."""
    HALF: tl.constexpr = HEAD_DIM // 2
    keep = keep & (length > 0)
    position = tl.maximum(length - 1, 0)
    by_cos = tl.load(cos + position * HALF + c, keep, other=0.0)
    by_sin = tl.load(sin + position * HALF + c, keep, other=0.0)
    wide_a = a.to(tl.float32)
    wide_b = b.to(tl.float32)
    rotates = head < heads + groups
    a = tl.where(rotates, (wide_a * by_cos - wide_b * by_sin).to(a.dtype), a)
    b = tl.where(rotates, (wide_b * by_cos + wide_a * by_sin).to(b.dtype), b)
    is_query = head < heads
    query = to + head * HEAD_DIM + c
    tl.store(query, a, keep & is_query)
    tl.store(query + HALF, b, keep & is_query)
    other = tl.where(is_query, 0, head - heads)
    place = (block.to(tl.int64) * groups + other % groups) * BLOCK + position % BLOCK
    place = cache + other // groups * values_from + place * HEAD_DIM + c
    tl.store(place, a, keep & (head >= heads))
    tl.store(place + HALF, b, keep & (head >= heads))


@jit
def largest_of(logits, ids, keep):
    """The largest of each row, and the lowest id that has it. NaN counts as infinite."""
    logits = tl.where(keep, tl.where(logits == logits, logits, float("inf")), float("-inf"))
    largest = tl.max(logits, 1)
    found = tl.where(keep & (logits == largest[:, None]), ids, 2147483647)
    return largest, tl.min(found, 1)


def pick(
    best: Best, ids: Tensor, tokens: Tensor | None, lengths: Tensor | None, *, pdl: bool = False
) -> Call:
    """The likeliest token of each row, -1 where its logit is no finite number; and the next step's input.

    Args:
        best: as `project` or `scan` leave it.
        ids: [M] int32, overwritten.
        tokens: [M] int32, overwritten with the ids, 0 for -1; None: no other step follows at once.
        lengths: [M] int32: 1 more, but 0 stays; None as `tokens`.
    """
    values, which = best
    arguments: dict[str, Any] = {
        "best": values,
        "best_id": which,
        "ids": ids,
        "tokens": tokens,
        "lengths": lengths,
    }
    arguments |= {"num": values.shape[1], "TILE": power_of_two(values.shape[1]), "PDL": pdl}
    return Call(_pick_kernel, (len(values),), arguments, warps=8, stages=1, pdl=pdl)


@jit
def _pick_kernel(best, best_id, ids, tokens, lengths, num, TILE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    i = tl.arange(0, TILE)
    values = tl.load(best + row * num + i, i < num, other=float("-inf"))
    which = tl.load(best_id + row * num + i, i < num, other=2147483647)
    largest = tl.max(values, 0)
    chosen = tl.min(tl.where(values == largest, which, 2147483647), 0)
    good = (largest > float("-inf")) & (largest < float("inf"))
    tl.store(ids + row, tl.where(good, chosen, -1))
    if tokens is not None:
        tl.store(tokens + row, tl.where(good, chosen, 0))
        length = tl.load(lengths + row)
        tl.store(lengths + row, length + (length > 0).to(tl.int32))


def carry(tokens: Tensor, chosen: Tensor) -> Call:
    """The launch that puts chosen tokens where `tokens` [M] int32 is -1 - the row of one.

    chosen: [S] int32; BROKEN counts as token 0.
    """
    arguments = {"tokens": tokens, "chosen": chosen}
    return Call(_carry_kernel, (len(tokens),), arguments, warps=1, stages=1)


@jit
def _carry_kernel(tokens, chosen):
    token = tl.load(tokens + tl.program_id(0))
    if token < 0:
        tl.store(tokens + tl.program_id(0), tl.maximum(tl.load(chosen - 1 - token), 0))


def add_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, out: Tensor, *, eps: float, pdl: bool = False
) -> Call:
    """The launch of x ← x + added (unless None), out ← RMSNorm(x)·weight, all [M, D]."""
    arguments: dict[str, Any] = {
        "x": x,
        "added": added,
        "weight": weight,
        "out": out,
        "size": x.shape[1],
        "eps": eps,
    }
    arguments |= {"TILE": power_of_two(x.shape[1]), "PDL": pdl}
    return Call(_add_norm_kernel, (len(x),), arguments, warps=4, stages=1, pdl=pdl)


@jit
def _add_norm_kernel(x, added, weight, out, size, eps, TILE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    i = tl.arange(0, TILE)
    inside = i < size
    scale_by = tl.load(weight + i, inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * size + i
    row = tl.load(x + at, inside, other=0.0)
    if added is not None:
        row = add_rounded(row, tl.load(added + at, inside, other=0.0))
        tl.store(x + at, row, inside)
    wide = row.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)).to(row.dtype).to(tl.float32)
    tl.store(out + at, (scale_by * normed).to(row.dtype), inside)


@jit
def norm_heads(a, b, head, c, keep, norms, eps, heads, groups, HEAD_DIM: tl.constexpr):
    """RMSNorm of the halves a and b of whole heads [n, C/2], where they are queries or keys."""
    wide_a = a.to(tl.float32)
    wide_b = b.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide_a * wide_a + wide_b * wide_b, 1)[:, None] / HEAD_DIM + eps)
    gain = norms + tl.where(head < heads, 0, HEAD_DIM) + c
    by_a = tl.load(gain, keep, other=0.0).to(tl.float32)
    by_b = tl.load(gain + HEAD_DIM // 2, keep, other=0.0).to(tl.float32)
    normed_a = (by_a * (wide_a * scale).to(a.dtype).to(tl.float32)).to(a.dtype)
    normed_b = (by_b * (wide_b * scale).to(b.dtype).to(tl.float32)).to(b.dtype)
    is_normed = head < heads + groups
    return tl.where(is_normed, normed_a, a), tl.where(is_normed, normed_b, b)


def rotate_and_store(qkv: Tensor, heads: Heads, *, pdl: bool = False) -> Call:
    """The launch that rotates the queries in qkv [M, (H + 2G)·C], and caches rotated keys, and values.

    Queries and keys are normalised before, if `heads.norms` says so. Queries alone, [M, H·C], are rotated;
    with H = 0 there are none.
    """
    arguments = heads.arguments() | {"norms": heads.norms, "eps": heads.eps}
    num_heads = qkv.shape[1] // heads.cache.shape[4]
    tile = 16
    arguments |= {"qkv": qkv, "row": qkv.stride(0), "num_heads": num_heads, "TILE": tile, "PDL": pdl}
    arguments |= {"TILE_C": power_of_two(heads.cache.shape[4] // 2)}
    return Call(_rotate_kernel, (len(qkv), ceil(num_heads / tile)), arguments, warps=4, stages=1, pdl=pdl)


@jit
def _rotate_kernel(
    qkv, row, num_heads,
    cos, sin, cache, blocks, lengths, table_rows, block_row, values_from, heads, groups, norms, eps,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TILE_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0)
    head = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    c = tl.arange(0, TILE_C)[None, :]
    keep = (head < num_heads) & (c < HEAD_DIM // 2)
    qkv += m.to(tl.int64) * row
    at = qkv + head * HEAD_DIM + c
    a = tl.load(at, keep, other=0.0)
    b = tl.load(at + HEAD_DIM // 2, keep, other=0.0)
    if norms is not None:
        a, b = norm_heads(a, b, head, c, keep, norms, eps, heads, groups, HEAD_DIM)
    length = tl.load(lengths + m)
    table_row = m
    if table_rows is not None:
        table_row = tl.load(table_rows + m)
    block = tl.load(blocks + table_row * block_row + tl.maximum(length - 1, 0) // BLOCK)
    place_heads(
        a, b, head, c, keep, length, block, qkv, cos, sin, cache, values_from, heads, groups, HEAD_DIM, BLOCK
    )


def silu_mul(gate_up: Tensor, out: Tensor, *, pdl: bool = False) -> Call:
    """The launch of out [M, F] ← silu(gate)·up of gate_up [M, 2F]."""
    size, tile = out.shape[1], 1024
    arguments = {"gate_up": gate_up, "out": out, "size": size, "TILE": tile, "PDL": pdl}
    return Call(_silu_kernel, (len(out), ceil(size / tile)), arguments, warps=4, stages=1, pdl=pdl)


@jit
def _silu_kernel(gate_up, out, size, TILE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < size
    gate = tl.load(gate_up + row * 2 * size + i, inside)
    up = tl.load(gate_up + row * 2 * size + size + i, inside)
    tl.store(out + row * size + i, silu_times(gate, up), inside)


def scan(logits: Tensor, wide: Tensor, best: Best, *, pdl: bool = False) -> Call:
    """The launch that widens logits [M, V] to fp32 and finds the largest of each SCAN, for `pick`."""
    size = logits.shape[1]
    arguments = {"logits": logits, "wide": wide, "best": best[0], "best_id": best[1], "size": size}
    arguments |= {"TILE": SCAN, "PDL": pdl}
    return Call(_scan_kernel, (len(logits), ceil(size / SCAN)), arguments, warps=4, stages=1, pdl=pdl)


@jit
def _scan_kernel(logits, wide, best, best_id, size, TILE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < size
    found = tl.load(logits + row.to(tl.int64) * size + i, inside, other=0.0).to(tl.float32)
    tl.store(wide + row.to(tl.int64) * size + i, found, inside)
    largest, which = largest_of(found[None, :], i[None, :], inside[None, :])
    at = row * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, 1)
    tl.store(best + at, largest)
    tl.store(best_id + at, which)
