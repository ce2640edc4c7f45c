"""Muon's variants, Scion and Transported Scion against their papers' formulas."""

import pytest
import torch

from optim.geometry import parse_norm
from optim.rules import (
    adamw,
    aurora,
    ema_nesterov,
    mars,
    muon,
    muon_eq,
    muon_plus,
    new_state,
    normuon,
    paired,
    scion,
    step,
    transported,
    warm_started,
)
from tests.optim.rule_cases import RULES, exact, factor, ours, tensors


def momenta(gradients: list[torch.Tensor], *, beta: float, nesterov: bool) -> list[torch.Tensor]:
    """The raw update of every step."""
    average, found = torch.zeros_like(gradients[0]), []
    for gradient in gradients:
        average = beta * average + (1 - beta) * gradient
        found.append(beta * average + (1 - beta) * gradient if nesterov else average)
    return found


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)], ids=str)
@pytest.mark.parametrize("lines", ["row", "column", "larger"])
@pytest.mark.parametrize("divisor", ["sqrt_plus", "max"])
def test_normuon_is_algorithm_1_and_equation_4_1_of_its_paper(shape, lines, divisor):
    """With alpha so large that it counts. Algorithm 1's step is 0.2 η √(rc) Ô/‖Ô‖_F, Eq. (4.1)'s ‖O‖_F."""
    gradients, lr, wd, alpha = exact(*shape, count=4), 0.1, 0.3, 0.05
    dim = {"row": 1, "column": 0, "larger": 1 if shape[0] >= shape[1] else 0}[lines]
    first, second = torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    moment = torch.zeros(1, dtype=torch.float64)
    for update in momenta(gradients, beta=0.9, nesterov=False):
        o = factor(update)
        moment = 0.95 * moment + 0.05 * (o * o).mean(dim, keepdim=True)
        divided = o / ((moment.sqrt() + alpha) if divisor == "sqrt_plus" else moment.clamp_min(alpha).sqrt())
        unit = divided / divided.norm()
        first = first * (1 - lr * wd) - 0.2 * lr * (shape[0] * shape[1]) ** 0.5 * unit
        second = second * (1 - lr * wd) - lr * o.norm() * unit
    common = {"momentum": 0.9, "nesterov": False, "weight_decay": wd, "dtype": torch.float32}
    common |= {"lines": lines, "divisor": divisor, "alpha": alpha}
    for expected, form in ((first, {}), (second, {"length": "kept", "update_scale": "none"})):
        found = ours(normuon(**common, **form), torch.ones(shape), [g.float() for g in gradients], lr=lr)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)], ids=str)
def test_muon_eq_and_aurora_balance_lines_before_the_polar_factor(shape):
    [gradient], (rows, cols) = exact(*shape, count=1), shape
    options = {"update_scale": "none", "nesterov": False, "momentum": 0.0, "dtype": torch.float32}
    found = -ours(muon_eq(**options), torch.zeros(shape), [gradient.float()], lr=1.0).double()
    by_row = gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, factor(by_row), rtol=0, atol=2e-5)
    for lines, wide in (("row", False), ("larger", True)):
        balanced = rows > cols or (wide and rows < cols)
        dim = 1 if rows > cols else 0
        once = factor(gradient / gradient.norm(dim=dim, keepdim=True))
        weights = (min(shape) / max(shape) / once.square().sum(dim, keepdim=True)).sqrt()
        twice = factor(gradient / gradient.norm(dim=dim, keepdim=True) * weights)
        update = -ours(aurora(lines=lines, **options), torch.zeros(shape), [gradient.float()], lr=1.0)
        expected = twice if balanced else factor(gradient)
        torch.testing.assert_close(update.double(), expected, rtol=0, atol=5e-5)
        if balanced:  # closer to even than Muon's
            spread = [each.norm(dim=dim).std() for each in (expected, factor(gradient))]
            assert spread[0] < 0.5 * spread[1]


def test_cautious_decay_acts_where_the_update_pulls_to_zero_by_hand():
    rule, weight = muon(cautious=True, weight_decay=0.5), torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    rule.apply(weight, torch.tensor([[1.0, -1.0, 1.0, -1.0]]), lr=0.1, state={})
    torch.testing.assert_close(weight, torch.tensor([[1.9 - 0.1, 2.1, -2.1, -1.9 + 0.1]]))
    rule.apply(weight := torch.ones(1, 1), torch.ones(1, 1), lr=0.1, decay=0.5, state={})  # by a schedule
    torch.testing.assert_close(weight, torch.tensor([[1 - 0.1 * 0.25 - 0.1]]))


