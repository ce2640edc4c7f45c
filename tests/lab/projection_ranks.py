"""Rates with W workers running at once on this machine: GEMMs, passes over memory, collectives.

    torchrun --nproc-per-node=W -m tests.lab.projection_ranks [--bytes N] [key=value of training.config ...]

For tests/lab/projection_check.py. Its workers share cores, so the rates of one worker alone do not apply.
Each figure is the mean over the ranks, one thread each. The last line on stdout is one JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster import cli
from cluster.session import set_defaults, worker_environment
from training import config as training_config
from training.config import TrainConfig
from training.plan import resolve_shape

SECONDS = 2.0  # that products and passes are repeated for
REPEATS = 7  # of a collective; the median counts
PASS_ELEMENTS = 1 << 23  # fp32, well above a core's caches
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command, of each rank. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser(
        "tests.lab.projection_ranks", description=__doc__.splitlines()[0], keys=TrainConfig()
    )
    parser.add_argument("--bytes", type=int, default=1 << 24, metavar="N", help="of a large buffer, per rank")
    options = parser.parse_args(arguments)

    def body() -> None:
        config = training_config.load(file=options.config, dotlist=options.overrides)
        found = None if options.dry_run else run(config, num_bytes=options.bytes)
        if found is not None:
            print(json.dumps(found))

    return cli.run(body)


def run(config: TrainConfig, *, num_bytes: int) -> dict[str, Any] | None:
    """Measure on this rank; the result on rank 0, None on the others.

    Keys: `num_ranks`; `products_tflops` and `passes_gb_per_s` of a rank while all are busy;
    `<collective>_gb_per_s`, bus bandwidths as in nccl-tests; `all_reduce_latency_us` of 4 bytes.
    """
    set_defaults(worker_environment(gpu=False, threads=1))
    import torch

    from training.run.context import torch_context

    torch.set_num_threads(1)
    with torch_context(gpu=False) as context:
        found = {"products_tflops": _products(config, context), "passes_gb_per_s": _passes(context)}
        if context.world_size > 1:
            dtype = torch.bfloat16 if config.is_bf16 else torch.float32
            found |= _collectives(context, num_bytes, dtype)
        every = context.gather(found)
        if not context.is_main:
            return None
        means = {name: statistics.mean(rank[name] for rank in every) for name in found}
        return {"num_ranks": context.world_size, **means}


def _rate(body: Callable[[], Any], context: Any) -> float:
    """Calls of `body` per second, while every rank makes them."""
    body()
    context.gather(None)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        body()
        calls += 1
    return calls / (time.perf_counter() - start)


def _products(config: TrainConfig, context: Any) -> float:
    """TFLOP/s of the model's products for one micro-batch, there and back, in its precision."""
    import torch

    from optim.precision import product_dtype

    wanted = torch.bfloat16 if config.is_bf16 else torch.float32
    dtype, shape = product_dtype(wanted, context.device), resolve_shape(config)
    sizes = list(dict.fromkeys([*shape.matrices(), (shape.vocab_size, shape.hidden_size)]))
    num_rows = config.batch.micro_sequences * config.batch.sequence_length
    weights = [torch.randn(size).to(dtype) for size in sizes]
    inputs = {cols: torch.randn(num_rows, cols).to(dtype) for _, cols in sizes}

    def there_and_back() -> None:
        for weight in weights:
            x = inputs[weight.shape[1]]
            y = x @ weight.T
            _ = y @ weight, y.T @ x

    return sum(6 * rows * cols * num_rows for rows, cols in sizes) * _rate(there_and_back, context) / 1e12


def _passes(context: Any) -> float:
    """GB/s of copying an array larger than the caches, bytes read plus bytes written."""
    import torch

    source = torch.zeros(PASS_ELEMENTS)
    target = torch.empty_like(source)
    return 2 * source.nbytes * _rate(lambda: target.copy_(source), context) / 1e9


def _collectives(context: Any, num_bytes: int, dtype: Any) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    ranks = context.world_size
    count = num_bytes // dtype.itemsize // ranks * ranks
    whole, other = torch.ones(count, dtype=dtype), torch.empty(count, dtype=dtype)
    part, word = torch.ones(count // ranks, dtype=dtype), torch.ones(1)
    others = (ranks - 1) / ranks
    bodies: dict[str, tuple[float, Callable[[], Any]]] = {
        "all_reduce": (2 * others, lambda: dist.all_reduce(whole)),
        "all_gather": (others, lambda: dist.all_gather_single(other, part)),
        "reduce_scatter": (others, lambda: dist.reduce_scatter_single(part, whole)),
        "all_to_all": (others, lambda: dist.all_to_all_single(other, whole)),
    }
    found = {
        f"{name}_gb_per_s": share * whole.nbytes / _seconds(body) / 1e9
        for name, (share, body) in bodies.items()
    }
    return found | {"all_reduce_latency_us": _seconds(lambda: dist.all_reduce(word)) * 1e6}


def _seconds(body: Callable[[], Any]) -> float:
    """Median time of `body`, ranks starting together."""
    import torch.distributed as dist

    taken = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        start = time.perf_counter()
        body()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


if __name__ == "__main__":
    sys.exit(main())
