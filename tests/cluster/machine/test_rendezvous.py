"""Where ranks meet: real processes, real gloo, and the addresses on which they listen."""

import os
import socket
from datetime import timedelta

import pytest

from cluster.machine.rendezvous import interface_of, meet
from cluster.session import free_ports
from tests.listening import listening
from tests.waiting import PATIENCE_SECONDS

LIMIT = timedelta(seconds=PATIENCE_SECONDS)


def test_an_interface_is_found_by_its_address():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None and interface_of("2001:db8::77") is None


def rank_of_two(rank: int, port: int, results) -> None:
    import torch
    import torch.distributed as dist

    meet("gloo", rank=rank, world_size=2, address="127.0.0.1", port=port, timeout=LIMIT)
    total = torch.ones(3) * (rank + 1)
    dist.all_reduce(total)
    results.put((total.tolist(), {address for _, address, _ in listening(os.getpid())}))
    dist.barrier()
    dist.destroy_process_group()


def test_the_store_and_gloo_listen_on_loopback_alone():
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    results = context.Queue()
    (port,) = free_ports(1)
    ranks = [context.Process(target=rank_of_two, args=(rank, port, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=PATIENCE_SECONDS) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=PATIENCE_SECONDS)
    assert found == [([3.0, 3.0, 3.0], {"127.0.0.1"})] * 2


def test_a_port_in_use_is_an_error_and_not_a_wait():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            meet("gloo", rank=0, world_size=2, address="127.0.0.1", port=port, timeout=LIMIT)
