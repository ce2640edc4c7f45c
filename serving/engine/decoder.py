"""A decoder step in torch, on any device: tokens of many requests in, logits out, keys and values cached.

`serving.engine.native.NativeDecoder` does the same on a CPU with AVX2 or better. On a GPU, steps that only
decode replay a CUDA graph, because launching their kernels one by one takes longer than running them. All
graphs are captured when the decoder is made, because a capture would delay requests.
"""

import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from serving.engine.protocol import Sampling, Score
from serving.engine.scheduler import BLOCK_TOKENS, Span, num_blocks, origins, single_first
from training.model.attention import chosen, for_changing_lengths, sdpa
from training.model.llama import Llama

WARM_UPS = 2  # runs before a capture, in which libraries choose kernels and allocate workspaces
SLICE_ROWS = 64  # of logits that are scored at a time: a tensor of 33 MB in fp32 at a vocabulary of 128k


class StepDecoder(Protocol):
    """Runs the model over the tokens of a step.

    What an earlier request left in a block, even NaN, does not affect the request that has it now.
    """

    def forward(self, spans: Sequence[Span]) -> Tensor:
        """Logits [S, V], fp32, after the last token of each of the S spans that sample, in order."""

    def scored(self) -> Iterator[Tensor]:
        """Logits after each token that the `num_scored` of the last step's spans count.

        In order, in slices [R, V], fp32, R at most SLICE_ROWS; a slice may be overwritten by the next.
        """


# Waits for the tokens of a step; their ids and, where log-probabilities are asked for, their scores.
Chosen = Callable[[], tuple[list[int], list[Score | None]]]


class AheadDecoder(StepDecoder, Protocol):
    """One whose steps need no answer of the host: a step may begin before the last one has ended.

    A span that begins where its request's known tokens end has the token that `choose` chose for it last.
    """

    def choose(
        self,
        samplings: Sequence[Sampling],
        chances: Sequence[random.Random],
        changed: Mapping[int, Tensor] | None = None,
    ) -> Chosen:
        """Choose a token for each row of the newest step's logits, as `serving.engine.sampling.choose`."""


