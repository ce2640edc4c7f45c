"""Triton kernels of attention over a cache in pages: one query per request, and spans of a prompt.

A page is the `BLOCK_TOKENS` keys (or values) of one head, contiguous, so that a program reads whole pages.
Nothing at or beyond a request's length is read: what another request left there, even NaN, does no harm.
No call allocates or asks the GPU for a number, so a CUDA graph can capture it, and a graph captured with the
widest table of blocks serves every context.

Both kernels are the online softmax of FlashAttention-2 (arXiv 2307.08691), in powers of two, with sums in
fp32. Decoding splits a request's keys among programs, as Flash-Decoding does
(https://pytorch.org/blog/flash-decoding/); the program that ends last adds up.

Legend: B requests, M rows of a step, H heads, K heads of the cache, C channels of a head, N blocks of a
request, G = H / K queries that share a page.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cluster.machine import triton_calls
from cluster.machine.triton_calls import INTERPRETED, Call
from serving.engine.decoder import power_of_two
from serving.engine.gpu.attention_kernels import decode_kernel, prefill_kernel
from serving.engine.scheduler import BLOCK_TOKENS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)
MAX_SPLITS = 32
LEAST_ROWS = 16  # of a product on tensor cores


@dataclass(frozen=True)
class Tile:
    """Keys (and queries) that a program takes at a time, with how many warps and pipeline stages."""

    keys: int
    warps: int
    stages: int
    queries: int = 1


@dataclass(frozen=True)
class Tiles:
    """A GPU's tiles.

    Attributes:
        programs: among which a decoding step divides its tiles of keys, about.
        single: decoding with G = 1.
        grouped: decoding with G queries of a page in one product.
        prefill: spans of a prompt.
        large: the same, in steps that have at least `programs` of these tiles, counted over all heads. It
            reads keys and values half as often: the bandwidth of the L2 cache limits `prefill`.
    """

    programs: int
    single: Tile
    grouped: Tile
    prefill: Tile
    large: Tile | None = None


TILES = {  # in half precision
    # A40: 84 multiprocessors, 101,376 bytes of shared memory each: two programs fit. Not measured.
    (8, 6): Tiles(84 * 3, Tile(64, 4, 2), Tile(64, 4, 2), Tile(32, 4, 2, queries=64)),
    # H100, H200: 132 multiprocessors, 232,448 bytes. Chosen among 7 tiles and 4 numbers of programs, measured
    # on an H200 with contexts of 512 and 2000 and 1 to 32 requests, equal and mixed. On an H100 with 16 heads
    # `large` is faster than `prefill` for 4 x 2048 and 8 x 512 tokens, and slower for 1 x 2000. Loads through
    # tensor descriptors are no faster. cuDNN is faster for 4 x 2048, but slow whenever a length is new.
    (9, 0): Tiles(
        384, Tile(64, 4, 2), Tile(128, 4, 2), Tile(64, 4, 3, queries=64), large=Tile(32, 8, 3, queries=128)
    ),
}
# Products of fp32 use no tensor cores. Larger tiles of it spill.
FP32_TILES: dict[str, Any] = {
    "single": Tile(32, 8, 2),
    "grouped": Tile(32, 8, 2),
    "prefill": Tile(16, 8, 2, queries=32),
    "large": None,
}


def _tiles(capability: tuple[int, int], dtype: torch.dtype) -> Tiles:
    tiles = TILES[capability]
    return replace(tiles, **FP32_TILES) if dtype == torch.float32 else tiles


@cache
def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run on `device` with this dtype and C, in one sentence; None if they can."""
    if dtype not in DTYPES:
        return f"attention in {dtype} stays with torch"
    if head_dim not in HEAD_DIMS:
        return f"attention with head_dim {head_dim} stays with torch"
    return triton_calls.unsupported(device, TILES)


