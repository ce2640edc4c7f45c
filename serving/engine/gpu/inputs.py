"""What a step's kernels read besides weights and cache, sent to the GPU by one copy from pinned memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from serving.engine.gpu import attention
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Span, num_blocks


class Rows:
    """What a step that only decodes reads, on the GPU, and a pinned copy from which it is sent at once.

    Attributes:
        tokens, lengths, ids: [slots] int32; lengths count the step's token, and are 0 for padding.
        blocks: [slots, width] int32.
    """

    def __init__(self, slots: int, *, num_blocks: int, context: int, device: torch.device) -> None:
        slots = self._slots = _aligned(slots)
        width = _aligned(min(-(-context // BLOCK_TOKENS), num_blocks))
        self._device = torch.zeros(slots * (2 + width), dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = torch.zeros(slots * (2 + width), dtype=torch.int32, pin_memory=pinned)
        self.tokens, self.lengths = self._device[:slots], self._device[slots : 2 * slots]
        self.blocks = self._device[2 * slots :].view(slots, width)
        self.ids = torch.zeros(slots, dtype=torch.int32, device=device)
        self._table = self._host[2 * slots :].view(slots, width)
        self._owners: list[ScheduledRequest | None] = [None] * slots  # of the rows of the table

    def set(self, spans: Sequence[Span]) -> None:
        """Send what these spans of one token need. The last step must have ended."""
        slots = self._slots
        padding = [0] * (slots - len(spans))
        tokens = [span.request.tokens[span.start] for span in spans] + padding
        lengths = [span.stop for span in spans] + padding
        self._host[: 2 * slots] = torch.tensor(tokens + lengths, dtype=torch.int32)
        changed = False
        for row, span in enumerate(spans):
            if self._owners[row] is not span.request:
                # All of the request's, so that they change no more; its own are gone if it was cancelled.
                blocks = span.request.blocks or span.blocks
                self._table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                self._owners[row] = span.request
                changed = True
        size = len(self._host) if changed else 2 * slots
        self._device[:size].copy_(self._host[:size], non_blocking=True)


@dataclass(frozen=True)
class Sent:
    """A step's numbers on the GPU, int32: see `Step`."""

    tokens: Tensor
    lengths: Tensor
    table_rows: Tensor
    wanted: Tensor
    tiles: Tensor
    blocks: Tensor


class Step:
    """Rows of a step of any spans: those of one token first. One array, sent at once.

    Args:
        tile: rows of a tile of `attention.prefill_attention`.
    """

    def __init__(self, spans: Sequence[Span], *, tile: int) -> None:
        ordered = sorted(spans, key=lambda span: span.stop - span.start > 1)
        self.num_decoding = sum(span.stop - span.start == 1 for span in spans)
        first, row = {}, 0
        for span in ordered:
            first[id(span)] = row
            row += span.stop - span.start
        sizes = [span.stop - span.start for span in ordered]
        tokens = [token for span in ordered for token in span.request.tokens[span.start : span.stop]]
        lengths = [np.arange(span.start + 1, span.stop + 1) for span in ordered]
        table_rows = np.repeat(np.arange(len(ordered)), sizes)
        scored = [first[id(span)] + i for span in spans for i in range(span.num_scored)]
        sampled = [first[id(span)] + span.stop - span.start - 1 for span in spans if span.samples]
        long = [
            (first[id(span)], span.start, span.stop, index)
            for index, span in enumerate(ordered)
            if span.stop - span.start > 1
        ]
        width = _aligned(max(num_blocks(span.stop) for span in spans))
        blocks = np.zeros((len(ordered), width), dtype=np.int32)
        for index, span in enumerate(ordered):
            blocks[index, : len(span.blocks)] = span.blocks
        self.num_scored = len(scored)
        tiles = np.asarray(attention.prefill_tiles(long, rows=tile), dtype=np.int32).reshape(-1, 4)
        self._parts = (tokens, np.concatenate(lengths), table_rows, [*scored, *sampled], tiles, blocks)

    def send(self, device: torch.device) -> Sent:
        """By one copy from pinned memory."""
        parts = [np.asarray(part, dtype=np.int32) for part in self._parts]
        ends = list(accumulate(_aligned(part.size) for part in parts))
        flat = np.zeros(ends[-1], dtype=np.int32)
        for start, part in zip([0, *ends], parts, strict=False):
            flat[start : start + part.size] = part.ravel()
        host = torch.empty(len(flat), dtype=torch.int32, pin_memory=device.type == "cuda")
        there = host.copy_(torch.tensor(flat)).to(device, non_blocking=True)
        found = [there[start:] for start in [0, *ends[:-1]]]
        return Sent(*(each[: part.size].view(part.shape) for each, part in zip(found, parts, strict=True)))


def _aligned(size: int) -> int:
    """The next multiple of 16: Triton compiles a kernel anew for arguments that are less aligned."""
    return -(-size // 16) * 16
