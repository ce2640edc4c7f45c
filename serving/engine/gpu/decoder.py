"""A decoder step by Triton kernels, cuBLAS and CUDA graphs, on GPUs that `unsupported` lets through.

A layer is four products: q, k and v are one matrix, and so are gate and up. Steps of few rows multiply by
`layers.project`, which reads the weights while the launch before it ends, and has norm, RoPE, SiLU and
residual inside; others multiply by cuBLAS, with a kernel between two products. What varies between steps that
only decode lies in a few tensors on the GPU, so there is one CUDA graph for each number of rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.decoder import SLICE_ROWS, WARM_UPS
from serving.engine.gpu import attention
from serving.engine.gpu.inputs import Rows, Step
from serving.engine.gpu.layers import (
    ADD,
    LOGITS,
    MOST_NARROW,
    ROPE,
    SCAN,
    SILU,
    Heads,
    add_norm,
    pick,
    power_of_two,
    project,
    project_programs,
    rotate_and_store,
    scan,
    silu_mul,
)
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Span
from training.model.llama import Layer, Linear, Llama, rotary
from training.model.shapes import LlamaShape

Attend = Callable[[int, Tensor, Tensor], None]  # of a layer: queries [M, H, C] -> mixed values, written

MOST_INNER = 16_384  # elements of a row that one program holds


def unsupported(device: torch.device, dtype: torch.dtype, shape: LlamaShape) -> str | None:
    """Why `GpuDecoder` cannot run this model, in one sentence; None if it can."""
    largest = max(shape.hidden_size, shape.ffn_size, shape.num_heads * shape.head_dim)
    if power_of_two(largest) > MOST_INNER:
        return f"rows of {largest} exceed the {MOST_INNER} that one program of a kernel holds"
    return attention.unsupported(device, dtype, shape.head_dim)


@dataclass(frozen=True)
class _Layer:
    """The matrices [outputs, inputs] and norms of a layer."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class GpuDecoder:
    """See the module, and `serving.engine.decoder.StepDecoder`.

    Args:
        model: on its device. Its weights become views of the merged matrices.
        num_blocks: of the cache, of `BLOCK_TOKENS` tokens each.
        slots: most requests of a step.
        graphs: capture CUDA graphs of the steps that only decode.
        context_tokens: most tokens of a request; default: the model's.
        most_narrow: most rows that `layers.project` multiplies.

    Raises:
        torch.OutOfMemoryError: the cache or the graphs do not fit.
    """

    @torch.no_grad()
    def __init__(
        self, model: Llama, *, num_blocks: int, slots: int, graphs: bool = True,
        context_tokens: int | None = None, most_narrow: int = MOST_NARROW,
    ) -> None:  # fmt: skip
        shape = self._shape = model.shape
        self._embedding, self._head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        self._norm = model.model.norm.weight.data
        self.device, self._dtype = self._norm.device, self._norm.dtype
        self._layers = [_merged(layer) for layer in model.model.layers]  # type: ignore[arg-type]
        context = min(context_tokens or shape.max_positions, shape.max_positions)
        angles = rotary(shape, torch.arange(context, device=self.device))
        self._cos, self._sin = (each[0, 0, :, : shape.head_dim // 2].contiguous() for each in angles)
        size = (shape.num_layers, 2, num_blocks, shape.num_kv_heads, BLOCK_TOKENS, shape.head_dim)
        self._cache = torch.zeros(size, dtype=self._dtype, device=self.device)
        self._scratch = attention.decode_scratch(
            slots=slots, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, device=self.device,
        )  # fmt: skip
        self._pdl = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self._most_narrow = most_narrow
        self._state = Rows(slots, num_blocks=num_blocks, context=context, device=self.device)
        self._scored = self._norm.new_empty(0, shape.hidden_size)
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
        size = min((size for size in self._graphs if size >= len(spans)), default=None)
        if size is None:
            return self._decode(len(spans))
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(spans)]

    @torch.inference_mode()
    def scored(self) -> Iterator[Tensor]:
        """See `StepDecoder`."""
        for rows in self._scored.split(SLICE_ROWS):
            yield F.linear(rows, self._head).float()

    @property
    def ids(self) -> Tensor:
        """[slots] int32: the likeliest token of each row of the newest step that only decodes."""
        return self._state.ids

    def _warm_up(self, slots: int) -> None:
        """Steps of prompts, so that no request waits for kernels to be compiled."""
        for scored in (False, True):
            long = ScheduledRequest([0, 0], 3, scored=scored)
            spans = [Span(long, 0, 2, (0,)), Span(ScheduledRequest([0], 2), 0, 1, (0,))]
            self.forward(spans[: min(slots, 2)])

    def _capture(self, slots: int) -> None:
        """One graph for each power of two up to `slots`, and for `slots`: the largest first, in one pool.

        As torch's documentation says: warm-up and capture on one side stream, which waits for the current
        one and is waited for by it (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
        """
        sizes = sorted({min(1 << i, slots) for i in range(slots.bit_length() + 1)}, reverse=True)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for size in sizes:
                for _ in range(WARM_UPS):
                    self._decode(size)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        for size in sizes:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                logits = self._decode(size)
            self._graphs[size] = graph, logits

    def _decode(self, num_rows: int) -> Tensor:
        """Logits [num_rows, V] of a step that only decodes, of the rows in `_state`."""
        state = self._state
        lengths, blocks = state.lengths[:num_rows], state.blocks[:num_rows]
        x = self._embedding.index_select(0, state.tokens[:num_rows])
        if num_rows <= self._most_narrow:
            self._narrow(x, lengths, blocks)
            logits, best = self._narrow_head(x)
        else:

            def attend(layer: int, q: Tensor, mixed: Tensor) -> None:
                self._attend(layer, q, mixed, lengths, blocks)

            added = self._wide(x, lengths, blocks, None, attend)
            logits, best = self._wide_head(self._final_norm(x, added))
        pick(best, state.ids, state.tokens, state.lengths, pdl=self._pdl).launch()
        return logits

    def _attend(self, layer: int, q: Tensor, mixed: Tensor, lengths: Tensor, blocks: Tensor) -> None:
        attention.decode_attention(q, self._cache[layer], blocks, lengths, mixed, scratch=self._scratch)

    # --- few rows: each product with what stands around it ---

    def _narrow(self, x: Tensor, lengths: Tensor, blocks: Tensor) -> None:
        """All layers over x [M, D], in place."""
        shape, pdl = self._shape, self._pdl
        heads_of = self._heads(lengths, blocks, None)
        q = x.new_empty(len(x), shape.num_heads, shape.head_dim)
        mixed, active = torch.empty_like(q), x.new_empty(len(x), shape.ffn_size)
        normed: dict[str, Any] = {"eps": shape.norm_eps, "pdl": pdl}
        half = ceil(shape.hidden_size / 2)
        for index, layer in enumerate(self._layers):
            project(
                x, layer.qkv, q.flatten(1), epilogue=ROPE, half=shape.head_dim // 2, norm=layer.input_norm,
                heads=heads_of(index), **normed,
            ).launch()  # fmt: skip
            self._attend(index, q, mixed, lengths, blocks)
            project(mixed.flatten(1), layer.out, x, epilogue=ADD, half=half, pdl=pdl).launch()
            project(
                x, layer.gate_up, active, epilogue=SILU, half=shape.ffn_size, norm=layer.ffn_norm, **normed
            ).launch()
            project(active, layer.down, x, epilogue=ADD, half=half, pdl=pdl).launch()

    def _narrow_head(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits [M, V] of x [M, D] before the final norm, and the largest of each program."""
        shape = self._shape
        size = {"outputs": shape.vocab_size, "half": ceil(shape.vocab_size / 2)}
        logits = x.new_empty(len(x), shape.vocab_size, dtype=torch.float32)
        best = self._best(len(x), project_programs(x, **size))
        project(
            x, self._head, logits, epilogue=LOGITS, half=size["half"], norm=self._norm, eps=shape.norm_eps,
            best=best, pdl=self._pdl,
        ).launch()  # fmt: skip
        return logits, best

    # --- any number of rows: products by cuBLAS ---

    def _wide(
        self, x: Tensor, lengths: Tensor, blocks: Tensor, table_rows: Tensor | None, attend: Attend
    ) -> Tensor:
        """All layers over x [M, D], in place but for the last product: the end is x + what is returned."""
        shape, pdl = self._shape, self._pdl
        heads_of = self._heads(lengths, blocks, table_rows)
        normed, mixed = torch.empty_like(x), x.new_empty(len(x), shape.num_heads, shape.head_dim)
        active = x.new_empty(len(x), shape.ffn_size)
        added = None
        for index, layer in enumerate(self._layers):
            add_norm(x, added, layer.input_norm, normed, eps=shape.norm_eps, pdl=pdl).launch()
            qkv = F.linear(normed, layer.qkv)
            rotate_and_store(qkv, heads_of(index), pdl=pdl).launch()
            attend(index, qkv[:, : mixed[0].numel()].view(mixed.shape), mixed)
            added = F.linear(mixed.flatten(1), layer.out)
            add_norm(x, added, layer.ffn_norm, normed, eps=shape.norm_eps, pdl=pdl).launch()
            silu_mul(F.linear(normed, layer.gate_up), active, pdl=pdl).launch()
            added = F.linear(active, layer.down)
        assert added is not None
        return added

    def _final_norm(self, x: Tensor, added: Tensor) -> Tensor:
        normed = torch.empty_like(x)
        if len(x):
            add_norm(x, added, self._norm, normed, eps=self._shape.norm_eps, pdl=self._pdl).launch()
        return normed

    def _wide_head(self, normed: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits [M, V] of normed [M, D], and the largest of each program."""
        logits = F.linear(normed, self._head)
        wide = torch.empty_like(logits, dtype=torch.float32)
        best = self._best(len(logits), ceil(logits.shape[1] / SCAN))
        scan(logits, wide, best, pdl=self._pdl).launch()
        return wide, best

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

        x = self._embedding.index_select(0, sent.tokens)
        added = self._wide(x, sent.lengths, sent.blocks, sent.table_rows, attend)
        normed = self._final_norm(x.index_select(0, sent.wanted), added.index_select(0, sent.wanted))
        self._scored = normed[: step.num_scored]
        sampled = normed[step.num_scored :]
        return self._wide_head(sampled)[0] if len(sampled) else sampled.new_empty(0, len(self._head)).float()

    def _heads(self, lengths: Tensor, blocks: Tensor, table_rows: Tensor | None) -> Callable[[int], Heads]:
        def of(layer: int) -> Heads:
            return Heads(
                self._cos, self._sin, self._cache[layer], blocks, lengths, table_rows, self._shape.num_heads
            )

        return of

    def _best(self, num_rows: int, programs: int) -> tuple[Tensor, Tensor]:
        return (
            torch.empty(num_rows, programs, dtype=torch.float32, device=self.device),
            torch.empty(num_rows, programs, dtype=torch.int32, device=self.device),
        )


def _merged(layer: Layer) -> _Layer:
    """The layer's weights, of which its parameters become views: two copies would not fit."""
    attend, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=layer.input_layernorm.weight.data,
        qkv=_merge(attend.q_proj, attend.k_proj, attend.v_proj),
        out=attend.o_proj.weight.data,
        ffn_norm=layer.post_attention_layernorm.weight.data,
        gate_up=_merge(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj.weight.data,
    )


def _merge(*matrices: Linear) -> Tensor:
    merged = torch.cat([each.weight.data for each in matrices])
    for each, part in zip(matrices, merged.split([len(each.weight) for each in matrices]), strict=True):
        each.weight = torch.nn.Parameter(part, requires_grad=False)
    return merged
