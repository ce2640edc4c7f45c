"""What a step's kernels read besides weights and cache, sent to the GPU by one copy from pinned memory.

The host does not know yet which tokens the last step chose. Where a span begins with one of them, the host
sends `-1 - row`, with the token's row among the chosen ones, and `layers.carry` replaces it on the GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from serving.engine.gpu import attention
from serving.engine.scheduler import (
    BLOCK_TOKENS,
    ScheduledRequest,
    Span,
    num_blocks,
    origins,
    single_first,
)

Chosen = Mapping[ScheduledRequest, int]  # rows of the last step's chosen tokens


def token_of(span: Span, chosen: Chosen) -> int:
    """The first token of the span; `-1 - row` (see the module) if the host does not know it yet."""
    known = span.request.tokens
    return known[span.start] if span.start < len(known) else -1 - chosen[span.request]


def most_blocks(*, context: int, num_blocks: int) -> int:
    """Columns of a table of blocks that serves every request."""
    return _aligned(min(-(-context // BLOCK_TOKENS), num_blocks))


class Rows:
    """What a step that only decodes reads, on the GPU. Each step leaves there what the next one reads.

    Args:
        width: of the table of blocks.

    Attributes:
        tokens, lengths, ids: [slots] int32; lengths count the step's token, and are 0 for padding.
        blocks: [slots, width] int32.
    """

    def __init__(self, slots: int, *, width: int, device: torch.device) -> None:
        slots = self._slots = _aligned(slots)
        self._device = torch.zeros(slots * (2 + width), dtype=torch.int32, device=device)
        self._host = np.zeros(slots * (2 + width), dtype=np.int32)
        self.tokens, self.lengths = self._device[:slots], self._device[slots : 2 * slots]
        self.blocks = self._device[2 * slots :].view(slots, width)
        self.ids = torch.zeros(slots, dtype=torch.int32, device=device)
        self._table = self._host[2 * slots :].reshape(slots, width)
        self._owners: list[ScheduledRequest | None] = [None] * slots  # of the rows of the table
        self._left: list[tuple[ScheduledRequest, int]] = []  # which token of each request the last step left

    def set(self, spans: Sequence[Span], chosen: Chosen) -> bool:
        """Send what these spans of one token need; True if `layers.carry` has to put tokens there."""
        wanted = [(span.request, span.start) for span in spans]
        there = wanted == self._left and all(start == len(request.tokens) for request, start in wanted)
        self._left = [(request, start + 1) for request, start in wanted]
        if there:
            return False
        slots, num = self._slots, len(spans)
        self._host[: 2 * slots] = 0
        self._host[:num] = [token_of(span, chosen) for span in spans]
        self._host[slots : slots + num] = [span.stop for span in spans]
        changed = False
        for row, span in enumerate(spans):
            if self._owners[row] is not span.request:
                # All of the request's, so that they change no more; its own are gone if it was cancelled.
                blocks = span.request.blocks or span.blocks
                self._table[row, : len(blocks)] = blocks
                self._owners[row] = span.request
                changed = True
        size = len(self._host) if changed else 2 * slots
        _send(self._host[:size], self._device[:size])
        return bool(self._host[:num].min() < 0)


class Sizes(NamedTuple):
    """Of a step, or of all steps that one graph runs.

    Attributes:
        rows: tokens.
        decoding: the first rows, which attend as requests that decode.
        kept: rows that the last layer computes; of the others it leaves nothing but keys and values.
        wanted: kept rows after which logits are wanted.
        tiles: of `attention.prefill_attention`.
        last_tiles: the same of the last layer, of kept rows.
        spans, blocks: of the table of blocks.
    """

    rows: int
    decoding: int
    kept: int
    wanted: int
    tiles: int
    last_tiles: int
    spans: int
    blocks: int


class Sent:
    """A step's numbers on the GPU, int32. Where a step is smaller, the rest is 0, and does nothing.

    Attributes:
        tokens, lengths, table_rows: [rows]; lengths count a row's own token, and are 0 for padding.
        decoding: [decoding] lengths, 0 for a row that does not decode.
        kept: [kept] rows.
        wanted: [wanted] rows among the kept ones.
        tiles: [tiles, 4].
        last_tiles: [last_tiles, 4].
        blocks: [spans, blocks].
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        shapes = [
            *[(sizes.rows,)] * 3, (sizes.decoding,), (sizes.kept,), (sizes.wanted,), (sizes.tiles, 4),
            (sizes.last_tiles, 4), sizes[-2:],
        ]  # fmt: skip
        ends = list(accumulate((_aligned(prod(shape)) for shape in shapes), initial=0))
        self._flat = torch.zeros(ends[-1], dtype=torch.int32, device=device)
        self._host = np.zeros(ends[-1], dtype=np.int32)
        places = [
            (slice(start, start + prod(shape)), shape) for start, shape in zip(ends, shapes, strict=False)
        ]
        self._parts = [self._host[place].reshape(shape) for place, shape in places]
        (
            self.tokens, self.lengths, self.table_rows, self.decoding, self.kept, self.wanted, self.tiles,
            self.last_tiles, self.blocks,
        ) = (self._flat[place].view(shape) for place, shape in places)  # fmt: skip

    def send(self, step: "Step") -> None:
        """By one copy from pinned memory. Steps that were sent before keep what they read."""
        self._host.fill(0)
        for place, part in zip(self._parts, step.parts, strict=True):
            place[tuple(map(slice, part.shape))] = part
        _send(self._host, self._flat)


