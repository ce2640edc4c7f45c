"""fp32 accumulation of bf16 gradients under DeepSpeed's BF16_Optimizer (ZeRO-1), at 10 bytes a parameter.

DeepSpeed 0.19.8 keeps every bf16 gradient until the backward pass ends, casts it to fp32, adds it, and zeroes
both (26 bytes a parameter). It reduces whole groups at once, through copies in fp32 and in bf16 of all that
is reduced, also with a single rank, where nothing needs to travel.

Here each gradient is added as soon as autograd has it, read as bf16 and summed in fp32 in one pass, and then
freed. The first one of a step overwrites. Reduction goes bucket by bucket, and a single rank keeps its sums.
"""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from optim.kernels import accumulate


def accumulate_in_fp32(engine: deepspeed.DeepSpeedEngine, *, bucket_elements: int) -> None:
    """Give the engine's BF16_Optimizer, if it has one, the accumulation and reduction of this file.

    The engine's configuration must set `bf16.immediate_grad_update`. Gradients travel in its
    `communication_data_type`, `bucket_elements` at a time.
    """
    if type(engine.optimizer) is BF16_Optimizer:
        assert engine.optimizer.immediate_grad_update
        engine.optimizer.__class__ = Bf16Gradients
        engine.optimizer.sent_dtype = engine.communication_data_type
        engine.optimizer.bucket_elements = bucket_elements


class Bf16Gradients(BF16_Optimizer):
    """BF16_Optimizer with another way from gradients of the model to reduced sums.

    `fp32_groups_gradients[group][index]` is a parameter's part of the flat fp32 sums, and
    `fp32_groups_has_gradients` says whether this step has written it.
    """

    sent_dtype: torch.dtype
    bucket_elements: int

    @torch.no_grad()
    def _update_hp_grad(self, lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """Called by a hook of autograd for each gradient, which DeepSpeed then drops."""
        total, written = self.fp32_groups_gradients[group_idx][param_idx], self.fp32_groups_has_gradients
        assert lp.grad is not None
        gradient = lp.grad.view(-1)
        accumulate.add(total, gradient, overwrite=not written[group_idx][param_idx])
        written[group_idx][param_idx] = True

    def clear_hp_grads(self) -> None:
        """Forget the sums: the next gradients overwrite them."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.fp32_groups_gradients]

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the sums over the ranks. The engine calls it after the last backward pass of a step."""
        for totals, written in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for total, is_written in zip(totals, written, strict=True):
                if not is_written:
                    total.zero_()
        world_size = dist.get_world_size(self.dp_process_group)
        if world_size == 1:
            return
        for flat in self.fp32_groups_gradients_flat:
            for part in flat.split(self.bucket_elements):
                sent = part.to(self.sent_dtype)
                dist.all_reduce(sent, group=self.dp_process_group)
                part.copy_(sent.mul_(1 / world_size))
