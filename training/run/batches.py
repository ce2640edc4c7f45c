"""The training samples of one rank, on its device."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import TrainConfig
from training.data.dataset import TokenDataset, document_starts, micro_batch
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
        self._repeats = start.config.optim.gradients_per_update  # steps that see one batch
        self._order = order_of(start.train_set, seed=start.config.run.seed)
        self._context = context

    def micro_batch(self, step: int, micro_step: int, *, skipped: int = 0) -> tuple[Any, ...]:
        """What the model is called with in a pass after `step` steps, of which `skipped` changed nothing.

        Inputs and targets, int64 [micro_sequences, sequence_length], and what `documents` returns.
        """
        start, device = self._start, self._context.device
        read = micro_batch(
            start.train_set,
            self._order,
            consumed_samples=self._batches(step, skipped) * start.plan.samples_per_step,
            micro_step=micro_step,
            rank=self._context.rank,
            world_size=self._context.world_size,
            micro_sequences=start.config.batch.micro_sequences,
        )
        tokens = send(torch.from_numpy(read), device)
        starts = documents(start.config, start.train_set, read[:, :-1], device)
        return (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), *starts)

    def drawn(self, step: int) -> dict[str, float]:
        """For a row of the record after `step` steps: what each source of a mixture gave, skipped or not."""
        last = self._batches(max(step - 1, 0)) + (step > 0)
        return drawn(self._order, last * self._start.plan.samples_per_step, self._start.train_set)

    def _batches(self, step: int, skipped: int = 0) -> int:
        """Batches before the one of the next step. A gradient that is skipped has lost its pair."""
        return (step + self._passed_over(step) + (self._repeats - 1) * skipped) // self._repeats


def documents(
    config: TrainConfig, dataset: TokenDataset, inputs: NDArray[np.int64], device: torch.device
) -> tuple[Any, ...]:
    """`documents` and `longest` of `Llama.forward` for `inputs` [B, T], if `batch.document_masks` is on.

    Computed on the CPU, where the tokens are; on a GPU the host would have to wait for the result.
    """
    if not config.batch.document_masks:
        return ()
    starts = document_starts(inputs, end_of_text=dataset.manifest.end_of_text_id)
    return send(torch.from_numpy(starts), device), int(np.diff(starts).max())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, of the CPU, on the device. To a GPU from pinned memory: the host does not wait."""
    if device.type == "cuda":
        tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)
