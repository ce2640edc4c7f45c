"""The optimizer contract (DESIGN.md, "The optimizer step") on real ranks, against the one-process oracle."""

import pytest
import torch

from optim.step.health import PHASES
from tests.optim.step.zero_cases import (
    NUM_STEPS,
    STAGES,
    WORLDS,
    Network,
    ZeroCase,
    assemble,
    fill,
    oracle,
    outcomes,
    relative,
)
from training.optim_config import MUON_RULES
from training.run.engine import DTYPES, make_rules

pytestmark = pytest.mark.stack


TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


CASES_OF_WORLDS = [(world_size, case) for world_size, cases in WORLDS.items() for case in cases]


@pytest.mark.parametrize(("world_size", "case"), CASES_OF_WORLDS, ids=str)
def test_every_stage_equals_the_oracle(world_size: int, case: ZeroCase) -> None:
    results = outcomes(world_size)[case]
    expected = oracle(case, world_size)
    found = assemble(results)
    assert found.keys() == expected.tensors.keys()
    tolerance = TOLERANCE[case.precision]
    for name, tensors in expected.tensors.items():
        assert found[name].keys() == tensors.keys()
        assert found[name]["master"].numel() == tensors["master"].numel()
        assert relative(found[name]["master"], tensors["master"].flatten()) < tolerance, name
        if case.precision == "fp32":  # in bf16 the gradients themselves differ by their rounding
            for key in tensors:
                assert relative(found[name][key], tensors[key].flatten()) < tolerance, (name, key)
    for result in results:
        assert result["norms"] == pytest.approx(
            expected.norms, rel=1e-5 if case.precision == "fp32" else 2e-2
        )
        # The model's own weights are the masters in its precision, or the point, on every rank.
        for name, weight in result["weights"].items():
            shown = found[name].get("point", found[name]["master"])
            assert torch.equal(weight.flatten(), shown.to(DTYPES[case.precision])), name
        # What is evaluated is the weights; the points come back after that.
        at_point, at_weights, *_ = expected.losses
        rel = 1e-5 if case.precision == "fp32" else 5e-3
        assert result["losses"] == pytest.approx([*expected.losses, at_point], rel=rel)
        assert result["losses"][0] == result["losses"][-1]
        if case.rule == "transported_scion":
            assert abs(at_point - at_weights) > 4 * rel * at_weights
        elif not case.config().optim.looks_ahead:
            assert result["losses"][0] == result["losses"][1]


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_acts_on_the_gradient_and_not_on_the_update(stage) -> None:
    """Muon's step length does not depend on the gradient's scale, so clipping must not shorten it."""
    clipped, free = (outcomes(2)[ZeroCase(*stage, accumulation=4, clip=clip)] for clip in (0.05, 0.0))
    assert min(clipped[0]["norms"]) > 0.1  # the clip is in force
    network = Network()
    fill(network)
    before = network.square.weight.detach().flatten()
    lengths = [(assemble(case)["square.weight"]["master"] - before).norm().item() for case in (clipped, free)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_matrix_is_orthogonalised_once(world_size: int) -> None:
    for case, results in outcomes(world_size).items():
        # up, down, square, idle; qkv_proj as queries, keys and values, or as five heads
        if case.rule == "muon":
            elementwise = sum("idle*" in each for each in case.by_name)
            assert case.num_matrices == (4 + 5 if case.per_head else 4 + 3) - elementwise
        elif "scion" in case.rule:
            # And the embedding, the norm's weight and two biases; the head unless by its sign, elementwise.
            assert case.num_matrices == 4 + 3 + 4 + (case.precision == "bf16")
        else:
            assert (case.num_matrices > 0) == (case.rule in MUON_RULES)
        updates = NUM_STEPS // case.config().optim.gradients_per_update
        assert sum(result["transforms"] for result in results) == case.num_matrices * updates, case


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_health_of_a_step_is_that_of_all_ranks(world_size: int) -> None:
    for case, results in outcomes(world_size).items():
        health = results[0]["health"]
        assert all(result["health"] == health for result in results)
        moved = NUM_STEPS % case.config().optim.gradients_per_update == 0  # in the last step
        assert health["orthogonalisations"] == case.num_matrices * moved
        rel = 1e-4 if case.precision == "fp32" else 2e-2
        # Scion's RMS is over matrices of every norm. In bf16 the oracle itself moves by 5% with its number of
        # threads: Newton-Schulz leaves singular values anywhere in its band, and a vector has only one.
        if "scion" in case.rule and case.precision == "fp32":
            assert health["update_rms"] == pytest.approx(oracle(case, world_size).update_rms, rel=rel), case
        if (
            case.rule != "muon" or case.noise != "none" or case.by_name or case.after
        ):  # noise moves `idle` too
            continue
        layers = health["layers"]
        assert len(layers) == case.num_matrices
        errors = [each["orthogonality_error"] for each in layers.values()]
        assert max(errors) == pytest.approx(health["orthogonality_error_max"])
        assert sum(errors) / len(errors) == pytest.approx(health["orthogonality_error"])
        assert set(health) == {
            "layers",
            *(f"{phase}_seconds" for phase in PHASES),
            *("imbalance", "orthogonalisations"),
            *("orthogonality_error", "orthogonality_error_max", "update_rms"),
        }
        # `idle` has no gradient, so that its update is 0 and its error 1.
        assert 0 < health["orthogonality_error"] < health["orthogonality_error_max"] == pytest.approx(1)
        assert 0 <= health["imbalance"] < world_size - 1 + 1e-9
        assert all(health[f"{phase}_seconds"] > 0 for phase in PHASES)
        assert health["update_rms"] == pytest.approx(oracle(case, world_size).update_rms, rel=rel), case


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_description_names_the_matrices_and_the_bytes(world_size: int) -> None:
    for case, results in outcomes(world_size).items():
        for result in results:
            assert f"{case.num_matrices} matrices" in result["text"]
            assert f"{result['bytes_sent']:,} bytes of matrices sent per step" in result["text"]
        assert (results[0]["bytes_sent"] > 0) == (world_size > 1 and case.num_matrices > 0)
        assert len({result["text"] for result in results}) == 1


def test_a_sub_group_of_stage_3_is_a_call_of_its_own() -> None:
    """Else the cases above with small ones would show nothing."""
    for case, results in outcomes(2).items():
        if case.rule == "muon":
            assert (results[0]["calls"] > 2) == bool(case.sub_group or case.by_name), case


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_state_exists_from_the_start_under_the_same_names(world_size: int) -> None:
    for case, results in outcomes(world_size).items():
        names = set().union(*(result["state_keys"] for result in results))
        by_label = make_rules(case.config().optim)
        rules = [by_label[label] for label in {member.label for member in case.members()}]
        expected = (
            {"master"}
            | ({"average"} if case.after else set())
            | ({"point"} if any(rule.looks_ahead for rule in rules) else set())
        )
        assert names == expected.union(*(rule.state_names + rule.line_state_names for rule in rules)), case
