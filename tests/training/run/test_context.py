"""Ranks that wait for rank 0 longer than a collective may take, as real processes with a gloo group."""

import os
import resource
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import distributed_c10d

from cluster.cli import BAD_INPUT, RunError, UserError
from cluster.session import free_ports
from tests.ranks import forkserver
from tests.waiting import PATIENCE_SECONDS, wait_until
from training.run import context
from training.run.context import Context, Ranks, torch_context

pytestmark = pytest.mark.stack

WORLD_SIZE, TIMEOUT = 3, timedelta(seconds=1)
FORMING = timedelta(seconds=PATIENCE_SECONDS)  # of a group, which takes as long as the machine needs


def one_rank(rank: int, how: str, port: int, folder: str) -> None:
    """Writes what came of it, as torchrun's environment tells it who it is."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    Path(folder, str(rank)).write_text(how_it_ends(how, Path(folder)))


def slow() -> str:
    time.sleep(2 * TIMEOUT.total_seconds())
    return "the data"


def how_it_ends(how: str, folder: Path) -> str:
    distributed_c10d.default_pg_timeout = TIMEOUT  # of a group that is formed from now on
    ranks = Ranks.meet()
    try:
        if how == "in the group":
            distributed_c10d.default_pg_timeout = FORMING
            with torch_context(ranks, gpu=False) as context:
                distributed_c10d._set_pg_timeout(TIMEOUT)
                if context.is_main:  # later than any timeout
                    wait_until(lambda: len(list(folder.iterdir())) == WORLD_SIZE - 1)
                return str(context.gather("the data"))
        result = ranks.on_main(slow if how == "before the group" else refuse)
        distributed_c10d.default_pg_timeout = FORMING
        with torch_context(ranks, gpu=False) as context:
            return str(context.gather((result, context.rank, Context.__name__)))
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    except UserError as error:
        return f"UserError: {error}"
    except SystemExit as error:
        return f"exit {error.code}"


def refuse() -> str:
    raise UserError("data.source: missing")


def results(how: str, folder: Path) -> list[str]:
    [port] = free_ports(1)
    forkserver()
    mp.start_processes(one_rank, (how, port, str(folder)), nprocs=WORLD_SIZE, start_method="forkserver")
    return [(folder / str(rank)).read_text() for rank in range(WORLD_SIZE)]


def test_preparing_data_may_take_longer_than_a_collective(tmp_path):
    told = str([("the data", rank, "Context") for rank in range(WORLD_SIZE)])
    assert results("before the group", tmp_path) == [told] * WORLD_SIZE


def test_in_the_group_the_same_wait_ends_the_run(tmp_path):
    """So the timeout above is in force."""
    waited = results("in the group", tmp_path)[1:]
    assert all(each.startswith("RuntimeError") and "imed out" in each for each in waited), waited


def test_an_error_of_rank_0_is_told_once_and_ends_every_rank(tmp_path):
    first, *others = results("refused", tmp_path)
    assert first == "UserError: data.source: missing"
    assert others == [f"exit {BAD_INPUT}"] * (WORLD_SIZE - 1)


def test_a_rank_that_does_not_come_is_not_waited_for(monkeypatch):
    [port] = free_ports(1)
    monkeypatch.setattr(context, "MEET_SECONDS", 0.3)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"rank 0 of 2: the ranks did not meet at 127.0.0.1:\d+ within 0.3 s"):
        Ranks.meet()
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(RunError, match="MASTER_PORT expected"):
        Ranks.meet()


def test_a_single_process_prepares_and_has_a_group_of_its_own(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ranks = Ranks.meet()
    assert ranks.on_main(lambda: 7) == 7 and not dist.is_initialized()
    with torch_context(ranks, gpu=False) as context:
        assert (context.rank, context.world_size, context.gather("a")) == (0, 1, ["a"])
        faults = []
        for _ in range(8):  # 64 MB: 16,384 pages, which glibc would ask of the system each time
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(1 << 24)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert min(faults) < 1000
