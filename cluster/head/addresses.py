"""Addresses of nodes, which the inventory may give as IPv4, IPv6 or by name. Standard library only."""

import contextlib
import ipaddress
import socket
from collections.abc import Sequence


def is_address(node: str) -> bool:
    """Whether a node is given by its IPv4 or IPv6 address, and not by a name."""
    try:
        ipaddress.ip_address(node)
    except ValueError:
        return False
    return True


def own_address(name: str, others: Sequence[str]) -> str:
    """This machine's address, as the other nodes reach it; `name` itself if it is one.

    A machine's name often leads to a loopback address on the machine itself (Debian's 127.0.1.1), or to one
    of a network beyond it. Then it is the address by which this machine reaches the first of the others.

    Raises:
        ValueError: neither leads anywhere. The message names the remedy.
    """
    if is_address(name):
        return name
    mine = [
        address
        for address in _found(name)
        if not (ipaddress.ip_address(address).is_loopback and others) and _is_mine(address)
    ]
    sources = (_source(address) for other in others for address in _found(other))
    for address in (*mine, *filter(None, sources)):
        return address
    raise ValueError(f"{name}: no address of this machine; give the head's address in the inventory")


def _found(name: str) -> list[str]:
    """The addresses of a name, IPv4 before IPv6, which is the younger one in Ray; none if it is unknown."""
    with contextlib.suppress(OSError):
        rows = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
        return [str(row[4][0]) for row in sorted(rows, key=lambda row: row[0] != socket.AF_INET)]
    return []


def _is_mine(address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(family(address), socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _source(address: str) -> str | None:
    """This machine's address on the way to another. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(family(address), socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return probe.getsockname()[0]
    return None


def family(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET
