"""A layer's cache in pages, filled for a test, and attention over it in fp64."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.engine.scheduler import BLOCK_TOKENS, num_blocks


class Pages:
    """A layer's cache with random tokens of some requests, in blocks in random order; NaN everywhere else.

    Attributes:
        cache: [2, blocks, K, BLOCK_TOKENS, C].
        blocks: [requests, N] int32; at least one block of each request is not used.
    """

    def __init__(
        self, lengths: Sequence[int], *, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)
        width = max(map(num_blocks, lengths)) + 1
        size = (2, len(lengths) * width + 1, num_kv_heads, BLOCK_TOKENS, head_dim)
        self.cache = torch.full(size, torch.nan, dtype=dtype, device=device)
        order = torch.randperm(size[1], generator=generator, device=device)
        self.blocks = order[1:].view(len(lengths), width).int()
        self._tokens = [
            torch.randn(2, num_kv_heads, length, head_dim, generator=generator, device=device).to(dtype)
            for length in lengths
        ]
        for row, tokens in zip(self.blocks.tolist(), self._tokens, strict=True):
            for block, part in zip(row, tokens.split(BLOCK_TOKENS, dim=2), strict=False):
                self.cache[:, block, :, : part.shape[2]] = part

    def exact(self, request: int, q: Tensor, start: int) -> Tensor:
        """[T, H, C] fp64: attention of q [T, H, C] at positions from `start` on."""
        keys, values = self._tokens[request][:, :, : start + len(q)].double()
        places = torch.arange(keys.shape[1], device=q.device)
        visible = places <= places[start:, None]
        queries = q.double().transpose(0, 1)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible, enable_gqa=True
        ).transpose(0, 1)
