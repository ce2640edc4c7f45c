"""What a step measures of itself: seconds by phase, and how good its updates are."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PHASES = ("start", "exchange", "orthogonalize", "finish")


@dataclass
class Health:
    """What one step measured on this rank.

    Attributes:
        device: whose time is taken.
        seconds: phase -> seconds. "start" and "finish" are the passes over the shard, "exchange" is waiting
            for what travels, "orthogonalize" is the rule on whole matrices. On a GPU filled by `read`.
        transforms: matrices that went through the rule here.
        errors: of each owned matrix, ‖OOᵀ - I‖_F / √n of its update O before scaling; only under a rule that
            means to orthogonalise.
        mean_squares: of each owned matrix, the mean square of its update after scaling.
        layers: owned matrix -> "update_rms" and "orthogonality_error", from the same numbers.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    transforms: int = 0
    errors: list[float] = field(default_factory=list)
    mean_squares: list[float] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    _marks: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a block: by the clock, or on a GPU by events on its stream, which nobody waits for yet."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((phase, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        """`seconds`, after waiting for what is still on the GPU's stream."""
        for phase, begin, end in self._marks:
            end.synchronize()
            self._add(phase, begin.elapsed_time(end) / 1e3)
        self._marks = []
        return self.seconds

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def inspect(self, update: Tensor, scale: float, *, orthogonal: bool, names: Sequence[str]) -> None:
        """Add the mean square, and the orthogonality error if asked, of each update [B, r, c].

        names: of the B matrices.
        """
        squares = torch.linalg.vector_norm(update, dim=(-2, -1), dtype=torch.float32).square()
        mean_squares = (squares * scale**2 / update[0].numel()).tolist()
        self.mean_squares += mean_squares
        self.layers |= {
            name: {"update_rms": square**0.5} for name, square in zip(names, mean_squares, strict=True)
        }
        if orthogonal:
            short = update.float()
            short = short.mT if short.size(-2) > short.size(-1) else short
            gram = short @ short.mT
            gram.diagonal(dim1=-2, dim2=-1).sub_(1)
            errors = (torch.linalg.matrix_norm(gram) / gram.size(-1) ** 0.5).tolist()
            self.errors += errors
            for name, error in zip(names, errors, strict=True):
                self.layers[name]["orthogonality_error"] = error


def over_all_ranks(steps: Sequence[Health], device: torch.device) -> dict[str, float]:
    """The steps of all units and ranks taken together; collective.

    Keys: "orthogonalisations", over all ranks; "<phase>_seconds" for each of PHASES, of the slowest rank. If
    the updates were inspected: "orthogonality_error" (‖OOᵀ - I‖_F / √n, mean over the matrices under rules
    that mean to orthogonalise), its "_max", and "update_rms" (of the scaled updates, over all matrices).
    """
    timed = [health.read() for health in steps]
    seconds = [sum(phases.get(phase, 0.0) for phases in timed) for phase in PHASES]
    errors = [error for health in steps for error in health.errors]
    squares = [square for health in steps for square in health.mean_squares]
    transforms = sum(health.transforms for health in steps)
    counted = [transforms, len(errors), sum(errors), len(squares), sum(squares)]
    largest = torch.tensor([*seconds, max(errors, default=0.0)], dtype=torch.float64).to(device)
    sums = torch.tensor(counted, dtype=torch.float64).to(device)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        dist.all_reduce(sums)
    *slowest, largest_error = largest.tolist()
    total_transforms, num_errors, total_error, num_squares, total_square = sums.tolist()
    found = {"orthogonalisations": total_transforms}
    found |= {f"{phase}_seconds": value for phase, value in zip(PHASES, slowest, strict=True)}
    if num_errors:
        found["orthogonality_error"] = total_error / num_errors
        found["orthogonality_error_max"] = largest_error
    if num_squares:
        found["update_rms"] = (total_square / num_squares) ** 0.5
    return found


def layers_of_all_ranks(steps: Sequence[Health]) -> dict[str, dict[str, float]]:
    """Matrix -> its values in `Health.layers`, of all units and ranks, layer by layer; collective.

    Empty unless the step was inspected. It gathers objects, some 100 bytes a matrix.
    """
    mine = {name: values for health in steps for name, values in health.layers.items()}
    everyone = [mine]
    if dist.is_initialized():
        everyone = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    found = {name: values for part in everyone for name, values in part.items()}
    return {name: found[name] for name in sorted(found, key=_by_number)}


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
