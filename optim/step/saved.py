"""What a run saves of its optimizer: masters, state and points, by parameter and element.

The elements are counted in the parameter, so that a run resumes at another world size or ZeRO stage.
"""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from optim.step.fragments import Fragment, rank_and_world_size
from optim.step.fused import FusedStep

MASTER = "master"  # name of the fp32 weights beside a rule's state names
POINT = "point"  # and of the point that a rule looks ahead to, in the model's precision


def shards(units: Iterable[FusedStep], *, replicated: bool) -> Iterator[tuple[str, int, dict[str, Tensor]]]:
    """As `ZeroOptimizer.shards`. Of replicated parameters each rank saves an equal share."""
    rank, world_size = rank_and_world_size()
    for unit in units:
        for fragment in unit.fragments:
            share = slice(None)
            start, numel = fragment.start, fragment.stop - fragment.start
            if replicated:
                share = slice(numel * rank // world_size, numel * (rank + 1) // world_size)
                start, numel = share.start, share.stop - share.start
            if numel:
                tensors = _tensors(unit, fragment)
                yield fragment.name, start, {name: t[share] for name, t in tensors.items()}
        yield from unit.line_states()


def load(
    units: Iterable[FusedStep], read: Callable[[str, str, int, int], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Restore masters and state. Returns (tensor, content) of the points, not written yet.

    Refreshing the model's weights would overwrite the points, so whoever does that writes them afterwards.
    """
    points = []
    for unit in units:
        for fragment in unit.fragments:
            for name, tensor in _tensors(unit, fragment).items():
                content = read(fragment.name, name, fragment.start, fragment.stop)
                if name == POINT:
                    points.append((tensor, content))
                else:
                    tensor.copy_(content)
        for parameter, first, lines in unit.line_states():
            for name, tensor in lines.items():
                tensor.copy_(read(parameter, name, first, first + len(tensor)))
    return points


def copy_points(units: Iterable[FusedStep]) -> list[tuple[Tensor, Tensor]]:
    """(model's copy of a shard, its content now) of every unit whose rule looks ahead."""
    ahead = [unit for unit in units if unit.rule.looks_ahead]
    models = {id(f.model): f.model for unit in ahead for f in unit.fragments if f.model is not None}
    return [(model, model.clone()) for model in models.values()]


def _tensors(unit: FusedStep, fragment: Fragment) -> dict[str, Tensor]:
    """Views of the fragment's master weights, state and point, by name."""
    tensors = {MASTER: fragment.view(fragment.flat.data), **unit.state_of(fragment)}
    if unit.rule.looks_ahead:
        assert fragment.model is not None
        tensors[POINT] = fragment.view(fragment.model)
    return tensors
