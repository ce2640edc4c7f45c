"""What a block of the kit is given: the device, the ceilings, and where its rows go."""

import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TextIO

import torch

from cluster.measure import hardware
from training.model import shapes
from training.model.shapes import LlamaShape

TINY = LlamaShape(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=160,
    max_positions=256,
)  # fmt: skip
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Run:
    """One run of a block.

    Attributes:
        device: a GPU, or the CPU in a rehearsal, where sizes are small and the code is the same.
        ceilings: what block 1 measured: "product_tflops" (bf16), "read_gb_per_s", "copy_gb_per_s"; those that
            it did not measure are missing.
        stream: gets one JSON object for each row.
    """

    device: torch.device
    stream: TextIO
    ceilings: Mapping[str, float] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> LlamaShape:
        """The model: 1.4B parameters, or TINY in a rehearsal."""
        return shapes.resolve("llama-1b4") if self.gpu else TINY

    @property
    def sheet(self) -> hardware.Device | None:
        """The GPU's datasheet, if there is one."""
        return hardware.lookup(torch.cuda.get_device_name(self.device)) if self.gpu else None

    def row(self, case: str, *, problem: str | None = None, **figures: Any) -> None:
        """Report one row: its figures, each with its unit in its key, and what is wrong with it, if anything.

        A figure that is not finite is a problem of its own. A share of a ceiling above 100% voids that
        ceiling, and the row says so.
        """
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        broken = [name for name, value in numbers.items() if not math.isfinite(value)]
        problem = problem or (f"not finite: {', '.join(broken)}" if broken else None)
        faults = [
            name.removeprefix("percent_of_")
            for name, value in numbers.items()
            if name.startswith("percent_of_") and value > 100
        ]
        row = {"case": case, **figures, **{name: str(numbers[name]) for name in broken}}
        if faults:
            row["fault"] = f"above 100% of {', '.join(faults)}: that ceiling is too low, its shares are void"
        if problem:
            row["problem"] = problem
        self.stream.write(json.dumps(row, allow_nan=False) + "\n")
        self.stream.flush()

    def attempt(self, *parts: Callable[["Run"], None]) -> None:
        """Run the parts of a block. What one raises is a row's problem, and the next runs all the same."""
        for part in parts:
            try:
                part(self)
            except Exception as error:
                traceback.print_exc()
                reason = (str(error).strip().splitlines() or ["no message"])[0]
                where = f"{part.__module__}.{part.__qualname__}"
                self.row(where, problem=f"{type(error).__name__}: {reason}")

    def of_products(self, tflops: float) -> dict[str, float]:
        """`tflops` as a share of each ceiling of bf16 products that is known, in percent."""
        return self._shares(tflops, ("datasheet_bf16_tflops", "product_tflops"))

    def of_memory(self, gb_per_s: float, *, measured: str) -> dict[str, float]:
        """`gb_per_s` as a share of the datasheet's bandwidth and of the measured "read" or "copy"."""
        return self._shares(gb_per_s, ("datasheet_gb_per_s", f"{measured}_gb_per_s"))

    def _shares(self, rate: float, names: tuple[str, str]) -> dict[str, float]:
        known = dict(self.ceilings)
        if (sheet := self.sheet) is not None:
            known |= {
                "datasheet_bf16_tflops": sheet.bf16_tflops,
                "datasheet_gb_per_s": sheet.memory_gb_per_s,
            }
        labels = {name: name if name.startswith("datasheet") else f"measured_{name}" for name in names}
        return {f"percent_of_{labels[name]}": 100 * rate / known[name] for name in names if name in known}

    def seconds_of(
        self, body: Callable[[], Any], *, repeats: int = 10, warm_up: int = 2
    ) -> tuple[float, float, float]:
        """(median, least, most) seconds of `body`, by events on a GPU's stream or by the clock of a CPU."""
        for _ in range(warm_up):
            body()
        if not self.gpu:
            marks = [time.perf_counter()]
            for _ in range(repeats):
                body()
                marks.append(time.perf_counter())
            taken = [b - a for a, b in pairwise(marks)]
        else:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
            events[0].record()
            for event in events[1:]:
                body()
                event.record()
            events[-1].synchronize()
            taken = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]  # elapsed_time is in ms
        return statistics.median(taken), min(taken), max(taken)

    def peak_memory_gb(self) -> float | None:
        """Most that torch has allocated on the GPU since `reset_peak_memory`, in 1e9 bytes; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.gpu else None

    def reset_peak_memory(self) -> None:
        """Free what nothing refers to any more, and count from here."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def random(self, *size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Standard normal numbers, drawn on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*size, generator=generator, device=self.device).to(dtype)


def error_of(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found - exact‖ / ‖exact‖ in fp64; NaN where `found` holds one."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


def worst_of(*errors: float) -> float:
    """The largest; NaN if any is NaN, which `max` would pass over."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)
