"""The compiled step against its formulas in fp64, and what happens without a compiler."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cluster.machine import compiled
from optim import cost, polar
from optim.kernels import native
from optim.rules import adamw
from tests.commands import ROOT
from tests.guard import NO_BF16
from tests.optim.kernels.test_passes import build

CPU = torch.device("cpu")


def in_each_tier(test: Callable[..., None]) -> Callable[..., None]:
    """In each that this code is compiled for."""
    return pytest.mark.usefixtures("tier")(pytest.mark.parametrize("tier", native.TIERS, indirect=True)(test))


METHODS = polar.METHODS
# Edges of the panels of 32 and of the tiles of 16 pairs; "long" ones get the Gram form.
SIZES = [(1, 1), (5, 3), (31, 33), (32, 32), (33, 34), (40, 47), (64, 64), (65, 96), (97, 70)]
LONG = [(1, 70), (3, 5), (31, 65), (32, 64), (33, 200), (64, 100), (40, 257)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Gaussian matrices in bf16, each of Frobenius norm 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x / torch.linalg.matrix_norm(x, keepdim=True)).bfloat16()


def exact(x: torch.Tensor, method: str) -> torch.Tensor:
    """The method's polynomials in fp64."""
    return polar._standard_form(x.double(), METHODS[method].coefficients)


def form(shape: tuple[int, int]) -> dict[str, int]:
    return {"restart": cost.GRAM_RESTART} if cost.uses_gram(*shape) else {}


def distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative, of each matrix of a batch."""
    norm = torch.linalg.matrix_norm
    return norm(found.double() - expected) / norm(expected)


@in_each_tier
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("shape", SIZES + LONG)
@pytest.mark.parametrize("method", METHODS)
def test_any_size_is_as_near_to_the_polynomials_as_torchs_own_bf16(method, shape, tall):
    """Measured: half of its distance for most. The median, as a Gaussian matrix may be nearly singular."""
    shape = shape[::-1] if tall else shape
    x, coefficients = random(15, *shape), METHODS[method].coefficients
    in_torch = polar._gram_form if form(shape) else polar._standard_form
    usual = distance(in_torch(x, coefficients), exact(x, method))
    found = native.orthogonalize_(x.clone(), coefficients, **form(shape))
    assert distance(found, exact(x, method)).median() <= usual.median() + 0.002


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("tier", ["AVX2"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_in_fp32_the_gram_form_needs_no_restart(method):
    """Measured: 0.002 (jordan), 0.003 and 0.005 (cans, rank one) of the norm from the polynomials in fp64.

    The smallest values of these spectra are lost in the rounding of the Gram matrix.
    """
    index, generator = torch.arange(1, 65, dtype=torch.float64), torch.Generator().manual_seed(0)
    spectra = torch.stack(
        [index**-1, index**-2, index**-6, torch.exp(-index / 4), *(index <= i for i in (1, 8))]
    )
    left, right = (
        torch.linalg.qr(torch.randn(6, size, 64, dtype=torch.float64, generator=generator)).Q
        for size in (64, 200)
    )
    x = (left * (spectra / spectra.norm(dim=1, keepdim=True))[:, None]) @ right.mT
    x = x.bfloat16()
    found = native.orthogonalize_(x.clone(), METHODS[method].coefficients, **form((64, 200)))
    assert distance(found, exact(x, method)).max() < 0.01


@in_each_tier
@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
def test_each_matrix_of_a_batch_is_its_own_whatever_the_threads(shape):
    x, coefficients = random(7, *shape), METHODS["jordan"].coefficients
    x[3] = 0
    apart = [native.orthogonalize_(each[None].clone(), coefficients, **form(shape)) for each in x]
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            together = native.orthogonalize_(x.clone(), coefficients, **form(shape))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(together, torch.cat(apart))
    assert not together[3].any()


@in_each_tier
@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
def test_factors_are_those_of_matrices_rounded_once(shape):
    x, coefficients = random(3, *shape), METHODS["jordan"].coefficients
    factors = torch.tensor([0.3, 1.0, 0.7])
    scaled = (x.float() * factors[:, None, None]).bfloat16()
    expected = native.orthogonalize_(scaled, coefficients, **form(shape))
    assert torch.equal(native.orthogonalize_(x, coefficients, factors=factors, **form(shape)), expected)


@in_each_tier
@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
def test_not_a_number_goes_through_and_stays_in_its_matrix(shape):
    x, coefficients = random(3, *shape), METHODS["jordan"].coefficients
    clean = native.orthogonalize_(x.clone(), coefficients, **form(shape))
    x[1, 3, 4] = torch.nan
    found = native.orthogonalize_(x, coefficients, **form(shape))
    assert found[1].isnan().all()
    assert torch.equal(found[0], clean[0]) and torch.equal(found[2], clean[2])


@in_each_tier
def test_nothing_is_written_beside_the_matrices():
    space = torch.full((3, 33 * 70 + 200), 7.0).bfloat16()
    for shape in ((33, 34), (33, 70), (70, 33)):
        numel = shape[0] * shape[1]
        space[1, 100 : 100 + numel] = random(*shape).view(-1)
        x = space[1, 100 : 100 + numel].view(1, *shape)
        native.orthogonalize_(x, METHODS["jordan"].coefficients, **form(shape))
        space[1, 100 : 100 + numel] = 7
        assert (space == 7).all()


@in_each_tier
def test_operands_that_do_not_fit_are_an_error():
    x, coefficients = random(2, 4, 5), METHODS["jordan"].coefficients
    for wrong in (x.float(), x[0], x.mT, x[:, ::2]):
        with pytest.raises(ValueError, match="contiguous batch of bf16"):
            native.orthogonalize_(wrong, coefficients)
    for wrong in (torch.ones(3), torch.ones(2).double(), torch.ones(4)[::2]):
        with pytest.raises(ValueError, match="factors must be one number in fp32 for each matrix"):
            native.orthogonalize_(x, coefficients, factors=wrong)
    for restart in (0, -1, 5, 9):
        with pytest.raises(ValueError, match=f"restart: {restart} must lie between"):
            native.orthogonalize_(x, coefficients, restart=restart)


# Offsets in the flat tensor and in the packed buffer, in other orders, with gaps, at odd places; one empty.
SEGMENTS = ((1, 5203, 5000), (5003, 3, 0), (5003, 0, 1), (5010, 1, 2048), (7300, 2051, 2049), (9349, 5200, 3))
FLAT, PACKED = 9400, 10300


def values(size: int, *, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@in_each_tier
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.95])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 1e-25), (torch.bfloat16, 1e25)]
)
def test_the_momentum_pass(dtype, scale, beta, nesterov):
    gradient, before = (values(FLAT, seed=0) * scale).to(dtype), values(FLAT, seed=1) * scale
    momentum, out = before.clone(), torch.full((PACKED,), torch.nan).bfloat16()
    squares = torch.full((len(SEGMENTS),), torch.nan, dtype=torch.float64)
    native.momentum_pass(gradient, momentum, out, squares, build(*SEGMENTS), beta=beta, nesterov=nesterov)

    wide = gradient.double()
    exact = beta * before.double() + (1 - beta) * wide
    update = beta * exact + (1 - beta) * wide if nesterov else exact
    flat, packed = torch.zeros(FLAT, dtype=torch.bool), torch.zeros(PACKED, dtype=torch.bool)
    for (source, target, numel), square in zip(SEGMENTS, squares, strict=True):
        flat[source : source + numel] = packed[target : target + numel] = True
        wanted, got = update[source : source + numel], out[target : target + numel].double()
        assert ((got - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6 * scale).all()
        torch.testing.assert_close(square, wanted.square().sum(), rtol=1e-6, atol=0.0)
    assert ((momentum - exact)[flat].abs() <= 1e-6 * scale).all()
    assert torch.equal(momentum[~flat], before[~flat])
    assert torch.equal(out.isnan(), ~packed)
    if beta == 0:
        assert torch.equal(momentum[flat], gradient.float()[flat])


@in_each_tier
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("ahead", [0.0, 19.0])
def test_the_apply_pass(model_dtype, ahead):
    before, update = values(FLAT, seed=0), values(PACKED, seed=1, dtype=torch.bfloat16)
    weight = before.clone()
    model = None if model_dtype is None else torch.full((FLAT,), torch.nan, dtype=model_dtype)
    native.apply_pass(weight, update, build(*SEGMENTS), decay=0.9, factor=0.3, ahead=ahead, model=model)

    flat = torch.zeros(FLAT, dtype=torch.bool)
    for source, target, numel in SEGMENTS:
        place = slice(source, source + numel)
        flat[place] = True
        exact = 0.9 * before[place].double() - 0.3 * update[target : target + numel].double()
        assert ((weight[place] - exact).abs() <= 1e-6).all()
    assert torch.equal(weight[~flat], before[~flat])
    if model is not None:
        point = weight[flat].double() + ahead * (weight[flat].double() - before[flat].double())
        unit = 2**-8 if model_dtype == torch.bfloat16 else 1e-6
        assert ((model[flat] - point).abs() <= unit * point.abs() + 1e-5).all()
        assert model[~flat].isnan().all()


@in_each_tier
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, None])
def test_the_adamw_pass_is_the_rule_s_step(dtype, model_dtype):
    """To the bit but at the ends of torch's own pieces, where it rounds some products once more."""
    size, step, rule = 10_001, 7, adamw(weight_decay=0.1)
    gradient, weight = values(size, seed=0, dtype=dtype), values(size, seed=1)
    state = {"first_moment": 0.1 * values(size, seed=2), "second_moment": values(size, seed=3).square()}
    found, first, second = weight.clone(), *(each.clone() for each in state.values())
    model = None if model_dtype is None else torch.empty(size, dtype=model_dtype)
    end = rule.finish(lr=0.01, scale=1.0, step=step)
    native.adamw_pass(
        found, gradient, first, second, step=step, **vars(rule.direction),
        decay=end.decay, factor=end.factor, model=model,
    )  # fmt: skip
    rule.apply(weight, rule.direction(gradient.float(), state, step=step), lr=0.01, step=step, state=state)
    for ours, torchs in ((first, state["first_moment"]), (second, state["second_moment"]), (found, weight)):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)
        assert (ours == torchs).float().mean() > 0.99
    if model is not None:
        assert torch.equal(model, found.to(model.dtype))


