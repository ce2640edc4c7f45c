"""Block 2, first part: every Triton kernel against fp64, on random data, into poisoned outputs.

Outputs are NaN before each launch and lie inside a frame of NaN, so an element that is not written and one
that is written beside the output are both seen. Errors are ‖found - exact‖ / ‖exact‖.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import nan

import torch
from torch import Tensor

from cluster.machine.triton_calls import INTERPRETED
from optim import polar
from optim.kernels.gpu import adamw_pass, apply_pass, momentum_pass, scale_pass, symmetric_product
from optim.kernels.passes import BLOCK, SegmentTable
from optim.precision import gram_dtype
from tests.gpu.block import Run, error_of, worst_of

# One rounding leaves at most half a unit in the last place. Triton's interpreter truncates: twice that.
HALF_UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-21}

# (matrices, rows, columns). On a GPU: small and large tiles, of sizes that 16 divides and that it does not.
# The last one comes through tensor descriptors on sm_90.
SIZES = {
    "cuda": ((2, 64, 192), (2, 33, 70), (1, 2048, 5504), (3, 1031, 2053), (3, 2048, 1000)),
    "cpu": ((2, 33, 70), (1, 64, 64)),
}
# Of the flat tensor (source, target in the packed buffer, numel): other orders, gaps, odd places, one empty.
SEGMENTS = ((1, 5203, 5000), (5003, 3, 0), (5003, 0, 1), (5010, 1, 2048), (7300, 2051, 2049), (9349, 5200, 3))
FLAT, PACKED = 9400, 10300
LARGE = {"cuda": 2**31 + 4099, "cpu": 3 * BLOCK + 5}  # elements of a flat tensor
TABLES = {"cuda": 206_045_184, "cpu": 3 * BLOCK + 5}  # elements
LARGE_BATCH = {"cuda": (129, 4096, 4096), "cpu": (3, 16, 16)}  # more than 2^31 elements, too
WINDOW = 1 << 26  # elements that are checked in fp64 at a time


def measure(run: Run) -> None:
    run.attempt(products, passes, orthogonalize, large_products, large_passes)


def tolerance(dtype: torch.dtype) -> float:
    return HALF_UNIT[dtype] * (2 if INTERPRETED else 1)


def framed(like: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer of NaN [B + 2, r + 2, c + 2] and the output inside it, laid out as `like` [B, r, c]."""
    tall = like.stride(-1) > like.stride(-2)
    sizes = [size + 2 for size in (like.mT if tall else like).shape]
    buffer = torch.full(sizes, nan, dtype=like.dtype, device=like.device)
    inside = buffer[1:-1, 1:-1, 1:-1]
    return buffer, inside.mT if tall else inside


@dataclass
class Worst:
    """The worst of several checks of one kernel."""

    error: float = 0.0
    unwritten: int = 0
    beside: int = 0

    def add(self, buffer: Tensor, found: Tensor, exact: Tensor) -> None:
        unwritten = int(found.isnan().sum())
        frame = buffer.numel() - found.numel()
        self.unwritten += unwritten
        self.beside += frame - (int(buffer.isnan().sum()) - unwritten)
        self.error = worst_of(self.error, error_of(found.nan_to_num(), exact))

    def report(self, run: Run, case: str, dtype: torch.dtype, **figures: float) -> None:
        limit = tolerance(dtype)
        wrong = []
        if not self.error <= limit:
            wrong.append(f"relative error {self.error:.2g} above {limit:.2g}")
        if self.unwritten:
            wrong.append(f"{self.unwritten} elements not written")
        if self.beside:
            wrong.append(f"{self.beside} elements written beside the output")
        run.row(
            case, problem="; ".join(wrong) or None, relative_error=self.error, tolerance=limit,
            unwritten_elements=self.unwritten, elements_beside=self.beside, **figures,
        )  # fmt: skip


# --- products -----------------------------------------------------------------------------------------------


