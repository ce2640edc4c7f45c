"""Waiting, for as long as a slow or busy machine needs: a bound is there to end a test that hangs."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE_SECONDS = 300.0  # of a wait for something that takes seconds on an idle machine


def wait_until(
    condition: Callable[[], Found], *, seconds: float = PATIENCE_SECONDS, told: object = ""
) -> Found:
    """What `condition` returns, as soon as it is true. `told`: what to say if it never is, or who says it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {told() if callable(told) else told}")
        time.sleep(0.02)
    return found