class TorchDecoder:
    """The decoder in torch operations.

    A request's logits depend on the other requests of its steps by rounding: torch chooses the kernel of a
    matrix product by its number of rows.

    Args:
        model: on its device.
        num_blocks: of the cache, of `BLOCK_TOKENS` tokens each. Padding writes to one more.
        slots: most requests of a step.
        graphs: use CUDA graphs for steps that only decode, and capture them now (`graph_sizes`).
        context_tokens: most tokens of a request; default: the model's.

    Raises:
        torch.OutOfMemoryError: the cache or the graphs do not fit.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_blocks: int,
        slots: int,
        graphs: bool,
        context_tokens: int | None = None,
    ) -> None:
        shape, weight = model.shape, model.model.norm.weight
        self.device = weight.device
        self._model = model
        self._spare = num_blocks
        size = (shape.num_layers, 2, num_blocks + 1, BLOCK_TOKENS, shape.num_kv_heads, shape.head_dim)
        self._cache = torch.zeros(size, dtype=weight.dtype, device=self.device)
        self._scored = torch.empty(0)  # [rows, hidden], of the last step
        self._graphs: _Graphs | None = None
        if graphs:
            context = context_tokens or shape.max_positions
            sizes = graph_sizes(slots=slots, context_tokens=context, cache_blocks=num_blocks)
            self._graphs = _Graphs(self, sizes)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """See `StepDecoder`. The next step may overwrite what this one returns."""
        self._clear_begun(spans)
        if self._graphs is not None and all(span.samples and span.stop - span.start == 1 for span in spans):
            logits = self._graphs.replay(spans)
            if logits is not None:
                return logits
        with for_changing_lengths():
            return self._eager(spans)

    def _eager(self, spans: Sequence[Span]) -> Tensor:
        ordered = single_first(spans)
        kept = single_first([replace(s, start=s.stop - s.num_kept) for s in ordered if s.num_kept])
        origin, kept_origin = origins(ordered), origins(kept)
        tokens = [t for span in ordered for t in span.request.tokens[span.start : span.stop]]
        positions = [p for span in ordered for p in range(span.start, span.stop)]
        places = [
            span.blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS
            for span in ordered
            for p in range(span.start, span.stop)
        ]
        keep = [origin[span.request] + p for span in kept for p in range(span.start, span.stop)]
        all_kept = len(keep) == len(tokens)
        parts = self._parts(ordered)
        attention = _Attention(
            self._cache, self._tensor(places), parts, parts if all_kept else self._parts(kept)
        )
        hidden = self._model.model(
            self._tensor(tokens)[None],
            positions=self._tensor(positions)[None],
            attend=attention,
            kept=None if all_kept else self._tensor(keep),
        )[0]
        scored = [
            kept_origin[span.request] + p
            for span in spans
            for p in range(span.start, span.start + span.num_scored)
        ]
        self._scored = hidden[scored] if scored else hidden[:0]
        wanted = [kept_origin[span.request] + span.stop - 1 for span in spans if span.samples]
        return self._model.lm_head(hidden[wanted]).float()

    @torch.inference_mode()
    def scored(self) -> Iterator[Tensor]:
        """See `StepDecoder`."""
        for rows in self._scored.split(SLICE_ROWS):
            yield self._model.lm_head(rows).float()

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        """Logits [B, V] of a step that only decodes: tokens, positions [B] and blocks [B, N], all int64."""
        with for_changing_lengths():
            return self._step(tokens, positions, blocks)

    def _step(self, tokens: Tensor, positions: Tensor, blocks: Tensor) -> Tensor:
        block = blocks.gather(1, positions[:, None] // BLOCK_TOKENS)[:, 0]
        parts = [(blocks, _visible(blocks, positions[:, None]), 1)]
        attention = _Attention(self._cache, block * BLOCK_TOKENS + positions % BLOCK_TOKENS, parts, parts)
        hidden = self._model.model(tokens[None], positions=positions[None], attend=attention)[0]
        return self._model.lm_head(hidden).float()

    def inputs(
        self, spans: Sequence[Span], *, width: int, size: int
    ) -> tuple[list[int], list[int], list[list[int]]]:
        """Tokens, positions [size] and blocks [size, width] of spans of one token, and of padding."""
        empty = size - len(spans)
        tokens = [span.request.tokens[span.start] for span in spans] + [0] * empty
        positions = [span.start for span in spans] + [0] * empty
        # A request is padded with a block of its own: the spare may hold NaN, which no mask hides.
        rows = [span.blocks for span in spans] + [(self._spare,)] * empty
        return tokens, positions, [[*row, *row[:1] * (width - len(row))] for row in rows]

    def _parts(self, spans: Sequence[Span]) -> list["_Part"]:
        """Each span of several tokens attends by itself; those of one token, which come first, together."""
        num_single = sum(1 for span in spans if span.stop - span.start == 1)
        together = [self._decoding(spans[:num_single])] if num_single else []
        return together + [self._prefilling(span) for span in spans[num_single:]]

    def _decoding(self, spans: Sequence[Span]) -> "_Part":
        width = max(num_blocks(span.stop) for span in spans)
        _, positions, blocks = self.inputs(spans, width=width, size=len(spans))
        found = self._tensor(blocks)
        return found, _visible(found, self._tensor(positions)[:, None]), 1

    def _prefilling(self, span: Span) -> "_Part":
        blocks = self._tensor(span.blocks)[None]
        positions = torch.arange(span.start, span.stop, device=self.device)[None]
        return blocks, _visible(blocks, positions), span.stop - span.start

    def _clear_begun(self, spans: Sequence[Span]) -> None:
        """Clear the blocks that the step begins and does not fill: earlier requests may have left NaN there.

        A mask gives a place that is not written yet the weight 0, and 0 times NaN is NaN.
        """
        begun = [
            span.blocks[-1]
            for span in spans
            if span.stop % BLOCK_TOKENS and span.start <= span.stop // BLOCK_TOKENS * BLOCK_TOKENS
        ]
        if begun:
            self._cache.index_fill_(2, self._tensor(begun), 0)

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _visible(blocks: Tensor, positions: Tensor) -> Tensor:
    """[B, 1, T, N·BLOCK_TOKENS]: whether a token at positions [B, T] sees each token of its blocks [B, N]."""
    places = torch.arange(blocks.shape[1] * BLOCK_TOKENS, device=blocks.device)
    return (places <= positions[..., None])[:, None]


def attention_kernel(model: Llama) -> str:
    """By which kernel `TorchDecoder` attends."""
    weight = model.model.norm.weight
    mask = torch.ones(1, 1, 1, BLOCK_TOKENS, dtype=torch.bool, device=weight.device)
    with for_changing_lengths():
        return f"{chosen(model.shape, weight, queries=1, keys=BLOCK_TOKENS, mask=mask)} over gathered pages"


_Part = tuple[Tensor, Tensor, int]  # blocks [B, N] of B requests, their mask, and T rows of each


class _Attention:
    """`attend` of `training.model.llama` over a cache in blocks.

    Args:
        cache: [layers, 2, blocks, BLOCK_TOKENS, K, C].
        places: [M], where the step's tokens go in each layer's cache, counted in tokens.
        parts: of the rows, one after the other.
        last_parts: of those that the last layer keeps.
    """

    def __init__(
        self, cache: Tensor, places: Tensor, parts: Sequence[_Part], last_parts: Sequence[_Part]
    ) -> None:
        self._cache, self._places = cache, places
        self._parts, self._last_parts = parts, last_parts

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, rows, C]; k, v [1, K, M, C]."""
        cached = self._cache[layer]
        for store, new in zip(cached.flatten(1, 2), (k, v), strict=True):
            store[self._places] = new[0].transpose(0, 1)
        mixed, row = [q[0, :, :0]], 0
        for blocks, visible, num_tokens in self._last_parts if layer + 1 == len(self._cache) else self._parts:
            num_rows = len(blocks) * num_tokens
            queries = q[0, :, row : row + num_rows].unflatten(1, (len(blocks), num_tokens)).transpose(0, 1)
            keys, values = (kept[blocks].flatten(1, 2).transpose(1, 2) for kept in cached)
            part = sdpa(queries, keys, values, visible=visible)
            mixed.append(part.transpose(0, 1).flatten(1, 2))  # [H, rows, C]
            row += num_rows
        return torch.cat(mixed, dim=1)[None]


