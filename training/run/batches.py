"""The training samples of one rank, on its device."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.data.dataset import SampleOrder, micro_batch
from training.run.context import Context
from training.run.start import Start


class Batches:
    """Micro-batches as a function of the step: there is no state to save.

    passed_over: step -> how many steps' worth of batches are skipped before that which follows it.
    """

    def __init__(self, start: Start, context: Context, *, passed_over: Callable[[int], int]) -> None:
        self._start = start
        self._passed_over = passed_over
        self._order = SampleOrder(start.train_set.num_samples, seed=start.config.run.seed)
        self._context = context

    def micro_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a pass after `step` steps: int64 [micro_sequences, sequence_length]."""
        drawn = torch.from_numpy(
            micro_batch(
                self._start.train_set,
                self._order,
                consumed_samples=(step + self._passed_over(step)) * self._start.plan.samples_per_step,
                micro_step=micro_step,
                rank=self._context.rank,
                world_size=self._context.world_size,
                micro_sequences=self._start.config.batch.micro_sequences,
            )
        )
        if self._context.device.type == "cuda":
            drawn = drawn.pin_memory()  # or the host would wait for the copy, and so for all work before it
        tokens = drawn.to(self._context.device, non_blocking=True)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
