"""Update rules against torch's own optimizers, against values worked by hand, and on shards."""

import itertools
from math import sqrt

import pytest
import torch

from optim.geometry import parse_norm
from optim.polar import METHODS, polar_factor
from optim.rules import (
    SCALES,
    AdamW,
    EmaNesterov,
    Muon,
    MuonPlus,
    NorMuon,
    Scion,
    Sgd,
    Signum,
    TransportedScion,
    new_state,
    step,
)

RULES = {
    "muon": Muon(),
    "muon-plain": Muon(nesterov=False, momentum=0.9),
    "adamw": AdamW(beta1=0.8, beta2=0.9),
    "normuon": NorMuon(),
    "muon_plus": MuonPlus(),
    "ema_nesterov": EmaNesterov(),
    "scion": Scion(),
    "scion-sign": Scion(norm="sign"),
    "transported": TransportedScion(),
    "sgd": Sgd(),
    "signum": Signum(),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def tensors(*shape: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    """fp32 Gaussians whose scale differs from one to the next, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10 ** (i % 3 - 1) for i in range(count)]


def frobenius(matrices: torch.Tensor) -> torch.Tensor:
    """[B] norms of [B, r, c]."""
    return torch.linalg.matrix_norm(matrices)


def ours(rule, weight, gradients, *, lr: float) -> torch.Tensor:
    """The weight after one `step` per gradient."""
    weight = weight.clone()
    state = new_state(rule, weight, num_rows=len(weight) if weight.dim() else 0)
    for number, gradient in enumerate(gradients, 1):
        step(rule, weight, gradient, state, lr=lr, step=number)
    return weight


def theirs(optimizer: type, weight, gradients, **options) -> torch.Tensor:
    """The same with an optimizer of torch."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optimizer([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def newton_schulz_in_fp32(gradient, coefficients, num_steps, eps):
    """torch's `_zeropower_via_newtonschulz`, but in fp32 and without its transposition."""
    a, b, c = coefficients
    x = gradient / gradient.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(48, 32), (32, 80), (40, 40)], ids=str)
def test_muon_is_torch_muon_but_for_its_rounding(nesterov, weight_decay, shape, monkeypatch):
    weight, *gradients = tensors(*shape, count=7)
    rule = Muon(
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=weight_decay,
        method="jordan",
        update_scale="jordan",
        dtype=torch.float32,
    )
    found = ours(rule, weight, gradients, lr=0.1)
    options = {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "adjust_lr_fn": "original",
    }
    # torch iterates in bf16, which is good to 1 to 2% of the update (measured: 0.8 to 1.0%).
    with_bf16 = theirs(torch.optim.Muon, weight, gradients, **options)
    assert (found - with_bf16).norm() < 0.02 * (with_bf16 - weight).norm()
    # With its iteration in fp32, all the rest must agree to fp32's own rounding.
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz_in_fp32)
    with_fp32 = theirs(torch.optim.Muon, weight, gradients, **options)
    assert (found - with_fp32).norm() < 1e-5 * (with_fp32 - weight).norm()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(), (17,), (9, 5)], ids=str)
