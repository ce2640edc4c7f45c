"""The Triton kernels without a GPU: compiled for each one that has tiles, and run by the interpreter.

Triton decides at its import whether kernels are interpreted, so a second pytest in its own process runs the
 functions named `interpreted_*`. The interpreter truncates where a GPU rounds a cast to bf16.
"""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cluster.machine import toolchain
from optim import polar, rules
from optim.kernels import gpu, product
from optim.kernels.gpu import apply_pass, momentum_pass, symmetric_product
from optim.step.fragments import Fragment
from optim.step.fused import FusedStep
from tests.commands import ROOT
from tests.compiled_kernels import compiled, problems, run_interpreted
from tests.optim.kernels import interpreted_products
from tests.optim.kernels.interpreted_products import assert_rounded_once, random
from tests.optim.kernels.test_passes import build

INSTRUCTIONS = {  # of a product: tensor cores, rounding to nearest, asynchronous copies, wide stores
    (8, 6): ("mma.sync", "cvt.rn", "cp.async", "st.global.v4"),
    (9, 0): ("wgmma", "cvt.rn", "cp.async", "st.global.v4"),
}

each_capability = pytest.mark.parametrize("capability", product.TILES)


@pytest.mark.stack
@each_capability
def test_every_variant_fits_the_gpu_and_uses_its_tensor_cores(capability, tmp_path):
    found = {}
    for name, call in gpu.variants(capability).items():
        kernel = compiled(call, capability)
        found[name] = problems(kernel, capability, tmp_path)
        if "TILE_K" in call.arguments:
            wanted = INSTRUCTIONS[capability]
            found[name] += [f"no {each}" for each in wanted if each not in kernel.asm["ptx"]]
    assert len(found) == 41
    assert {name: text for name, text in found.items() if text} == {}


@each_capability
def test_the_variants_have_every_tile(capability):
    def tile(call):
        sizes = [call.arguments[f"TILE_{side}"] for side in "MNK"]
        return product.Tile(*sizes, warps=call.warps, stages=call.stages)

    products = [call for call in gpu.variants(capability).values() if "TILE_K" in call.arguments]
    tiles = product.TILES[capability]
    assert {tile(call) for call in products} == {tiles.small, tiles.large, tiles.described} - {None}


def test_a_tile_that_does_not_fit_is_seen(tmp_path):
    call = gpu.variants((8, 6))["XXᵀ, wide torch.bfloat16 4096"]
    assert problems(compiled(replace(call, stages=5), (8, 6)), (8, 6), tmp_path) == [
        "131072 bytes of shared memory"
    ]
    narrow = compiled(replace(call, warps=2), (8, 6))
    assert re.fullmatch(r"\d+ bytes spilled", problems(narrow, (8, 6), tmp_path)[-1])


# --- where the kernels run ----------------------------------------------------------------------------------