def products(run: Run) -> None:
    """Wide without an addend and tall with one; fp16 on one size of each tile."""
    sizes = SIZES[run.device.type]
    for dtype, chosen in ((torch.bfloat16, sizes), (torch.float16, sizes[1:3])):
        for number, (batch, rows, cols) in enumerate(chosen):
            x = run.random(batch, rows, cols, dtype=dtype, seed=number)
            tall = x.mT.contiguous().mT
            of = f"{str(dtype).removeprefix('torch.')} {batch}x{rows}x{cols}"
            lower = run.random(batch, rows, rows, dtype=dtype, seed=100 + number).tril()
            upper_unread = lower + torch.full_like(lower, nan).triu(1)
            worst = Worst()
            for left, addend, alpha, beta in ((x, None, 1.0, 0.0), (tall, upper_unread, 0.5, -2.0)):
                buffer, out = framed(lower)
                symmetric_product(left, left, alpha=alpha, c=addend, beta=beta, out=out)
                half = (alpha * left.double() @ left.double().mT + beta * lower.double()).tril()
                worst.add(buffer, out, half + half.tril(-1).mT)
            worst.report(run, f"symmetric_product {of}", dtype)


def large_products(run: Run) -> None:
    """A batch of more than 2^31 elements: its first and last matrix, and that all are written."""
    batch, rows, cols = LARGE_BATCH[run.device.type]
    x = run.random(batch, rows, cols, dtype=torch.bfloat16)
    out = torch.full((batch, rows, rows), nan, dtype=x.dtype, device=x.device)
    symmetric_product(x, x, out=out)
    worst = Worst(unwritten=sum(int(matrix.isnan().sum()) for matrix in out))
    for index in (0, batch - 1):
        exact = x[index].double() @ x[index].double().mT
        worst.error = worst_of(worst.error, error_of(out[index], exact))
    worst.report(run, f"symmetric_product bfloat16 {batch}x{rows}x{cols}", x.dtype, elements=float(x.numel()))


def orthogonalize(run: Run) -> None:
    """`optim.polar` by the kernels against the same polynomials in fp64, in both forms."""
    square, wide = ((1, 2048, 2048), (1, 2048, 5504)) if run.gpu else ((1, 24, 24), (1, 24, 64))
    for name, size in (("standard form", square), ("Gram form", wide)):
        x = run.random(*size)
        found = polar.orthogonalize(x, method="polar_express", dtype=torch.bfloat16)
        exact = polar.orthogonalize(x.double(), method="polar_express", dtype=torch.float64)
        error, limit = error_of(found, exact), 0.08 if INTERPRETED else 0.04
        problem = None if error <= limit else f"relative error {error:.2g} above {limit:.2g}"
        products_in = str(gram_dtype(torch.bfloat16, run.device) if name[0] == "G" else torch.bfloat16)
        run.row(
            f"orthogonalize, {name}, {size[1]}x{size[2]}", problem=problem, relative_error=error,
            tolerance=limit, products_in=products_in.removeprefix("torch."),
        )  # fmt: skip


# --- passes -------------------------------------------------------------------------------------------------


def passes(run: Run) -> None:
    single, half = torch.float32, torch.bfloat16
    for source, packed, nesterov in (
        *product((single, half), (single, half), (True,)),
        (single, half, False),
    ):
        _momentum(run, source, packed, nesterov=nesterov)
    for update, model in product((single, half), (half, single, None)):
        _apply(run, update, model)
    for model in (torch.bfloat16, None):
        _adamw(run, model)
    for dtype in (torch.bfloat16, torch.float16):
        _scale(run, dtype)


def _table(run: Run) -> SegmentTable:
    sources, targets, numels = zip(*SEGMENTS, strict=True)
    return SegmentTable.build(sources, targets, numels, device=run.device)


