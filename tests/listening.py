"""What listens on TCP, read from /proc: of one session of processes, or of a whole network namespace.

python3 tests/listening.py      one JSON list of [process, address, port] of this namespace's; needs root
"""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"


def listening(session: int | None = None) -> set[tuple[str, str, int]]:
    """(process, address, port) of every listening socket; `session`: only of processes with this `getsid`."""
    found = set()
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTEN:
                sockets[f"socket:[{inode}]"] = place(local)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if session is not None and os.getsid(int(folder.name)) != session:
                continue
            name = process((folder / "cmdline").read_bytes())
            for file in (folder / "fd").iterdir():
                with suppress(OSError):
                    if (link := os.readlink(file)) in sockets:
                        found.add((name, *sockets[link]))
    return found


def place(local: str) -> tuple[str, int]:
    """Address and port, from the kernel's hexadecimal digits; every address of either kind is 0.0.0.0."""
    digits, _, port = local.partition(":")
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    packed = b"".join(words)
    if len(packed) == 16 and packed.startswith(b"\0" * 10 + b"\xff\xff"):
        packed = packed[12:]
    if not any(packed):
        packed = packed[:4]
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), int(port, 16)


def process(command: bytes) -> str:
    """A name for a process: the module or script of a Python, or the program; Ray's workers are one name."""
    words = [word for word in command.decode(errors="replace").split("\0") if word]
    if not words:
        return ""
    if words[0].startswith("ray::"):
        title = words[0].split()[0]
        return title if title.endswith("Agent") else "ray::worker"
    if not Path(words[0]).name.startswith("python"):
        return Path(words[0].split()[0]).name
    if "-m" in words:
        return words[words.index("-m") + 1]
    return next((Path(word).name for word in words[1:] if word.endswith(".py")), "python")


if __name__ == "__main__":
    print(json.dumps(sorted(listening())))