def test_mars_takes_two_gradients_for_an_update_by_hand():
    """Its point is the weights before, then the weights; AdamW beside it moves with the second gradients.

    The corrected gradient is clipped to length one: without that the second update would go the other way.
    """
    unit, strength, beta, lr = factor(torch.ones(1, 1)).item(), 0.4, 0.5, 0.1
    rule = mars(momentum=beta, nesterov=False, strength=strength, weight_decay=0.5, dtype=torch.float32)
    weight, state = torch.tensor([[2.0]]), new_state(rule, torch.zeros(1, 1))
    theta, momentum = 2.0, 0.0
    for pair, (before, here) in enumerate([(3.0, 3.0), (-0.5, -0.7), (5.0, 1.0)]):
        point = step(rule, weight, torch.tensor([[before]]), state, lr=lr, step=2 * pair + 1)
        assert point is weight and weight.item() == pytest.approx(theta)
        last = theta
        corrected = here + strength * beta / (1 - beta) * (here - before)
        momentum += (1 - beta) * (max(-1.0, min(corrected, 1.0)) - momentum)
        theta = theta * (1 - lr * 0.5) - lr * unit * (1 if momentum > 0 else -1)
        point = step(rule, weight, torch.tensor([[here]]), state, lr=lr, step=2 * pair + 2)
        assert weight.item() == pytest.approx(theta, rel=1e-5) and point.item() == pytest.approx(last)
    start, *gradients = tensors(7, count=7)
    beside, alone = (
        ours(rule, start, given, lr=0.1)
        for rule, given in ((paired(adamw()), gradients), (adamw(), gradients[1::2]))
    )
    assert torch.equal(beside, alone)


@pytest.mark.parametrize("num_steps", [3, 7])
def test_more_or_fewer_polar_steps_are_those_of_the_method(num_steps):
    [gradient] = exact(8, 20, count=1)
    rule = muon(polar_steps=num_steps, update_scale="none", nesterov=False, momentum=0.0, dtype=torch.float32)
    found = -ours(rule, torch.zeros(8, 20), [gradient.float()], lr=1.0)
    torch.testing.assert_close(found.double(), factor(gradient, num_steps=num_steps), rtol=0, atol=2e-5)
    error = (torch.linalg.svdvals(found) - 1).abs().max()
    assert error > 0.5 if num_steps == 3 else error < 0.01


def test_the_rows_of_a_normuon_update_are_levelled():
    """Rows that Muon left short grow, and by their average over the steps, not by this step's."""
    gradient = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 8)[:, None]
    )
    plain, level = (
        ours(rule, torch.zeros(8, 4), [gradient] * 3, lr=1.0).norm(dim=1)
        for rule in (muon(dtype=torch.float32), normuon(dtype=torch.float32))
    )
    assert plain.max() / plain.min() > 20 and level.max() / level.min() < 1.01


@pytest.mark.parametrize(
    ("lines", "dims"), [("row", [1]), ("column", [0]), ("row_column", [1, 0]), ("column_row", [0, 1])]
)
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)], ids=str)
def test_muon_plus_normalises_lines_after_muon(lines, dims, shape):
    [gradient] = exact(*shape, count=1)
    o = factor(gradient)
    for dim in dims:
        o = o / o.norm(dim=dim, keepdim=True)
    o = o * min(shape) ** 0.5 / o.norm()
    rule = muon_plus(lines=lines, update_scale="jordan", nesterov=False, dtype=torch.float32)
    found = ours(rule, torch.zeros(shape), [gradient.float()], lr=1.0) / -rule.scale(*shape)
    torch.testing.assert_close(found.double(), o, rtol=0, atol=2e-5)
    lengths = found.norm(dim=dims[-1])
    assert lengths.max() / lengths.min() < 1.0001  # the last lines are of one length


def test_a_zero_gradient_moves_no_member_of_the_family():
    for name, rule in RULES.items():
        found = ours(rule, torch.ones(4, 6), [torch.zeros(4, 6)], lr=1.0)
        assert torch.equal(found, torch.ones(4, 6)), name


