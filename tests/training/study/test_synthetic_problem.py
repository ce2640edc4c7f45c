"""The synthetic problem: the theory's exponents, constants by probing, noise."""

from dataclasses import replace
from math import atanh, log, sqrt

import pytest
import torch

from optim.geometry import parse_norm
from optim.noise import KINDS
from training.study.synthetic.config import NOISES, SyntheticConfig
from training.study.synthetic.problem import (
    SPECTRAL,
    NoiseStream,
    Problem,
    batched_theory,
    control_theory,
    noise_bound,
    noise_of,
    transported_theory,
)

TINY = SyntheticConfig(horizons=(4, 6), tuning_horizon=5, seeds=3, tuning_seeds=2)
NORM = parse_norm(SPECTRAL)


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- theory ---


@pytest.mark.parametrize(
    ("p", "batched", "transported"),
    [
        (2.0, (1 / 2, 3 / 4, 1 / 4), (4 / 7, 5 / 7, 2 / 7)),
        (1.5, (3 / 5, 4 / 5, 1 / 5), (2 / 3, 7 / 9, 2 / 9)),
    ],
)
def test_exponents_by_hand(p, batched, transported):
    assert batched_theory(p) == pytest.approx(batched)
    assert transported_theory(p) == pytest.approx(transported)
    assert control_theory(p).rate == pytest.approx(transported[2] / 2)


@pytest.mark.parametrize("p", [1.01, 1.2, 1.5, 1.9, 2.0])
def test_parameters_balance_the_terms_of_the_descent_lemma(p):
    """Way down, lag and noise fall alike; the rates are the issue's powers of ε, half a power apart."""
    for theory, order in ((batched_theory(p), 1), (transported_theory(p), 2)):
        way_down, noise = 1 - theory.step, theory.average * (p - 1) / p
        lag = order * (theory.step - theory.average)
        assert way_down == pytest.approx(theory.rate) and lag == pytest.approx(theory.rate)
        assert noise == pytest.approx(theory.rate)
    assert 1 / batched_theory(p).rate == pytest.approx((3 * p - 2) / (p - 1))
    assert 1 / transported_theory(p).rate == pytest.approx((5 * p - 3) / (2 * p - 2))
    assert 1 / batched_theory(p).rate - 1 / transported_theory(p).rate == pytest.approx(1 / 2)


# --- the problem ---