def why_not(device: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    return gpu.unsupported.__wrapped__(torch.device(device), dtype)


def test_a_cpu_is_named_as_the_reason():
    assert why_not("cpu") == "cpu is no CUDA device"
    x = torch.ones(1, 2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="cpu is no CUDA device"):
        symmetric_product(x, x)


def test_a_machine_without_a_gpu_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_not("cuda") == f"torch {torch.__version__} finds no CUDA device"


def test_a_gpu_runs_half_precision_if_it_has_tiles(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(toolchain, "missing", lambda: None)
    device = {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device["capability"])
    for device["capability"] in product.TILES:
        assert why_not("cuda") is why_not("cuda", torch.float16) is None
        assert why_not("cuda", torch.float32) == "products of torch.float32 stay with torch"
    monkeypatch.setattr(toolchain, "missing", lambda: "Triton needs a C compiler: `apt install gcc`")
    assert why_not("cuda") == "Triton needs a C compiler: `apt install gcc`"
    device["capability"] = (7, 5)
    assert why_not("cuda") == "there are tiles for compute capability (8, 6), (9, 0), not (7, 5)"
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls its devices "cuda", too
    assert "finds no CUDA device" in why_not("cuda")


IMPORT_WITHOUT_TRITON = '''
import sys

class WithoutTriton:
    """As if it were not installed: importlib.util.find_spec, which torch asks, answers None."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(WithoutTriton, sys.meta_path)
import torch
from optim import polar, rules; from optim.step import fused; from optim.kernels import gpu, product

print(gpu.unsupported(torch.device("cuda"), torch.bfloat16))
print(polar.orthogonalize(torch.eye(2)[None], method="cans", dtype=torch.float32).shape)
'''


def test_the_module_imports_without_triton():
    command = [sys.executable, "-c", IMPORT_WITHOUT_TRITON]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["triton cannot be imported: No module named 'triton'", "torch.Size([1, 2, 2])"]


# --- what is checked before a launch ------------------------------------------------------------------------


def test_operands_that_do_not_fit_are_an_error():
    meta = torch.device("meta")
    x, p = torch.empty(2, 3, 5, device=meta), torch.empty(2, 3, 3, device=meta)

    def multiply(a, b, c=None, out=p):
        product.call(a, b, c, out, 1.0, 0.0, 0.0, capability=(8, 6))

    multiply(x, x)
    for wrong in (
        lambda: multiply(x, p),
        lambda: multiply(x, x.mT),
        lambda: multiply(x, x, c=x),
        lambda: multiply(x, x, out=x),
        lambda: multiply(x, x, out=p[:1]),
        lambda: multiply(x, x, c=p.half()),
        lambda: multiply(x, torch.empty(2, 3, 5)),
    ):
        with pytest.raises(ValueError, match=r"symmetric|the product is|differ"):
            wrong()


def test_flat_tensors_that_do_not_fit_are_an_error():
    table = build((1, 2, 3))
    flat, packed, squares = torch.zeros(4), torch.zeros(5), torch.zeros(1, dtype=torch.float64)

    def momentum(gradient=flat, momentum=flat, out=packed, squares=squares):
        momentum_pass(gradient, momentum, out, squares, table, beta=0.9, nesterov=True)

    def apply(weight=flat, update=packed, model=None):
        apply_pass(weight, update, table, decay=1.0, factor=1.0, model=model)

    for function, name, wrong, message in (
        (momentum, "gradient", flat[:3], "gradient has 3 elements, the table needs 4"),
        (momentum, "momentum", flat.double(), "momentum must be fp32"),
        (momentum, "out", packed[:4], "out has 4 elements, the table needs 5"),
        (momentum, "squares", squares.float(), "squares must be fp64"),
        (momentum, "squares", squares[:0], "squares has 0 elements"),
        (apply, "weight", flat.bfloat16(), "weight must be fp32"),
        (apply, "weight", torch.zeros(8)[::2], "weight must be flat and contiguous"),
        (apply, "update", packed.view(1, 5), "update must be flat and contiguous"),
        (apply, "model", flat[1:], "model has 3 elements"),
        (apply, "model", flat.half(), "model must be bf16 or fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            function(**{name: wrong})


def test_what_descriptors_cannot_hold_stays_with_pointers():
    x = torch.empty(64, 520, 520, dtype=torch.bfloat16, device="meta")
    kernels = [
        product.call(
            each, each, None, each.new_empty(len(each), 520, 520), 1.0, 0.0, 0.0, capability=capability
        ).kernel
        for each, capability in (
            (x, (9, 0)), (x.mT, (9, 0)), (x, (8, 6)), (x[..., ::2], (9, 0)), (x[..., 1:], (9, 0)),
            (x.new_empty(64, 520, 523), (9, 0)), (x[:1], (9, 0)),
        )
    ]  # fmt: skip
    assert kernels == [product._described_product_kernel] * 2 + [product._product_kernel] * 5


# --- by the interpreter -------------------------------------------------------------------------------------


@pytest.mark.stack
def test_the_kernels_compute_what_they_say():
    run_interpreted(__file__, interpreted_products.__file__, passes=62)


# Offsets in the flat tensor and in the packed buffer, in other orders, with gaps, at odd places; one empty.
SEGMENTS = ((1, 5203, 5000), (5003, 3, 0), (5003, 0, 1), (5010, 1, 2048), (7300, 2051, 2049), (9349, 5200, 3))
FLAT, PACKED = 9400, 10300


def covered(length: int, place: int) -> torch.Tensor:
    """Which elements of the flat tensor (place 0) or of the buffer (place 1) belong to a segment."""
    mask = torch.zeros(length, dtype=torch.bool)
    for segment in SEGMENTS:
        mask[segment[place] : segment[place] + segment[2]] = True
    return mask


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.95])
@pytest.mark.parametrize(
    ("dtypes", "scale"),
    [
        ((torch.float32, torch.bfloat16), 1.0),
        ((torch.bfloat16, torch.float32), 1.0),
        ((torch.float32, torch.float32), 1e-25),
        ((torch.bfloat16, torch.bfloat16), 1e25),
    ],
)
def interpreted_momentum_pass(dtypes, scale, beta, nesterov):
    gradient = (random(FLAT, dtype=torch.float32, seed=0) * scale).to(dtypes[0])
    before = random(FLAT, dtype=torch.float32, seed=1) * scale
    momentum, out = before.clone(), torch.full((PACKED,), torch.nan, dtype=dtypes[1])
    squares = torch.full((len(SEGMENTS),), torch.nan, dtype=torch.float64)
    momentum_pass(gradient, momentum, out, squares, build(*SEGMENTS), beta=beta, nesterov=nesterov)

    exact = beta * before.double() + (1 - beta) * gradient.double()
    update = beta * exact + (1 - beta) * gradient.double() if nesterov else exact
    mask = covered(FLAT, 0)
    assert torch.equal(momentum[~mask], before[~mask])
    assert ((momentum - exact)[mask].abs() <= 1e-6 * scale).all()
    assert torch.equal(out.isnan(), ~covered(PACKED, 1))
    for (source, target, numel), square in zip(SEGMENTS, squares, strict=True):
        wanted = update[source : source + numel]
        got = out[target : target + numel]
        assert_rounded_once(got, wanted, torch.full_like(wanted, scale))
        torch.testing.assert_close(square, wanted.square().sum(), rtol=1e-6, atol=0.0)
    if beta == 0:
        assert torch.equal(momentum[mask], gradient.float()[mask])


def interpreted_momentum_pass_of_nothing():
    flat, squares = torch.zeros(3), torch.full((2,), torch.nan, dtype=torch.float64)
    momentum_pass(flat, flat, flat, squares, build((0, 0, 0), (3, 3, 0)), beta=0.9, nesterov=True)
    assert squares.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("ahead", [0.0, 19.0])
def interpreted_apply_pass(update_dtype, model_dtype, ahead):
    before, update = random(FLAT, dtype=torch.float32, seed=0), random(PACKED, dtype=update_dtype, seed=1)
    weight = before.clone()
    model = None if model_dtype is None else torch.full((FLAT,), torch.nan, dtype=model_dtype)
    apply_pass(weight, update, build(*SEGMENTS), decay=0.9, factor=0.3, ahead=ahead, model=model)

    mask = covered(FLAT, 0)
    assert torch.equal(weight[~mask], before[~mask])
    for source, target, numel in SEGMENTS:
        old, change = before[source : source + numel].double(), update[target : target + numel].double()
        assert ((weight[source : source + numel] - (0.9 * old - 0.3 * change)).abs() <= 1e-6).all()
    if model is not None:
        new = weight[mask].double()
        point = new + ahead * (new - before[mask].double())
        assert_rounded_once(model[mask], point, torch.full_like(new, ahead))
        assert model[~mask].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def interpreted_scale_pass(dtype):
    x = random(3, 50, 70, dtype=torch.bfloat16, seed=0)
    factors, out = random(3, dtype=torch.float32, seed=1), torch.full((3, 50, 70), torch.nan, dtype=dtype)
    for given, exact in ((factors, factors[:, None, None].double() * x.double()), (None, x.double())):
        gpu.scale_pass(x, given, out=out)
        assert_rounded_once(out, exact, torch.ones_like(exact))
    with pytest.raises(ValueError, match="contiguous"):
        gpu.scale_pass(x.mT, None, out=out.mT)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, None])
