"""Measured ceilings: matrix products, memory, disks, and the links between GPUs and between nodes.

    python -m cluster.measure.probe [--device cpu|cuda] [--dtype bfloat16|float32] [--threads N]

Each figure is the best of several repeats: a ceiling is what the hardware can do when nothing disturbs it. A
GPU that multiplies for more than some 50 ms is slowed down by its limit of power (an H200 from 799 to 683
TFLOP/s, tests/baselines/nvidia-h200_gpu.json). Products are therefore measured in short bursts after rests,
and shares are of that ceiling. What the GPU sustains is reported beside it.
The spread beside it, (slowest, fastest), shows how much was disturbed. Products are measured in the dtype in
which a model of that dtype multiplies (`optim.precision`); the result names it. Sizes and repeats shrink on a
slow CPU, so that everything takes at most ten seconds. What cannot be measured is missing, with a reason.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.process import Child
from optim.precision import product_dtype

if TYPE_CHECKING:
    import torch

GEMM_SIZE = 2048  # most rows, columns and depth on a CPU; a GPU takes four times as much of each
PILOT_SIZE = 256  # of the product whose speed chooses size and repeats on a CPU
PILOT_REPEATS = 5
LEAST_ROWS = 64  # of a model's products, on a slow CPU
CPU_SECONDS = 2.5  # on a CPU, for each measurement: products, two of memory, and all products of a model
COPY_BYTES = 1 << 28  # well above any cache
SUSTAINED_SECONDS = 0.2  # of each repeat on a GPU
BURST_SECONDS, REST_SECONDS = 0.02, 0.3  # of products on a GPU, before its limit of power holds
PEAKS = ("product_tflops", "read_gb_per_s")  # of Ceilings: the peaks of compute and memory
RATES = ("product_tflops", "read_gb_per_s", "copy_gb_per_s", "product_sustained_tflops")  # of Ceilings
LINK_PEAK = "all_reduce_gb_per_s"  # of MeasuredLinks: the peak for the bytes that a rank sends


@dataclass(frozen=True)
class Ceiling:
    """A measured rate: the best repeat, and (slowest, fastest). The unit is in the name that holds it."""

    best: float
    spread: tuple[float, float]


@dataclass(frozen=True)
class Ceilings:
    """What a device reached. A rate that could not be measured is None, and `problems` says why.

    Attributes:
        product_dtype: what the products were measured in, such as "bfloat16".
        product_tflops: TFLOP/s of a square product with fp32 accumulation, 2·n³ FLOPs each.
        read_gb_per_s: GB/s (1e9 bytes) of summing an array much larger than the caches.
        copy_gb_per_s: GB/s of copying one, bytes read plus bytes written.
        device: such as "cpu, 2 threads" or the GPU's name.
        problems: name of a rate -> why it is missing, in one line.
        product_sustained_tflops: of the same products without a rest, after half a second: what a GPU's limit
            of power leaves. None on a CPU, whose products have no rests.
    """

    product_dtype: str
    product_tflops: Ceiling | None
    read_gb_per_s: Ceiling | None
    copy_gb_per_s: Ceiling | None
    device: str
    problems: dict[str, str]
    product_sustained_tflops: Ceiling | None = None


def measure(
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    num_threads: int | None = None,
    repeats: int = 7,
    size: int | None = None,
) -> Ceilings:
    """Ceilings of "cpu" or "cuda", in a few seconds.

    Args:
        dtype: of a model's weights, "bfloat16" or "float32"; products are measured in what it multiplies in.
        num_threads: of torch on a CPU; None leaves them as they are. They stay set.
        repeats: of each measurement at most, after one that is not counted.
        size: most rows, columns and depth of the products; None takes GEMM_SIZE, or four times that on a GPU.
    """
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    gpu = device == "cuda"
    product = _product_dtype(dtype, device)
    num_bytes = COPY_BYTES * (4 if gpu else 1)
    problems: dict[str, str] = {}

    def attempt(name: str, take: Callable[[], Ceiling]) -> Ceiling | None:
        try:
            return take()
        except (RuntimeError, MemoryError) as error:  # torch's errors of allocation are RuntimeErrors
            problems[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return None

    def products(*, sustained: bool = False) -> Ceiling:
        n = size or GEMM_SIZE * (4 if gpu else 1)
        n = n if gpu else _affordable_size(n, repeats, _pilot_flops(product))
        return _square_products(n, repeats, device=device, dtype=product, sustained=sustained)

    def memory(*, copied: bool) -> Ceiling:
        source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
        target = torch.empty_like(source) if copied else source
        body = partial(target.copy_, source) if copied else source.sum
        taken = _sustained(body, repeats, gpu=gpu, within=CPU_SECONDS)
        return _ceiling((2 if copied else 1) * num_bytes / 1e9, taken)

    name = torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads"
    return Ceilings(
        product_dtype=str(product).removeprefix("torch."),
        product_tflops=attempt("product_tflops", products),
        read_gb_per_s=attempt("read_gb_per_s", partial(memory, copied=False)),
        copy_gb_per_s=attempt("copy_gb_per_s", partial(memory, copied=True)),
        device=name,
        product_sustained_tflops=(
            attempt("product_sustained_tflops", partial(products, sustained=True)) if gpu else None
        ),
        problems=problems,
    )


def _square_products(n: int, repeats: int, *, device: str, dtype: "torch.dtype", sustained: bool) -> Ceiling:
    import torch

    gpu = device == "cuda"
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    multiply = partial(torch.mm, left, right, out=out)
    if gpu and not sustained:
        taken = _sustained(multiply, repeats, gpu=True, seconds=BURST_SECONDS, rest=REST_SECONDS)
    else:
        taken = _sustained(multiply, repeats, gpu=gpu, within=CPU_SECONDS)
    return _ceiling(2 * n**3 / 1e12, taken[2:] if sustained else taken)


def measure_products(
    counts: Mapping[tuple[int, int], int],
    *,
    num_rows: int,
    device: str,
    dtype: str = "bfloat16",
    repeats: int = 5,
    within: float = CPU_SECONDS,
) -> Ceiling:
    """TFLOP/s of a model's own products, there and back: the ceiling of its training step.

    Each size is measured once and counts as often as the model has it.

    Args:
        counts: (rows, columns) of each weight -> how many the model has.
        num_rows: tokens that are multiplied at once; fewer on a CPU that could not do them in time.
        dtype: as in `measure`.
        within: seconds, on a CPU.
    """
    import torch

    gpu, product = device == "cuda", _product_dtype(dtype, device)
    if not gpu:
        flops_of_all = _pilot_flops(product) * within / (repeats + 1)
        affordable = int(flops_of_all / sum(6 * rows * cols for rows, cols in counts))
        num_rows = min(num_rows, max(LEAST_ROWS, affordable))

    def seconds(rows: int, cols: int) -> list[float]:
        weight = torch.randn(rows, cols, device=device).to(product)
        x = torch.randn(num_rows, cols, device=device).to(product)

        def there_and_back() -> None:
            y = x @ weight.T
            _ = y @ weight, y.T @ x

        return _sustained(there_and_back, repeats, gpu=gpu, within=within / len(counts))

    taken = [[count * each for each in seconds(*size)] for size, count in counts.items()]
    flops = sum(6 * rows * cols * count for (rows, cols), count in counts.items()) * num_rows
    return _ceiling(flops / 1e12, [sum(repeat) for repeat in zip(*taken, strict=False)])


def _product_dtype(dtype: str, device: str) -> "torch.dtype":
    import torch

    return product_dtype(getattr(torch, dtype), torch.device(device))


def _pilot_flops(dtype: "torch.dtype") -> float:
    """FLOP/s of a small product on this CPU."""
    import torch

    operand = torch.randn(PILOT_SIZE, PILOT_SIZE).to(dtype)
    return 2 * PILOT_SIZE**3 / min(_seconds(lambda: operand @ operand, PILOT_REPEATS, gpu=False))


def _affordable_size(most: int, repeats: int, flops_per_s: float) -> int:
    """The largest of `most`, its half, its quarter ... whose products take CPU_SECONDS in all."""
    size = most
    while size > PILOT_SIZE and 2 * size**3 * (repeats + 1) > CPU_SECONDS * flops_per_s:
        size //= 2
    return size


def _sustained(
    body: Callable[[], Any], repeats: int, *, gpu: bool, within: float = inf, rest: float = 0.0,
    seconds: float = SUSTAINED_SECONDS,
) -> list[float]:  # fmt: skip
    """Seconds of `body`; on a GPU each is the mean of as many launches in a row as take `seconds`.

    A single product is over before a GPU's clocks have settled, and too short beside waiting for it. Before
    each repeat a GPU rests. On a CPU repeats end after `within` seconds.
    """
    if not gpu:
        return _seconds(body, repeats, gpu=gpu, within=within)
    number = max(1, round(seconds / min(_seconds(body, 3, gpu=True))))

    def many() -> None:
        for _ in range(number):
            body()

    taken = _seconds(many, repeats, gpu=True, before=partial(time.sleep, rest))
    return [each / number for each in taken]


def _seconds(
    body: Callable[[], Any],
    repeats: int,
    *,
    gpu: bool,
    before: Callable[[], Any] = lambda: None,
    within: float = inf,
) -> list[float]:
    """How long `body` takes, `repeats` times after one that is not counted; `before` is not in the time.

    No repeat begins once all of them together have taken `within` seconds; one is always counted.
    """
    import torch

    taken: list[float] = []
    while len(taken) <= repeats and (len(taken) < 2 or sum(taken) < within):
        before()
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        body()
        if gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[1:]


def _ceiling(amount: float, seconds: list[float]) -> Ceiling:
    rates = [amount / each for each in seconds]
    return Ceiling(max(rates), (min(rates), max(rates)))


@dataclass(frozen=True)
class MeasuredLinks:
    """What collectives between ranks reached.

    Attributes:
        all_reduce_gb_per_s: bus bandwidth of a large all-reduce, GB/s: 2·(n-1)/n · bytes / seconds, which is
            what each rank's link carries whatever n is.
            Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        all_to_all_gb_per_s: of a large all-to-all, (n-1)/n · bytes / seconds. The source is the same.
        all_reduce_latency_us: median time of an all-reduce of 4 bytes, microseconds.
        num_ranks: n.
        num_bytes: of the large buffers, per rank.
    """

    all_reduce_gb_per_s: Ceiling
    all_to_all_gb_per_s: Ceiling
    all_reduce_latency_us: float
    num_ranks: int
    num_bytes: int


def measure_links(
    *, rank: int, num_ranks: int, address: str, port: int, device: str, num_bytes: int, repeats: int = 5
) -> MeasuredLinks:
    """Measure the links between `num_ranks` processes that all call this at once.

    Args:
        address, port: of rank 0, free there.
        device: "cpu" (gloo) or "cuda" (NCCL); the current GPU.

    Raises:
        RuntimeError: the others did not come, or the backend failed; within two minutes.
    """
    import torch
    import torch.distributed as dist

    from cluster.machine.rendezvous import meet

    gpu = device == "cuda"
    meet(
        "nccl" if gpu else "gloo",
        rank=rank,
        world_size=num_ranks,
        address=address,
        port=port,
        timeout=timedelta(minutes=2),
    )
    try:
        count = max(num_ranks, num_bytes // 4 // num_ranks * num_ranks)
        source = torch.ones(count, device=device)
        target = torch.empty_like(source)
        word = torch.ones(1, device=device)

        def seconds(body: Callable[[], Any], times: int) -> list[float]:
            return _seconds(body, times, gpu=gpu, before=dist.barrier)

        def rate(body: Callable[[], Any], share: float) -> Ceiling:
            return _ceiling(share * count * 4 / 1e9, seconds(body, repeats))

        others = (num_ranks - 1) / num_ranks
        return MeasuredLinks(
            all_reduce_gb_per_s=rate(lambda: dist.all_reduce(source), 2 * others),
            all_to_all_gb_per_s=rate(lambda: dist.all_to_all_single(target, source), others),
            all_reduce_latency_us=statistics.median(seconds(lambda: dist.all_reduce(word), 4 * repeats))
            * 1e6,
            num_ranks=num_ranks,
            num_bytes=count * 4,
        )
    finally:
        dist.destroy_process_group()


def measure_node_links(num_ranks: int, *, device: str, num_bytes: int) -> MeasuredLinks:
    """`measure_links` between processes of this node, one per GPU or, on a CPU, of one thread each.

    Raises:
        RuntimeError: a process failed; the message is its own.
    """
    from cluster.session import free_ports

    (port,) = free_ports(1)
    command = [sys.executable, "-m", "cluster.measure.probe", "--device", device, "--threads", "1"]
    ranks = [
        Child(
            [*command, "--link", f"{rank}/{num_ranks}:{port}", "--bytes", str(num_bytes)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, problem) in zip(ranks, said, strict=True):
        if rank.returncode:
            raise RuntimeError((problem.strip().splitlines() or ["a rank failed"])[-1])
    found = json.loads(said[0][0].strip().splitlines()[-1])
    rates: dict[str, Any] = {
        name: Ceiling(**found.pop(name)) for name in ("all_reduce_gb_per_s", "all_to_all_gb_per_s")
    }
    return MeasuredLinks(**rates, **found)


def measure_disk(folder: Path, *, num_bytes: int) -> tuple[float, float]:
    """(write, read) in GB/s of one file in `folder`, synced to the disk, and read past the page cache.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    file = folder / f".probe-{uuid.uuid4().hex}"
    block = os.urandom(1 << 22)
    try:
        start = time.perf_counter()
        with file.open("wb", buffering=0) as stream:
            for _ in range(num_bytes // len(block)):
                stream.write(block)
            os.fsync(stream.fileno())
            written = time.perf_counter() - start
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with file.open("rb", buffering=0) as stream:
            while stream.read(len(block)):
                pass
        read = time.perf_counter() - start
    finally:
        file.unlink(missing_ok=True)
    size = num_bytes // len(block) * len(block) / 1e9
    return size / written, size / read


def main() -> int:
    """Measure, and print the best rates as one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.measure.probe", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of a model")
    parser.add_argument("--threads", type=int, default=None, help="compute threads; default: torch's own")
    parser.add_argument("--link", metavar="RANK/RANKS:PORT", help="be a rank of a measurement of links")
    parser.add_argument("--bytes", type=int, default=1 << 26, help="with --link: of its large buffers")
    options = parser.parse_args()
    if options.link:
        print(json.dumps(asdict(_be_a_rank(options))))
        return 0
    found = asdict(measure(device=options.device, dtype=options.dtype, num_threads=options.threads))
    print(
        json.dumps(
            {name: value["best"] if name in RATES and value else value for name, value in found.items()}
        )
    )
    return 0


def _be_a_rank(options: argparse.Namespace) -> MeasuredLinks:
    import torch

    ranks, _, port = options.link.partition(":")
    rank, _, num_ranks = ranks.partition("/")
    if options.device == "cuda":
        torch.cuda.set_device(int(rank))
    else:
        torch.set_num_threads(options.threads or 1)
    return measure_links(
        rank=int(rank), num_ranks=int(num_ranks), address="127.0.0.1", port=int(port),
        device=options.device, num_bytes=options.bytes,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
