"""Fragments that cannot be laid out, heads as matrices, state, and the phases of one rank's step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from optim import rules
from optim.directions import Momentum
from optim.groups import attention_splits, partition
from optim.kernels import native
from optim.lookahead import EmaNesterov, Transport
from optim.rules import adamw, muon
from optim.stages import Polar
from optim.step import exchange, health
from optim.step.fragments import Fragment
from optim.step.fused import FusedStep
from tests.optim.step.fused_cases import LR, NUM_STEPS, RULES, StepCase, lay_out, relative, set_gradients
from tests.ranks import spawn
from training.model.llama import Llama
from training.model.shapes import resolve
from training.run.context import Context

pytestmark = pytest.mark.stack


def refusals(context: Context) -> list[str]:
    """What FusedStep says to fragments that neither tile nor replicate their parameter."""
    found = []
    for start, stop in [(0, 8 + context.rank), (9 * context.rank, 8 + 8 * context.rank), (0, 8)]:
        fragment = Fragment("layers.0.up_proj.weight", (4,), 4, start, stop, torch.zeros(16), 0)
        with pytest.raises(ValueError, match="elements") as raised:
            FusedStep(muon(), [fragment], device=context.device)
        found.append(str(raised.value))
    return found


def test_fragments_that_overlap_or_leave_a_gap_are_refused_on_every_rank():
    first, second = spawn(refusals, world_size=2)
    assert first == second
    for message, elements in zip(first, ("8 to 0", "8 to 9", "8 to 0"), strict=True):
        assert message.startswith(f"layers.0.up_proj.weight: elements {elements} are held")


# --- alone, without a process group ------------------------------------------------------------------------


def fragments_of(model: torch.nn.Module, splits: dict[str, tuple[int, ...]]) -> list[Fragment]:
    """One fragment for each hidden matrix, whole."""
    members = partition(model.named_parameters(), splits=splits)
    return [
        Fragment(m.name, m.blocks, m.shape[1], 0, m.parameter.numel(), m.parameter, 0)
        for m in members
        if m.kind == "matrix"
    ]


@pytest.mark.parametrize("per_head", [True, False])
def test_per_head_makes_every_head_of_a_llama_a_matrix_of_its_own(per_head):
    sizes = {"num_heads": 4, "num_kv_heads": 2}
    shape = resolve("llama-5m", num_layers=2, hidden_size=32, ffn_size=48, vocab_size=300, **sizes)
    model, rule = Llama(shape), muon(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.zero_()
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    splits = attention_splits(**sizes, head_dim=shape.head_dim, per_head=per_head)
    unit = FusedStep(rule, fragments_of(model, splits), device=torch.device("cpu"))
    names = [matrix.name for matrix in unit.plan.matrices]
    heads = {"q_proj": 4, "k_proj": 2, "v_proj": 2} if per_head else {}
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        own = [name for name in names if ".layers.1." in name and f".{projection}." in name]
        [prefix] = {name.partition("[")[0] for name in own}
        count = heads.get(projection)
        assert own == ([f"{prefix}[{head}]" for head in range(count)] if count else [prefix])
    assert len(names) == 2 * (4 + sum(heads.values()) if per_head else 7)

    unit.step(lr=1.0)
    assert unit.num_transforms == len(names) and unit.bytes_sent == 0
    query = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    for rows in (shape.head_dim, shape.hidden_size):
        blocks = [torch.zeros(rows, shape.hidden_size) for _ in range(shape.hidden_size // rows)]
        for block, part in zip(blocks, query.grad.split(rows), strict=True):
            rules.step(rule, block, part, rules.new_state(rule, block), lr=1.0, step=1)
        error = relative(query.detach(), torch.cat(blocks))
        if per_head == (rows == shape.head_dim):
            assert error < 1e-5
        else:
            assert error > 0.1  # the other split is another update


def test_the_state_is_there_from_the_start_and_can_be_written():
    flat = torch.ones(10)
    fragments = [Fragment("a", (2,), 3, 0, 6, flat, 0), Fragment("b", (2,), 2, 0, 4, flat, 6)]
    unit = FusedStep(muon(), fragments, device=torch.device("cpu"))
    assert [tuple(state) for state in unit.states] == [("momentum",)]
    unit.state_of(fragments[1])["momentum"].fill_(7)  # as a checkpoint that is loaded does
    assert unit.states[0]["momentum"].tolist() == [0] * 6 + [7] * 4


class OwnDirection(Momentum):
    def __call__(self, *arguments, **options):
        return super().__call__(*arguments, **options).square_()


class OwnEnd(Transport):
    def move(self, weight, descend, **options):
        point = super().move(weight, descend, **options)
        weight.sign_()
        return point


@pytest.mark.parametrize("changed", [{"direction": OwnDirection()}, {"ahead": OwnEnd(1.0)}], ids=str)
def test_a_rule_with_a_part_of_its_own_is_obeyed_where_there_are_compiled_passes(changed):
    initial, gradient = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(0))

    def fused_step(rule):
        flat = initial.flatten().clone()
        flat.grad = gradient.flatten()
        FusedStep(rule, [Fragment("a", (20,), 12, 0, 240, flat, 0)], device=torch.device("cpu")).step(lr=0.1)
        return flat.view(20, 12)

    rule, expected = replace(muon(), **changed), initial.clone()
    rules.step(rule, expected, gradient, rules.new_state(rule, expected), lr=0.1, step=1)
    assert relative(fused_step(rule) - initial, expected - initial) < 1e-2
    assert relative(fused_step(muon()) - initial, expected - initial) > 0.1


def test_the_rules_that_the_compiled_passes_know():
    reasons = {name: rule.not_compiled for name, rule in RULES.items() if rule.whole}
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "ema_nesterov": "muon looks ahead by more than a displacement",
        "mars": "mars's direction is no plain momentum",
        "normuon-larger": "cautious weight decay asks for the sign of each entry",
    }


def test_each_phase_is_that_of_its_part_of_the_rule(monkeypatch):
    """By a clock that only the parts of the rule move on."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(health, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class SlowStart(Momentum):
        def __call__(self, *arguments, **options):
            clock.now += 1
            return super().__call__(*arguments, **options)

    class SlowPolar(Polar):
        def __call__(self, *arguments):
            clock.now += 2
            return super().__call__(*arguments)

    class SlowEnd(EmaNesterov):
        def move(self, *arguments, **options):
            clock.now += 3
            return super().move(*arguments, **options)

    slow = replace(muon(), direction=SlowStart(), stages=(SlowPolar(),), ahead=SlowEnd())
    flat = torch.ones(12)
    unit = FusedStep(slow, [Fragment("a", (3,), 4, 0, 12, flat, 0)], device=torch.device("cpu"))
    unit.step(lr=0.1)
    # alone there is nothing to wait for in an exchange
    assert unit.health.seconds == {"start": 1, "orthogonalize": 2, "finish": 3, "exchange": 0}


