"""The Triton kernels of `serving.engine.gpu.attention`: online softmax over keys and values in pages.

As FlashAttention-2 (arXiv 2307.08691), in powers of two: scores are scaled by log2(e)/sqrt(C). Sums are fp32.

Legend: H heads, K heads of the cache, C = SIZE channels of a head, GROUP = H / K queries that share a page.
A place in the cache: `pages`, the first page of a head, + block * `cache_block` + token in it * SIZE, and
`cache_values` further for values.
"""

# Kernel arguments are pointers and scalars, which have no Python type.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations  # the kernels' annotations name triton, which may be missing

from cluster.machine import triton_calls
from cluster.machine.triton_calls import jit

if triton_calls.TRITON_MISSING is None:
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@jit
def decode_kernel(
    q, cache, blocks, out, lengths, mixed, logs, arrived, scale,
    q_row, q_head, out_row, out_head, blocks_row, cache_values, cache_block,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, ROWS_ADDED: tl.constexpr, SPLITS: tl.constexpr, SPLITS_ADDED: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    request = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + request)
    if PDL:
        gdc_wait()  # the launch before writes q and the newest keys and values, not the lengths
    num_tiles = tl.cdiv(length, KEYS)
    tiles_each = tl.cdiv(num_tiles, splits)
    first = split * tiles_each
    g = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, SIZE)[None, :]
    out += request * out_row + head * GROUP * out_head
    if length == 0:
        if split == 0:
            tl.store(out + g * out_head + c, tl.zeros((ROWS, SIZE), out.dtype.element_ty), g < GROUP)
        return
    if first >= num_tiles:
        return
    last = tl.minimum(first + tiles_each, num_tiles)
    query = tl.load(q + request * q_row + (head * GROUP + g) * q_head + c, g < GROUP, other=0.0)
    pages = cache + head * (PAGE * SIZE)
    table = blocks + request * blocks_row
    if ROWS == 1:
        top, total, result = _attend_by_sums(
            query, pages, table, first, last, length, scale, cache_values, cache_block,
            SIZE, PAGE, KEYS, STAGES,
        )  # fmt: skip
    else:
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, SIZE), tl.float32)
        newest = tl.zeros((ROWS,), tl.int32) + length - 1
        top, total, result = _attend_by_products(
            top, total, result, query, pages, table, first, last, length, newest, scale,
            cache_values, cache_block, SIZE, PAGE, WIDEN, KEYS, STAGES, True,
        )  # fmt: skip
    result = result / total[:, None]

    used = tl.cdiv(num_tiles, tiles_each)
    if used == 1:
        tl.store(out + g * out_head + c, result.to(out.dtype.element_ty), g < GROUP)
    else:
        pair = request * tl.num_programs(0) + head
        mixed += pair * splits * GROUP * SIZE
        logs += pair * splits * GROUP
        log = top + tl.log2(total)
        if _leave(mixed, logs, arrived + pair, result, log, split, GROUP, SIZE, ROWS) == used - 1:
            tl.store(arrived + pair, 0)
            _add_splits(mixed, logs, out, out_head, used, GROUP, SIZE, ROWS_ADDED, SPLITS, SPLITS_ADDED)