def test_adamw_is_torch_adamw(weight_decay, shape):
    weight, *gradients = tensors(*shape, count=11)
    rule = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=weight_decay)
    found = ours(rule, weight, gradients, lr=0.05)
    expected = theirs(
        torch.optim.AdamW,
        weight,
        gradients,
        lr=0.05,
        betas=(0.8, 0.95),
        eps=1e-6,
        weight_decay=weight_decay,
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_muon_momentum_by_hand():
    for nesterov, expected in ((True, [0.1 * 2 + 0.9 * 0.2, 0.1 * 4 + 0.9 * 0.58]), (False, [0.2, 0.58])):
        rule = Muon(momentum=0.9, nesterov=nesterov)
        state = new_state(rule, torch.zeros(1))
        found = [float(rule.direction(torch.tensor([g]), state, step=i)) for i, g in enumerate((2.0, 4.0), 1)]
        assert found == pytest.approx(expected)
        assert float(state["momentum"]) == pytest.approx(0.58)


def test_adamw_first_step_is_the_sign_of_the_gradient():
    gradient = torch.tensor([3.0, -0.01, 0.0])
    found = ours(AdamW(eps=1e-12), torch.zeros(3), [gradient], lr=0.5)
    torch.testing.assert_close(found, torch.tensor([-0.5, 0.5, 0.0]))


@each_rule
def test_weight_decay_is_decoupled_from_the_update(rule):
    rule = type(rule)(weight_decay=0.25)
    weight = torch.full((2, 3), 8.0)
    state = new_state(rule, weight)
    rule.apply(weight, torch.full((2, 3), 10.0), lr=0.5, state=state)
    assert torch.equal(weight, torch.full((2, 3), 8.0 * (1 - 0.5 * 0.25) - 0.5 * 10))
    state = new_state(rule, weight)
    update = torch.full((2, 3), 10.0, dtype=torch.bfloat16)
    rule.apply(weight, update, lr=0.5, scale=3.0, state=state)  # not of the decay
    assert torch.equal(weight, torch.full((2, 3), 2.0 * (1 - 0.5 * 0.25) - 0.5 * 3 * 10))
    still = ours(rule, torch.ones(4, 4), [torch.zeros(4, 4)], lr=0.5)
    torch.testing.assert_close(still, torch.full((4, 4), 0.875))  # no gradient: only the decay


@pytest.mark.parametrize(
    ("name", "rows", "cols", "expected"),
    [
        ("spectral", 4, 16, 0.5),
        ("spectral", 16, 4, 2.0),
        ("spectral", 7, 7, 1.0),
        ("jordan", 4, 16, 1.0),
        ("jordan", 16, 4, 2.0),
        ("rms", 4, 16, 0.8),
        ("rms", 16, 4, 0.8),
        ("rms", 2048, 5504, 0.2 * sqrt(5504)),
    ],
)
def test_scales_by_hand(name, rows, cols, expected):
    assert SCALES[name](rows, cols) == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_transform_is_the_orthogonal_factor_and_leaves_the_scale_to_apply(method):
    rule = Muon(method=method, dtype=torch.float32)
    for rows, cols in ((8, 32), (32, 8), (8, 8)):
        batch = torch.stack(tensors(rows, cols, count=3))
        before = batch.clone()
        updates = rule.transform(batch, norms=frobenius(batch))
        assert torch.equal(batch, before) and updates.shape == batch.shape
        values = torch.linalg.svdvals(updates)
        assert values.max() < 1.21
        assert values.min() > (0.68 if rows != cols else 0)  # a square Gaussian has values below any basin


@pytest.mark.parametrize("name", SCALES)
def test_a_step_moves_the_weight_by_lr_times_scale_times_the_orthogonal_factor(name):
    rule = Muon(update_scale=name, dtype=torch.float32, nesterov=False)
    for rows, cols in ((8, 32), (32, 8)):
        [gradient] = tensors(rows, cols, count=1)
        factor = rule.transform(gradient[None], norms=frobenius(gradient[None]))[0]
        found = ours(rule, torch.zeros(rows, cols), [gradient], lr=0.5)
        assert rule.scale(rows, cols) == SCALES[name](rows, cols)
        # Measured: 2.0e-6, the rounding of the momentum as the Gram form amplifies it.
        torch.testing.assert_close(found, -0.5 * rule.scale(rows, cols) * factor, rtol=0, atol=5e-6)


def test_the_norm_is_of_the_raw_update_before_it_was_rounded():
    """The oracle takes it there, because `optim.step.fused` has it there, in the pass that rounds."""
    seen = {}

    class Spy(Muon):
        def transform(self, matrices, *, norms, rows=None):
            seen.update(dtype=matrices.dtype, norm=norms.item(), rounded=matrices.double().norm().item())
            return super().transform(matrices, norms=norms)

    gradient = torch.full((4, 6), 1 + 2**-9)  # bf16 rounds it to 1
    ours(Spy(momentum=0.0), torch.zeros(4, 6), [gradient], lr=0.1)
    assert seen["dtype"] == torch.bfloat16
    assert seen["rounded"] == pytest.approx(sqrt(24), rel=1e-6)
    assert seen["norm"] == pytest.approx(sqrt(24) * (1 + 2**-9), rel=1e-6)


def test_the_rms_scale_gives_the_rms_of_adamw_for_a_full_rank_update():
    """An orthogonal r x c matrix has RMS 1/sqrt(max(r, c)), so the scaled one has 0.2."""
    [gradient] = tensors(64, 24, count=1)
    rule = Muon(method="cans", update_scale="rms", dtype=torch.float32)
    update = rule.scale(64, 24) * rule.transform(gradient[None], norms=frobenius(gradient[None]))
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.12)