def test_ema_nesterov_by_hand():
    """A 1 x 1 matrix: the factor is the sign, times what the method makes of 1."""
    unit = factor(torch.ones(1, 1)).item()
    plain = muon(momentum=0.0, weight_decay=0.5, dtype=torch.float32)
    rule = ema_nesterov(plain, lookahead=0.5, velocity_decay=0.75, ramp_steps=2)
    weight, state = torch.tensor([[2.0]]), new_state(rule, torch.zeros(1, 1))
    theta, velocity, points = 2.0, 0.0, []
    for number, (gradient, ahead, next_ahead) in enumerate(
        [(3.0, 0.0, 0.25), (-1.0, 0.25, 0.5), (5.0, 0.5, 0.5)], 1
    ):
        y = theta + ahead * velocity
        after = y * (1 - 0.1 * 0.5) - 0.1 * unit * (1 if gradient > 0 else -1)
        velocity = 0.75 * velocity + 0.25 * (after - theta)
        theta = after
        points.append(theta + next_ahead * velocity)
        found = step(rule, weight, torch.tensor([[gradient]]), state, lr=0.1, step=number)
        assert found.item() == pytest.approx(points[-1], rel=1e-5)
        assert weight.item() == pytest.approx(theta, rel=1e-5)


def test_ema_nesterov_that_looks_nowhere_is_muon():
    weight, *gradients = tensors(6, 9, count=5)
    options = {"weight_decay": 0.1, "dtype": torch.float32}
    found = ours(ema_nesterov(muon(**options), lookahead=0.0), weight, gradients, lr=0.1)
    torch.testing.assert_close(found, ours(muon(**options), weight, gradients, lr=0.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "norm", ["spectral", "frobenius:rms", "sign", "column:embedding", "row", "schatten:3", "spectral:input"]
)
@pytest.mark.parametrize("constrained", [True, False])
def test_scion_steps_to_the_minimiser_of_its_norm(norm, constrained):
    """θ ← (1 - ηλ)θ + ηρ·lmo(m), λ = 1 where constrained; the radius of the ball is ρ."""
    gradients, lr, radius = exact(6, 8, count=3), 0.2, 3.0
    geometry, decay = parse_norm(norm), 1.0 if constrained else 0.3
    weight = torch.ones(6, 8, dtype=torch.float64) * 0.01
    for update in momenta(gradients, beta=0.9, nesterov=False):
        weight = (1 - lr * decay) * weight + lr * radius * geometry.lmo(update[None])[0]
    rule = scion(
        momentum=0.9, norm=norm, method="exact", radius=radius, constrained=constrained, weight_decay=0.3,
        dtype=torch.float32,
    )  # fmt: skip
    found = ours(rule, torch.ones(6, 8) * 0.01, [g.float() for g in gradients], lr=lr)
    torch.testing.assert_close(found.double(), weight, rtol=0, atol=2e-5)


def test_constrained_scion_stays_in_its_ball_and_unconstrained_does_not():
    gradients = [torch.ones(4, 4).triu()] * 40
    for constrained in (True, False):
        options = {"constrained": constrained, "dtype": torch.float32}
        rule = scion(norm="spectral", method="exact", radius=2.0, **options)
        length = parse_norm("spectral").value(ours(rule, torch.zeros(4, 4), gradients, lr=0.1)[None]).item()
        assert (length <= 2.0 + 1e-5) is constrained


def test_scion_in_the_spectral_norm_is_muon_without_nesterov():
    weight, *gradients = tensors(7, 12, count=4)
    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "dtype": torch.float32}
    assert torch.equal(
        ours(scion(**options), weight, gradients, lr=0.1), ours(muon(**options), weight, gradients, lr=0.1)
    )


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("transport", "cap", "ramp_steps", "peak_lr", "aheads"),
    [
        (1.0, 1e9, 0, None, [9.0, 9.0, 9.0]),  # β/(1-β) at β = 0.9
        (0.5, 1e9, 0, None, [4.5, 4.5, 4.5]),
        (1.0, 2.0, 0, None, [2.0, 2.0, 2.0]),
        (1.0, 1e9, 3, None, [3.0, 6.0, 9.0]),
        (1.0, 2.0, 2, 0.4, [0.25, 0.5, 0.5]),  # at a quarter of the peak rate
    ],
)
def test_the_transported_point_is_ahead_by_the_whole_displacement(
    transport, cap, ramp_steps, peak_lr, aheads, constrained
):
    """Y = θ + c·β/(1-β)·(θ - θ_before), the decay being part of what moved θ."""
    weight, *gradients = tensors(5, 8, count=4)
    options = {"momentum": 0.9, "weight_decay": 0.7, "constrained": constrained, "dtype": torch.float32}
    given = {"transport": transport, "cap": cap, "ramp_steps": ramp_steps, "peak_lr": peak_lr}
    rule = transported(scion(**options), **given)
    plain, state = weight.clone(), new_state(rule, weight)
    plain_state = new_state(rule, weight)
    for number, (gradient, ahead) in enumerate(zip(gradients, aheads, strict=True), 1):
        before = weight.clone()
        point = step(rule, weight, gradient, state, lr=0.1, step=number)
        step(scion(**options), plain, gradient, plain_state, lr=0.1, step=number)
        assert torch.equal(weight, plain)  # given the same gradients, the weights go Scion's way
        expected = weight.double() + ahead * (weight.double() - before.double())
        torch.testing.assert_close(point.double(), expected, rtol=0, atol=1e-5 * ahead)