class Step:
    """Rows of a step of any spans: those of one token first.

    The kept rows are in the same order, and spans of one token are all kept: those that decode come first.

    Args:
        tile: rows of a tile of `attention.prefill_attention`.
        last_tile: the same in the last layer.
        chosen: needed for spans whose token is not known yet.

    Attributes:
        parts: as in `Sent`, in its order; `decoding` has as many as decode.
        sizes: the least that hold it.
        num_scored: how many of the wanted rows are scored; they come first.
        carries: tokens are to be put in place by `layers.carry`.
    """

    def __init__(self, spans: Sequence[Span], *, tile: int, last_tile: int, chosen: Chosen) -> None:
        ordered = single_first(spans)
        num_tokens = [span.stop - span.start for span in ordered]
        num_decoding = num_tokens.count(1)
        kept = [
            span if num == 1 else replace(span, start=span.stop - span.num_kept)
            for span, num in zip(ordered, num_tokens, strict=True)
        ]
        origin, kept_origin = origins(ordered), origins(kept)
        tokens = np.empty(sum(num_tokens), dtype=np.int32)
        for row, span in enumerate(ordered[:num_decoding]):
            tokens[row] = token_of(span, chosen)
        for span in ordered[num_decoding:]:
            row = origin[span.request]
            tokens[row + span.start : row + span.stop] = span.request.tokens[span.start : span.stop]
        lengths = np.concatenate([np.arange(span.start + 1, span.stop + 1) for span in ordered])
        kept_rows = [origin[span.request] + p for span in kept for p in range(span.start, span.stop)]
        scored = [
            kept_origin[span.request] + p
            for span in spans
            for p in range(span.start, span.start + span.num_scored)
        ]
        sampled = [kept_origin[span.request] + span.stop - 1 for span in spans if span.samples]
        tiles, last_tiles = (
            attention.prefill_tiles(
                [
                    (row_of[span.request] + span.start, span.start, span.stop, index)
                    for index, span in enumerate(each)
                    if index >= num_decoding
                ],
                rows=rows,
            )
            for each, row_of, rows in ((ordered, origin, tile), (kept, kept_origin, last_tile))
        )
        blocks = np.zeros((len(spans), _aligned(max(num_blocks(span.stop) for span in spans))), np.int32)
        for index, span in enumerate(ordered):
            blocks[index, : len(span.blocks)] = span.blocks
        self.num_scored = len(scored)
        self.carries = bool(num_decoding and tokens[:num_decoding].min() < 0)
        self.parts: tuple[np.ndarray, ...] = (
            tokens,
            lengths,
            np.repeat(np.arange(len(ordered)), num_tokens),
            lengths[:num_decoding],
            np.array(kept_rows or [0]),  # kernels are launched for one row at least
            np.array([*scored, *sampled], dtype=np.int32),
            *(np.array(each, dtype=np.int32).reshape(-1, 4) for each in (tiles, last_tiles)),
            blocks,
        )
        self.sizes = Sizes._make((len(tokens), *map(len, self.parts[3:-1]), *blocks.shape))


def _send(values: np.ndarray, there: Tensor) -> None:
    """Without a wait. The pinned copy is used for nothing else until it has been sent: torch sees to that."""
    pinned = torch.empty(len(values), dtype=torch.int32, pin_memory=there.device.type == "cuda")
    there.copy_(pinned.copy_(torch.from_numpy(values)), non_blocking=True)


def _aligned(size: int) -> int:
    """The next multiple of 16: Triton compiles a kernel anew for arguments that are less aligned."""
    return -(-size // 16) * 16