@each_rule
def test_direction_and_apply_are_elementwise(rule):
    """On shards cut anywhere, empty ones included, they do what they do on the whole."""
    weight, *gradients = tensors(12, 7, count=5)
    updates = tensors(84, count=2, seed=1)
    for edges in ([0, 84], [0, 1, 30, 30, 84], [0, 0, 7, 50, 83, 84]):
        whole, whole_state = weight.flatten(), new_state(rule, weight.flatten())
        shards = [whole[a:b].clone() for a, b in itertools.pairwise(edges)]
        states = [new_state(rule, shard) for shard in shards]
        for number, gradient in enumerate(gradients, 1):
            pieces = [gradient.flatten()[a:b] for a, b in itertools.pairwise(edges)]
            found = torch.cat(
                [rule.direction(g, s, step=number) for g, s in zip(pieces, states, strict=True)]
            )
            expected = rule.direction(gradient.flatten(), whole_state, step=number)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        for number, update in enumerate(updates, 1):
            point = rule.apply(whole, update, lr=0.1, step=number, state=whole_state)
            points = [
                rule.apply(shard, update[a:b], lr=0.1, step=number, state=state)
                for shard, state, (a, b) in zip(shards, states, itertools.pairwise(edges), strict=True)
            ]
            assert (point is not None) == rule.looks_ahead
            if point is not None:
                torch.testing.assert_close(torch.cat(points), point, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat(shards), whole, rtol=1e-6, atol=1e-7)


@each_rule
def test_direction_returns_a_tensor_of_its_own(rule):
    for shape in ((6, 4), (5,)):
        gradient = torch.ones(shape)
        state = new_state(rule, gradient)
        update = rule.direction(gradient, state, step=1)
        after = {name: tensor.clone() for name, tensor in state.items()}
        update.fill_(99.0)  # as the exchange does
        assert torch.equal(gradient, torch.ones(shape))
        assert all(torch.equal(state[name], after[name]) for name in state)


@each_rule
def test_state_exists_from_construction_under_the_rules_names(rule):
    weight = torch.ones(3, 4)
    state = new_state(rule, weight, num_rows=3)
    assert tuple(state) == rule.state_names + rule.row_state_names
    assert all(state[name].shape == weight.shape for name in rule.state_names)
    assert all(state[name].shape == (3,) for name in rule.row_state_names)
    assert not any(tensor.any() for tensor in state.values())
    before = {name: tensor.data_ptr() for name, tensor in state.items()}
    step(rule, weight, torch.ones(3, 4), state, lr=0.1, step=1)
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == before  # updated in place


@each_rule
def test_a_step_leaves_the_gradient_alone_and_writes_no_graph(rule):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    [gradient] = tensors(4, 4, count=1)
    before, pointer = gradient.clone(), weight.data_ptr()
    step(rule, weight, gradient, new_state(rule, weight.detach(), num_rows=4), lr=0.1, step=1)
    assert torch.equal(gradient, before)
    assert weight.data_ptr() == pointer and weight.grad_fn is None
    assert not torch.equal(weight.detach(), torch.ones(4, 4))


def test_only_rules_of_more_than_an_entry_need_whole_matrices():
    assert Muon.whole and not AdamW.whole
    assert {name for name, rule in RULES.items() if not rule.whole} == {
        "adamw", "sgd", "signum", "scion-sign"
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match="elementwise"):
        AdamW().transform(torch.ones(1, 2, 2), norms=torch.ones(1))


