"""fp32 sums of bf16 gradients under ZeRO-1, bit for bit against sums taken by hand on the same rank."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.optim.step.zero_cases import Network, ZeroCase, batches, build
from tests.ranks import spawn
from training.run.context import Context

pytestmark = pytest.mark.stack

NUM_STEPS, BUCKET = 2, 100  # elements: less than a matrix, so buckets cut it
SENT = {"auto": torch.bfloat16, "fp32": torch.float32}
CASES = [(1, "auto"), (4, "auto"), (16, "auto"), (4, "fp32")]  # accumulation, dtype between ranks


def build_case(case: ZeroCase, sent: str):
    config = case.config()
    zero = replace(config.zero, communication_dtype=sent, bucket_elements=BUCKET)
    with mock.patch.object(ZeroCase, "config", return_value=replace(config, zero=zero)):
        return build(case)


def by_hand(context: Context, weights: dict[str, Tensor], case: ZeroCase, step: int, sent: str):
    """The mean over the ranks of each one's sum, in fp32, of its micro-batches' bf16 gradients."""
    model = Network().bfloat16()
    model.load_state_dict(weights)
    tokens, targets = batches(case, context.world_size)
    sums = []
    for rank in range(context.world_size):
        total = {name: torch.zeros(p.numel()) for name, p in model.named_parameters()}
        for micro in range(case.accumulation):
            model.zero_grad()
            (model(tokens[step, micro, rank], targets[step, micro, rank]) / case.accumulation).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] += parameter.grad.float().flatten()
        sums.append(total)
    if context.world_size == 1:
        return sums[0]
    return {
        name: (sum(total[name].to(SENT[sent]) for total in sums) * (1 / context.world_size)).float()
        for name in sums[0]
    }


def differing(context: Context) -> list[tuple[int, str, int, list[str]]]:
    """Of every case and step: the parameters whose gradient differs from `by_hand` in any bit."""
    found = []
    for accumulation, sent in CASES:
        case = ZeroCase(1, accumulation=accumulation, precision="bf16")
        engine, _, _ = build_case(case, sent)
        tokens, targets = batches(case, context.world_size)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        for step in range(NUM_STEPS):
            for micro in range(accumulation):
                engine.backward(engine(tokens[step, micro, context.rank], targets[step, micro, context.rank]))
                assert all(parameter.grad is None for parameter in engine.module.parameters())
                if micro < accumulation - 1:
                    engine.step()
            weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
            expected = by_hand(context, weights, case, step, sent)
            own = {
                names[id(parameter)]: total
                for group, totals in zip(
                    engine.optimizer.bf16_groups, engine.optimizer.fp32_groups_gradients, strict=True
                )
                for parameter, total in zip(group, totals, strict=True)
            }
            wrong = [name for name, total in expected.items() if not torch.equal(own[name], total)]
            found.append((accumulation, sent, step, wrong))
            engine.step()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_the_fp32_sum_of_every_micro_batch_of_their_step(world_size: int) -> None:
    """Of every one: DeepSpeed once added the last micro-batch after reducing, so that it counted in the next
    step (https://github.com/deepspeedai/DeepSpeed/pull/7985). On one rank nothing is rounded on its way."""
    for rank in spawn(differing, world_size=world_size):
        assert rank == [(*case, step, []) for case in CASES for step in range(NUM_STEPS)]
