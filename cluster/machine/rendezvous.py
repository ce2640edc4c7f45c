"""Where the ranks of a process group meet: torch's store and gloo, each on one address and not on all.

Neither asks who connects (torch has no means to), so both belong on loopback where all ranks are on one
machine, and on the network between the nodes, which a site fences, where they are not.
"""

import fcntl
import os
import socket
import struct
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from cluster.head.addresses import family
from cluster.session import set_defaults

SIOCGIFADDR = 0x8915  # of Linux's ioctl: the IPv4 address of an interface


def meet(backend: str, *, rank: int, world_size: int, address: str, port: int, timeout: timedelta) -> None:
    """Make the default process group. Collective.

    Args:
        backend: "gloo" or "nccl". gloo's connections take the interface that leads to rank 0, unless
            GLOO_SOCKET_IFNAME is set; NCCL's are NCCL_SOCKET_IFNAME's.
        address, port: of rank 0, an address of its own, on which nothing listens at this port.

    Raises:
        OSError: rank 0 cannot listen there.
        RuntimeError: the others did not come within `timeout`.
    """
    descriptor = _listen(address, port) if rank == 0 else None
    store = dist.TCPStore(
        address, port, world_size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=descriptor
    )
    if interface := interface_of(_local_address(address)):
        set_defaults({"GLOO_SOCKET_IFNAME": interface})
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave() -> None:
    """End the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The network interface whose first IPv4 address, or an IPv6 one, is `address`; or None."""
    if family(address) == socket.AF_INET6:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        wanted = socket.inet_pton(socket.AF_INET6, address).hex()
        return next((row[-1] for row in rows if row[0] == wanted), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", os.fsencode(name)))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _listen(address: str, port: int) -> int:
    """The descriptor of a listening socket; torch's store would listen on every address."""
    listener = socket.socket(family(address))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(1024)
    return listener.detach()


def _local_address(address: str) -> str:
    """This machine's own address on the way to `address`. Nothing is sent."""
    with socket.socket(family(address), socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return probe.getsockname()[0]
