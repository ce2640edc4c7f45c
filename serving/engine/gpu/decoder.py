"""A decoder step by Triton kernels, cuBLAS and CUDA graphs, on GPUs that `unsupported` lets through.

A layer is four products: q, k and v are one matrix, and so are gate and up. Steps of few rows multiply by
`project`, which reads the weights while the launch before it ends, and has norm, RoPE, SiLU and
residual inside; others multiply by cuBLAS, with a kernel between two products. What varies between steps that
only decode lies in a few tensors on the GPU, so one CUDA graph for each power of two of rows is enough.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.decoder import SLICE_ROWS, Chosen, captured, power_of_two
from serving.engine.gpu import attention
from serving.engine.gpu.inputs import Rows, Step
from serving.engine.gpu.layers import pick
from serving.engine.gpu.sampling import Sampler
from serving.engine.gpu.stack import Stack
from serving.engine.protocol import Sampling
from serving.engine.scheduler import ScheduledRequest, Span
from training.model.llama import Llama
from training.model.shapes import LlamaShape

MOST_INNER = 16_384  # elements of a row that one program holds


def unsupported(device: torch.device, dtype: torch.dtype, shape: LlamaShape) -> str | None:
    """Why `GpuDecoder` cannot run this model, in one sentence; None if it can."""
    largest = max(shape.hidden_size, shape.ffn_size, shape.num_heads * shape.head_dim)
    if power_of_two(largest) > MOST_INNER:
        return f"rows of {largest} exceed the {MOST_INNER} that one program of a kernel holds"
    return attention.unsupported(device, dtype, shape.head_dim)


class GpuDecoder:
    """See the module, and `serving.engine.decoder.AheadDecoder`.

    Args:
        model: on its device. Its weights become views of the merged matrices.
        num_blocks: of the cache, of `BLOCK_TOKENS` tokens each.
        slots: most requests of a step.
        graphs: capture CUDA graphs of the steps that only decode.
        context_tokens: most tokens of a request; default: the model's.
        most_narrow: most rows that `project` multiplies. With more than one, cuBLAS is faster: when both
            were measured on an H200 at 1.4B, a step of 8 rows took 1.8 ms, and 2.5 ms by `project`.

    Raises:
        torch.OutOfMemoryError: the cache or the graphs do not fit.
    """

    @torch.no_grad()
    def __init__(
        self, model: Llama, *, num_blocks: int, slots: int, graphs: bool = True,
        context_tokens: int | None = None, most_narrow: int = 1,
    ) -> None:  # fmt: skip
        shape = model.shape
        context = min(context_tokens or shape.max_positions, shape.max_positions)
        self._stack = Stack(model, num_blocks=num_blocks, context=context)
        self._cache = self._stack.cache
        self.device, self._dtype = self._cache.device, self._cache.dtype
        self._scratch = attention.decode_scratch(
            slots=slots, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, device=self.device,
        )  # fmt: skip
        self._most_narrow = most_narrow
        self._state = Rows(slots, num_blocks=num_blocks, context=context, device=self.device)
        self._scored = self._cache.new_empty(0, shape.hidden_size)
        self._sampler = Sampler(slots, self.device)
        self._logits = self._likeliest = torch.empty(0, device=self.device)  # of the newest step
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        if graphs:
            self._warm_up(slots)
            self._capture(slots)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """See `StepDecoder`. The next step may overwrite what this one returns."""
        if not all(span.samples and span.stop - span.start == 1 for span in spans):
            return self._mixed(spans)
        self._scored = self._scored[:0]
        self._state.set(spans)
        return self._replay(len(spans))

    @torch.inference_mode()
    def again(self, spans: Sequence[Span]) -> Tensor:
        """See `AheadDecoder`. Tokens, lengths and blocks of the rows are on the GPU already."""
        return self._replay(len(spans))

    @torch.inference_mode()
    def choose(self, samplings: Sequence[Sampling], chances: Sequence[random.Random]) -> Chosen:
        """See `AheadDecoder`."""
        ids, read = self._sampler.choose(self._logits, self._likeliest, samplings, chances)
        if ids is not self._likeliest:
            self._state.tokens[: len(ids)] = ids.clamp_min(0)
        return read

    def _replay(self, num_rows: int) -> Tensor:
        size = min((size for size in self._graphs if size >= num_rows), default=None)
        if size is None:
            logits = self._decode(num_rows)
        else:
            graph, logits = self._graphs[size]
            graph.replay()
        self._logits, self._likeliest = logits[:num_rows], self._state.ids[:num_rows]
        return self._logits

    @torch.inference_mode()
    def scored(self) -> Iterator[Tensor]:
        """See `StepDecoder`."""
        for rows in self._scored.split(SLICE_ROWS):
            yield F.linear(rows, self._stack.lm_head).float()

    @property
    def ids(self) -> Tensor:
        """[S] int32: the likeliest token of each row of the newest step's logits, BROKEN if there is none."""
        return self._likeliest

    def _warm_up(self, slots: int) -> None:
        """Steps of prompts, so that no request waits for kernels to be compiled."""
        for scored in (False, True):
            long = ScheduledRequest([0, 0], 3, scored=scored)
            spans = [Span(long, 0, 2, (0,)), Span(ScheduledRequest([0], 2), 0, 1, (0,))]
            self.forward(spans[: min(slots, 2)])

    def _capture(self, slots: int) -> None:
        """One graph for each power of two up to `slots`, and for `slots`: the largest first."""
        sizes = sorted({min(1 << i, slots) for i in range(slots.bit_length() + 1)}, reverse=True)
        self._graphs = captured({size: partial(self._decode, size) for size in sizes}, self.device)

    def _decode(self, num_rows: int) -> Tensor:
        """Logits [num_rows, V] of a step that only decodes, of the rows in `_state`."""
        state, stack = self._state, self._stack
        lengths, blocks = state.lengths[:num_rows], state.blocks[:num_rows]
        x = stack.embedding.index_select(0, state.tokens[:num_rows])

        def attend(layer: int, q: Tensor, mixed: Tensor) -> None:
            self._attend(layer, q, mixed, lengths, blocks)

        if num_rows <= self._most_narrow:
            stack.few(x, lengths, blocks, attend)
            logits, best = stack.few_head(x)
        else:
            added = stack.many(x, lengths, blocks, None, attend)
            logits, best = stack.head(stack.final_norm(x, added))
        pick(best, state.ids, state.tokens, state.lengths, pdl=stack.pdl).launch()
        return logits

    def _attend(self, layer: int, q: Tensor, mixed: Tensor, lengths: Tensor, blocks: Tensor) -> None:
        attention.decode_attention(
            q, self._cache[layer], blocks, lengths, mixed, scratch=self._scratch, pdl=self._stack.pdl
        )

    def _mixed(self, spans: Sequence[Span]) -> Tensor:
        """Logits [S, V] of a step of any spans; those of one token attend together, before the others."""
        step = Step(spans, tile=attention.prefill_rows(self.device, self._dtype))
        sent = step.send(self.device)
        q_rows, num = step.num_decoding, len(sent.tokens)

        def attend(layer: int, q: Tensor, mixed: Tensor) -> None:
            if q_rows:
                few = q[:q_rows], mixed[:q_rows], sent.lengths[:q_rows], sent.blocks[:q_rows]
                self._attend(layer, *few)
            if q_rows < num:
                attention.prefill_attention(q, self._cache[layer], sent.blocks, sent.tiles, mixed)

        x = self._stack.embedding.index_select(0, sent.tokens)
        added = self._stack.many(x, sent.lengths, sent.blocks, sent.table_rows, attend)
        normed = self._stack.final_norm(x.index_select(0, sent.wanted), added.index_select(0, sent.wanted))
        self._scored = normed[: step.num_scored]
        sampled = normed[step.num_scored :]
        self._logits = sampled.new_empty(len(sampled), len(self._stack.lm_head), dtype=torch.float32)
        self._likeliest = torch.empty(len(sampled), dtype=torch.int32, device=self.device)
        if len(sampled):
            self._logits, best = self._stack.head(sampled)
            pick(best, self._likeliest, None, None, pdl=self._stack.pdl).launch()
        return self._logits