# --- the family ---------------------------------------------------------------------------------------------


def exact(rows: int, cols: int, count: int) -> list[torch.Tensor]:
    """fp64 Gaussians, for oracles that write the formula out."""
    return [tensor.double() for tensor in tensors(rows, cols, count=count)]


def momenta(gradients: list[torch.Tensor], *, beta: float, nesterov: bool) -> list[torch.Tensor]:
    """The raw update of every step."""
    average, found = torch.zeros_like(gradients[0]), []
    for gradient in gradients:
        average = beta * average + (1 - beta) * gradient
        found.append(beta * average + (1 - beta) * gradient if nesterov else average)
    return found


def factor(update: torch.Tensor, method: str = "polar_express") -> torch.Tensor:
    """Newton-Schulz in fp64 on U, s, V: the method's polynomials on the singular values alone."""
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for a, b, c in METHODS[method].coefficients:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)], ids=str)
def test_normuon_is_algorithm_1_of_its_paper(shape):
    """With the scale "rms" the step is 0.2 η √(rc) Ô / ‖Ô‖_F, Ô the factor over the rows' past RMS."""
    gradients, lr, wd = exact(*shape, count=4), 0.1, 0.3
    weight, second = torch.ones(shape, dtype=torch.float64), torch.zeros(shape[0], 1, dtype=torch.float64)
    for update in momenta(gradients, beta=0.9, nesterov=True):
        o = factor(update)
        second = 0.95 * second + 0.05 * (o * o).mean(1, keepdim=True)
        o = o / (second.sqrt() + 1e-10)
        weight = weight * (1 - lr * wd) - 0.2 * lr * (shape[0] * shape[1]) ** 0.5 * o / o.norm()
    rule = NorMuon(momentum=0.9, weight_decay=wd, dtype=torch.float32)
    found = ours(rule, torch.ones(shape), [g.float() for g in gradients], lr=lr)
    torch.testing.assert_close(found.double(), weight, rtol=0, atol=2e-5)


