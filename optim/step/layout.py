"""DeepSpeed 0.19.8 from inside. Only `gradients` reads internals of it too.

Read, to know where the shards lie (a missing attribute is an error that names it and the version):
    stage 0     nothing: the groups hold whole fp32 parameters
    stage 1, 2  parameter._hp_mapping: where the parameter's piece lies in the flat fp32 shard;
                optimizer.parallel_partitioned_bit16_groups, or bf16_partitioned_groups of a BF16_Optimizer,
                or param_buffer_of_bit16_for_cpu_offload_groups: the model's copy of the shard
    stage 3     optimizer.fp16_groups, fp32_partitioned_groups_flat, fp16_partitioned_groups_flat,
                sub_group_to_group_id; parameter.partition_numel(), ds_numel, ds_tensor

Called, to copy the masters to the model and gather them: `refresh_weights`.
"""

import logging
import warnings
from collections.abc import Iterator
from math import prod
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime import bf16_optimizer
from torch import Tensor

from optim.groups import Member
from optim.rules import Rule
from optim.step.fragments import Fragment, rank_and_world_size


def quiet_deepspeed() -> None:
    """Keep DeepSpeed to errors. Call it before `deepspeed.initialize`.

    BF16_Optimizer collects garbage and prints a table of memory, which takes 2 s. On a CPU, DeepSpeed would
    run a compiler to learn which of its operators it can build, and then build one, `deepspeed_shm_comm`,
    which only inference needs. That takes 20 to 90 s, and a build that is killed leaves a lock that hangs
    every later run.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls functions that torch.distributed deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}


def read_layout(
    groups: list[dict[str, Any]], engine: deepspeed.DeepSpeedEngine
) -> Iterator[tuple[Rule, list[Fragment]]]:
    """Yield (rule, fragments in the same order on every rank) for each unit of work of `step`.

    Args:
        groups: of the client optimizer, each with its "params" (DeepSpeed's shards), "members" and "rule".

    Raises:
        ValueError: a shard differs from the model's weights, or lies where DeepSpeed would not copy it.
        RuntimeError: this DeepSpeed lacks an attribute that the layout is read from.
    """
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2) and engine.zero_round_robin_gradients():
        raise ValueError(
            "round_robin_gradients makes DeepSpeed report wrong shard addresses; "
            "remove it from the DeepSpeed configuration"
        )
    parameters = {member.name: member.parameter for group in groups for member in group["members"]}
    for rule, fragments in (
        _read_stage_3(groups, wrapper) if stage == 3 else _read_stages(groups, wrapper, stage)
    ):
        for fragment in fragments:
            _check_against_weights(fragment, parameters[fragment.name], stage, wrapper)
        yield rule, fragments


def _read_stages(
    groups: list[dict[str, Any]], wrapper: Any, stage: int
) -> Iterator[tuple[Rule, list[Fragment]]]:
    """Stages 0 to 2: one unit for each group."""
    for index, group in enumerate(groups):
        members, masters = group["members"], group["params"]
        if stage == 0:
            yield group["rule"], _whole_parameters(members, masters)
        else:
            [flat] = masters
            yield group["rule"], _flat_partition(members, flat, _model_partition(wrapper, index))


def _fragment(
    member: Member, start: int, stop: int, flat: Tensor, offset: int, model: Tensor | None
) -> Fragment:
    cols = member.shape[1] if len(member.shape) == 2 else 1
    return Fragment(member.name, member.blocks, cols, start, stop, flat, offset, model)


def _whole_parameters(members: list[Member], masters: list[Tensor]) -> list[Fragment]:
    """Stage 0: every rank holds every parameter."""
    found = []
    for member, master in zip(members, masters, strict=True):
        model = None if master is member.parameter else member.parameter.data
        found.append(_fragment(member, 0, prod(member.shape), master, 0, model))
    return found


def _model_partition(wrapper: Any, index: int) -> Tensor:
    """Stages 1 and 2: what DeepSpeed copies this rank's shard of a group to."""
    if getattr(wrapper, "cpu_offload", False):
        return _read(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups")[index]
    bf16 = isinstance(wrapper, bf16_optimizer.BF16_Optimizer)
    groups = _read(wrapper, "bf16_partitioned_groups" if bf16 else "parallel_partitioned_bit16_groups")
    return groups[index][rank_and_world_size()[0]]


def _flat_partition(members: list[Member], flat: Tensor, model: Tensor) -> list[Fragment]:
    """Stages 1 and 2: one flat shard per group, in which consecutive parameters lie end to end."""
    fragments = []
    for member in members:
        mapping = _read(member.parameter, "_hp_mapping")
        if mapping is None:  # no piece of this parameter here
            fragments.append(_fragment(member, 0, 0, flat, 0, model))
            continue
        in_parameter = _read(mapping, "lp_fragment_address")
        in_shard = _read(mapping, "hp_fragment_address")
        stop = in_parameter.start + in_parameter.numel
        fragments.append(_fragment(member, in_parameter.start, stop, flat, in_shard.start, model))
    return fragments


def _read_stage_3(groups: list[dict[str, Any]], wrapper: Any) -> Iterator[tuple[Rule, list[Fragment]]]:
    """Stage 3: every parameter is cut into equal pieces, and sub-groups of pieces lie end to end."""
    rank, _ = rank_and_world_size()
    by_parameter = {id(member.parameter): member for group in groups for member in group["members"]}
    for index, flat in enumerate(_read(wrapper, "fp32_partitioned_groups_flat")):
        model = _read(wrapper, "fp16_partitioned_groups_flat")[index]
        if model is not None and model.device != flat.device:
            model = None  # DeepSpeed copies the masters to the other device
        fragments, offset = [], 0
        for parameter in _read(wrapper, "fp16_groups")[index]:
            size, numel = _read(parameter, "partition_numel")(), _read(parameter, "ds_numel")
            start = min(rank * size, numel)
            member = by_parameter[id(parameter)]
            fragments.append(_fragment(member, start, min(start + size, numel), flat, offset, model))
            offset += size
        yield groups[_read(wrapper, "sub_group_to_group_id")[index]]["rule"], fragments


def _read(owner: Any, attribute: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {type(owner).__name__}.{attribute}, from which "
            "optim/step/layout.py reads the shard layout; install deepspeed==0.19.8"
        ) from error


def _check_against_weights(fragment: Fragment, parameter: Tensor, stage: int, wrapper: Any) -> None:
    """The shard must hold the model's own weights and know where they lie, or the layout was misread."""
    if stage == 3:
        weights = _read(parameter, "ds_tensor").view(-1)[: fragment.stop - fragment.start]
    else:
        weights = parameter.detach().reshape(-1)[fragment.start : fragment.stop]
    master = fragment.view(fragment.flat.detach())
    where = f"{fragment.name}: elements {fragment.start} to {fragment.stop}"
    if not torch.equal(master.to(weights.device, weights.dtype), weights):
        raise ValueError(
            f"{where} of the fp32 master differ from the model's weights; "
            f"DeepSpeed {deepspeed.__version__} lays shards out in another way"
        )
    offloaded = getattr(wrapper, "cpu_offload", False)  # its copy is on the way to the model's
    if fragment.model is None or offloaded or not len(weights):
        return
    if fragment.view(fragment.model).data_ptr() != weights.data_ptr():
        raise ValueError(
            f"{where} are not where the step would write the model's weights; "
            f"DeepSpeed {deepspeed.__version__} lays its copy out in another way"
        )


@torch.no_grad()
def refresh_weights(groups: list[dict[str, Any]], engine: deepspeed.DeepSpeedEngine) -> None:
    """Write the model's weights, in their precision and on every rank, from the fp32 masters."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for group in groups:
            for member, master in zip(group["members"], group["params"], strict=True):
                member.parameter.copy_(master)
    elif stage == 3:
        _read(wrapper, "_partition_all_parameters")()  # gathered ones would stay as they are
        for index in range(len(_read(wrapper, "fp32_partitioned_groups_flat"))):
            _read(wrapper, "_reassign_or_swap_out_partitioned_parameters")(index)
        persistent = _read(wrapper, "persistent_parameters")  # small ones, kept whole on every rank
        if persistent:
            persistent[0].all_gather(persistent)
    else:
        _read(wrapper, "update_lp_params")()