def interpreted_adamw(model_dtype, monkeypatch):
    """The step in one pass is the step chunk by chunk; nothing beside the fragment is written."""

    def stepped() -> dict[str, torch.Tensor]:
        flat = random(5000, dtype=torch.float32, seed=0)
        model = None if model_dtype is None else torch.zeros(5000, dtype=model_dtype)
        place = Fragment("a", (70,), 70, 0, 4900, flat, 50, model)
        unit = FusedStep(rules.adamw(weight_decay=0.1), [place], device=torch.device("cpu"))
        for step in range(3):
            flat.grad = random(5000, dtype=torch.float32, seed=1 + step)
            unit.step(lr=0.1)
        return {"flat": flat, **unit.states[0]} | ({} if model is None else {"model": model.float()})

    launches = []
    launch = gpu.adamw_pass
    monkeypatch.setattr(gpu, "adamw_pass", lambda *a, **k: launches.append(1) or launch(*a, **k))
    found = stepped()
    assert len(launches) == 3
    monkeypatch.setattr(gpu, "unsupported", lambda device, dtype: "for comparison")
    for name, tensor in stepped().items():
        bound = 2**-7 if name == "model" and model_dtype == torch.bfloat16 else 1e-6  # truncated
        assert (found[name] - tensor).norm() <= bound * tensor.norm(), name
        assert torch.equal(found[name][:50], tensor[:50]) and torch.equal(found[name][4950:], tensor[4950:])


