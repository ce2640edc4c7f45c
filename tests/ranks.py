"""Real ranks for tests: a function in several processes with a gloo process group between them."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from cluster.session import set_defaults, worker_environment
from training.context import Context


def spawn(function: Callable[..., Any], *arguments: Any, world_size: int) -> list[Any]:
    """Call `function(context, *arguments)` on every rank; return the results in rank order.

    `function` must be importable. A rank that raises fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, arguments, world_size, Path(folder)), nprocs=world_size)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, function: Callable[..., Any], arguments: tuple, world_size: int, folder: Path) -> None:
    import torch.distributed as dist

    set_defaults(worker_environment(gpu=False, threads=1))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    context = Context(rank, world_size, torch.device("cpu"), "torch")
    torch.save(function(context, *arguments), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()
