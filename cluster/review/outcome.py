"""The outcome of a run: its losses, tokens and time, and one sentence that says them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster.display import duration
from cluster.review.run_reader import FINISHED, Run
from cluster.review.words import amount, commit

LossCurve = Sequence[tuple[int, float]]  # (tokens, validation loss in nats per token), tokens ascending


@dataclass(frozen=True)
class Outcome:
    """What a training run reached, whatever its state. None: it is not known."""

    run: Run

    @cached_property
    def curve(self) -> LossCurve:
        """Validation losses over tokens."""
        pairs = zip(*self.run.curve("validation_loss", over="tokens"), strict=True)
        return tuple((int(tokens), loss) for tokens, loss in pairs)

    @property
    def loss(self) -> float | None:
        """The last validation loss; not-a-number after a divergence."""
        return self.curve[-1][1] if self.curve else None

    @property
    def best(self) -> float | None:
        """The lowest validation loss."""
        return min((loss for _, loss in self.curve if not math.isnan(loss)), default=None)

    @property
    def tokens(self) -> int | None:
        """Tokens trained on so far."""
        found = self.run.latest.get("tokens")
        return found if isinstance(found, int) else None

    @property
    def seconds(self) -> float | None:
        """Time of the training loop over all starts; without a summary, up to the newest row."""
        found = (self.run.summary or {}).get("wall_seconds")
        if isinstance(found, int | float) and abs(found) < 1e15:
            return found
        x, _ = self.run.curve("step", over="seconds")
        return x[-1] if x and math.isfinite(x[-1]) else None

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the median step; without a summary, that of the newest row."""
        found = (self.run.summary or {}).get("tokens_per_second", self.run.latest.get("tokens_per_second"))
        return found if isinstance(found, int | float) else None


def sentence(run: Run, *, measured: str = "") -> str:
    """The outcome in a sentence or two. `measured`: what a run that does not train reached."""
    step, planned, outcome = run.last_step, run.planned_steps, Outcome(run)
    head = run.state.name.capitalize()
    if planned is not None:
        head += f" at step {step:,} of {planned:,}" if step is not None else " before its first row"
    said = [measured] if measured else []
    if outcome.loss is not None:
        said.append(f"validation loss {amount(outcome.loss)}")
    if outcome.tokens is not None:
        said.append(f"after {outcome.tokens:,} tokens")
    if planned is not None and outcome.seconds:
        said.append(f"in {duration(outcome.seconds)}")
    head += f": {' '.join(said)}" if said else ""
    head += f", commit {commit(run.provenance)}." if run.provenance.get("commit") else "."
    reason = run.state.reason
    return head if run.state.name == FINISHED else f"{head} {reason[:1].upper()}{reason[1:]}."


def tokens_to(curve: LossCurve, target: float) -> float | None:
    """Tokens at which the curve first reaches `target` (nats per token), linearly between evaluations.

    None if it never does. A curve that begins at or below the target reaches it at its first point.
    """
    before: tuple[int, float] | None = None
    for tokens, loss in curve:
        if loss <= target:
            if before is None:
                return float(tokens)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = (tokens, loss)
    return None


def loss_at(curve: LossCurve, tokens: float) -> float | None:
    """The loss at these tokens, linearly between evaluations; None outside of the curve."""
    before: tuple[int, float] | None = None
    for place, loss in curve:
        if place == tokens:
            return loss
        if place > tokens:
            if before is None:
                return None
            return before[1] + (loss - before[1]) * (tokens - before[0]) / (place - before[0])
        before = (place, loss)
    return None