def _momentum(run: Run, source: torch.dtype, packed: torch.dtype, *, nesterov: bool) -> None:
    beta = 0.95
    gradient, before = run.random(FLAT, dtype=source, seed=1), run.random(FLAT, seed=2)
    momentum = before.clone()
    out = torch.full((PACKED,), nan, dtype=packed, device=run.device)
    squares = torch.full((len(SEGMENTS),), nan, dtype=torch.float64, device=run.device)
    momentum_pass(gradient, momentum, out, squares, _table(run), beta=beta, nesterov=nesterov)
    exact = beta * before.double() + (1 - beta) * gradient.double()
    update = beta * exact + (1 - beta) * gradient.double() if nesterov else exact
    worst, wanted, place = Worst(), torch.full_like(out, nan, dtype=torch.float64), torch.zeros_like(before)
    for first, target, numel in SEGMENTS:
        wanted[target : target + numel] = update[first : first + numel]
        place[first : first + numel] = 1
    inside = ~wanted.isnan()
    worst.unwritten = int(out[inside].isnan().sum())
    worst.beside = int((~out[~inside].isnan()).sum() + (momentum != before)[place == 0].sum())
    worst.error = error_of(out[inside], wanted[inside])
    momentum_error = error_of(momentum[place == 1], exact[place == 1])
    sums = torch.stack([update[first : first + numel].square().sum() for first, _, numel in SEGMENTS])
    names = f"{_short(source)} to {_short(packed)}{', Nesterov' if nesterov else ''}"
    worst.report(
        run, f"momentum_pass {names}", packed, momentum_relative_error=momentum_error,
        squares_relative_error=error_of(squares, sums),
    )  # fmt: skip
    if not worst_of(momentum_error, error_of(squares, sums)) <= 1e-5:
        run.row(f"momentum_pass {names}", problem="momentum or its squares are wrong by more than 1e-5")


def _apply(run: Run, update_dtype: torch.dtype, model_dtype: torch.dtype | None) -> None:
    decay, factor, ahead = 0.9, 0.3, 19.0
    before, update = run.random(FLAT, seed=3), run.random(PACKED, dtype=update_dtype, seed=4)
    weight = before.clone()
    model = None if model_dtype is None else torch.full((FLAT,), nan, dtype=model_dtype, device=run.device)
    apply_pass(weight, update, _table(run), decay=decay, factor=factor, ahead=ahead, model=model)
    wanted = before.double()
    for first, target, numel in SEGMENTS:
        wanted[first : first + numel] *= decay
        wanted[first : first + numel] -= factor * update[target : target + numel].double()
    changed = wanted != before.double()
    worst = Worst(error=error_of(weight, wanted), beside=int((weight != before)[~changed].sum()))
    names = f"{_short(update_dtype)}, model {'none' if model_dtype is None else _short(model_dtype)}"
    worst.report(run, f"apply_pass {names}", torch.float32)
    if model is not None:
        point = wanted + ahead * (wanted - before.double())
        worst = Worst(
            unwritten=int(model[changed].isnan().sum()), beside=int((~model[~changed].isnan()).sum())
        )
        worst.error = error_of(model[changed], point[changed])
        worst.report(run, f"apply_pass {names}: the point ahead", model.dtype)


def _adamw(run: Run, model_dtype: torch.dtype | None) -> None:
    """The third step, on as many elements as the tables of the 1.4B model have."""
    numel, beta1, beta2, eps, decay, factor = TABLES[run.device.type], 0.9, 0.95, 1e-8, 0.9, 0.3
    weight, gradient, first = (run.random(numel, seed=seed) for seed in (7, 8, 9))
    second = run.random(numel, seed=10).square()
    model = None if model_dtype is None else torch.full((numel,), nan, dtype=model_dtype, device=run.device)

    def launch() -> None:
        adamw_pass(
            weight, gradient, first, second, beta1=beta1, beta2=beta2, eps=eps, step=3, decay=decay,
            factor=factor, model=model,
        )  # fmt: skip

    before = [each.double() for each in (weight, first, second)]
    launch()
    m = beta1 * before[1] + (1 - beta1) * gradient.double()
    v = beta2 * before[2] + (1 - beta2) * gradient.double().square()
    update = m / (1 - beta1**3) / ((v / (1 - beta2**3)).sqrt() + eps)
    exact = decay * before[0] - factor * update
    worst = Worst(error=worst_of(error_of(weight, exact), error_of(first, m), error_of(second, v)))
    rates = _rates(run, launch, num_bytes=(28 + (0 if model is None else model.itemsize)) * numel)
    case = f"adamw_pass, model {'none' if model_dtype is None else _short(model_dtype)}"
    worst.report(run, case, torch.float32, elements=float(numel), **rates)
    if model is not None:
        launch()  # _rates has moved the weights on
        worst = Worst(unwritten=int(model.isnan().sum()), error=error_of(model.nan_to_num(), weight))
        worst.report(run, f"{case}: the model", model.dtype)