def graph_sizes(*, slots: int, context_tokens: int, cache_blocks: int) -> list[tuple[int, int]]:
    """(requests, blocks of each) of the steps to capture, the largest first.

    Powers of two, and all slots, so that few graphs serve every step; the rest of a graph is padding. Sizes
    above four times the cache are left out: requests of about equal length never reach them. The largest are
    captured first, so that the others fit into the memory that it has freed.
    """
    requests = {min(1 << i, slots) for i in range(slots.bit_length() + 1)}
    widths = [1 << i for i in range(power_of_two(num_blocks(context_tokens)).bit_length())]
    found = [(n, width) for n in requests for width in widths if n * width <= 4 * cache_blocks]
    return sorted(found, key=lambda size: (size[0] * size[1], size[0]), reverse=True)


Size = TypeVar("Size", bound=Hashable)
Result = TypeVar("Result")


def captured(
    steps: Mapping[Size, Callable[[], Result]], device: torch.device
) -> dict[Size, tuple[torch.cuda.CUDAGraph, Result]]:
    """A CUDA graph of each of `steps`, in their order, and the tensors that its replay writes.

    As torch's documentation says: warm-up and capture on one side stream, which waits for the current one and
    is waited for by it. All graphs share one memory pool, since none runs beside another and logits are read
    before the next replay.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Checked on an H200 by block 2 of
    tests/gpu; the tests see the order of the calls, on fake tensors.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for step in steps.values():
            for _ in range(WARM_UPS):
                step()
    torch.cuda.current_stream(device).wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for size, step in steps.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = step()
        graphs[size] = graph, result
    return graphs


class _Graphs:
    """CUDA graphs of steps that only decode, one for each of `sizes`."""

    def __init__(self, decoder: TorchDecoder, sizes: Sequence[tuple[int, int]]) -> None:
        self._decoder = decoder
        self._inputs = {
            (n, width): tuple(
                torch.tensor(each, dtype=torch.int64, device=decoder.device) for each in padding
            )
            for n, width in sizes
            for padding in (decoder.inputs([], width=width, size=n),)
        }
        steps = {size: partial(decoder.step, *inputs) for size, inputs in self._inputs.items()}
        self._captured = captured(steps, decoder.device)

    def replay(self, spans: Sequence[Span]) -> Tensor | None:
        """Logits [S, V], S the number of spans; None if no graph is as large as this step."""
        longest = num_blocks(max(span.stop for span in spans))
        size = min(
            (size for size in self._captured if size[0] >= len(spans) and size[1] >= longest), default=None
        )
        if size is None:
            return None
        graph, logits = self._captured[size]
        values = self._decoder.inputs(spans, width=size[1], size=size[0])
        for tensor, value in zip(self._inputs[size], values, strict=True):
            tensor.copy_(torch.tensor(value, dtype=torch.int64), non_blocking=True)
        graph.replay()
        return logits[: len(spans)]


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
