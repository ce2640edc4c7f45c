"""What a site of many nodes needs: SSH, ports, Ray's control, the network, storage. Arithmetic alone.

`make up ARGS=--dry-run` prints it of an inventory, and `make projection` of its largest number of nodes.
"""

from dataclasses import dataclass
from math import ceil

from cluster.head.keeper import ALIVE_POLL_SECONDS
from cluster.laptop.keys import Inventory

NUM_AT_ONCE = 32  # nodes that the laptop meets at a time
# An estimate, of a first command over ssh: TCP, key exchange, authentication and channel. The handshake of a
# worker passes through the head.
ROUND_TRIPS_OF_SSH = 15
HEALTH_SECONDS = 3.0  # Ray's health_check_period_ms
ROW_BYTES = 1_000  # an estimate, of a node in the answer of Ray's state API
STATE_BYTES_PER_PARAMETER = 12  # fp32 weights and, at most, two moments


@dataclass(frozen=True)
class Site:
    """The size of a site, and what lies between its parts."""

    nodes: int
    round_trip_seconds: float = 0.14  # New York to Asunción
    environment_bytes: float = 6e9  # with CUDA's torch
    network_gb_per_s: float = 3.1  # of a node: 25 Gbit/s Ethernet at its best
    gcs_port: int = 6379
    dashboard_port: int = 8265


def site_of(inventory: Inventory) -> Site:
    """The site that an inventory describes."""
    ports = inventory.ports
    return Site(len(inventory.active), gcs_port=ports.gcs, dashboard_port=ports.dashboard)


def connect_seconds(site: Site) -> float:
    """Seconds in which the laptop has met all workers for the first time."""
    return ceil((site.nodes - 1) / NUM_AT_ONCE) * ROUND_TRIPS_OF_SSH * site.round_trip_seconds


def copy_seconds(site: Site) -> float:
    """Seconds in which the head has sent the environment to all workers, where its network is the limit."""
    return (site.nodes - 1) * site.environment_bytes / (site.network_gb_per_s * 1e9)


def describe(site: Site) -> list[tuple[str, str]]:
    """(what, what it needs) for people."""
    workers = site.nodes - 1
    contact = f"{workers:,} first contacts through the head, {NUM_AT_ONCE} at a time"
    size = f"{site.environment_bytes / 1e9:.1f} GB (assumed) to each worker from the head"
    states = f"{site.nodes * ROW_BYTES / ALIVE_POLL_SECONDS / 1e6:.2f} MB of states"
    return [
        ("SSH", f"{contact}: {connect_seconds(site):.0f} s at {site.round_trip_seconds * 1e3:.0f} ms"),
        (
            "environment",
            f"{size}: {copy_seconds(site) / 60:.1f} min at {site.network_gb_per_s:.1f} GB/s, the first time",
        ),
        (
            "ports",
            f"{site.gcs_port} of the head, and all above 1023 between the nodes (Ray's and NCCL's are "
            f"random); {site.dashboard_port} is on loopback",
        ),
        (
            "Ray's control",
            f"{site.nodes / HEALTH_SECONDS:.0f} health checks and {states} a second, on the head",
        ),
        (
            "preflight",
            f"{site.nodes:,} nodes at once; then the links in each node, those of all nodes together, and "
            "those of neighbours in two rounds, or three",
        ),
    ]


def checkpoint(site: Site, num_parameters: int) -> tuple[str, str]:
    """As a row of `describe`: what a checkpoint of a model asks of the storage that all nodes share."""
    size = num_parameters * STATE_BYTES_PER_PARAMETER / 1e9
    return "checkpoint", (
        f"{size:.1f} GB, {size / site.nodes:.2f} of each node: {size / 60:.2f} GB/s of the shared storage to "
        "write one in a minute, whatever the number of nodes"
    )