PROBLEMS = [Problem(4, 16, 4.0), Problem(5, 3, 0.5), Problem(6, 6, 1.0)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_gradient_is_that_of_autograd(problem):
    points = normal(7, problem.rows, problem.cols, seed=0, scale=3 * problem.width).requires_grad_()
    value = problem.value(points)
    assert value.shape == (7,)
    (expected,) = torch.autograd.grad(value.sum(), points)
    torch.testing.assert_close(problem.gradient(points.detach()), expected, rtol=1e-12, atol=1e-14)


def test_the_value_is_log_cosh_and_does_not_overflow():
    problem = Problem(1, 1, 2.0)
    points = torch.tensor([[[0.0]], [[1.0]], [[-3.0]]], dtype=torch.float64)
    expected = 4 * torch.log(torch.cosh(points / 2)).view(-1)
    torch.testing.assert_close(problem.value(points), expected)
    assert problem.value(torch.full((1, 1, 1), 1e6)).item() == pytest.approx(4 * (5e5 - log(2)), rel=1e-6)


def curvature(problem: Problem, points: torch.Tensor) -> torch.Tensor:
    """Entries of the diagonal Hessian."""
    return 1 / torch.cosh(points / problem.width).square()


def corner(problem: Problem, value: float = 1.0) -> torch.Tensor:
    return value * torch.eye(problem.rows, problem.cols, dtype=torch.float64)[None]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_gradient_has_its_lipschitz_constant(problem):
    shape = (500, problem.rows, problem.cols)
    for scale in (0.01, 1.0, 5.0):
        x = normal(*shape, seed=1, scale=scale * problem.width)
        directions = normal(*shape, seed=2)
        directions[::2] = NORM.direction(directions[::2])  # orthogonal ones come closest
        y = x + scale * directions
        rate = NORM.dual(problem.gradient(x) - problem.gradient(y)) / NORM.value(x - y)
        assert rate.max() <= problem.gradient_lipschitz * (1 + 1e-9)
    small = corner(problem, 1e-4 * problem.width)
    attained = NORM.dual(problem.gradient(small)) / NORM.value(small)
    assert attained.item() == pytest.approx(problem.gradient_lipschitz, rel=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_hessian_has_its_lipschitz_constant(problem):
    shape = (500, problem.rows, problem.cols)
    x = normal(*shape, seed=3, scale=problem.width)
    d, e = NORM.direction(normal(*shape, seed=4)), NORM.direction(normal(*shape, seed=5))
    for scale in (0.01, 1.0):
        y = x + scale * problem.width * normal(*shape, seed=6)
        form = ((curvature(problem, x) - curvature(problem, y)) * d * e).sum((-2, -1)).abs()
        assert (form / NORM.value(x - y)).max() <= problem.hessian_lipschitz * (1 + 1e-9)
    steepest, tiny = problem.width * atanh(1 / sqrt(3)), 1e-5 * problem.width
    x, y = corner(problem, steepest + tiny), corner(problem, steepest - tiny)
    form = ((curvature(problem, x) - curvature(problem, y)) * corner(problem) ** 2).sum().abs()
    assert (form / NORM.value(x - y)).item() == pytest.approx(problem.hessian_lipschitz, rel=1e-6)


# --- noise ---


def test_noise_laws_are_those_of_the_sampler():
    assert tuple(KINDS) == NOISES
    law = noise_of(replace(TINY, tail_margin=0.2, scale=3.0), 1.5)
    assert (law.kind, law.tail, law.moment, law.scale) == ("student", 1.7, 1.5, 3.0)


@pytest.mark.parametrize("p", [2.0, 1.5])
@pytest.mark.parametrize("skewed", [True, False])
def test_noise_has_mean_zero_and_keeps_its_bounds(p, skewed):
    """Gaussian, because its sampled moments converge; the bounds hold for every law."""
    config = replace(TINY, noise="gaussian", scale=2.0, skewed=skewed)
    noise = NoiseStream(config, "a").noise(p, begin=0, end=20_000).double()
    assert noise.mean(0).abs().max() < 4.5 * noise.std() / sqrt(20_000)
    moment = noise.abs().pow(p).mean().item()
    assert moment <= (2 ** (2 - p) if skewed else 1.01) * config.scale**p
    assert NORM.dual(noise).pow(p).mean() <= noise_bound(config, p) ** p
    if not skewed:
        assert moment == pytest.approx(config.scale**p, rel=0.01)


def test_skewed_noise_misleads_most_of_the_time_and_averages_do_less():
    config = replace(TINY, rows=1, cols=1)
    stream = NoiseStream(config, "a")
    noise = stream.noise(1.5, begin=0, end=200_000).view(-1)
    sign = stream._gaussian("signs", 1.0).sign().item()
    medians = [sign * noise.view(-1, n).mean(1).median().item() for n in (1, 8, 64)]
    assert medians[0] < 1.5 * medians[1] < 1.5**2 * medians[2] < 0
    assert (sign * noise < 0).float().mean() > 0.6
    plain = NoiseStream(replace(config, skewed=False), "a").noise(1.5, begin=0, end=200_000)
    assert plain.median().abs() < 0.01


def test_a_stream_is_the_same_under_any_cut_and_another_elsewhere():
    stream = NoiseStream(TINY, "run0")
    whole = stream.noise(2.0, begin=0, end=600)
    assert torch.equal(whole[256:300], stream.noise(2.0, begin=256, end=300))
    longer = NoiseStream(replace(TINY, seeds=9, horizons=(5, 9)), "run0")
    assert torch.equal(whole, longer.noise(2.0, begin=0, end=600))
    assert torch.equal(stream.start(), longer.start())
    for other in (NoiseStream(TINY, "run1"), NoiseStream(replace(TINY, seed=1), "run0")):
        assert not torch.equal(stream.start(), other.start())
        both = torch.stack([whole.flatten(), other.noise(2.0, begin=0, end=600).flatten()])
        assert torch.corrcoef(both.clamp(-1, 1))[0, 1].abs() < 0.025  # of 38400 each
    assert stream.start().std() == pytest.approx(TINY.distance, rel=0.3)
