"""The table of a pass: where the segments of a shard lie."""

import pytest
import torch

from optim.kernels.passes import BLOCK, SegmentTable


def build(*segments: tuple[int, int, int]) -> SegmentTable:
    """Segments as (source, target, numel)."""
    sources, targets, numels = zip(*segments, strict=True) if segments else ((), (), ())
    return SegmentTable.build(sources, targets, numels, device=torch.device("cpu"))


def test_segments_are_cut_into_blocks():
    size = BLOCK
    table = build((7, size, size + 3), (5, 9, 0), (0, 3, 2), (3 * size, 0, size))
    assert table.sources.tolist() == [7, 7 + size, 0, 3 * size]
    assert table.targets.tolist() == [size, 2 * size, 3, 0]
    assert table.numels.tolist() == [size, 3, 2, size]
    assert table.num_blocks.tolist() == [2, 0, 1, 1]
    assert (table.source_stop, table.target_stop) == (4 * size, 2 * size + 3)
    empty = build()
    assert (len(empty.sources), len(empty.num_blocks), empty.source_stop) == (0, 0, 0)


def test_a_table_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="one source, target and numel"):
        SegmentTable.build([0, 1], [0], [1], device=torch.device("cpu"))
    with pytest.raises(ValueError, match="negative"):
        build((0, -1, 4))
