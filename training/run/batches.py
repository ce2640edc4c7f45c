"""The training samples of one rank, on its device."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.data.dataset import micro_batch
from training.data.mixture import drawn, order_of
from training.run.context import Context
from training.run.start import Start


class Batches:
    """Micro-batches as a function of the step: there is no state to save.

    passed_over: given the steps taken, the steps' worth of batches that are skipped before the next batch.
    """

    def __init__(self, start: Start, context: Context, *, passed_over: Callable[[int], int]) -> None:
        self._start = start
        self._passed_over = passed_over
        self._order = order_of(start.train_set, seed=start.config.run.seed)
        self._context = context

    def micro_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a pass after `step` steps: int64 [micro_sequences, sequence_length]."""
        read = torch.from_numpy(
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
        tokens = send(read, self._context.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def drawn(self, step: int) -> dict[str, float]:
        """For a row of the record after `step` steps: what each source of a mixture gave, skipped or not."""
        samples = (step + self._passed_over(step)) * self._start.plan.samples_per_step
        return drawn(self._order, samples, self._start.train_set)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, of the CPU, on the device. To a GPU from pinned memory: the host does not wait."""
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)