@jit
def _leave(
    mixed, logs, arrived, result, log, split, GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Stores a split's result [ROWS, C], and how heavy it is; returns how many splits did so before."""
    g = tl.arange(0, ROWS)
    place = mixed + (split * GROUP + g[:, None]) * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(place, result, g[:, None] < GROUP)
    tl.store(logs + split * GROUP + g, log, g < GROUP)
    tl.debug_barrier()  # all threads have stored before the first of them says so
    return tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")


@jit
def _attend_by_sums(
    query, pages, table, first, last, length, scale, cache_values, cache_block,
    SIZE: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query: largest score [1], sum of weights [1] and weighted values [1, C] over tiles first to last.

    Each place of a tile has its own running maximum and sums, so that threads meet only after the last tile.
    """
    i = tl.arange(0, KEYS)
    c = tl.arange(0, SIZE)[None, :]
    query = query.to(tl.float32) * scale
    top = tl.full((KEYS,), -1e30, tl.float32)  # finite: a place may have no key at all
    total = tl.zeros((KEYS,), tl.float32)
    result = tl.zeros((KEYS, SIZE), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        key = tile * KEYS + i
        inside = key < length
        block = tl.load(table + key // PAGE, inside, other=0).to(tl.int64)
        place = pages + (block * cache_block + key % PAGE * SIZE)[:, None] + c
        keys = tl.load(place, inside[:, None], other=0.0).to(tl.float32)
        values = tl.load(place + cache_values, inside[:, None], other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(keys * query, 1), -float("inf"))
        higher = tl.maximum(top, score)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score - higher)
        total = total * shrink + weight
        result = result * shrink[:, None] + weight[:, None] * values
        top = higher
    highest = tl.max(top, 0)
    shrink = tl.exp2(top - highest)
    total = tl.sum(total * shrink, 0, keep_dims=True)
    return tl.max(top, 0, keep_dims=True), total, tl.sum(result * shrink[:, None], 0, keep_dims=True)


@jit
def _attend_by_products(
    top, total, result, query, pages, table, first, last, length, newest, scale, cache_values, cache_block,
    SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Goes on from largest scores [R], sums of weights [R] and weighted values [R, C] of R queries.

    MASKED: a query sees no key after its `newest` [R], and none is read from `length` on.
    """
    c = tl.arange(0, SIZE)[None, :]
    for tile in tl.range(first, last, num_stages=STAGES):
        key = tile * KEYS + tl.arange(0, KEYS)
        known = key < length if MASKED else None
        inside = (key < length)[:, None] if MASKED else None
        block = tl.load(table + key // PAGE, known, other=0 if MASKED else None).to(tl.int64)
        place = pages + (block * cache_block + key % PAGE * SIZE)[:, None] + c
        keys = tl.load(place, inside, other=0.0 if MASKED else None)
        values = tl.load(place + cache_values, inside, other=0.0 if MASKED else None)
        score = _product(query, tl.trans(keys), None, WIDEN)
        if MASKED:
            score = tl.where(key[None, :] <= newest[:, None], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(score * scale - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        result = _product(weight.to(values.dtype), values, result * shrink[:, None], WIDEN)
        top = higher
    return top, total, result


@jit
def _product(a, b, c, WIDEN: tl.constexpr):
    """a b + c."""
    if WIDEN:  # the interpreter multiplies the bits of bf16 as integers: triton issue 11584
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@jit
def _add_splits(
    mixed, logs, out, out_head, used,
    GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Adds the results of all splits of a pair, each with its share of the weights, and stores the sum."""
    g = tl.arange(0, ROWS)[None, :]
    c = tl.arange(0, SIZE)[None, :]
    each = tl.arange(0, SPLITS)[:, None]
    # .cg: other multiprocessors wrote it, and a level-1 cache does not see that
    log = tl.load(logs + each * GROUP + g, (each < used) & (g < GROUP), other=-1e30, cache_modifier=".cg")
    highest = tl.max(log, 0)[None, :]
    total = tl.sum(tl.exp2(log - highest), 0)[:, None]
    result = tl.zeros((ROWS, SIZE), tl.float32)
    for done in range(0, used, ADDED):
        s = done + tl.arange(0, ADDED)[:, None]
        inside = (s < used) & (g < GROUP)
        log_here = tl.load(logs + s * GROUP + g, inside, other=-1e30, cache_modifier=".cg")
        part = tl.load(
            mixed + (s * GROUP + g)[:, :, None] * SIZE + c[None, :, :],
            inside[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        result += tl.sum(tl.exp2(log_here - highest)[:, :, None] * part, 0)
    place = out + tl.arange(0, ROWS)[:, None] * out_head + c
    tl.store(place, (result / total).to(out.dtype.element_ty), tl.arange(0, ROWS)[:, None] < GROUP)


@jit
def prefill_kernel(
    q, cache, blocks, out, tiles, scale,
    q_row, q_head, out_row, out_head, blocks_row, cache_values, cache_block,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tiles += 4 * tl.program_id(1)
    row = tl.load(tiles).to(tl.int64)
    num_rows = tl.load(tiles + 1)
    position = tl.load(tiles + 2)
    table = blocks + tl.load(tiles + 3).to(tl.int64) * blocks_row
    pages = cache + (head // GROUP) * (PAGE * SIZE)
    i = tl.arange(0, QUERIES)[:, None]
    c = tl.arange(0, SIZE)[None, :]
    query = tl.load(q + row * q_row + head * q_head + i * q_row + c, i < num_rows, other=0.0)
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    result = tl.zeros((QUERIES, SIZE), tl.float32)
    whole = (position + 1) // KEYS  # tiles that every query sees all of
    stop = position + num_rows
    newest = position + tl.arange(0, QUERIES)
    top, total, result = _attend_by_products(
        top, total, result, query, pages, table, 0, whole, stop, newest, scale,
        cache_values, cache_block, SIZE, PAGE, WIDEN, KEYS, STAGES, False,
    )  # fmt: skip
    top, total, result = _attend_by_products(
        top, total, result, query, pages, table, whole, tl.cdiv(stop, KEYS), stop, newest, scale,
        cache_values, cache_block, SIZE, PAGE, WIDEN, KEYS, STAGES, True,
    )  # fmt: skip
    out += row * out_row + head * out_head
    result = result / total[:, None]
    tl.store(out + i * out_row + c, result.to(out.dtype.element_ty), i < num_rows)
