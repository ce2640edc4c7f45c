"""Whole optimizer steps in one process, in turns: ours and torch.optim.Muon, from the same gradients.

torch.optim.Muon multiplies in bf16 on any device. A CPU without bf16 arithmetic takes about 100 times as long
for that as for fp32. There it is left out, and ours are compared with our own in torch, in fp32 throughout.

Every contender starts from zero weights, so the first step leaves its bare update in them. By that the race
makes sure that all do the same work.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cluster.measure.turns import turns
from optim.kernels import native
from optim.precision import product_dtype
from optim.rules import muon
from optim.step.fragments import Fragment
from optim.step.fused import FusedStep

Shapes = Sequence[tuple[int, int]]

LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.95, 0.1
WARM_UP_ROUNDS = 3  # allocations and rising clocks
GEMM_REPEATS = 20  # the first ones find cold caches and low clocks


@dataclass
class StepRace:
    """Seconds of a whole step, by contender, one per round; and by how much first updates differ.

    Attributes:
        peer: the contender that ours are compared with: "torch_muon", or "torch_fp32" where that is left out.
        difference: ‖ours - peer‖ / ‖peer‖ over all matrices.
    """

    seconds: dict[str, list[float]]
    peer: str
    difference: float


def gemm_gflops(shapes: Shapes, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> float:
    """GFLOP/s of one product P·X per matrix, all matrices of one shape at once: best of GEMM_REPEATS.

    In `dtype`, or what is multiplied in its place on this device (`optim.precision`).
    """
    flops, seconds = 0, 0.0
    dtype = product_dtype(dtype, device)
    for rows, cols in dict.fromkeys(shapes):
        short, count = min(rows, cols), shapes.count((rows, cols))
        x = torch.randn(count, short, max(rows, cols), device=device).to(dtype)
        p = torch.randn(count, short, short, device=device).to(dtype)
        flops += 2 * count * short * rows * cols
        multiply = functools.partial(torch.bmm, p, x)
        seconds += min(_seconds(multiply, device) for _ in range(GEMM_REPEATS))
    return flops / seconds / 1e9


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products are worth doing in bf16 there, so that peers who insist on it can take part."""
    return product_dtype(torch.bfloat16, device) == torch.bfloat16


def compiled_step() -> str:
    """The tier of the compiled step that ours runs in on this CPU, such as "AVX2"; or why it does without."""
    reason = native.unsupported(torch.device("cpu"), torch.bfloat16)
    return native.describe() if reason is None else f"not used: {reason}"


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `action`, with what it leaves on the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def race_steps(
    shapes: Shapes, methods: Mapping[str, str], *, num_rounds: int, device: torch.device
) -> StepRace:
    """Whole optimizer steps on fp32 weights, in turns.

    Args:
        methods: contender -> its name in `optim.polar.METHODS`. One is "ours", by "jordan": the same
            polynomials as in the peer.
    """
    numel = sum(rows * cols for rows, cols in shapes)
    gradient = torch.randn(numel, generator=torch.Generator(device).manual_seed(0), device=device)
    contenders = {name: _ours(shapes, gradient, method) for name, method in methods.items()}
    if multiplies_bf16(device):
        peer, contenders["torch_muon"] = "torch_muon", _torch_muon(shapes, gradient)
    else:
        peer, contenders["torch_fp32"] = "torch_fp32", _ours(shapes, gradient, "jordan", dtype=torch.float32)

    for step, _ in contenders.values():
        step()
    [flat], theirs = contenders["ours"][1], contenders[peer][1]
    pieces = flat.split([each.numel() for each in theirs])
    differences = [(ours - each.view(-1)).norm() for ours, each in zip(pieces, theirs, strict=True)]
    difference = torch.stack(differences).norm() / torch.stack([each.norm() for each in theirs]).norm()

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-WARM_UP_ROUNDS, num_rounds):
        for name in turns(list(contenders), number):
            taken = _seconds(contenders[name][0], device)
            if number >= 0:
                seconds[name].append(taken)
    return StepRace(seconds, peer, difference.item())


Stepper = tuple[Callable[[], Any], Sequence[Tensor]]  # what takes a step, and the weights


def _ours(shapes: Shapes, gradient: Tensor, method: str, *, dtype: torch.dtype = torch.bfloat16) -> Stepper:
    """The matrices end to end in one flat tensor, as a shard holds them; updates and products in `dtype`."""
    flat, offset, fragments = torch.zeros_like(gradient), 0, []
    flat.grad = gradient
    for index, (rows, cols) in enumerate(shapes):
        numel = rows * cols
        fragments.append(Fragment(f"matrix {index}", (rows,), cols, 0, numel, flat, offset))
        offset += numel
    rule = muon(
        momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, method=method, update_scale="jordan", dtype=dtype
    )
    fused = FusedStep(rule, fragments, device=flat.device)
    return functools.partial(fused.step, lr=LR), [flat]


def _torch_muon(shapes: Shapes, gradient: Tensor) -> Stepper:
    weights = [nn.Parameter(torch.zeros(shape, device=gradient.device)) for shape in shapes]
    sizes = [weight.numel() for weight in weights]
    for weight, part in zip(weights, gradient.split(sizes), strict=True):
        weight.grad = part.view_as(weight)
    optimizer = torch.optim.Muon(
        weights, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, adjust_lr_fn="original"
    )
    return optimizer.step, [weight.detach() for weight in weights]
