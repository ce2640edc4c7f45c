"""Norms and their oracles: by brute force, by Hölder's inequality, against torch.linalg and against Scion."""

from math import sqrt

import pytest
import torch

from optim.geometry import NORMS, SCION, norm_for, parse_norm
from optim.polar import METHODS, orthogonalize
from tests.optim.test_polar import BANDS

SHAPES = {"tall": (9, 5), "wide": (5, 9), "square": (7, 7)}
SPECTRA = {"gaussian": None, "power": 1.0}  # else the exponent p of singular values i^-p
EXPONENTS = ("1", "1.25", "2", "3", "4", "16", "inf")
ALL = (*NORMS, *(f"schatten:{p}" for p in EXPONENTS))


each_norm = pytest.mark.parametrize("text", ALL)


def matrix(shape: str | tuple[int, int], spectrum: str, *, seed: int = 0) -> torch.Tensor:
    """fp64 [1, r, c] with Haar-random singular vectors and the named spectrum."""
    rows, cols = SHAPES[shape] if isinstance(shape, str) else shape
    gaussian = random((1, rows, cols), seed=seed)
    if SPECTRA[spectrum] is None:
        return gaussian
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    return u * torch.arange(1, min(rows, cols) + 1, dtype=torch.float64) ** -SPECTRA[spectrum] @ vh