def test_the_rows_of_a_normuon_update_are_levelled():
    """Rows that Muon left short grow, and by their average over the steps, not by this step's."""
    gradient = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 8)[:, None]
    )
    plain, level = (
        ours(rule, torch.zeros(8, 4), [gradient] * 3, lr=1.0).norm(dim=1)
        for rule in (Muon(dtype=torch.float32), NorMuon(dtype=torch.float32))
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
    rule = MuonPlus(lines=lines, update_scale="jordan", nesterov=False, dtype=torch.float32)
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
    rule = EmaNesterov(
        momentum=0.0, weight_decay=0.5, lookahead=0.5, velocity_decay=0.75, ramp_steps=2, dtype=torch.float32
    )
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
    found = ours(EmaNesterov(lookahead=0.0, **options), weight, gradients, lr=0.1)
    torch.testing.assert_close(found, ours(Muon(**options), weight, gradients, lr=0.1), rtol=0, atol=1e-6)


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
    rule = Scion(
        0.9, norm=norm, method=None, radius=radius, constrained=constrained, weight_decay=0.3,
        dtype=torch.float32,
    )  # fmt: skip
    found = ours(rule, torch.ones(6, 8) * 0.01, [g.float() for g in gradients], lr=lr)
    torch.testing.assert_close(found.double(), weight, rtol=0, atol=2e-5)


def test_constrained_scion_stays_in_its_ball_and_unconstrained_does_not():
    gradients = [torch.ones(4, 4).triu()] * 40
    for constrained in (True, False):
        rule = Scion(norm="spectral", method=None, radius=2.0, constrained=constrained, dtype=torch.float32)
        length = parse_norm("spectral").value(ours(rule, torch.zeros(4, 4), gradients, lr=0.1)[None]).item()
        assert (length <= 2.0 + 1e-5) is constrained


def test_scion_in_the_spectral_norm_is_muon_without_nesterov():
    weight, *gradients = tensors(7, 12, count=4)
    options = {"momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "dtype": torch.float32}
    assert torch.equal(
        ours(Scion(**options), weight, gradients, lr=0.1), ours(Muon(**options), weight, gradients, lr=0.1)
    )


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("transport", "cap", "ramp_steps", "aheads"),
    [
        (1.0, 1e9, 0, [9.0, 9.0, 9.0]),  # β/(1-β) at β = 0.9
        (0.5, 1e9, 0, [4.5, 4.5, 4.5]),
        (1.0, 2.0, 0, [2.0, 2.0, 2.0]),
        (1.0, 1e9, 3, [3.0, 6.0, 9.0]),
    ],
)
def test_the_transported_point_is_ahead_by_the_whole_displacement(
    transport, cap, ramp_steps, aheads, constrained
):
    """Y = θ + c·β/(1-β)·(θ - θ_before), the decay being part of what moved θ."""
    weight, *gradients = tensors(5, 8, count=4)
    options = {"momentum": 0.9, "weight_decay": 0.7, "constrained": constrained, "dtype": torch.float32}
    rule = TransportedScion(**options, transport=transport, cap=cap, ramp_steps=ramp_steps)
    plain, state = weight.clone(), new_state(rule, weight)
    plain_state = new_state(rule, weight)
    for number, (gradient, ahead) in enumerate(zip(gradients, aheads, strict=True), 1):
        before = weight.clone()
        point = step(rule, weight, gradient, state, lr=0.1, step=number)
        step(Scion(**options), plain, gradient, plain_state, lr=0.1, step=number)
        assert torch.equal(weight, plain)  # given the same gradients, the weights go Scion's way
        expected = weight.double() + ahead * (weight.double() - before.double())
        torch.testing.assert_close(point.double(), expected, rtol=0, atol=1e-5 * ahead)


def test_transported_scion_with_factor_0_is_scion_bit_for_bit():
    """Its point is then the weights themselves, also where gradients are taken at the point."""
    target = tensors(5, 8, count=1, seed=3)[0]
    found = []
    for rule in (Scion(weight_decay=0.1), TransportedScion(weight_decay=0.1, transport=0.0)):
        weight = torch.zeros(5, 8)
        point, state = weight, new_state(rule, weight)
        for number in range(1, 30):
            point = step(rule, weight, point - target, state, lr=0.05, step=number)
            assert point is weight
        found.append(weight)
        assert not rule.looks_ahead
    assert torch.equal(*found)


def test_transport_changes_where_the_gradient_is_taken():
    target = tensors(5, 8, count=1, seed=3)[0]
    ends = []
    for transport in (0.0, 1.0):
        rule = TransportedScion(transport=transport)
        weight = torch.zeros(5, 8)
        point, state = weight, new_state(rule, weight)
        for number in range(1, 30):
            point = step(rule, weight, point - target, state, lr=0.05, step=number)
        ends.append(weight)
    assert not torch.allclose(*ends)


def test_sgd_is_torch_sgd_with_dampening_equal_to_momentum():
    weight, *gradients = tensors(5, 3, count=6)
    # torch's first momentum is the gradient itself, not its share: give both a zero gradient first.
    gradients = [torch.zeros(5, 3), *gradients]
    found = ours(Sgd(momentum=0.8), weight, gradients, lr=0.3)
    expected = theirs(torch.optim.SGD, weight, gradients, lr=0.3, momentum=0.8, dampening=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_signum_by_hand():
    gradients = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-0.5, 3.0, 0.0])]
    found = ours(Signum(momentum=0.5, weight_decay=0.1), torch.ones(3), gradients, lr=0.1)
    # m: (0.5, -1, 0), then (0, 1, 0)
    first = torch.tensor([0.99 - 0.1, 0.99 + 0.1, 0.99])
    torch.testing.assert_close(found, first * 0.99 - 0.1 * torch.tensor([0.0, 1.0, 0.0]))


def test_the_spectral_factor_of_scion_is_the_polar_factor():
    [gradient] = exact(6, 9, count=1)
    rule = Scion(0.0, norm="spectral:plain", method=None, dtype=torch.float32)
    found = ours(rule, torch.zeros(6, 9), [gradient.float()], lr=1.0)
    torch.testing.assert_close(found.double(), -polar_factor(gradient), rtol=0, atol=1e-5)
