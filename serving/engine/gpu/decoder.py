"""A decoder step by Triton kernels, cuBLAS and CUDA graphs, on GPUs that `unsupported` lets through.

A layer is four products: q, k and v are one matrix, and so are gate and up. One row is multiplied by
`project`, which reads the weights while the launch before it ends, and has norm, RoPE, SiLU and residual
inside; more are multiplied by cuBLAS, with a kernel between two products. What varies between steps lies in a
few tensors on the GPU. So one CUDA graph for each power of two of rows serves the steps that only decode, and
one for each of `PROMPT_ROWS` serves short steps with prompts, which the host would launch more slowly than
they run. In those steps the last layer computes only the rows whose logits are wanted, and keys and values of
the others.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.decoder import SLICE_ROWS, Chosen, captured, power_of_two
from serving.engine.gpu import attention
from serving.engine.gpu.inputs import Rows, Sent, Sizes, Step, most_blocks
from serving.engine.gpu.layers import carry, pick
from serving.engine.gpu.sampling import Sampler
from serving.engine.gpu.stack import Stack
from serving.engine.protocol import Sampling
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Span
from training.model.llama import Llama
from training.model.shapes import LlamaShape

MOST_INNER = 16_384  # elements of a row that one program holds
# Rows of the graphs of steps with prompts. The padding of a step of n > 64 tokens is below n / 2. At 1.4B the
# first token of a prompt of 512 tokens came after 3.8 ms with these graphs (on an H100), after 7.3 ms with
# older code that had none (on an H200); of 2000 tokens, after 10.2 and 10.3 ms. Both are block 6 of
# tests/baselines/nvidia-*_gpu.json.
PROMPT_ROWS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)

Output = tuple[Tensor, Tensor]  # logits [S, V] fp32, and the likeliest token of each row, [S] int32


def unsupported(device: torch.device, dtype: torch.dtype, shape: LlamaShape) -> str | None:
    """Why `GpuDecoder` cannot run this model, in one sentence; None if it can."""
    largest = max(shape.hidden_size, shape.ffn_size, shape.num_heads * shape.head_dim)
    if power_of_two(largest) > MOST_INNER:
        return f"rows of {largest} exceed the {MOST_INNER} that one program of a kernel holds"
    if shape.qkv_bias or shape.out_bias or shape.mlp_bias:
        return "the model has biases"
    return attention.unsupported(device, dtype, shape.head_dim)


class GpuDecoder:
    """See the module, and `serving.engine.decoder.AheadDecoder`.

    Args:
        model: on its device. Its weights become views of the merged matrices.
        num_blocks: of the cache, of `BLOCK_TOKENS` tokens each.
        slots: most requests of a step.
        graphs: capture CUDA graphs.
        context_tokens: most tokens of a request; default: the model's.
        step_tokens: most tokens of a step; default: any number.
        project: multiply one row by `project`, not by cuBLAS.

    Raises:
        torch.OutOfMemoryError: the cache or the graphs do not fit.
    """

    @torch.no_grad()
    def __init__(
        self, model: Llama, *, num_blocks: int, slots: int, graphs: bool = True,
        context_tokens: int | None = None, step_tokens: int | None = None, project: bool = True,
    ) -> None:  # fmt: skip
        shape = model.shape
        context = min(context_tokens or shape.max_positions, shape.max_positions)
        self._stack = Stack(model, num_blocks=num_blocks, context=context)
        self._cache = self._stack.cache
        self.device = self._cache.device
        self._scratch = attention.decode_scratch(
            slots=slots, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, device=self.device,
        )  # fmt: skip
        self._project, self._slots = project, slots
        self._width = most_blocks(context=context, num_blocks=num_blocks)
        self._state = Rows(slots, width=self._width, device=self.device)
        self._scored = self._cache.new_empty(0, shape.hidden_size)
        self._sampler = Sampler(slots, self.device)
        self._logits = self._likeliest = torch.empty(0, device=self.device)  # of the newest step
        self._chosen, self._chosen_rows = self._state.ids, dict[ScheduledRequest, int]()  # of its requests
        # Of so many rows that decode; or of so many with prompts, and whether some of them decode.
        self._graphs: dict[int | tuple[int, bool], tuple[torch.cuda.CUDAGraph, Output]] = {}
        self._decode_sizes = sorted({min(1 << i, slots) for i in range(slots.bit_length() + 1)})
        self._sent: dict[tuple[int, bool], Sent] = {}  # what the latter read
        if graphs:
            most_rows = min(step_tokens or PROMPT_ROWS[-1], num_blocks * BLOCK_TOKENS)
            self._warm_up(most_rows)
            self._capture(most_rows)

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span]) -> Tensor:
        """See `StepDecoder`. The next step may overwrite what this one returns."""
        if all(span.samples and span.stop - span.start == 1 for span in spans):
            self._scored = self._scored[:0]
            if self._state.set(spans, self._chosen_rows):
                carry(self._state.tokens[: len(spans)], self._chosen).launch()
            logits, likeliest = self._replay(len(spans))
        else:
            logits, likeliest = self._mixed(spans)
        sampling = [span.request for span in spans if span.samples]
        self._chosen_rows = {request: row for row, request in enumerate(sampling)}
        self._logits, self._likeliest = logits[: len(sampling)], likeliest[: len(sampling)]
        return self._logits

    @torch.inference_mode()
    def choose(
        self, samplings: Sequence[Sampling], chances: Sequence[random.Random],
        changed: Mapping[int, Tensor] | None = None,
    ) -> Chosen:  # fmt: skip
        """See `AheadDecoder`."""
        self._chosen, read = self._sampler.choose(self._logits, self._likeliest, samplings, chances, changed)
        if self._chosen is not self._likeliest:  # else a step that only decodes has left them there
            self._state.tokens[: len(self._chosen)] = self._chosen.clamp_min(0)
        return read

    @torch.inference_mode()
    def scored(self) -> Iterator[Tensor]:
        """See `StepDecoder`."""
        for rows in self._scored.split(SLICE_ROWS):
            yield F.linear(rows, self._stack.lm_head).float()

    @property
    def ids(self) -> Tensor:
        """[S] int32: the likeliest token of each row of the newest step's logits, BROKEN if there is none."""
        return self._likeliest

    @torch.inference_mode()
    def _warm_up(self, most_rows: int) -> None:
        """Steps of prompts, so that no request waits for kernels to be compiled or loaded, or for memory.

        cuBLAS chooses its kernels by the number of rows, and CUDA loads each when it is first used.
        """
        rows = most_rows
        while True:
            for decodes in (True, False):
                self._prompts(Sent(self._sizes(rows, decodes=decodes), self.device))
            if rows <= PROMPT_ROWS[-1]:
                break
            rows = rows * 3 // 4
        carry(self._state.tokens[:1], self._state.ids).launch()

    def _capture(self, most_rows: int) -> None:
        """Graphs of prompts; and one for each power of two of rows that decode, and for all slots."""
        enough = next((each for each in PROMPT_ROWS if each >= most_rows), PROMPT_ROWS[-1])
        self._sent = {
            (each, decodes): Sent(self._sizes(each, decodes=decodes), self.device)
            for each in PROMPT_ROWS[::-1]
            if each <= enough
            for decodes in (True, False)
        }
        steps: dict[Any, Any] = {size: partial(self._prompts, sent) for size, sent in self._sent.items()}
        steps |= {each: partial(self._decode, each) for each in self._decode_sizes[::-1]}
        self._graphs = captured(steps, self.device)

    def _sizes(self, rows: int, *, decodes: bool) -> Sizes:
        """Of all steps of so many tokens."""
        slots = self._slots
        tiles = min(rows // self._tile_rows(rows) + slots, rows)
        kept = min(slots, rows)
        return Sizes(rows, kept if decodes else 0, kept, slots, tiles, kept, slots, self._width)

    # --- steps that only decode ---

    def _replay(self, num_rows: int) -> Output:
        size = next(size for size in self._decode_sizes if size >= num_rows)
        if size not in self._graphs:
            return self._decode(num_rows)
        graph, output = self._graphs[size]
        graph.replay()
        return output

    def _decode(self, num_rows: int) -> Output:
        """Of the rows in `_state`."""
        state, stack = self._state, self._stack
        lengths, blocks = state.lengths[:num_rows], state.blocks[:num_rows]
        x = stack.embedding.index_select(0, state.tokens[:num_rows])

        def attend(layer: int, q: Tensor, mixed: Tensor) -> None:
            self._attend(layer, q, mixed, lengths, blocks)

        if num_rows == 1 and self._project:
            stack.one(x, lengths, blocks, attend)
            logits, best = stack.one_head(x)
        else:
            logits, best = stack.head(stack.final_norm(*stack.many(x, lengths, blocks, None, attend)))
        pick(best, state.ids, state.tokens, state.lengths, pdl=stack.pdl).launch()
        return logits, state.ids[:num_rows]

    def _attend(self, layer: int, q: Tensor, mixed: Tensor, lengths: Tensor, blocks: Tensor) -> None:
        attention.decode_attention(
            q, self._cache[layer], blocks, lengths, mixed, scratch=self._scratch, pdl=self._stack.pdl
        )

    # --- steps with prompts ---

    def _tile_rows(self, rows: int) -> int:
        """Of a tile of attention, in a step of so many rows."""
        num_heads = self._stack.shape.num_heads
        return attention.prefill_rows(self.device, self._cache.dtype, num_rows=rows, num_heads=num_heads)

    def _mixed(self, spans: Sequence[Span]) -> Output:
        """A step of any spans; those of one token attend together, before the others."""
        rows = sum(span.stop - span.start for span in spans)
        decodes = any(span.stop - span.start == 1 for span in spans)
        found = [size for size in self._sent if size[0] >= rows and size[1] == decodes]
        size = None if any(span.num_scored for span in spans) else min(found, default=None)
        tile = self._tile_rows(rows if size is None else size[0])
        step = Step(spans, tile=tile, last_tile=self._tile_rows(1), chosen=self._chosen_rows)
        sent = Sent(step.sizes, self.device) if size is None else self._sent[size]
        sent.send(step)
        if step.carries:
            carry(sent.tokens[: step.sizes.decoding], self._chosen).launch()
        if size is None:
            return self._prompts(sent, num_scored=step.num_scored)
        self._scored = self._scored[:0]
        graph, output = self._graphs[size]
        graph.replay()
        return output

    def _prompts(self, sent: Sent, *, num_scored: int = 0) -> Output:
        """Of the rows in `sent`."""
        q_rows, stack = len(sent.decoding), self._stack
        prefill = None  # as compiled for the layer before

        def attend(layer: int, q: Tensor, mixed: Tensor) -> None:
            nonlocal prefill
            if q_rows:  # rows of prompts among them become 0, and are then overwritten
                self._attend(layer, q[:q_rows], mixed[:q_rows], sent.decoding, sent.blocks[:q_rows])
            tiles = sent.tiles if layer + 1 < len(stack.layers) else sent.last_tiles
            if len(tiles):
                call = attention.prefill_call(q, self._cache[layer], sent.blocks, tiles, mixed)
                prefill = call.launch(like=prefill if tiles is sent.tiles else None)

        x = stack.embedding.index_select(0, sent.tokens)
        ends = stack.many(x, sent.lengths, sent.blocks, sent.table_rows, attend, sent.kept)
        normed = stack.final_norm(*(each.index_select(0, sent.wanted) for each in ends))
        self._scored, sampled = normed[:num_scored], normed[num_scored:]
        likeliest = torch.empty(len(sampled), dtype=torch.int32, device=self.device)
        if not len(sampled):
            return sampled.new_empty(0, len(stack.lm_head), dtype=torch.float32), likeliest
        logits, best = stack.head(sampled)
        pick(best, likeliest, None, None, pdl=stack.pdl).launch()
        return logits, likeliest