def _scale(run: Run, dtype: torch.dtype) -> None:
    x = run.random(*((24, 2048, 5504) if run.gpu else (2, 30, 70)), dtype=torch.bfloat16, seed=11)
    factors, out = run.random(len(x), seed=12), torch.full_like(x, nan, dtype=dtype)
    scale_pass(x, factors, out=out)
    worst = Worst(unwritten=int(out.isnan().sum()))
    # Over all matrices: for 3 factors of 1000, all products of 8 bits round by more than the mean.
    worst.error = error_of(out.nan_to_num(), factors.double()[:, None, None] * x.double())
    rates = _rates(run, lambda: scale_pass(x, factors, out=out), num_bytes=4 * x.numel())
    worst.report(run, f"scale_pass bf16 to {_short(dtype)}", dtype, **rates)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def large_passes(run: Run) -> None:
    """Flat tensors whose last elements no 32-bit offset reaches. Every element is checked."""
    numel = LARGE[run.device.type]
    table = SegmentTable.build([0], [0], [numel], device=run.device)
    _large_momentum(run, numel, table)
    _large_apply(run, numel, table)


def _large_momentum(run: Run, numel: int, table: SegmentTable) -> None:
    beta = 0.9
    gradient = run.random(numel, dtype=torch.bfloat16, seed=5)
    momentum = torch.ones(numel, device=run.device)
    out = torch.full((numel,), nan, dtype=torch.bfloat16, device=run.device)
    squares = torch.full((1,), nan, dtype=torch.float64, device=run.device)

    def launch() -> None:
        momentum_pass(gradient, momentum, out, squares, table, beta=beta, nesterov=True)

    launch()
    worst, total = Worst(), torch.zeros((), dtype=torch.float64, device=run.device)
    for part in _windows(numel):
        g = gradient[part].double()
        exact = beta * (beta + (1 - beta) * g) + (1 - beta) * g  # the momentum was 1
        worst.unwritten += int(out[part].isnan().sum())
        worst.error = worst_of(worst.error, error_of(out[part].nan_to_num(), exact))
        total += exact.square().sum()
    squares_error = error_of(squares[0], total)
    rates = _rates(run, launch, num_bytes=12 * numel)  # gradient 2, momentum 4 + 4, out 2
    worst.report(
        run, "momentum_pass, a large flat tensor", out.dtype, elements=float(numel),
        squares_relative_error=squares_error, **rates,
    )  # fmt: skip
    if not squares_error <= 1e-5:
        run.row("momentum_pass, a large flat tensor", problem="its sum of squares is wrong")


def _large_apply(run: Run, numel: int, table: SegmentTable) -> None:
    weight = torch.ones(numel, device=run.device)
    update = run.random(numel, dtype=torch.bfloat16, seed=6)
    model = torch.full((numel,), nan, dtype=torch.bfloat16, device=run.device)

    def launch() -> None:
        apply_pass(weight, update, table, decay=0.9, factor=0.3, model=model)

    launch()
    worst, weight_error = Worst(), 0.0
    for part in _windows(numel):
        exact = 0.9 - 0.3 * update[part].double()
        worst.unwritten += int(model[part].isnan().sum())
        worst.error = worst_of(worst.error, error_of(model[part].nan_to_num(), exact))
        weight_error = worst_of(weight_error, error_of(weight[part], exact))
    rates = _rates(run, launch, num_bytes=12 * numel)  # weight 4 + 4, update 2, model 2
    worst.report(
        run, "apply_pass, a large flat tensor", model.dtype, elements=float(numel),
        weight_relative_error=weight_error, **rates,
    )  # fmt: skip
    if not weight_error <= 1e-5:
        run.row("apply_pass, a large flat tensor", problem="its weights are wrong")


def _rates(run: Run, launch: Callable[[], None], *, num_bytes: int) -> dict[str, float]:
    """Of a pass that moves so many bytes; none from the interpreter."""
    if not run.gpu:
        return {}
    gb_per_s = num_bytes / run.seconds_of(launch, repeats=5)[0] / 1e9
    return {"gb_per_s": gb_per_s, **run.of_memory(gb_per_s, measured="copy")}


def _windows(numel: int) -> Iterator[slice]:
    for start in range(0, numel, WINDOW):
        yield slice(start, min(start + WINDOW, numel))
