"""Which requests of a load are measured, and whether the server kept up. Pure: no clock, no I/O.

1. Warm-up. A closed loop sends as many requests as are in flight, and at least `warm_up`. An open loop waits
   until `warm_up` requests, and at least one, have ended and no more are in flight than have ended; at most
   `most_seconds`.
2. The next `number` requests are measured.
3. The load goes on as before until the last of them has ended. Requests of this time are not measured, and
   are given up at its end.

So the server has its full load during the whole window, from the first measured request's scheduled arrival
to the last one's end. `serving.bench.latency.summarise` counts the tokens of all requests in it.
"""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.bench.latency import RequestOutcome, overloaded

LEAST_GROWTH = 0.1  # share of the arrivals that the queue takes up before a server counts as over-saturated
SIGMAS = 3  # and of the chance by which a Poisson number in flight scatters


@dataclass
class Steady:
    """The phases of one load, which its requests tell as they begin and end.

    Attributes:
        warm_up: requests; of a closed loop no fewer than are in flight.
        number: requests to measure.
        most_seconds: of an open loop's warm-up; None: a closed loop, whose warm-up is a number alone.
        first: the index of the first measured request, once it has begun.
    """

    warm_up: int
    number: int
    most_seconds: float | None = None
    first: int | None = None
    _begun: int = 0
    _ended: int = 0
    _left: int = field(default=-1)

    def begins(self, index: int, at: float) -> None:
        """A request is sent: the `index`-th, at `at` seconds since the load's start."""
        if self.first is None and self._is_warm(index, at):
            self.first, self._left = index, self.number
        self._begun += 1

    def _is_warm(self, index: int, at: float) -> bool:
        if self.most_seconds is None:
            return index >= self.warm_up
        in_flight = self._begun - self._ended
        return self._ended >= max(1, self.warm_up, in_flight) or at >= self.most_seconds

    def ends(self, index: int) -> None:
        """A request has ended."""
        self._ended += 1
        self._left -= self.measures(index)

    def measures(self, index: int) -> bool:
        """Whether a request that has begun is measured."""
        return self.first is not None and self.first <= index < self.first + self.number

    @property
    def over(self) -> bool:
        """All measured requests have ended."""
        return self._left == 0


def queue(measured: Sequence[RequestOutcome], beside: Sequence[RequestOutcome]) -> dict[str, Any]:
    """Whether an open loop's queue grew while the measured requests arrived.

    The number in flight at each arrival has a least-squares slope over time. The server is over-saturated if
    slope x time plus the requests that it turned away (429, 503) exceed LEAST_GROWTH of the arrivals and
    SIGMAS x the square root of the mean number in flight, by which it scatters if the queue is stable.

    Keys: `queue_slope_per_second`, requests; `mean_in_flight`; `over_saturated`.
    """
    arrivals = sorted(outcome.scheduled for outcome in measured)
    spans = [(o.scheduled, o.ended) for o in (*measured, *beside)]
    begins, ends = sorted(begin for begin, _ in spans), sorted(end for _, end in spans)
    in_flight = [bisect_right(begins, at) - bisect_right(ends, at) for at in arrivals]
    mean = statistics.mean(in_flight)
    slope = 0.0
    if arrivals[-1] > arrivals[0]:
        slope = statistics.linear_regression(arrivals, in_flight).slope
    refused = sum(overloaded(outcome) for outcome in measured)
    growth = slope * (arrivals[-1] - arrivals[0]) + refused
    return {
        "queue_slope_per_second": slope,
        "mean_in_flight": mean,
        "over_saturated": growth > max(LEAST_GROWTH * len(arrivals), SIGMAS * mean**0.5),
    }