def _capability(device: torch.device) -> tuple[int, int]:
    return (8, 6) if INTERPRETED else torch.cuda.get_device_capability(device)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check(q: Tensor, cache: Tensor, out: Tensor, **indices: Tensor) -> None:
    _, num_heads, head_dim = q.shape
    _require(
        cache.dim() == 5 and len(cache) == 2 and cache.shape[3:] == (BLOCK_TOKENS, head_dim),
        f"a layer's cache is [2, blocks, K, {BLOCK_TOKENS}, {head_dim}], not {list(cache.shape)}",
    )
    _require(num_heads % cache.shape[2] == 0, f"{num_heads} heads cannot share {cache.shape[2]} of the cache")
    _require(q.shape == out.shape, f"out is {list(q.shape)}, not {list(out.shape)}")
    _require(q.dtype == cache.dtype == out.dtype, "q, the cache and out differ in dtype")
    _require(cache.is_contiguous(), "a layer's cache must be contiguous")
    _require(q.stride(2) == out.stride(2) == 1, "the channels of q and out must be contiguous")
    for name, tensor in indices.items():
        _require(tensor.dtype == torch.int32 and tensor.stride(-1) == 1, f"{name} must be int32, contiguous")


def _layout(q: Tensor, cache: Tensor, blocks: Tensor, out: Tensor) -> dict[str, Any]:
    """The arguments that both kernels have."""
    head_dim = q.shape[2]
    strides = dict(
        zip(("q_row", "q_head", "out_row", "out_head"), (*q.stride()[:2], *out.stride()[:2]), strict=True)
    )
    strides |= {
        "blocks_row": blocks.stride(0),
        "cache_values": cache.stride(0),
        "cache_block": cache.stride(1),
    }
    sizes = {"GROUP": q.shape[1] // cache.shape[2], "SIZE": head_dim, "PAGE": BLOCK_TOKENS}
    tensors = {"q": q, "cache": cache, "blocks": blocks, "out": out}
    scale = math.log2(math.e) / math.sqrt(head_dim)
    return {**tensors, **strides, "scale": scale, **sizes, "WIDEN": INTERPRETED}


# --- one query per request ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeScratch:
    """What the programs of a request leave to the one that ends last. All calls on one stream share it.

    Attributes:
        mixed: [·, C] fp32, each split's result.
        logs: [·] fp32, log₂ of its sum of weights.
        arrived: [slots, K] int32, how many splits have ended; 0 between calls.
    """

    mixed: Tensor
    logs: Tensor
    arrived: Tensor


def decode_scratch(
    *, slots: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeScratch:
    """For steps of at most `slots` requests."""
    programs = TILES[_capability(device)].programs
    most = max(size * _most_splits(programs, size, num_kv_heads) for size in range(1, slots + 1)) * num_heads
    return DecodeScratch(
        torch.empty(most, head_dim, device=device),
        torch.empty(most, device=device),
        torch.zeros(slots, num_kv_heads, dtype=torch.int32, device=device),
    )


def _most_splits(programs: int, size: int, num_kv_heads: int) -> int:
    """Programs for each pair of a request and a head of the cache.

    Four times what is used if all requests are equally long, which divides long ones among short ones. One
    request alone gets two thirds: there, programs without work take longer to launch than they save.
    """
    alone = math.ceil(programs * 2 / 3 / num_kv_heads)
    return min(alone, 4 * math.ceil(programs / (size * num_kv_heads)), MAX_SPLITS)


def decode_attention(
    q: Tensor, cache: Tensor, blocks: Tensor, lengths: Tensor, out: Tensor, *, scratch: DecodeScratch,
    pdl: bool = False,
) -> None:  # fmt: skip
    """out ← softmax(q kᵀ/√C) v over the first `lengths` tokens of each request.

    Args:
        q, out: [B, H, C], C contiguous.
        cache: [2, blocks, K, BLOCK_TOKENS, C] keys and values of a layer, contiguous, in q's dtype.
        blocks: [B, N] int32, where each request's tokens are.
        lengths: [B] int32, at most N·BLOCK_TOKENS. Of a request with length 0, out becomes 0.
        scratch: of at least B slots.
        pdl: as in `Call`. The launch before must not write `lengths`.

    Raises:
        ValueError: shapes, strides or dtypes do not fit together.
    """
    decode_call(q, cache, blocks, lengths, out, scratch=scratch, pdl=pdl).launch()


def decode_call(
    q: Tensor, cache: Tensor, blocks: Tensor, lengths: Tensor, out: Tensor, *, scratch: DecodeScratch,
    pdl: bool = False, capability: tuple[int, int] | None = None,
) -> Call:  # fmt: skip
    """The launch of `decode_attention`, for this device or another GPU's `capability`."""
    _check(q, cache, out, blocks=blocks, lengths=lengths)
    (size, num_heads, _), num_kv_heads = q.shape, cache.shape[2]
    _require(size == len(blocks) == len(lengths), "q, blocks and lengths differ in requests")
    tiles = _tiles(capability or _capability(q.device), q.dtype)
    splits = _most_splits(tiles.programs, size, num_kv_heads)
    _require(
        len(scratch.logs) >= size * splits * num_heads and len(scratch.arrived) >= size,
        f"the scratch is for fewer than {size} requests",
    )
    group = num_heads // num_kv_heads
    tile = tiles.single if group == 1 else tiles.grouped
    rows = power_of_two(group)
    arguments = _layout(q, cache, blocks, out) | {
        "lengths": lengths,
        "mixed": scratch.mixed,
        "logs": scratch.logs,
        "arrived": scratch.arrived,
        "programs": tiles.programs,
        "REQUESTS": max(power_of_two(size), 128),
        "ROWS": max(rows, LEAST_ROWS),
        "ROWS_ADDED": rows,
        "ADDED": max(MAX_SPLITS // rows, 1),
        "KEYS": tile.keys,
        "PDL": pdl,
    }
    return Call(decode_kernel, (num_kv_heads, size, splits), arguments, tile.warps, tile.stages, pdl=pdl)


# --- spans of a prompt --------------------------------------------------------------------------------------


def prefill_rows(device: torch.device, dtype: torch.dtype, *, num_rows: int, num_heads: int) -> int:
    """Queries of a tile of `prefill_attention` there, in a step of `num_rows`."""
    return _prefill_tile(_tiles(_capability(device), dtype), num_rows, num_heads).queries


def _prefill_tile(tiles: Tiles, num_rows: int, num_heads: int) -> Tile:
    large = tiles.large
    if large and math.ceil(num_rows / large.queries) * num_heads >= tiles.programs:
        return large
    return tiles.prefill


def prefill_tiles(spans: Iterable[tuple[int, int, int, int]], *, rows: int) -> list[list[int]]:
    """What `prefill_attention` computes for these spans, in tiles of at most `rows` queries.

    Args:
        spans: (row of its first token in q, start, stop, row of its blocks in the table) of each.

    Returns:
        (row in q, queries, position of the first, row of the table) of each tile. Those that see most keys
        come first, because the last ones to end should be short.
    """
    tiles = [
        [row + done, min(rows, stop - start - done), start + done, table]
        for row, start, stop, table in spans
        for done in range(0, stop - start, rows)
    ]
    return sorted(tiles, key=lambda tile: tile[2], reverse=True)


def prefill_attention(q: Tensor, cache: Tensor, blocks: Tensor, tiles: Tensor, out: Tensor) -> None:
    """out ← softmax(q kᵀ/√C) v, where each query sees its past and itself in the pages.

    Args:
        q, out: [M, H, C], C contiguous. Rows of `out` that no tile names are left as they are.
        cache: as in `decode_attention`; holds the keys and values of the queries' tokens already.
        blocks: [R, N] int32, a row for each span.
        tiles: [T, 4] int32, `prefill_tiles` with the `prefill_rows` of M and H; zeros do nothing.

    Raises:
        ValueError: shapes, strides or dtypes do not fit together.
    """
    prefill_call(q, cache, blocks, tiles, out).launch()


def prefill_call(
    q: Tensor, cache: Tensor, blocks: Tensor, tiles: Tensor, out: Tensor, *,
    capability: tuple[int, int] | None = None,
) -> Call:  # fmt: skip
    """The launch of `prefill_attention`, for this device or another GPU's `capability`."""
    _check(q, cache, out, blocks=blocks, tiles=tiles)
    _require(tiles.shape[1:] == (4,) and tiles.is_contiguous(), "tiles must be [T, 4], contiguous")
    tile = _prefill_tile(_tiles(capability or _capability(q.device), q.dtype), *q.shape[:2])
    arguments = _layout(q, cache, blocks, out) | {"tiles": tiles}
    arguments |= {"QUERIES": tile.queries, "KEYS": tile.keys}
    return Call(prefill_kernel, (q.shape[1], len(tiles)), arguments, tile.warps, tile.stages)
