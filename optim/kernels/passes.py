"""What a pass over a shard takes, whoever runs it: where the segments lie, and checks of the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # elements of a pass that one program handles


@dataclass(frozen=True)
class SegmentTable:
    """Segments of a flat tensor and their places in a packed buffer, cut into blocks. Int64 tensors.

    Attributes:
        sources, targets, numels: [blocks], of each block its first element in the flat tensor and in the
            buffer, and how many elements it has: at most BLOCK.
        num_blocks: [segments], how many blocks each segment was cut into.
        source_stop, target_stop: how long the flat tensor and the buffer are at least.
    """

    sources: Tensor
    targets: Tensor
    numels: Tensor
    num_blocks: Tensor
    source_stop: int
    target_stop: int

    @classmethod
    def build(
        cls, sources: Sequence[int], targets: Sequence[int], numels: Sequence[int], *, device: torch.device
    ) -> SegmentTable:
        """Segment s is elements [sources[s], + numels[s]) of the flat and [targets[s], + numels[s]) packed.

        Segments may be empty, and start anywhere; two must not overlap.

        Raises:
            ValueError: the lists differ in length, or hold a negative number.
        """
        require(len(sources) == len(targets) == len(numels), "one source, target and numel for each segment")
        require(min([0, *sources, *targets, *numels]) == 0, "negative offset or size of a segment")
        table = torch.tensor([sources, targets, numels], dtype=torch.int64).view(3, -1)
        num_blocks = (table[2] + BLOCK - 1) // BLOCK
        first = num_blocks.cumsum(0) - num_blocks
        segments = torch.repeat_interleave(torch.arange(len(numels)), num_blocks)
        inside = (torch.arange(len(segments)) - first[segments]) * BLOCK
        per_block = table[:, segments]
        return cls(
            sources=(per_block[0] + inside).to(device),
            targets=(per_block[1] + inside).to(device),
            numels=(per_block[2] - inside).clamp_max(BLOCK).to(device),
            num_blocks=num_blocks.to(device),
            source_stop=max(map(sum, zip(sources, numels, strict=True)), default=0),
            target_stop=max(map(sum, zip(targets, numels, strict=True)), default=0),
        )

    def sum_blocks(self, values: Tensor, *, out: Tensor) -> None:
        """Write to `out` [segments] the sum of `values` [blocks] over each segment's blocks."""
        sums = torch.segment_reduce(values, "sum", lengths=self.num_blocks, unsafe=True, initial=0.0)
        out[: len(sums)].copy_(sums)


def check_momentum_pass(
    gradient: Tensor, momentum: Tensor, out: Tensor, squares: Tensor, table: SegmentTable
) -> None:
    """Raises `ValueError` as `momentum_pass` says."""
    _check_flat(table.source_stop, gradient=gradient, momentum=momentum)
    _check_flat(table.target_stop, out=out)
    _check_flat(len(table.num_blocks), squares=squares)
    require(gradient.dtype in (torch.bfloat16, torch.float32), "gradient must be bf16 or fp32")
    require(momentum.dtype == torch.float32, "momentum must be fp32")
    require(squares.dtype == torch.float64, "squares must be fp64")


def check_apply_pass(weight: Tensor, update: Tensor, table: SegmentTable, model: Tensor | None) -> None:
    """Raises `ValueError` as `apply_pass` says."""
    _check_flat(table.source_stop, weight=weight)
    _check_flat(table.target_stop, update=update)
    if model is not None:
        _check_flat(table.source_stop, model=model)
        require(model.dtype in (torch.bfloat16, torch.float32), "model must be bf16 or fp32")
    require(weight.dtype == torch.float32, "weight must be fp32")


def check_adamw_pass(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, model: Tensor | None
) -> None:
    """Raises `ValueError` as `adamw_pass` says."""
    _check_flat(len(weight), weight=weight, gradient=gradient, first=first, second=second)
    require(gradient.dtype in (torch.bfloat16, torch.float32), "gradient must be bf16 or fp32")
    for name, tensor in (("weight", weight), ("first", first), ("second", second)):
        require(tensor.dtype == torch.float32, f"{name} must be fp32")
    if model is not None:
        _check_flat(len(weight), model=model)
        require(model.dtype in (torch.bfloat16, torch.float32), "model must be bf16 or fp32")


def _check_flat(least: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.dim() == 1 and tensor.is_contiguous(), f"{name} must be flat and contiguous")
        require(len(tensor) >= least, f"{name} has {len(tensor)} elements, the table needs {least}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
