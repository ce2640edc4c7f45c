"""The layers of a model over the rows of a step: one row by `project`, any number by cuBLAS."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.gpu.layers import SCAN, Best, Heads, add_norm, rotate_and_store, scan, silu_mul
from serving.engine.gpu.project import ADD, LOGITS, ROPE, SILU, STORE, project, project_programs
from serving.engine.scheduler import BLOCK_TOKENS
from training.model.llama import Layer, Linear, Llama, rotary

Attend = Callable[[int, Tensor, Tensor], None]  # of a layer: queries [M, H, C] -> mixed values, written


@dataclass(frozen=True)
class _Layer:
    """The matrices [outputs, inputs] and norms of a layer; those of queries and keys are [2, C], if any."""

    input_norm: Tensor
    qk_norm: Tensor | None
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Stack:
    """A model's weights, four matrices a layer, and the cache that its layers write to.

    Args:
        model: on its device. Its weights become views of the merged matrices.
        num_blocks: of the cache.
        context: most tokens of a request.

    Attributes:
        cache: [layers, 2, blocks, G, BLOCK_TOKENS, C].
        pdl: see `project.project`.
    """

    def __init__(self, model: Llama, *, num_blocks: int, context: int) -> None:
        shape = self.shape = model.shape
        self.embedding, self.lm_head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        self._norm = model.model.norm.weight.data
        device = self._norm.device
        self.layers = [_merged(layer) for layer in model.model.layers]  # type: ignore[arg-type]
        angles = rotary(shape, torch.arange(context, device=device))
        self.cos, self.sin = (each[0, 0, :, : shape.head_dim // 2].contiguous() for each in angles)
        size = (shape.num_layers, 2, num_blocks, shape.num_kv_heads, BLOCK_TOKENS, shape.head_dim)
        self.cache = torch.zeros(size, dtype=self._norm.dtype, device=device)
        self.pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

    # --- one row: each product with what stands around it ---

    def one(self, x: Tensor, lengths: Tensor, blocks: Tensor, attend: Attend) -> None:
        """All layers over x [1, D], in place."""
        shape, pdl = self.shape, self.pdl
        heads_of = self._heads(lengths, blocks, None)
        q = x.new_empty(len(x), shape.num_heads, shape.head_dim)
        mixed, active = torch.empty_like(q), x.new_empty(len(x), shape.ffn_size)
        normed: dict[str, Any] = {"eps": shape.norm_eps, "pdl": pdl}
        half = ceil(shape.hidden_size / 2)
        for index, layer in enumerate(self.layers):
            heads, into_attention = heads_of(index), {"norm": layer.input_norm, **normed}
            if layer.qk_norm is None:
                project(
                    x, layer.qkv, q.flatten(1), epilogue=ROPE, half=shape.head_dim // 2, heads=heads,
                    **into_attention,
                ).launch()  # fmt: skip
            else:  # a norm needs whole heads, and a program of `project` has only a few pairs of a head
                qkv = x.new_empty(len(x), len(layer.qkv))
                project(
                    x, layer.qkv, qkv, epilogue=STORE, half=shape.head_dim // 2, **into_attention
                ).launch()
                rotate_and_store(qkv, heads, pdl=pdl).launch()
                q = qkv[:, : mixed[0].numel()].view(mixed.shape)
            attend(index, q, mixed)
            project(mixed.flatten(1), layer.out, x, epilogue=ADD, half=half, pdl=pdl).launch()
            project(
                x, layer.gate_up, active, epilogue=SILU, half=shape.ffn_size, norm=layer.ffn_norm,
                **normed,
            ).launch()  # fmt: skip
            project(active, layer.down, x, epilogue=ADD, half=half, pdl=pdl).launch()

    def one_head(self, x: Tensor) -> tuple[Tensor, Best]:
        """Logits [1, V] of x [1, D] before the final norm, and the largest of each program."""
        shape = self.shape
        size = {"outputs": shape.vocab_size, "half": ceil(shape.vocab_size / 2)}
        logits = x.new_empty(len(x), shape.vocab_size, dtype=torch.float32)
        best = self._best(len(x), project_programs(x, **size))
        project(
            x, self.lm_head, logits, epilogue=LOGITS, half=size["half"], norm=self._norm, eps=shape.norm_eps,
            best=best, pdl=self.pdl,
        ).launch()  # fmt: skip
        return logits, best

    # --- any number of rows: products by cuBLAS ---

    def many(
        self, x: Tensor, lengths: Tensor, blocks: Tensor, table_rows: Tensor | None, attend: Attend,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """All layers over x [M, D], in place: the end is the sum of what is returned.

        cuBLAS could add the residuals, and `add_norm` would move half as many bytes. On an H100 that was
        slower, for 4 x 2048 tokens of prompts and for a step that decodes 8 rows.

        Args:
            kept: [N] int32, rows whose end is wanted, in this order; None: all. Of the others the last layer
                computes keys and values alone.
        """
        shape, pdl = self.shape, self.pdl
        heads_of = self._heads(lengths, blocks, table_rows)
        normed, mixed = torch.empty_like(x), x.new_empty(len(x), shape.num_heads, shape.head_dim)
        active, width = x.new_empty(len(x), shape.ffn_size), shape.num_heads * shape.head_dim
        added = None
        norm = rotate = silu = None  # as compiled for the layer before
        for index, layer in enumerate(self.layers):
            heads = heads_of(index)
            into_attention = add_norm(x, added, layer.input_norm, normed, eps=shape.norm_eps, pdl=pdl)
            into_attention.launch(like=norm if index else None)
            if kept is None or index + 1 < len(self.layers):
                q = F.linear(normed, layer.qkv)
                rotate = rotate_and_store(q, heads, pdl=pdl).launch(like=rotate)
            else:
                rows = replace(heads, num_heads=0)
                rotate_and_store(F.linear(normed, layer.qkv[width:]), rows, pdl=pdl).launch()
                x, normed, mixed, active = (
                    x.index_select(0, kept), normed.index_select(0, kept), mixed[: len(kept)],
                    active[: len(kept)],
                )  # fmt: skip
                q = F.linear(normed, layer.qkv[:width])
                rotate_and_store(q, heads.of_rows(kept), pdl=pdl).launch()
            attend(index, q[:, :width].view(mixed.shape), mixed)
            added = F.linear(mixed.flatten(1), layer.out)
            into_ffn = add_norm(x, added, layer.ffn_norm, normed, eps=shape.norm_eps, pdl=pdl)
            norm = into_ffn.launch(like=norm)
            silu = silu_mul(F.linear(normed, layer.gate_up), active, pdl=pdl).launch(like=silu)
            added = F.linear(active, layer.down)
        assert added is not None
        return x, added

    def final_norm(self, x: Tensor, added: Tensor) -> Tensor:
        normed = torch.empty_like(x)
        if len(x):
            add_norm(x, added, self._norm, normed, eps=self.shape.norm_eps, pdl=self.pdl).launch()
        return normed

    def head(self, normed: Tensor) -> tuple[Tensor, Best]:
        """Logits [M, V] of normed [M, D], and the largest of each program."""
        logits = F.linear(normed, self.lm_head)
        wide = torch.empty_like(logits, dtype=torch.float32)
        best = self._best(len(logits), ceil(logits.shape[1] / SCAN))
        scan(logits, wide, best, pdl=self.pdl).launch()
        return wide, best

    def _heads(self, lengths: Tensor, blocks: Tensor, table_rows: Tensor | None) -> Callable[[int], Heads]:
        def of(layer: int) -> Heads:
            return Heads(
                self.cos, self.sin, self.cache[layer], blocks, lengths, table_rows, self.shape.num_heads,
                self.layers[layer].qk_norm, self.shape.norm_eps,
            )  # fmt: skip

        return of

    def _best(self, num_rows: int, programs: int) -> Best:
        return (
            torch.empty(num_rows, programs, dtype=torch.float32, device=self.cache.device),
            torch.empty(num_rows, programs, dtype=torch.int32, device=self.cache.device),
        )


def _merged(layer: Layer) -> _Layer:
    """The layer's weights, of which its parameters become views: two copies would not fit."""
    attend, mlp = layer.self_attn, layer.mlp
    norms = [norm.weight.data for norm in (attend.q_norm, attend.k_norm) if norm is not None]
    return _Layer(
        input_norm=layer.input_layernorm.weight.data,
        qk_norm=torch.stack(norms) if norms else None,
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
