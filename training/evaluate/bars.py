"""lm_eval's progress bars, shown as every other command of the project shows its progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.progress import Progress


@contextmanager
def as_ours() -> Iterator[None]:
    """In a `with` block, every bar of tqdm's in this process is a `cluster.progress.Progress`.

    tqdm still counts. `display` is where its documentation has other front ends begin; `close` would write
    line breaks of its own.
    """
    from tqdm.std import tqdm

    shown: dict[int, Progress] = {}

    def display(bar: Any, *_: Any, **__: Any) -> None:
        progress = shown.setdefault(id(bar), Progress(bar.total, unit="request"))
        progress.update({"step": bar.n, "doing": bar.desc.removesuffix(": ")})

    def close(bar: Any) -> None:
        if not bar.disable:
            display(bar)
            shown.pop(id(bar)).close()
            bar.disable = True
            bar._decr_instances(bar)

    before = tqdm.display, tqdm.close
    tqdm.display, tqdm.close = display, close
    try:
        yield
    finally:
        tqdm.display, tqdm.close = before
        for progress in shown.values():
            progress.close()
