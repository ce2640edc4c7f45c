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

from cluster.measure.usage import SHORTEST_SECONDS

PERCENTILES = (50, 90, 99)
GIVEN_UP = "given up"  # error of a request that was in flight when its load was over


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
        asked_tokens: the length that was asked for; 0 where it is not known.
        error: None, or what went wrong in a few words: "timeout", "HTTP 429", "connection", "broken off" ...
        detail: what the server said of it.
    """

    index: int
    scheduled: float
    sent: float
    tokens: tuple[float, ...]
    ended: float
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int = 0
    error: str | None = None
    detail: str | None = None

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


def overloaded(outcome: RequestOutcome) -> bool:
    """Whether the server turned it away because it has too much to do."""
    return outcome.error in ("HTTP 429", "HTTP 503", "overloaded")


def summarise(
    outcomes: Sequence[RequestOutcome], *, slo: Slo, beside: Sequence[RequestOutcome] = ()
) -> dict[str, Any]:
    """Counts, rates and percentiles of the measured requests; keys carry units.

    The window is from the first scheduled arrival to the last end of the measured requests. Rates count what
    arrived in it, of the measured requests and of those `beside` them that did not fail: output tokens by
    their own times, a prompt's tokens at its first output token, requests at their end. Percentiles are over
    measured requests that succeeded; how many did not, and why, stands beside them in `errors`, with the
    server's words about the first in `first_error`. `attainment` is the share of measured requests that meet
    `slo`, and `goodput_per_second` is this share of all that ended. `short_answers` ended before the length
    that was asked for. The `decode_` keys: see `_decoding`.

    Raises:
        ValueError: there are no outcomes.
    """
    if not outcomes:
        raise ValueError("no request was measured")
    good = [outcome for outcome in outcomes if outcome.error is None]
    first = next((o for o in outcomes if o.error is not None), None)
    window = min(o.scheduled for o in outcomes), max(o.ended for o in outcomes)
    seconds = window[1] - window[0]
    everyone = [*outcomes, *beside]
    ended = [o for o in everyone if o.error != GIVEN_UP and window[0] <= o.ended <= window[1]]
    flowing = [o for o in everyone if o.error in (None, GIVEN_UP)]
    output = sum(tokens_within(outcome, *window) for outcome in flowing)
    prompt = sum(o.prompt_tokens for o in flowing if o.tokens and window[0] <= o.tokens[0] <= window[1])
    attainment = sum(slo.met_by(outcome) for outcome in outcomes) / len(outcomes)
    found: dict[str, Any] = {
        "requests": len(outcomes),
        "succeeded": len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None)),
        "first_error": first and (f"{first.error}: {first.detail}" if first.detail else first.error),
        "short_answers": sum(o.output_tokens < o.asked_tokens for o in good),
        "seconds": seconds,
        "requests_per_second": sum(o.error is None for o in ended) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": (prompt + output) / seconds,
        "output_tokens_in_window": output,
        "mean_prompt_tokens": _mean([o.prompt_tokens for o in good]),
        "mean_output_tokens": _mean([o.output_tokens for o in good]),
        "prompt_tokens_p50": percentile([o.prompt_tokens for o in good], 50),
        **_decoding(flowing, *window),
        "goodput_per_second": attainment * len(ended) / seconds,
        "attainment": attainment,
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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def joules_per_token(
    samples: Sequence[tuple[float, float]], outcomes: Sequence[RequestOutcome]
) -> float | None:
    """Joules between the first and the last sample / output tokens that arrived meanwhile.

    None if the time between them is too short for the driver's counter (`SHORTEST_SECONDS`).

    Args:
        samples: (seconds, joules since some origin), in order.
    """
    if not samples or samples[-1][0] - samples[0][0] < SHORTEST_SECONDS:
        return None
    (begin, least), (end, most) = samples[0], samples[-1]
    tokens = sum(tokens_within(o, begin, end) for o in outcomes if o.error in (None, GIVEN_UP))
    return (most - least) / tokens if tokens else None


def tokens_within(outcome: RequestOutcome, begin: float, end: float) -> float:
    """Output tokens that arrived in a time; events share the server's count evenly."""
    inside = sum(begin <= moment <= end for moment in outcome.tokens)
    return outcome.output_tokens * inside / len(outcome.tokens) if inside else 0.0


def _decoding(outcomes: Sequence[RequestOutcome], opens: float, closes: float) -> dict[str, float]:
    """What was decoded from `opens` to `closes`, and in what time: from a request's first token to its last.

    Keys: `decode_seconds`, in which any request decoded; `decode_steps`, if one engine decodes all of them
    together; `decode_context_tokens`, tokens in the cache before each decoded token, summed over these.
    """
    edges = []  # (when, change of the number that decode, change of the sum of their tokens per second)
    context_tokens = 0.0
    for outcome in outcomes:
        if outcome.tpot:
            times = Counter(outcome.tokens)
            per_event, made = (outcome.output_tokens - 1) / (len(outcome.tokens) - 1), 1.0
            for (begin, _), (end, events) in pairwise(sorted(times.items())):
                new = per_event * events
                if opens <= begin and end <= closes:
                    edges += [(begin, 1, new / (end - begin)), (end, -1, -new / (end - begin))]
                    context_tokens += new * (outcome.prompt_tokens + made + (new - 1) / 2)
                made += new
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
