"""What listens on TCP, read from /proc, against the tables in the READMEs.

python3 tests/listening.py      JSON list of [process, address, port] of this network namespace; needs root
"""

import json
import os
import re
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"
EVERY = "every address"  # in the tables: 0.0.0.0, and :: too
ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("cluster.", "optim.", "training.", "serving.")

Place = tuple[str, str, int]  # process, address, port


def listening(root: int | None = None) -> set[Place]:
    """Every listening socket of this network namespace, or of the process `root` and what it has started."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTEN:
                sockets[f"socket:[{inode}]"] = place(local)
    found = set()
    for pid in processes(root):
        with suppress(OSError):  # it has just ended
            folder = Path("/proc", str(pid))
            name = "driver" if pid == root else process((folder / "cmdline").read_bytes())
            for file in (folder / "fd").iterdir():
                with suppress(OSError):
                    if (link := os.readlink(file)) in sockets:
                        found.add((name, *sockets[link]))
    return found


def listening_there(python: list[str]) -> set[Place]:
    """`listening` of another network namespace; `python`: command line of a Python there, as root."""
    done = subprocess.run([*python, __file__], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return {(name, address, port) for name, address, port in json.loads(done.stdout)}


def processes(root: int | None) -> set[int]:
    """All processes, or `root` and its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    if root is None:
        return set(parents)
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def place(local: str) -> tuple[str, int]:
    """Address and port, from the kernel's hexadecimal digits."""
    digits, _, port = local.partition(":")
    packed = b"".join(bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8))
    packed = packed.removeprefix(b"\0" * 10 + b"\xff\xff")  # IPv4 in IPv6
    if not any(packed):
        return EVERY, int(port, 16)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed), int(port, 16)


def process(command: bytes) -> str:
    """A process's name: `driver` for a command of ours, one name for Ray's workers, else the program's."""
    words = [word for word in command.decode(errors="replace").split("\0") if word]
    if not words:
        return ""
    if words[0].startswith("ray::"):
        title = words[0].split()[0].removeprefix("ray::")
        return title if title.endswith("Agent") else "ray worker"
    if not Path(words[0]).name.startswith("python"):
        return Path(words[0].split()[0]).name
    module = words[words.index("-m") + 1] if "-m" in words else ""
    if module.startswith(ROOMS):
        return "driver"
    return module or next((Path(word).name for word in words[1:] if word.endswith(".py")), "python")


# --- the tables


def documented(readme: str, heading: str) -> set[tuple[str, str, str]]:
    """(process, address, port) of each row of the table below a heading of a room's README."""
    text = (ROOT / readme).read_text()
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0]] == ["Process", "Address", "Port", "Why"], rows[0]
    return {
        (name.strip("` "), address.strip("` "), port.strip("` "))
        for names, address, port, _ in rows[2:]
        for name in names.split(", ")
    }


def compare(found: set[Place], rows: set[tuple[str, str, str]]) -> dict[str, set]:
    """What listens and stands in no row, and the rows in which nothing was found; empty where all is told."""
    fits = {
        one: {row for row in rows if row[:2] == one[:2] and row[2] in ("any", str(one[2]))} for one in found
    }
    told = {one for one, some in fits.items() if some}
    return {
        name: some
        for name, some in (("untold", found - told), ("unseen", rows - set().union(*fits.values())))
        if some
    }


if __name__ == "__main__":
    print(json.dumps(sorted(listening())))
