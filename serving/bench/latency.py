"""Latencies of one request, and summaries of many. Pure: no clock, no I/O.

Times are seconds on one monotonic clock. TTFT: first token - scheduled arrival (so the wait of a request that
was sent late, because client or server stalled, counts). ITL: gap between consecutive
tokens, over all requests. TPOT: (last token - first token) / (output tokens - 1), of each request. E2E: last
token - scheduled arrival. These are vLLM's and MLPerf's definitions; GuideLLM calls our TPOT "ITL".
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class RequestOutcome:
    """One request, from its schedule to its end.

    Attributes:
        scheduled: when it should have been sent; in a closed loop, when its turn came.
        sent: when it was given to the connection.
        tokens: when each of its tokens arrived; tokens of one event share a time.
        ended: when the answer was complete, or had failed.
        prompt_tokens, output_tokens: as the server counted them; output_tokens may exceed `tokens` if a
            server puts several into one event.
        error: None, or what went wrong in a few words: "timeout", "HTTP 429", "connection", "broken off" ...
    """

    index: int
    scheduled: float
    sent: float
    tokens: tuple[float, ...]
    ended: float
    prompt_tokens: int
    output_tokens: int
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return self.tokens[0] - self.scheduled if self.tokens else None

    @property
    def e2e(self) -> float | None:
        return self.tokens[-1] - self.scheduled if self.tokens else None

    @property
    def tpot(self) -> float | None:
        """None with fewer than two tokens."""
        if self.output_tokens < 2 or not self.tokens:
            return None
        return (self.tokens[-1] - self.tokens[0]) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True)
class Slo:
    """Service-level objectives in seconds; None: no limit. A request must meet each."""

    ttft: float | None
    tpot: float | None
    e2e: float | None

    def met_by(self, outcome: RequestOutcome) -> bool:
        """A failed request meets none; a request of a single token has no TPOT to exceed."""
        if outcome.error is not None or not outcome.tokens:
            return False
        pairs = ((self.ttft, outcome.ttft), (self.tpot, outcome.tpot), (self.e2e, outcome.e2e))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """With linear interpolation between the closest ranks, as numpy's default; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarise(outcomes: Sequence[RequestOutcome], *, slo: Slo) -> dict[str, Any]:
    """Counts, rates and percentiles of the measured requests; keys carry units.

    Rates are over the time from the first scheduled arrival to the last end. Percentiles are over requests
    that succeeded; how many did not, and why, stands beside them in `errors`. `goodput_per_second` counts
    those that meet `slo`, and `attainment` is their share of all. The `decode_` keys: see `_decoding`.

    Raises:
        ValueError: there are no outcomes.
    """
    if not outcomes:
        raise ValueError("no request was measured")
    good = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max(o.ended for o in outcomes) - min(o.scheduled for o in outcomes)
    meeting = sum(slo.met_by(outcome) for outcome in outcomes)
    output = sum(outcome.output_tokens for outcome in good)
    prompt = sum(outcome.prompt_tokens for outcome in good)
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "succeeded": len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None)),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "mean_prompt_tokens": prompt / len(good) if good else None,
        "mean_output_tokens": output / len(good) if good else None,
        "prompt_tokens_p50": percentile([o.prompt_tokens for o in good], 50),
        **_decoding(good),
        "goodput_per_second": meeting / seconds,
        "attainment": meeting / len(outcomes),
    }
    samples = {
        "ttft": [o.ttft for o in good if o.ttft is not None],
        "tpot": [o.tpot for o in good if o.tpot is not None],
        "itl": [gap for o in good for gap in o.itls],
        "e2e": [o.e2e for o in good if o.e2e is not None],
        "send_lag": [o.sent - o.scheduled for o in outcomes],
    }
    for name, values in samples.items():
        for percent in PERCENTILES:
            value = percentile(values, percent)
            found[f"{name}_p{percent}_ms"] = None if value is None else 1e3 * value
    return found


def _decoding(outcomes: Sequence[RequestOutcome]) -> dict[str, float]:
    """What was decoded, and in what time. A request decodes from its first token to its last.

    Keys: `decode_seconds`, in which any request decoded; `decode_steps`, if one engine decodes all of them
    together; `decode_context_tokens`, tokens in the cache before each decoded token, summed over these.
    """
    edges = []  # (when, change of the number that decode, change of the sum of their tokens per second)
    context_tokens = 0.0
    for outcome in outcomes:
        if outcome.tpot:
            times = Counter(outcome.tokens)
            per_event = (outcome.output_tokens - 1) / (len(outcome.tokens) - 1)
            for (begin, _), (end, events) in pairwise(sorted(times.items())):
                rate = per_event * events / (end - begin)
                edges += [(begin, 1, rate), (end, -1, -rate)]
            mean = outcome.prompt_tokens + outcome.output_tokens / 2
            context_tokens += (outcome.output_tokens - 1) * mean
    seconds = steps = rates = last = 0.0
    number = 0
    for at, change, rate in sorted(edges):
        if number:
            seconds += at - last
            steps += (at - last) * rates / number  # a step gives each of them a token
        number, rates, last = number + change, rates + rate, at
    return {
        "decode_seconds": seconds,
        "decode_steps": steps,
        "decode_context_tokens": context_tokens,
    }