@in_each_tier
@pytest.mark.parametrize("size", [1, 31, 5003])
def test_a_gradient_is_added_to_the_bit_as_torch_adds_it(size):
    total, gradient = values(size, seed=0), values(size, seed=1, dtype=torch.bfloat16)
    expected = total + gradient
    native.add(total, gradient)
    assert torch.equal(total, expected)


@in_each_tier
def test_numbers_are_rounded_to_bf16_as_torch_rounds_them():
    """Ties, values next to them, what rounds to infinity, and NaN; not numbers too small to be normal."""
    exact = torch.tensor([1.0, -3.0, 2.0**-126, 1e30, torch.finfo(torch.bfloat16).max, torch.inf])
    halfway = exact.view(torch.int32) | 0x8000  # of infinity: NaN, by bits that bf16 drops
    patterns = torch.cat([halfway - 1, halfway, halfway + 1]).view(torch.float32)
    weight = torch.cat([patterns, -patterns, values(10_000, seed=0)])
    found, before = torch.empty(len(weight)).bfloat16(), weight.clone()
    nothing = torch.zeros(len(weight)).bfloat16()
    native.apply_pass(weight, nothing, build((0, 0, len(weight))), decay=1.0, factor=0.0, model=found)
    expected = before.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@in_each_tier
@pytest.mark.parametrize("threads", [1, 3])
def test_where_a_shard_is_cut_changes_no_bit(threads):
    """Ranks cut matrices anywhere; a resumed run may cut them elsewhere."""
    gradient, start = values(5000, seed=0), values(5000, seed=1)
    pieces = [(0, 0, 5000)], [(a, a, b - a) for a, b in pairwise((0, 1, 17, 40, 2048, 2049, 4500, 5000))]
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for table in (build(*segments) for segments in pieces):
            weight, momentum, out = start.clone(), start.clone(), torch.zeros(5000).bfloat16()
            squares = torch.zeros(9, dtype=torch.float64)
            native.momentum_pass(gradient, momentum, out, squares, table, beta=0.95, nesterov=True)
            native.apply_pass(weight, out, table, decay=0.99, factor=0.1)
            found.append((weight, momentum, out))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@in_each_tier
