"""A DeepSpeed that lays its shards out in another way is an error that names what moved."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch

from optim.step.zero import ZeroOptimizer
from tests.optim.step.zero_cases import VOCABULARY, ZeroCase, build
from tests.ranks import spawn
from training.run.context import Context

pytestmark = pytest.mark.stack

# (stage, owner, attribute): "mapping" is the parameter's. Without ds_tensor DeepSpeed itself fails earlier.
READ_AT_START = [
    *((stage, "parameter", "_hp_mapping") for stage in (1, 2)),
    *((2, "mapping", attribute) for attribute in ("lp_fragment_address", "hp_fragment_address")),
    *((3, "parameter", attribute) for attribute in ("partition_numel", "ds_numel")),
    *(
        (3, "wrapper", name)
        for name in ("fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id")
    ),
    (3, "wrapper", "fp16_partitioned_groups_flat"),
    (2, "wrapper", "parallel_partitioned_bit16_groups"),
]
READ_AT_RESUME = [
    (1, "wrapper", "update_lp_params"),
    (3, "wrapper", "fp32_partitioned_groups_flat"),
    (3, "wrapper", "_reassign_or_swap_out_partitioned_parameters"),
    (3, "wrapper", "persistent_parameters"),
    (3, "wrapper", "_partition_all_parameters"),
]
DIFFERENT = [
    ZeroCase(0, precision="bf16"),
    ZeroCase(1),
    ZeroCase(2, offload=True),
    ZeroCase(3),
    ZeroCase(3, init=True),
]


def owner_of(kind: str, wrapper: Any, optimizer: ZeroOptimizer) -> Any:
    members = (member for group in optimizer.param_groups for member in group["members"])
    [parameter] = [member.parameter for member in members if member.name == "up.weight"]
    return {
        "wrapper": lambda: wrapper,
        "parameter": lambda: parameter,
        "mapping": lambda: parameter._hp_mapping,
    }[kind]()


def forget(patch: pytest.MonkeyPatch, owner: Any, attribute: str) -> None:
    """Remove an attribute of an object, or of the class that it is of."""
    found = [one for one in (owner, *type(owner).__mro__) if attribute in vars(one)]
    assert found, f"{attribute} is not read from there any more"
    for one in found:
        patch.delattr(one, attribute)


def start(case: ZeroCase, interfere: Callable[[Any, ZeroOptimizer], None], **zero_keys: Any) -> str:
    """The error with which a run refuses to start after DeepSpeed's work and before `bind`."""
    bind = ZeroOptimizer.bind

    def interfered(optimizer: ZeroOptimizer, engine: deepspeed.DeepSpeedEngine) -> None:
        interfere(engine.optimizer, optimizer)
        bind(optimizer, engine)

    with mock.patch.object(ZeroOptimizer, "bind", interfered):
        try:
            build(case, **zero_keys)
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "it started"


def misread(context: Context) -> dict[str, list[str]]:
    """What is said at start-up and at resume to each change of DeepSpeed's layout."""
    found: dict[str, list[str]] = {"start": [], "resume": [], "different": [], "shifted": [], "reordered": []}
    for stage, kind, attribute in READ_AT_START:
        with pytest.MonkeyPatch.context() as patch:

            def remove(wrapper: Any, optimizer: ZeroOptimizer) -> None:
                forget(patch, owner_of(kind, wrapper, optimizer), attribute)  # noqa: B023

            found["start"].append(start(ZeroCase(stage), remove))
    for stage, kind, attribute in READ_AT_RESUME:
        engine, optimizer, _ = build(ZeroCase(stage))
        with pytest.MonkeyPatch.context() as patch:
            forget(patch, owner_of(kind, engine.optimizer, optimizer), attribute)
            try:
                optimizer.refresh_weights()
            except RuntimeError as error:
                found["resume"].append(str(error))
    for case in DIFFERENT:

        def change(wrapper: Any, optimizer: ZeroOptimizer) -> None:
            """One element of lm_head.weight, which is the second of the tables."""
            masters = optimizer.param_groups[0]["params"]
            if case.stage == 3:  # noqa: B023
                masters = wrapper.fp32_partitioned_groups_flat[:1]
            elements = torch.cat([master.data.flatten() for master in masters])
            elements[VOCABULARY * 12 + 5] += 1
            for master, changed in zip(masters, elements.split([m.numel() for m in masters]), strict=True):
                master.data.copy_(changed.view_as(master))

        found["different"].append(start(case, change))

    def shift(wrapper: Any, optimizer: ZeroOptimizer) -> None:
        owner_of("mapping", wrapper, optimizer).hp_fragment_address.start += 1

    found["nowhere"] = [start(ZeroCase(0, rule="transported_scion"), lambda *_: None)]
    found["shifted"] = [start(ZeroCase(stage), shift) for stage in (1, 2)]
    for stage in (1, 2):
        found["reordered"].append(start(ZeroCase(stage), lambda *_: None, round_robin_gradients=True))
    return found


@pytest.fixture(scope="module")
def errors() -> dict[str, list[str]]:
    [found] = spawn(misread, world_size=1)
    return found


def test_what_deepspeed_has_moved_is_an_error_at_start_that_names_it_and_the_version(errors) -> None:
    assert deepspeed.__version__ == "0.19.8"
    for (stage, _, attribute), message in zip(READ_AT_START, errors["start"], strict=True):
        assert message.startswith("RuntimeError: DeepSpeed 0.19.8 has no "), (stage, attribute, message)
        assert f".{attribute}, from which optim/step/layout.py reads the shard layout" in message
        assert message.endswith("install deepspeed==0.19.8")


def test_what_is_read_to_resume_is_an_error_that_names_it_and_the_version(errors) -> None:
    for (_, _, attribute), message in zip(READ_AT_RESUME, errors["resume"], strict=True):
        assert message.startswith("DeepSpeed 0.19.8 has no ") and f".{attribute}," in message


def test_a_master_that_differs_from_the_weights_names_the_parameter(errors) -> None:
    for case, message in zip(DIFFERENT, errors["different"], strict=True):
        assert message.startswith("ValueError: lm_head.weight: elements 0 to 192 of the fp32 master"), case
    for message in errors["shifted"]:  # the address of up.weight is off by one
        assert message.startswith("ValueError: up.weight: elements 0 to 240 of the fp32 master differ")


def test_a_point_ahead_needs_a_copy_of_the_weights_to_lie_in(errors) -> None:
    [message] = errors["nowhere"]
    assert message.startswith("ValueError: transported_scion takes gradients ahead of the weights, but here")
    assert "use zero.stage=1 or precision=bf16" in message


def test_round_robin_gradients_are_refused(errors) -> None:
    for message in errors["reordered"]:
        assert message.startswith("ValueError: round_robin_gradients makes DeepSpeed report wrong shard")
