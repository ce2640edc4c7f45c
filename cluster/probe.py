"""Measured ceilings of this machine: matrix products and memory. Shares of a datasheet's peak need no probe.

    python -m cluster.probe [--device cpu|cuda] [--threads N]      one JSON object

Each figure is the best of several repeats: a ceiling is what the hardware can do when nothing disturbs it.
The spread beside it, (slowest, fastest), says how disturbed it was.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GEMM_SIZE = 2048  # rows, columns and depth on a CPU; a GPU takes four times as much of each
COPY_BYTES = 1 << 28  # well above any cache


@dataclass(frozen=True)
class Ceiling:
    """A measured rate: the best repeat, and (slowest, fastest). The unit is in the name that holds it."""

    best: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Ceilings:
    """What a device reached.

    Attributes:
        bf16_tflops: TFLOP/s of a square bf16 product with fp32 accumulation, 2·n³ FLOPs each.
        read_gb_per_s: GB/s (1e9 bytes) of summing an array much larger than the caches.
        copy_gb_per_s: GB/s of copying one, bytes read plus bytes written.
        device: such as "cpu, 2 threads" or the GPU's name.
    """

    bf16_tflops: Ceiling
    read_gb_per_s: Ceiling
    copy_gb_per_s: Ceiling
    device: str


def measure(*, device: str = "cpu", num_threads: int | None = None, repeats: int = 7) -> Ceilings:
    """Ceilings of "cpu" or "cuda", in about a second each.

    Args:
        num_threads: of torch on a CPU; None leaves them as they are. They stay set.
        repeats: of each measurement, after one that is not counted.
    """
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    gpu = device == "cuda"
    size = GEMM_SIZE * (4 if gpu else 1)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(COPY_BYTES * (4 if gpu else 1) // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()

    def timed(body: Callable[[], Any], amount: float) -> Ceiling:
        """Rates in `amount` per second."""
        rates = []
        for _ in range(repeats + 1):
            if gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            body()
            if gpu:
                torch.cuda.synchronize()
            rates.append(amount / (time.perf_counter() - start))
        rates = rates[1:]
        return Ceiling(max(rates), (min(rates), max(rates)))

    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    return Ceilings(
        bf16_tflops=timed(lambda: torch.mm(left, right, out=product), 2 * size**3 / 1e12),
        read_gb_per_s=timed(source.sum, num_bytes / 1e9),
        copy_gb_per_s=timed(lambda: target.copy_(source), 2 * num_bytes / 1e9),
        device=name,
    )


def main() -> int:
    """Measure, and print the best rates as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m cluster.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="compute threads; default: torch's own")
    options = parser.parse_args()
    found = measure(device=options.device, num_threads=options.threads)
    rates = ("bf16_tflops", "read_gb_per_s", "copy_gb_per_s")
    print(json.dumps({"device": found.device, **{name: getattr(found, name).best for name in rates}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