def test_passes_over_what_does_not_fit_are_an_error():
    table, flat, squares = build((1, 2, 3)), torch.zeros(4), torch.zeros(1, dtype=torch.float64)
    packed = torch.zeros(5).bfloat16()
    for message, wrong in (
        ("gradient has 3 elements", {"gradient": flat[:3]}),
        ("gradient must be bf16 or fp32", {"gradient": flat.double()}),
        ("momentum must be fp32", {"momentum": flat.bfloat16()}),
        ("products of torch.float32", {"out": packed.float()}),
        ("squares must be fp64", {"squares": squares.float()}),
    ):
        right = {"gradient": flat, "momentum": flat, "out": packed, "squares": squares}
        with pytest.raises(ValueError, match=message):
            native.momentum_pass(**right | wrong, table=table, beta=0.9, nesterov=True)
    for message, wrong in (
        ("update has 4 elements", {"update": packed[:4]}),
        ("products of torch.float32", {"update": packed.float()}),
        ("weight must be fp32", {"weight": flat.bfloat16()}),
        ("model must be bf16 or fp32", {"model": flat.half()}),
    ):
        with pytest.raises(ValueError, match=message):
            native.apply_pass(**{"weight": flat, "update": packed} | wrong, table=table, decay=1, factor=1)


def what_runs() -> tuple[str | None, str | None, float]:
    """The tier, why there is no library, and the norm of orthogonalised matrices."""
    x = torch.randn(2, 40, 90, generator=torch.Generator().manual_seed(0))
    y = polar.orthogonalize(x, method="jordan", dtype=torch.bfloat16)
    return native.tier(), native.unsupported(CPU, torch.bfloat16), y.float().norm().item()


def what_runs_with(**environment: str) -> tuple[str, str, float]:
    """The same in a process of its own: torch reads its variables when it is imported."""
    program = "from tests.optim.kernels.test_native import what_runs\nprint(*what_runs(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    tier, reason, norm = done.stdout.splitlines()
    return tier, reason, float(norm)


def test_what_is_missing_is_said_and_torch_does_the_work(tmp_path, monkeypatch):
    """No compiler, one that fails, a folder that cannot be made, the switch, and torch's own for its CPU."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    file = tmp_path / "file"
    file.write_text("")
    _, _, usual = what_runs()
    supported = compiled.lacks("AVX2") is None
    for name, value, reason in (
        ("ASUNCION_NATIVE", "0", "ASUNCION_NATIVE=0 turned it off"),
        ("CXX", "no-such-compiler", "no C++ compiler: no-such-compiler is not on the path"),
        ("CXX", str(broken), "failed: x.cpp:1: error: no such flag"),
        ("XDG_CACHE_HOME", str(file), "native.cpp cannot be compiled or loaded"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            patch.setattr(compiled, "_load", compiled._load.__wrapped__)  # not what it said before
            _, said, norm = what_runs()
        assert reason in said or not supported
        assert norm == pytest.approx(usual, rel=0.05)
    _, said, norm = what_runs_with(ATEN_CPU_CAPABILITY="default")
    assert "torch's CPU capability is DEFAULT, below AVX2" in said or not supported
    assert norm == pytest.approx(usual, rel=0.05)


def test_the_variables_that_make_torch_do_with_avx2_choose_that_tier():
    if reason := compiled.lacks("AVX2"):
        pytest.skip(reason)
    tier, _, norm = what_runs_with(**NO_BF16)
    assert tier == "AVX2"
    assert norm == pytest.approx(what_runs()[2], rel=0.05)


def test_another_kind_of_cpu_is_the_reason(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    reason = "this CPU is aarch64, and the compiled code is for x86-64 with AVX2"
    assert {compiled.lacks(tier) for tier in compiled.TIERS} == {reason}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert compiled.choose_tier.__wrapped__() == (None, reason)


@pytest.mark.parametrize(
    ("capability", "has", "tier"),
    [
        ("AVX512", ["AMX BF16", "AVX-512 BF16", "AVX2"], "AMX BF16"),
        ("AVX512", ["AVX-512 BF16", "AVX2"], "AVX-512 BF16"),
        ("AVX512", ["AVX2"], "AVX2"),  # AVX-512 without BF16
        ("AVX2", ["AVX-512 BF16", "AVX2"], "AVX2"),
        ("AVX2", ["AVX2"], "AVX2"),
        ("AVX2", [], None),
        ("DEFAULT", ["AVX-512 BF16", "AVX2"], None),
    ],
)
def test_the_best_tier_is_chosen_that_the_cpu_has_and_torch_may_use(capability, has, tier, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(compiled, "lacks", lambda tier: None if tier in has else f"this CPU has no {tier}")
    found, reason = compiled.choose_tier.__wrapped__()
    assert found == tier and (reason is None) == (tier is not None)


def test_a_library_is_compiled_anew_for_another_tier_or_header(tmp_path, monkeypatch):
    """Else a machine would go on with what an older checkout, or a better CPU, left in the cache."""
    if (compiler := shutil.which("g++")) is None or platform.machine() != "x86_64":
        pytest.skip("no g++ for x86-64")
    source, header = tmp_path / "lanes.cpp", tmp_path / "simd.h"
    source.write_text('#include "simd.h"\nextern "C" long lanes_of_a_vector() { return WIDTH; }\n')
    header.write_bytes(compiled.HEADER.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "HEADER", header)

    def made() -> list[Path]:
        return [
            compiled._compiled(source, compiler, (*compiled.FLAGS, *each)) for each in compiled.TIERS.values()
        ]

    first = made()
    assert made() == first and len(set(first)) == len(compiled.TIERS)
    with header.open("a") as stream:
        stream.write("// changed\n")
    assert not set(made()) & set(first)
    for path, tier in zip(first, compiled.TIERS, strict=True):
        if compiled.lacks(tier) is None:
            assert ctypes.CDLL(str(path)).lanes_of_a_vector() == (8 if tier == "AVX2" else 16)


def test_other_devices_and_dtypes_stay_with_torch():
    assert native.unsupported(torch.device("meta"), torch.bfloat16) == "meta is no CPU"
    assert native.unsupported(CPU, torch.float32) == "products of torch.float32 stay with torch"


@in_each_tier
@pytest.mark.parametrize("shape", [(33, 33), (33, 90), (90, 33)])
def test_orthogonalize_uses_it_and_overwrites_only_what_it_may(shape, monkeypatch):
    calls = []
    product = native.orthogonalize_
    monkeypatch.setattr(native, "orthogonalize_", lambda *a, **k: calls.append(k) or product(*a, **k))
    x = 7 * random(2, *shape)
    before = x.clone()
    found = polar.orthogonalize(x, method="jordan", dtype=torch.bfloat16)
    assert torch.equal(x, before)
    wide = polar.orthogonalize(x.float(), method="jordan", dtype=torch.bfloat16)
    assert torch.equal(wide, found)  # rounded once, however it is brought to norm 1
    over = polar.orthogonalize(x, method="jordan", dtype=torch.bfloat16, overwrite=True)
    assert over is x and torch.equal(over, found)
    assert [call["restart"] for call in calls] == [2 if max(shape) == 90 else None] * 3


def test_with_amx_torch_multiplies_and_the_passes_are_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "choose_tier", lambda: (compiled.TILES, None))
    monkeypatch.setattr(native, "orthogonalize_", None)
    assert native.tier() == "AVX-512 BF16" and native.products_by_onednn()
    assert native.describe() == "used (AVX-512 BF16, products by oneDNN with AMX)"
    x = torch.randn(1, 16, 32).bfloat16()
    found = polar.orthogonalize(x, method="polar_express", dtype=torch.bfloat16)
    assert (found.float() @ found.float().mT - torch.eye(16)).norm() / 4 < 0.3
