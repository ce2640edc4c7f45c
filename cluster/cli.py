"""What the command lines share: --config, --dry-run, key=value, help that lists the keys, exit codes.

Exit codes: 0 done; 1 a run failed; 2 bad input; 130 interrupted (Ctrl-C); 143 stopped by SIGTERM. Every error
is one message on stderr.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster import files
from cluster.masking import mask

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class UserError(ValueError):
    """Something that the user can mend. The message names the key, file or node and the remedy."""


class RunError(RuntimeError):
    """A run that started and could not finish. The message says what is kept and how to go on."""


class Stopped(Exception):
    """A run that was asked to stop, by a signal, and did. The message says how to go on."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def make_parser(command: str, *, description: str, keys: Any, prefix: str = "") -> argparse.ArgumentParser:
    """A parser for `python -m <command> [--config FILE] [--dry-run] [key=value ...]`.

    Args:
        keys: a configuration object; its keys, defaults and help texts are listed by --help.
        prefix: what the keys begin with, such as "data.".
    """
    lines = [f"  {name}={_plain(value)}\n      {doc}" for name, value, doc in layered.walk(keys, prefix)]
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        epilog="\n".join(["keys and defaults:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with keys that differ from the defaults"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys that replace those of the file"
    )
    return parser


def run(body: Callable[[], None]) -> int:
    """Call `body`; turn the errors that users can act on into one message and an exit code.

    Any other error is a traceback, as Python's own; secrets are masked in both.
    """
    try:
        body()
    except (UserError, layered.ConfigError) as error:
        _print_error(str(error))
        return BAD_INPUT
    except OSError as error:
        _print_error(files.problem_of(error))
        return FAILED
    except (RunError, files.DamagedFile) as error:
        _print_error(str(error))
        return FAILED
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        print(mask(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED
    return 0


def _print_error(text: str) -> None:
    """The message, masked. Control characters of an input show as \\x1e: some would begin a new line."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in mask(text))
    print(f"error: {''.join(shown)}", file=sys.stderr)


@contextmanager
def told_to_stop(message: str, tell: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """For the length of a `with` block, the first SIGINT or SIGTERM calls `tell`; a second one interrupts.

    Yields the signals that have come. In a thread other than the main one, which alone may set handlers, it
    changes nothing.

    Args:
        message: written to stderr at the first signal, past Python's buffer: the signal may come while the
            main thread itself prints, and a second print inside of it would be an error.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        with suppress(OSError):  # nobody reads stderr any more
            os.write(2, f"\n{message}\n".encode())
        tell()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt for the length of a `with` block, in which what was started is ended.

    In a thread other than the main one, which alone may set handlers, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
