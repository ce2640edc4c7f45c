"""An engine without a model: it counts. Slots, queue, cancellation and failure are real."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from serving.checkpoints import Served
from serving.config import ServeConfig
from serving.engine.protocol import Engine, EngineInfo
from serving.engine.scheduler import Scheduler, Span
from serving.engine.torch_engine import TorchEngine
from tests.waiting import PATIENCE_SECONDS, wait_until

VOCABULARY, CONTEXT = 400, 512
FAILING = [397, 211, 389]  # a prompt that begins with these tokens breaks the engine; no chance draws it
STEP_SECONDS = 0.005


class Counting:
    """A decoder whose next token is the last one plus 1, below 256.

    Args:
        nan_from: the logits after this token, and after all that follow it, are not numbers.
        hold: while there is such a file, no more steps end than the number in it; none if it is empty.
    """

    def __init__(self, step_seconds: float, *, nan_from: int | None = None, hold: Path | None = None) -> None:
        self.step_seconds, self._nan_from, self._hold = step_seconds, nan_from, hold
        self._scored: list[int] = []

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        time.sleep(self.step_seconds)
        while self._is_held():
            time.sleep(0.005)
        scored = ((s.request.tokens, s.start + row) for s in spans for row in range(s.num_scored))
        self._scored = [self._last(tokens[: place + 1]) for tokens, place in scored]
        sampled = [span.request.tokens for span in spans if span.samples]
        if any(tokens[:3] == FAILING and len(tokens) > 5 for tokens in sampled):
            raise RuntimeError("an unlucky number")
        return self._logits([self._last(tokens) for tokens in sampled])

    def _is_held(self) -> bool:
        try:
            with (self._hold or Path()).open("r+") as file:
                left = int(file.read() or 0)
                file.seek(0)
                file.write(f"{max(0, left - 1):<9}")
                return left == 0
        except (FileNotFoundError, IsADirectoryError):
            return False

    def scored(self) -> Iterator[torch.Tensor]:
        yield self._logits(self._scored)

    def _logits(self, last: Sequence[int]) -> torch.Tensor:
        logits = torch.zeros(len(last), VOCABULARY)
        for row, token in zip(logits, last, strict=True):
            row[(token + 1) % 256] = 100.0
            if token == self._nan_from:
                row[:] = float("nan")
        return logits

    def _last(self, tokens: Sequence[int]) -> int:
        return self._nan_from if self._nan_from in tokens else tokens[-1]


def counting_engine(
    *,
    slots: int = 4,
    waiting: int = 4,
    step_seconds: float = STEP_SECONDS,
    name: str = "counting",
    nan_from: int | None = None,
    hold: Path | None = None,
) -> TorchEngine:
    """The engine of the project over a decoder that counts."""
    info = EngineInfo(
        engine="fake", model=name, device="cpu", dtype="none", context_tokens=CONTEXT, vocab_size=VOCABULARY,
        num_parameters=0, num_slots=slots, most_waiting=waiting, weight_bytes=1, kv_bytes_per_token=1,
        flops_per_token=1, head_flops=0, attention_flops=0, details={},
    )  # fmt: skip
    scheduler = Scheduler(slots=slots, cache_tokens=slots * CONTEXT, step_tokens=64)
    decoder = Counting(step_seconds, nan_from=nan_from, hold=hold)
    return TorchEngine(decoder, scheduler, info=info, eos_ids=[])


def make(
    config: ServeConfig, served: Served, *, step_seconds: float = 0.02, nan_from: int | None = None,
    hold: Path | None = None,
) -> TorchEngine:  # fmt: skip
    """A factory for `serving.deployment`, which waits while there is a file `hold`.making."""
    while hold is not None and hold.with_suffix(".making").exists():
        time.sleep(0.005)
    options = config.engine
    return counting_engine(
        slots=options.slots, waiting=options.waiting, step_seconds=step_seconds, name=served.name,
        nan_from=nan_from, hold=hold,
    )  # fmt: skip


class Gate:
    """Holds the steps of an engine in this process: in a `with` block only one that is under way may end."""

    def __init__(self, engine: TorchEngine) -> None:
        forward = engine._decoder.forward
        self._open, self._held = threading.Event(), threading.Event()
        self._open.set()

        def gated(spans: Sequence[Span]) -> torch.Tensor:
            if not self._open.is_set():
                self._held.set()
                assert self._open.wait(PATIENCE_SECONDS)
            return forward(spans)

        engine._decoder.forward = gated  # type: ignore[method-assign]

    def hold(self) -> None:
        self._held.clear()
        self._open.clear()

    def wait(self) -> None:
        """Until a step is held."""
        assert self._held.wait(PATIENCE_SECONDS), "the engine takes no step"

    def release(self) -> None:
        self._open.set()

    def __enter__(self) -> None:
        self.hold()

    def __exit__(self, *_: object) -> None:
        self.release()


def idle(engine: Engine) -> bool:
    """Whether nothing is left with the engine, soon."""

    def is_idle() -> bool:
        stats = engine.stats()
        return stats.running == stats.waiting == 0

    with suppress(AssertionError):
        return wait_until(is_idle)
    return False
