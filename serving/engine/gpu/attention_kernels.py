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
    q, cache, blocks, out, lengths, mixed, logs, arrived, scale, programs,
    q_row, q_head, out_row, out_head, blocks_row, cache_values, cache_block,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
    REQUESTS: tl.constexpr, ROWS: tl.constexpr, ROWS_ADDED: tl.constexpr, ADDED: tl.constexpr,
    KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)  # varies most slowly: those that have nothing to do come last
    splits = tl.num_programs(2)
    length = tl.load(lengths + request)
    num_tiles = tl.cdiv(length, KEYS)
    if split > 0 and split >= num_tiles:  # whatever the other requests need
        return
    each = tl.arange(0, REQUESTS)
    each_tiles = tl.cdiv(tl.load(lengths + each, each < tl.num_programs(1), other=0), KEYS)
    all_tiles = tl.sum(each_tiles) * tl.num_programs(0)
    tiles_each = tl.maximum(tl.cdiv(all_tiles, programs), tl.maximum(tl.cdiv(num_tiles, splits), 1))
    if PDL:
        gdc_wait()  # the launch before writes q and the newest keys and values, not the lengths
    g = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, SIZE)[None, :]
    out += request * out_row + head * GROUP * out_head
    first = split * tiles_each
    if first >= num_tiles:
        if split == 0:
            tl.store(out + g * out_head + c, tl.zeros((ROWS, SIZE), out.dtype.element_ty), g < GROUP)
        return
    query = tl.load(q + request * q_row + (head * GROUP + g) * q_head + c, g < GROUP, other=0.0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, SIZE), tl.float32)
    newest = tl.zeros((ROWS,), tl.int32) + length - 1
    top, total, result = _attend(
        top, total, result, query, cache + head * (PAGE * SIZE), blocks + request * blocks_row,
        first, tl.minimum(first + tiles_each, num_tiles), length, newest, scale, cache_values, cache_block,
        SIZE, PAGE, WIDEN, KEYS, True,
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
            _add_splits(mixed, logs, out, out_head, used, GROUP, SIZE, ROWS_ADDED, ADDED)


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
def _add_splits(
    mixed, logs, out, out_head, used,
    GROUP: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Adds the results of all splits of a pair, each with its share of the weights, and stores the sum."""
    g = tl.arange(0, ROWS)
    c = tl.arange(0, SIZE)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, SIZE), tl.float32)
    for done in range(0, used, ADDED):
        s = done + tl.arange(0, ADDED)[:, None]
        row = s * GROUP + g[None, :]
        inside = (s < used) & (g < GROUP)[None, :]
        # .cg: other multiprocessors wrote it, and a level-1 cache does not see that
        log = tl.load(logs + row, inside, other=-float("inf"), cache_modifier=".cg")
        place = mixed + row[:, :, None] * SIZE + c[None, None, :]
        part = tl.load(place, inside[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(log, 0))
        shrink = tl.exp2(top - higher)
        share = tl.exp2(log - higher[None, :])
        total = total * shrink + tl.sum(share, 0)
        result = result * shrink[:, None] + tl.sum(share[:, :, None] * part, 0)
        top = higher
    place = out + g[:, None] * out_head + c[None, :]
    tl.store(place, (result / total[:, None]).to(out.dtype.element_ty), (g < GROUP)[:, None])


@jit
def _attend(
    top, total, result, query, pages, table, first, last, length, newest, scale, cache_values, cache_block,
    SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Goes on from largest scores [R], sums of weights [R] and weighted values [R, C] of R queries.

    MASKED: a query sees no key after its `newest` [R], and none is read from `length` on.
    """
    c = tl.arange(0, SIZE)[None, :]
    place = _places(pages, table, first * KEYS, length, cache_block, SIZE, PAGE, KEYS)
    for tile in range(first, last):
        key = tile * KEYS + tl.arange(0, KEYS)
        inside = (key < length)[:, None] if MASKED else None
        keys = tl.load(place[:, None] + c, inside, other=0.0 if MASKED else None)
        values = tl.load(place[:, None] + c + cache_values, inside, other=0.0 if MASKED else None)
        # Ahead by one tile. In front of the loads, it would take stages of the pipeline from them.
        place = _places(pages, table, tile * KEYS + KEYS, length, cache_block, SIZE, PAGE, KEYS)
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
def _places(
    pages, table, start, length, cache_block, SIZE: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """[KEYS]: where the keys of the tokens from `start` on are; anywhere for those from `length` on."""
    i = tl.arange(0, KEYS)
    offset = tl.zeros((KEYS,), tl.int64)
    for page in tl.static_range((KEYS + PAGE - 1) // PAGE):
        token = start + page * PAGE
        block = tl.load(table + token // PAGE, token < length, other=0).to(tl.int64)
        offset = tl.where(i // PAGE == page, block * cache_block, offset)
    return pages + (offset + (start + i) % PAGE * SIZE)


@jit
def _product(a, b, c, WIDEN: tl.constexpr):
    """a b + c."""
    if WIDEN:  # the interpreter multiplies the bits of bf16 as integers: triton issue 11584
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@jit
def prefill_kernel(
    q, cache, blocks, out, tiles, scale,
    q_row, q_head, out_row, out_head, blocks_row, cache_values, cache_block,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tiles += 4 * tl.program_id(1)
    row = tl.load(tiles).to(tl.int64)
    num_rows = tl.load(tiles + 1)
    if num_rows == 0:  # padding
        return
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
    top, total, result = _attend(
        top, total, result, query, pages, table, 0, whole, stop, newest, scale,
        cache_values, cache_block, SIZE, PAGE, WIDEN, KEYS, False,
    )  # fmt: skip
    top, total, result = _attend(
        top, total, result, query, pages, table, whole, tl.cdiv(stop, KEYS), stop, newest, scale,
        cache_values, cache_block, SIZE, PAGE, WIDEN, KEYS, True,
    )  # fmt: skip
    out += row * out_row + head * out_head
    result = result / total[:, None]
    tl.store(out + i * out_row + c, result.to(out.dtype.element_ty), i < num_rows)
