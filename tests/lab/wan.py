"""A wide-area link in user space: two TUN devices in two network namespaces, joined by a relay.

    wan.py NETNS_A NETNS_B CONTROL.json      devices wan0 in both

CONTROL.json, read again when it changes: delay_ms (one way), jitter_ms, loss (0..1), burst (mean number of
packets that are lost in a row: Gilbert's model, 1 for independent losses), down (what does not pass, and is
lost under way: "both" ways, "there" from A to B, "back", or "" for none). Order is kept in each direction.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
CONTROL_SECONDS = 0.05
QUEUE_PACKETS = 20_000


def tun(netns: str) -> int:
    """A TUN device wan0 in the namespace; returns its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{netns}", os.O_RDONLY)
    if libc.setns(there, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns {netns}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"wan0", IFF_TUN | IFF_NO_PI))
    if libc.setns(home, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns back")
    os.close(home)
    os.close(there)
    return device


def relay(ends: tuple[int, int], control: Path) -> None:
    """Carry packets between the two devices, for ever."""
    link = {"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0, "burst": 1.0, "down": ""}
    in_burst = [False, False]
    queues: tuple[deque, deque] = (deque(), deque())  # of (due, packet), by the end they came from
    last_due = [0.0, 0.0]
    changed, next_look = 0, 0.0

    def is_down(side: int) -> bool:
        return link["down"] in ("both", ("there", "back")[side])

    poller = select.epoll()
    for end in ends:
        poller.register(end, select.EPOLLIN)
    while True:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + CONTROL_SECONDS
            if (stamp := control.stat().st_mtime_ns) != changed:
                changed = stamp
                link.update(json.loads(control.read_text()))
        due = min((queue[0][0] for queue in queues if queue), default=next_look)
        for end, _ in poller.poll(max(0.0, min(due, next_look) - now)):
            side = ends.index(end)
            for _ in range(256):
                try:
                    packet = os.read(end, 65536)
                except BlockingIOError:
                    break
                in_burst[side] = _is_lost(in_burst[side], loss=link["loss"], burst=link["burst"])
                if is_down(side) or in_burst[side] or len(queues[side]) > QUEUE_PACKETS:
                    continue
                wait = (link["delay_ms"] + random.uniform(-1, 1) * link["jitter_ms"]) / 1e3
                last_due[side] = max(time.monotonic() + wait, last_due[side])
                queues[side].append((last_due[side], packet))
        now = time.monotonic()
        for side, queue in enumerate(queues):
            while queue and queue[0][0] <= now + 0.0002:
                _, packet = queue.popleft()
                if not is_down(side):
                    with contextlib.suppress(OSError):  # its queue is full: lost, as on any link
                        os.write(ends[1 - side], packet)


def _is_lost(before: bool, *, loss: float, burst: float) -> bool:
    """Whether a packet is lost after one that was or was not; `loss` of all are, about `burst` in a row."""
    if loss >= 1:
        return True
    return random.random() < (1 - 1 / burst if before and burst > 1 else loss / burst / (1 - loss))


if __name__ == "__main__":
    relay((tun(sys.argv[1]), tun(sys.argv[2])), Path(sys.argv[3]))