def random(shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a, b> of each pair of matrices, in fp64."""
    return (a.double() * b.double()).sum((-2, -1))


def rivals(text: str, best: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Matrices of norm 1: dense, of rank one, sparse, and around `best` at distances from 1e-6 to 1."""
    count, (rows, cols) = 600, best.shape[-2:]
    noise = random((count, rows, cols), seed=seed)
    rank_one = random((count, rows, 1), seed=seed + 1) * random((count, 1, cols), seed=seed + 2)
    sparse = noise * (random((count, rows, cols), seed=seed + 3) > 1)
    near = best + best.abs().amax() * noise * torch.logspace(-6, 0, count, dtype=torch.float64)[:, None, None]
    every = torch.cat([noise, rank_one, sparse[sparse.abs().amax((-2, -1)) > 0], near])
    return every / parse_norm(text).value(every)[:, None, None]


@each_norm
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_attains_the_dual_norm_and_nothing_in_the_ball_beats_it(text, spectrum, shape):
    norm, s = parse_norm(text), matrix(shape, spectrum)
    lmo, dual = norm.lmo(s), norm.dual(s)
    torch.testing.assert_close(norm.value(lmo), torch.ones(1, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(inner(s, -lmo), dual, rtol=1e-12, atol=0)
    torch.testing.assert_close(norm.direction(s), -lmo, rtol=0, atol=0)
    others = rivals(text, lmo, seed=1)
    assert len(others) > 2000
    assert (inner(s, others) >= inner(s, lmo) - 1e-12 * dual).all()
    # The brute force is not blind: among the rivals around the optimum some come near to it.
    assert inner(s, others).min() < -0.99 * dual


@each_norm
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_norm_and_hoelders_inequality_holds(text, shape):
    norm = parse_norm(text)
    x, y = (random((500, *SHAPES[shape]), seed=seed) for seed in (2, 3))
    assert (inner(x, y).abs() <= norm.dual(x) * norm.value(y) * (1 + 1e-12)).all()
    for length in (norm.value, norm.dual):
        assert (length(x + y) <= length(x) + length(y) + 1e-9).all()
        torch.testing.assert_close(length(-3 * x), 3 * length(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dual_of_the_dual_is_the_norm(shape):
    """Of Schatten norms both are in the family: ‖·‖_q is the dual of ‖·‖_p."""
    x = random((20, *SHAPES[shape]), seed=4)
    for p, q in (("1", "inf"), ("2", "2"), ("4", repr(4 / 3)), ("1.25", "5"), ("3", "1.5")):
        one, other = parse_norm(f"schatten:{p}"), parse_norm(f"schatten:{q}")
        torch.testing.assert_close(one.dual(x), other.value(x), rtol=1e-12, atol=0)
        torch.testing.assert_close(other.dual(x), one.value(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_duals_are_those_of_torch_and_of_the_papers(shape):
    rows, cols = SHAPES[shape]
    x = random((6, rows, cols), seed=5)
    operator, nuclear, frobenius = (torch.linalg.matrix_norm(x, ord=order) for order in (2, "nuc", "fro"))
    row_norms, column_norms = x.square().sum(-1).sqrt(), x.square().sum(-2).sqrt()
    largest, total = x.abs().amax((-2, -1)), x.abs().sum((-2, -1))
    ratio = sqrt(rows / cols)
    expected = {
        "spectral": (operator / ratio, nuclear * ratio),
        "spectral:input": (operator / max(1, ratio), nuclear * max(1, ratio)),
        "spectral:plain": (operator, nuclear),
        "schatten:inf": (operator, nuclear),
        "schatten:1": (nuclear, operator),
        "schatten:2": (frobenius, frobenius),
        "schatten:4": ((torch.linalg.svdvals(x) ** 4).sum(-1) ** 0.25, None),
        "frobenius": (frobenius, frobenius),
        "frobenius:rms": (x.square().mean((-2, -1)).sqrt(), frobenius * sqrt(rows * cols)),
        "sign": (largest * cols, total / cols),
        "sign:plain": (largest, total),
        "column": (x.square().mean(-2).sqrt().amax(-1), column_norms.sum(-1) * sqrt(rows)),
        "column:normalized": (
            x.square().mean(-2).sqrt().amax(-1) * cols,
            column_norms.sum(-1) * sqrt(rows) / cols,
        ),
        "column:embedding": (x.square().mean(-1).sqrt().amax(-1), row_norms.sum(-1) * sqrt(cols)),
        "row": (row_norms.amax(-1) * sqrt(cols), row_norms.sum(-1) / sqrt(cols)),
        "row:plain": (row_norms.amax(-1), row_norms.sum(-1)),
        "row:embedding": (column_norms.amax(-1), column_norms.sum(-1)),
    }
    assert set(NORMS) <= set(expected)
    for text, (value, dual) in expected.items():
        torch.testing.assert_close(parse_norm(text).value(x), value, rtol=1e-12, atol=0)
        if dual is not None:
            torch.testing.assert_close(parse_norm(text).dual(x), dual, rtol=1e-12, atol=0)


def test_operator_norms_are_the_largest_gain_of_the_map():
    """What the names say, on inputs: ‖W‖ is the largest output length over inputs of length 1."""
    w = random((1, 6, 4), seed=6)
    inputs = random((20000, 4), seed=7)
    outputs = inputs @ w[0].mT
    rms = outputs.square().mean(-1).sqrt() / inputs.square().mean(-1).sqrt()
    assert 0.99 < rms.max() / parse_norm("spectral").value(w) <= 1 + 1e-12
    entry = outputs.abs().amax(-1) / inputs.square().mean(-1).sqrt()
    assert 0.99 < entry.max() / parse_norm("row").value(w) <= 1 + 1e-12
    # Of inputs in the ℓ1 ball a unit vector gains most: a token. An embedding stores the map transposed.
    tokens = w[0].square().mean(0).sqrt().max()
    assert parse_norm("column").value(w) == pytest.approx(tokens.item())
    assert parse_norm("column:embedding").value(w.mT) == pytest.approx(tokens.item())


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_are_those_of_scions_code(shape):
    """The formulas of https://github.com/LIONS-EPFL/scion/blob/main/scion.py without its eps of 1e-8."""
    rows, cols = SHAPES[shape]
    g = matrix(shape, "gaussian")[0]
    u, _, vh = torch.linalg.svd(g, full_matrices=False)

    def col_norm(g, *, normalized=False):
        return g / (g.square().sum(0, keepdim=True) / g.size(0)).sqrt() / (g.size(1) if normalized else 1)

    def row_norm(g, *, normalized=True):
        return g / g.square().sum(-1, keepdim=True).sqrt() / (sqrt(g.size(-1)) if normalized else 1)

    expected = {
        "spectral": sqrt(rows / cols) * u @ vh,
        "spectral:input": max(1, sqrt(rows / cols)) * u @ vh,
        "sign": g.sign() / cols,
        "sign:plain": g.sign(),
        "column": col_norm(g),
        "column:normalized": col_norm(g, normalized=True),
        "column:embedding": col_norm(g.mT).mT,
        "row": row_norm(g),
        "row:plain": row_norm(g, normalized=False),
        "row:embedding": row_norm(g.mT, normalized=False).mT,
    }
    for text, direction in expected.items():
        torch.testing.assert_close(parse_norm(text).direction(g[None])[0], direction, rtol=1e-10, atol=1e-12)
    bias = g.reshape(-1)
    direction = parse_norm("frobenius:rms").direction(bias[None, :, None]).view(-1)
    torch.testing.assert_close(direction, bias / bias.square().mean().sqrt())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", [name for name in NORMS if name.startswith("spectral")])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
def test_the_approximate_spectral_oracle_stays_in_its_methods_band(method, text, shape):
    s = matrix(shape, "power").float()
    exact = parse_norm(text)
    norms, radius = torch.linalg.matrix_norm(s), exact.radius(*shape)
    direction = radius * orthogonalize(s, method=method, dtype=s.dtype, norms=norms)
    low, high = BANDS[method]
    assert low < exact.value(direction) < high
    assert low < inner(s, direction) / exact.dual(s) < high
    halved = radius * orthogonalize(s, method=method, dtype=s.dtype, norms=2 * norms)  # those are used
    assert (halved - direction).abs().max() > 1e-3


@each_norm
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(text, shape):
    norm = parse_norm(text)
    batch = torch.cat([matrix(shape, name, seed=i).float() for i, name in enumerate(SPECTRA)])
    for function in (norm.value, norm.dual, norm.direction, norm.lmo):
        together = function(batch)
        assert together.dtype == torch.float32 and len(together) == len(batch)
        for x, result in zip(batch, together, strict=True):
            torch.testing.assert_close(function(x[None])[0], result, rtol=1e-5, atol=1e-6)


@each_norm
@pytest.mark.parametrize("shape", SHAPES)
def test_lower_precision_stays_within_its_rounding(text, shape):
    """fp32 to 1e-5 of fp64; bf16 carries 8 bits in and out: 2^-8 each, and a margin of two."""
    norm, x = parse_norm(text), matrix(shape, "gaussian")
    s = x.bfloat16()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.008)):
        before = s.to(dtype).clone()
        direction, value, dual = norm.direction(before), norm.value(before), norm.dual(before)
        assert direction.dtype == dtype and value.dtype == dual.dtype == torch.float32
        assert torch.equal(before, s.to(dtype))
        torch.testing.assert_close(value.double(), norm.value(s.double()), rtol=1e-5, atol=0)
        torch.testing.assert_close(dual.double(), norm.dual(s.double()), rtol=1e-5, atol=0)
        torch.testing.assert_close(inner(s, direction), dual.double(), rtol=tolerance, atol=0)
        assert norm.value(direction.double()).item() == pytest.approx(1, abs=tolerance)


@each_norm
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e35])
def test_the_scale_of_the_input_does_not_matter(text, scale):
    norm, x = parse_norm(text), matrix("wide", "gaussian").float()
    torch.testing.assert_close(norm.direction(x * scale), norm.direction(x), rtol=1e-4, atol=1e-5)
    for length in (norm.value, norm.dual):
        torch.testing.assert_close(length(x * scale), length(x) * scale, rtol=1e-4, atol=0)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_maps_to_zero_and_nan_stays_nan(text, dtype):
    norm = parse_norm(text)
    for shape in SHAPES.values():
        batch = torch.ones(3, *shape, dtype=dtype)
        batch[0], batch[2, 1, 2] = 0, torch.nan
        direction, value, dual = norm.direction(batch), norm.value(batch), norm.dual(batch)
        assert not direction[0].any() and not value[0] and not dual[0]
        assert direction[1].isfinite().all() and value[1].isfinite() and dual[1].isfinite()
        assert direction[2, 1, 2].isnan() and value[2].isnan() and dual[2].isnan()
    assert parse_norm("spectral").direction(torch.full((1, 2, 2), torch.inf)).isnan().all()


def test_zero_rows_and_missing_ranks_keep_the_oracle_feasible_and_optimal():
    s = torch.zeros(1, 6, 4, dtype=torch.float64)
    s[0, :2] = random((2, 4), seed=8)
    for text in ALL:
        norm = parse_norm(text)
        torch.testing.assert_close(inner(s, norm.direction(s)), norm.dual(s), rtol=1e-12, atol=0)
        assert norm.value(norm.direction(s)) <= 1 + 1e-12
    tie = torch.eye(3, dtype=torch.float64)[None]  # equal singular values: nuclear takes one of them
    nuclear = parse_norm("schatten:1")
    assert nuclear.value(nuclear.direction(tie)).item() == pytest.approx(1)
    assert inner(tie, nuclear.direction(tie)).item() == pytest.approx(1)


def test_schatten_four_by_hand():
    """S = diag(8, 1): q = 4/3, weights ∝ s^(1/3) = (2, 1), of ℓ4 length 17^(1/4); dual (16 + 1)^(3/4)."""
    norm = parse_norm("schatten:4")
    s = torch.diag(torch.tensor([8.0, 1.0], dtype=torch.float64))[None]
    expected = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)) / 17**0.25
    torch.testing.assert_close(norm.direction(s)[0], expected)
    assert norm.dual(s).item() == pytest.approx(17**0.75)
    assert norm.value(s).item() == pytest.approx((8**4 + 1) ** 0.25)


def test_schatten_runs_from_frobenius_to_spectral():
    x = random((4, 6, 9), seed=9)
    for p, other in (("2", "frobenius"), ("inf", "spectral:plain")):
        torch.testing.assert_close(
            parse_norm(f"schatten:{p}").direction(x), parse_norm(other).direction(x), rtol=1e-10, atol=1e-12
        )
    values = torch.stack([parse_norm(f"schatten:{p}").value(x) for p in EXPONENTS])
    assert (values.diff(dim=0) < 0).all()  # ‖·‖_p falls in p


def test_radius_times_unit_is_the_direction_in_full_precision():
    """What a rule uses: the bf16 unit, multiplied in the precision of the weights."""
    x = matrix("wide", "gaussian").bfloat16()
    for text in ALL:
        norm = parse_norm(text)
        once = norm.unit(x).double() * norm.radius(5, 9)
        torch.testing.assert_close(norm.direction(x).double(), once, rtol=2**-8, atol=0)


def test_scions_recipe_names_a_norm_for_every_parameter_of_a_llama():
    layer = "model.layers.3."
    expected = {
        "model.embed_tokens.weight": "column:embedding",
        "lm_head.weight": "sign",
        layer + "self_attn.q_proj.weight": "spectral",
        layer + "mlp.down_proj.weight": "spectral",
        layer + "self_attn.q_proj.bias": "frobenius:rms",
        layer + "input_layernorm.weight": "frobenius:rms",
        layer + "self_attn.q_norm.weight": "frobenius:rms",
        "model.norm.weight": "frobenius:rms",
    }
    assert {name: norm_for(name, SCION) for name in expected} == expected
    assert all(parse_norm(text) == parse_norm(text) for _, text in SCION)
    assert norm_for("lm_head.weight", (("*", "sign"), *SCION)) == "sign"  # the first match counts
    assert norm_for("LM_HEAD.weight", SCION) == "spectral"  # and case


def test_errors_say_what_is_known():
    with pytest.raises(ValueError, match=r"unknown norm 'nuclear'; known are spectral, .*schatten:P"):
        parse_norm("nuclear")
    with pytest.raises(ValueError, match=r"unknown norm 'sign:rms'"):
        parse_norm("sign:rms")
    with pytest.raises(ValueError, match="P of schatten:P is a number"):
        parse_norm("schatten")
    for p in ("0.5", "nan", "-inf"):
        with pytest.raises(ValueError, match="only p >= 1"):
            parse_norm(f"schatten:{p}")
    with pytest.raises(ValueError, match=r"no norm for a\.b: none of c\.\*, d matches"):
        norm_for("a.b", (("c.*", "sign"), ("d", "row")))