def test_the_rule_sees_the_number_of_the_step():
    """Bias correction: with a constant gradient Adam's steps all have the length of the first."""
    flat = torch.zeros(5)
    unit = FusedStep(adamw(), [Fragment("bias", (), 1, 0, 5, flat, 0)], device=torch.device("cpu"))
    for count in (1, 2, 3):
        flat.grad = torch.full((5,), 0.3)
        unit.step(lr=0.1)
        torch.testing.assert_close(flat, torch.full((5,), -0.1 * count))
    unit.steps = 0  # as a resumed run would be without its count: the correction is too strong
    unit.step(lr=0.1)
    assert (flat + 0.4).abs().min() > 0.05


def test_a_staged_step_gives_the_same_bits(monkeypatch):
    """The passes of an offloaded shard, on a CPU that plays both devices, against the passes in place."""
    monkeypatch.setattr(native, "unsupported", lambda device, dtype: "off: it sums in another order")
    monkeypatch.setattr(exchange, "STRETCH_BYTES", 400)
    for name, case in ((name, StepCase("alone", rule=name)) for name in RULES):
        found = []
        for staged in (False, True):
            monkeypatch.setattr(exchange, "_lies_elsewhere", lambda flat, device, staged=staged: staged)
            fragments = lay_out(case, 1, 0)
            unit = FusedStep(RULES[name], fragments, device=torch.device("cpu"))
            for step in range(NUM_STEPS):
                set_gradients(fragments, case, step)
                unit.step(lr=LR)
            assert [group.staging is not None for group in unit._groups] == [staged] * len(unit._groups)
            states = [tensor for state in unit.states for tensor in state.values()]
            found.append([fragments[0].flat.detach(), fragments[0].model, *states])
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*found, strict=True)), name
