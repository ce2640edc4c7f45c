"""A pseudo terminal of a given width, and what a person sees on it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3|4|9|10)[0-9]")  # foreground or background


def on_terminal(columns: int, use: Callable[[TextIO], None]) -> str:
    """All that `use(stream)` writes to a terminal of that width."""
    return _read(columns, lambda slave: _call(use, slave))


def run_on_terminal(command: Sequence[str], *, columns: int, **options: Any) -> tuple[int, str]:
    """A process whose three streams are a terminal of that width: its exit code, and all that it writes."""
    codes: list[int] = []

    def start(slave: int) -> None:
        codes.append(subprocess.call(command, stdin=slave, stdout=slave, stderr=slave, **options))

    written = _read(columns, start)
    return codes[0], written


def _call(use: Callable[[TextIO], None], slave: int) -> None:
    with os.fdopen(os.dup(slave), "w") as stream:
        use(stream)


def _read(columns: int, write: Callable[[int], None]) -> str:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(master, 1 << 16):
                parts.append(part)
        except OSError:  # Linux's end of file, once nobody holds the other end
            pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        write(slave)
    finally:
        os.close(slave)
        thread.join()
        os.close(master)
    return b"".join(parts).decode().replace("\r\n", "\n")


def screen(written: str, *, columns: int) -> list[str]:
    """The lines that stand on the terminal in the end. A line that reaches past its edge goes on below."""
    lines, row, column = [""], 0, 0
    for part in re.findall(rf"{CONTROL.pattern}|.", written, re.DOTALL):
        if part == "\n":
            row, column = row + 1, 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not CONTROL.fullmatch(part):
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