STEPPED = {"weight_decay": 0.1, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("rule", "model_dtype"),
    [
        (rules.muon(**STEPPED), None),
        (rules.normuon(**STEPPED), torch.bfloat16),
        (rules.transported(rules.scion(**STEPPED)), torch.float32),
        (rules.transported(rules.scion(**STEPPED)), torch.bfloat16),
        (rules.ema_nesterov(rules.muon(**STEPPED)), torch.float32),
    ],
)
def interpreted_fused_step(rule, model_dtype, monkeypatch):
    """The step by kernels is the step chunk by chunk, which a rule with another end than theirs keeps."""

    def stepped() -> dict[str, torch.Tensor]:
        flat = random(700, dtype=torch.float32, seed=0).requires_grad_()
        model = None if model_dtype is None else torch.zeros(700, dtype=model_dtype)
        shapes, offsets = {"a": ((20,), 12), "b": ((6, 6), 30)}, {"a": 3, "b": 280}
        unit = FusedStep(
            rule,
            [
                Fragment(name, blocks, cols, 0, sum(blocks) * cols, flat, offsets[name], model)
                for name, (blocks, cols) in shapes.items()
            ],
            device=torch.device("cpu"),
        )
        for step in range(3):
            flat.grad = random(700, dtype=torch.float32, seed=1 + step)
            unit.step(lr=0.1)
        return {"flat": flat.detach(), **unit.states[0]} | ({} if model is None else {"model": model.float()})

    passes = []
    for name in ("momentum_pass", "apply_pass"):
        launch = getattr(gpu, name)
        counted = lambda *a, launch=launch, **k: passes.append(1) or launch(*a, **k)  # noqa: E731
        monkeypatch.setattr(gpu, name, counted)
    found = stepped()
    assert len(passes) == (0 if rule.not_compiled else 2 * 2 * 3)  # two shapes, three steps
    monkeypatch.setattr(gpu, "unsupported", lambda device, dtype: "for comparison")
    expected = stepped()
    for name, tensor in expected.items():
        bound = 2**-7 if name == "model" and model_dtype == torch.bfloat16 else 1e-5  # truncated
        assert (found[name] - tensor).norm() <= bound * tensor.norm(), name


# Truncation, of the scaled input too, more than doubles what test_polar measured between bf16 products that
# are rounded at different places.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", [(72, 150), (150, 72), (72, 80)])
def interpreted_orthogonalize(shape, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda: True)
    products = []
    monkeypatch.setattr(
        gpu, "symmetric_product", lambda *a, **k: products.append(1) or symmetric_product(*a, **k)
    )
    x = random(2, *shape, dtype=torch.float32, seed=0)
    result = polar.orthogonalize(x, method="polar_express", dtype=dtype)
    assert len(products) >= 10  # two in each of five iterations, and more in the Gram form
    monkeypatch.setattr(gpu, "unsupported", lambda device, dtype: "for comparison")
    expected = polar.orthogonalize(x, method="polar_express", dtype=dtype)
    assert result.dtype == dtype and result.shape == x.shape
    assert (result.double() - expected.double()).norm() < tolerance * expected.double().norm()


def interpreted_gram_form_in_fp16(monkeypatch):
    """Every product mirrored: low ranks stay near the polynomials' band, and a Gaussian near fp64."""
    monkeypatch.setattr(polar, "gram_dtype", lambda dtype, device: torch.float16)
    x = random(3, 32, 80, dtype=torch.float32, seed=0)
    for rank in (1, 2):
        x[rank] = random(32, rank, dtype=torch.float32, seed=1) @ random(
            rank, 80, dtype=torch.float32, seed=2
        )
    result = polar.orthogonalize(x, method="polar_express", dtype=torch.bfloat16)
    exact = polar.orthogonalize(x.double(), method="polar_express", dtype=torch.float64)
    errors = (result - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert errors[0] < 0.01 and errors.max() < 0.06, errors


def interpreted_groups(monkeypatch):
    """Matrices are iterated some at a time, each as if it were alone; and may be written in their place."""
    x = random(3, 8, 10, dtype=torch.float32, seed=0)
    whole = polar.orthogonalize(x, method="jordan", dtype=torch.float32)
    monkeypatch.setattr(polar, "GROUP_BYTES", 2 * 4 * (2 * 8 * 10 + 2 * 8**2))
    assert polar._group_size(x, torch.float32) == 2
    assert polar.orthogonalize(x, method="jordan", dtype=torch.float32, overwrite=True) is x
    assert torch.equal(x, whole)


def interpreted_support():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert why_not("cpu", dtype) is None
    assert why_not("cpu", torch.float64) == "products of torch.float64 stay with torch"