def test_transported_scion_with_factor_0_is_scion_bit_for_bit():
    """Its point is then the weights themselves, also where gradients are taken at the point."""
    target = tensors(5, 8, count=1, seed=3)[0]
    found = []
    for rule in (scion(weight_decay=0.1), transported(scion(weight_decay=0.1), transport=0.0)):
        weight = torch.zeros(5, 8)
        point, state = weight, new_state(rule, weight)
        for number in range(1, 30):
            point = step(rule, weight, point - target, state, lr=0.05, step=number)
            assert point is weight
        found.append(weight)
        assert not rule.looks_ahead
    assert torch.equal(*found)


def test_any_rule_with_momentum_can_be_transported():
    weight, *gradients = tensors(5, 8, count=3)
    plain, rule = normuon(nesterov=False), transported(normuon(nesterov=False), cap=3.0)
    ends = []
    for each in (plain, rule):
        own, state = weight.clone(), new_state(each, weight, num_lines=5)
        for number, gradient in enumerate(gradients, 1):
            before = own.clone()
            point = step(each, own, gradient, state, lr=0.1, step=number)
        ends.append(own)
    assert torch.equal(*ends)
    torch.testing.assert_close(point, own + 3 * (own - before), rtol=0, atol=1e-6)
    for refused in (adamw(), rule, mars()):
        with pytest.raises(ValueError, match="transport is for rules with momentum"):
            transported(refused)
    for refused in (rule, mars()):
        with pytest.raises(ValueError, match="looks ahead"):
            ema_nesterov(refused)


def test_momentum_that_starts_warm_is_under_transport_the_gradient_at_the_weights():
    """Of a quadratic without noise, at every step, while the rate falls; from zero it is not.

    So the weights go the way of the rule without momentum, whatever β is (training/study/EXPERIMENTS.md).
    """
    target, errors = tensors(5, 8, count=1, seed=3)[0], []
    alone = torch.zeros(5, 8)
    for number in range(1, 30):
        still = scion(momentum=0.0)
        step(still, alone, alone - target, new_state(still, alone), lr=0.05 / number, step=number)
    for plain in (scion(momentum=0.8), warm_started(scion(momentum=0.8))):
        rule, worst = transported(plain), 0.0
        weight = torch.zeros(5, 8)
        point, state = weight, new_state(rule, weight)
        for number in range(1, 30):
            exact = weight - target
            point = step(rule, weight, point - target, state, lr=0.05 / number, step=number)
            worst = max(worst, (state["momentum"] - exact).abs().max().item())
        errors.append(worst)
    assert errors[1] < 1e-5 < 1e-2 < errors[0]
    torch.testing.assert_close(weight, alone, rtol=0, atol=2e-3)


def test_a_warm_start_is_for_every_rule_with_momentum_and_changes_its_first_steps_alone():
    weight, gradient = tensors(5, 8, count=2)
    gradient /= 2 * gradient.norm()  # mars clips longer ones
    for rule in (muon(), scion(norm="sign"), mars()):
        state, plain_state = (new_state(rule, weight) for _ in range(2))
        for number in range(1, 1 + rule.gradients_per_update):
            step(warm_started(rule), weight.clone(), gradient, state, lr=0.1, step=number)
            step(rule, weight.clone(), gradient, plain_state, lr=0.1, step=number)
        torch.testing.assert_close(plain_state["momentum"], 0.05 * gradient)
        assert torch.equal(state["momentum"], gradient)
    with pytest.raises(ValueError, match="adamw: has no momentum"):
        warm_started(adamw())


def test_transport_changes_where_the_gradient_is_taken():
    target = tensors(5, 8, count=1, seed=3)[0]
    ends = []
    for transport in (0.0, 1.0):
        rule = transported(scion(), transport=transport)
        weight = torch.zeros(5, 8)
        point, state = weight, new_state(rule, weight)
        for number in range(1, 30):
            point = step(rule, weight, point - target, state, lr=0.05, step=number)
        ends.append(weight)
    assert not torch.allclose(*ends)
