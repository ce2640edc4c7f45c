"""Real ranks for tests: a function in several processes with a gloo process group between them."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from cluster.session import set_defaults, worker_environment
from tests.waiting import PATIENCE_SECONDS
from training.run.context import Context


def forkserver() -> Any:
    """`multiprocessing`, whose processes are forked from one that has imported DeepSpeed."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.rank_imports"])
    return context


def spawn(function: Callable[..., Any], *arguments: Any, world_size: int) -> list[Any]:
    """Call `function(context, *arguments)` on every rank; return the results in rank order.

    `function` must be importable. A rank that raises fails the test with its traceback. Each rank is a new
    process, so nothing that one leaves behind reaches the next test; it is forked from a process that has
    imported DeepSpeed (`tests.rank_imports`), so 8 ranks start in 0.3 s.
    """
    with tempfile.TemporaryDirectory() as folder:
        forkserver()
        given = (function, arguments, world_size, Path(folder))
        mp.start_processes(_rank, given, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, function: Callable[..., Any], arguments: tuple, world_size: int, folder: Path) -> None:
    import torch.distributed as dist

    set_defaults(worker_environment(gpu=False, threads=1))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=PATIENCE_SECONDS)  # in vain: an error
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=limit)
    context = Context(rank, world_size, torch.device("cpu"), "torch")
    torch.save(function(context, *arguments), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()
