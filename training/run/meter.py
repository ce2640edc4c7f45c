"""What a line of the record says of the steps since the line before: throughput, MFU and mean loss."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cluster.heart.hang import Heartbeat
from cluster.measure import hardware
from training.run.context import Context


@dataclass
class Meter:
    """Times optimizer steps. The caller pauses it for everything else, such as evaluation and checkpoints.

    Attributes:
        tokens_per_step: over all workers.
        flops_per_token: see `LlamaShape.flops_per_token`.
        num_devices: accelerators over all workers.
        device_name: as the driver names it, or the CPU's model name.
        measured_tflops: what a device reached in a product (`cluster.preflight`), or None.
        step_seconds: of every step in a line, the mean of its line.
    """

    tokens_per_step: int
    flops_per_token: int
    num_devices: int
    device_name: str
    measured_tflops: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    _started: float = 0.0
    _seconds: float = 0.0  # of the steps since the last line, and their number
    _num_steps: int = 0
    _data_seconds: float = 0.0  # of these

    def start(self) -> None:
        """Begin to time, or go on. Call once the device has finished what came before."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock. Call once the device has finished the steps that were counted."""
        self._seconds += time.perf_counter() - self._started

    def count_step(self) -> None:
        """One more step has been taken while the clock ran."""
        self._num_steps += 1

    @contextmanager
    def phase(self, part: str) -> Iterator[None]:
        """Time a part of a step, as `Trainer.take_step` names it, by the host's clock: only "data" counts.

        What a GPU computes meanwhile is not waited for, so other parts would be too short.
        """
        began = time.perf_counter()
        yield
        if part == "data":
            self._data_seconds += time.perf_counter() - began

    def line(self) -> dict[str, Any]:
        """Means over the steps that were timed since the last line: seconds, tokens per second and MFU.

        data_wait_seconds: of a step, how long this rank waited for its micro-batches.
        """
        seconds, waited = self._seconds / self._num_steps, self._data_seconds / self._num_steps
        self.step_seconds += [seconds] * self._num_steps
        self._seconds, self._data_seconds, self._num_steps = 0.0, 0.0, 0
        return {"step_seconds": seconds, "data_wait_seconds": waited, **self.rates(seconds)}

    def summary(self) -> dict[str, Any]:
        """The median step and its rates; empty if no step was timed."""
        if not self.step_seconds:
            return {}
        median = statistics.median(self.step_seconds)
        return {"median_step_seconds": median, **self.rates(median)}

    def rates(self, step_seconds: float) -> dict[str, Any]:
        """tokens_per_second over all workers, and `mfu` as a share of the datasheet peak, or null and why.

        `mfu_of_measured` is the same share of what a product reached on these devices, where that is known.
        Above 1 each comes with a reason to doubt its peak.
        """
        rate = self.tokens_per_step / step_seconds
        rates: dict[str, Any] = {"tokens_per_second": rate}
        device = hardware.lookup(self.device_name)
        if device is None:
            rates |= {"mfu": None, "mfu_reason": f"no datasheet peak for {self.device_name}"}
        else:
            rates["mfu"] = self._mfu(rate, device.bf16_tflops)
        if self.measured_tflops is not None:
            rates["mfu_of_measured"] = self._mfu(rate, self.measured_tflops)
        named = {"mfu": "the datasheet's peak", "mfu_of_measured": "the preflight's product"}
        for name, ceiling in named.items():
            if fault := hardware.ceiling_fault({name: rates.get(name) or 0.0}, ceiling=ceiling):
                rates[f"{name}_reason"] = fault
        return rates

    def _mfu(self, tokens_per_second: float, peak_tflops: float) -> float:
        return hardware.mfu(
            tokens_per_second=tokens_per_second,
            flops_per_token=self.flops_per_token,
            num_devices=self.num_devices,
            peak_tflops=peak_tflops,
        )


class Pace:
    """Tells the heartbeat which part of a step begins, and how long this rank's last forward passes took.

    Forward passes show a slow rank, because in the backward pass each rank waits for the others. In ZeRO
    stage 3 ranks wait in the forward pass too, so no times are given. On a GPU they are times of the device,
    read without synchronising.
    """

    PASSES = 32

    def __init__(self, heart: Heartbeat, device: torch.device, *, accumulation: int, zero_stage: int) -> None:
        self._heart, self._accumulation = heart, accumulation
        self._cuda, self._tells = device.type == "cuda", zero_stage < 3
        self._seconds: deque[float] = deque(maxlen=self.PASSES)
        self._began: Any = None  # a time, or an event of the GPU
        self._pending: deque[tuple[Any, Any]] = deque(maxlen=self.PASSES)  # events around forward passes

    def mark(self, part: str, step: int) -> None:
        """A part of a step begins: data, forward, backward or optimizer."""
        self._heart.mark(part, step)
        if part == "forward":
            self._began = self._now()
        elif part == "backward" and self._tells:
            self._pending.append((self._began, self._now()))
            while self._pending and (not self._cuda or self._pending[0][1].query()):
                first, last = self._pending.popleft()
                self._seconds.append(first.elapsed_time(last) / 1000 if self._cuda else last - first)
            if self._seconds:
                self._heart.forward_seconds = self._accumulation * statistics.fmean(self._seconds)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Losses:
    """Losses of the steps since the last line. A checkpoint carries them over to the run that continues."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._means: list[float] = []  # over all ranks
        self._own: list[Tensor] = []  # of this rank, not yet averaged over the ranks

    def add(self, loss: Tensor) -> None:
        """One more step, with this rank's mean loss."""
        self._own.append(loss)

    def of_steps(self) -> list[float]:
        """The mean loss over all ranks of each step. Collective.

        The sums are in float64, so that the mean of the same steps is the same whether a checkpoint came
        between them or not.
        """
        if self._own:
            own = torch.stack(self._own).double()
            self._means += (self._context.sum(own) / self._context.world_size).tolist()
            self._own = []
        return self._means

    def line(self) -> float:
        """The mean over the steps; begins the next line. Collective."""
        mean = statistics.fmean(self.of_steps())
        self._means = []
        return mean

    def as_text(self) -> list[str]:
        """For a checkpoint, as text: JSON cannot hold the losses of a run that diverges. Collective."""
        return [str(loss) for loss in self.of_steps()]

    def restore(self, losses: list[str]) -> None:
        """Continue from `as_text`."""
        self._means = [float(loss) for loss in losses]
