"""Parameters, rules and layouts over which the fused step is tried."""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.rules import (
    adamw,
    aurora,
    ema_nesterov,
    mars,
    muon,
    muon_eq,
    muon_plus,
    normuon,
    paired,
    scion,
    sgd,
    signum,
    transported,
    warm_started,
)
from optim.step import fused
from optim.step.fragments import Fragment

NUM_STEPS, LR = 3, 0.02


PARAMETERS = {  # name -> rows of its blocks, columns
    "a": ((12,), 12),
    "b": ((12,), 12),
    "c": ((12,), 12),
    "wide": ((6,), 20),
    "tall": ((20,), 6),
    "oblong": ((9,), 7),
    "qkv_proj": ((12, 4, 4), 12),
    "q_proj": ((4, 4, 4), 12),
    "row": ((1,), 5),
    "column": ((3,), 1),
}


FP32 = {"weight_decay": 0.1, "dtype": torch.float32}


RULES = {
    "muon": muon(**FP32),
    "muon-bf16": warm_started(muon(weight_decay=0.1)),
    "muon-plain": muon(momentum=0.8, nesterov=False, method="jordan", update_scale="rms", **FP32),
    "adamw": adamw(weight_decay=0.1),
    "normuon": normuon(**FP32),
    "normuon-larger": transported(normuon(lines="larger", cautious=True, **FP32), cap=2.0),
    "normuon-column": normuon(lines="column", divisor="max", length="kept", polar_steps=7, **FP32),
    "muon_plus": muon_plus(lines="column_row", **FP32),
    "muon_eq": muon_eq(**FP32),
    "aurora": aurora(**FP32),
    "mars": mars(**FP32),
    "paired": paired(adamw(weight_decay=0.1)),
    "ema_nesterov": ema_nesterov(muon(**FP32), ramp_steps=4, velocity_decay=0.5),
    "scion": scion(radius=3.0, constrained=True, dtype=torch.float32),
    "scion-column": scion(norm="column", **FP32),
    "scion-sign": scion(norm="sign", **FP32),
    "transported": transported(warm_started(scion(**FP32)), peak_lr=0.3),
    "transported-capped": transported(
        scion(norm="frobenius:rms", dtype=torch.float32), cap=2.5, ramp_steps=5
    ),
    "transported-sign": transported(scion(norm="sign:plain", **FP32)),
    "sgd": sgd(weight_decay=0.1),
    "signum": signum(weight_decay=0.1),
}


@dataclass(frozen=True)
class StepCase:
    """One layout of PARAMETERS over the ranks.

    Attributes:
        cut: "random" (borders anywhere, any number of ranks, in any order), "flat" (end to end: ZeRO 1 and
            2), "equal" (each in equal pieces: ZeRO 3), "alone" (all on the last rank), "replicated".
        flats: whether the pieces lie in "one" flat tensor or in "many", one each.
        missing: parameters without a gradient.
        model: dtype of what the model computes with.
        chunk: elements of a pass; a small number puts many into one piece.
        staged: as if the matrices were computed on another device, with a few elements in each copy there.
    """

    cut: str
    seed: int = 0
    rule: str = "muon"
    flats: str = "one"
    missing: tuple[str, ...] = ()
    chunk: int = fused.CHUNK_ELEMENTS
    inspect: bool = False
    model: torch.dtype = torch.float32
    staged: bool = False


def numel(name: str) -> int:
    blocks, cols = PARAMETERS[name]
    return sum(blocks) * cols


def drawn(name: str, seed: int, scale: float) -> Tensor:
    """The same numbers on every rank and in the oracle."""
    generator = torch.Generator().manual_seed(1000 * seed + list(PARAMETERS).index(name))
    return torch.randn(numel(name), generator=generator) * scale


def weight(name: str) -> Tensor:
    return drawn(name, 0, 0.3)


def gradient(name: str, case: StepCase, step: int) -> Tensor | None:
    """Of very different size from one parameter and step to the next, as gradients are."""
    if name in case.missing:
        return None
    scale = 10.0 ** (list(PARAMETERS).index(name) % 4 - 3 + step)
    return drawn(name, 1 + step + 10 * case.seed, scale)


def holdings(case: StepCase, world_size: int) -> dict[str, list[tuple[int, int]]]:
    """Name -> the range that every rank holds."""
    draw = random.Random(f"{case.cut} {case.seed} {world_size}")
    total, position, found = sum(map(numel, PARAMETERS)), 0, {}
    for name in PARAMETERS:
        size = numel(name)
        if case.cut == "replicated":
            found[name] = [(0, size)] * world_size
            continue
        if case.cut == "random":
            count = draw.randint(1, world_size)
            edges = [0, *sorted(draw.randint(0, size) for _ in range(count - 1)), size]
            pieces = [*itertools.pairwise(edges), *[(size, size)] * (world_size - count)]
            draw.shuffle(pieces)
        else:
            piece = {"flat": -(-total // world_size), "equal": -(-size // world_size), "alone": size}[
                case.cut
            ]
            first = position if case.cut == "flat" else 0
            edges = [min(max(piece * rank - first, 0), size) for rank in range(world_size + 1)]
            pieces = list(itertools.pairwise(edges))
            if case.cut == "alone":
                pieces = [(0, 0)] * (world_size - 1) + [(0, size)]
        found[name] = pieces
        position += size
    return found


def lay_out(case: StepCase, world_size: int, rank: int) -> list[Fragment]:
    """This rank's pieces in flat tensors that are NaN elsewhere, so that reading beyond a piece shows."""
    fragments, offset, place = [], 0, {}
    held = {name: ranges[rank] for name, ranges in holdings(case, world_size).items()}
    for index, (name, (start, stop)) in enumerate(held.items()):
        offset = index % 3 + (offset if case.flats == "one" else 0)
        place[name] = (offset, offset + stop - start)
        offset += stop - start
    shared, models = torch.full((offset + 2,), torch.nan), {}
    for name, (start, stop) in held.items():
        flat = shared if case.flats == "one" else torch.full((place[name][1],), torch.nan)
        flat.data[slice(*place[name])] = weight(name)[start:stop]
        model = models.setdefault(id(flat), torch.full_like(flat.data, torch.nan, dtype=case.model))
        flat.requires_grad_()
        fragments.append(Fragment(name, *PARAMETERS[name], start, stop, flat, place[name][0], model))
    return fragments


def set_gradients(fragments: list[Fragment], case: StepCase, step: int) -> None:
    for fragment in fragments:
        fragment.flat.grad = None
    for fragment in fragments:
        whole = gradient(fragment.name, case, step)
        if whole is None and (case.flats == "many" or len(case.missing) == len(PARAMETERS)):
            continue
        if fragment.flat.grad is None:
            fragment.flat.grad = torch.full_like(fragment.flat, torch.nan)
        part = torch.zeros(numel(fragment.name)) if whole is None else whole
        fragment.view(fragment.flat.grad).copy_(part[fragment.start : fragment.stop])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
