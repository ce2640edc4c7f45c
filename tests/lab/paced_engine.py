"""An engine without a model, whose tokens come at times known beforehand, and its endpoint.

    python -m tests.lab.paced_engine --port PORT --log FILE

Request n's tokens are due at times after its arrival that n alone decides, whatever else is running: every
client that sends as many requests meets the same latencies, and next to no CPU is used. What each request
got and when goes to the file, one `serving.bench.latency.RequestOutcome` as JSON a line: the truth against
which `tests.lab.serve_agreement` compares the figures of load generators.
"""

import argparse
import heapq
import json
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

import uvicorn

from serving.bench.latency import RequestOutcome
from serving.endpoint.service import make_endpoint
from serving.endpoint.text import numbered_tokenizer
from serving.engine.protocol import (
    Deliver,
    EngineFailed,
    EngineInfo,
    EngineStats,
    RequestError,
    Sampling,
    Ticket,
    Token,
)

MODEL = "paced"
VOCABULARY, CONTEXT = 512, 4096
GOLDEN = (math.sqrt(5) - 1) / 2
WORD = 256  # the token that is always said: it has a text, without which some clients do not count it


@dataclass(frozen=True)
class Pace:
    """When tokens are due. Seconds are (least, most).

    Attributes:
        first: from a request's arrival to its first token. Multiples of the golden ratio spread the requests
            over it, so that no percentile falls into a wide gap between two of them, where a tool that
            interpolates and one that does not would differ.
        gap: from each token to the next, drawn evenly.
        slots: most requests at once; others wait in order, and their times begin when one is free. None: any.
    """

    first: tuple[float, float] = (0.1, 0.3)
    gap: tuple[float, float] = (0.06, 0.1)
    seed: int = 0
    slots: int | None = None

    def due(self, number: int, num_tokens: int) -> list[float]:
        """Seconds from the arrival of request `number` to each of its tokens."""
        draw = random.Random(f"{self.seed}:{number}")
        least, most = self.first
        first = least + (most - least) * (number * GOLDEN % 1)
        return list(accumulate((draw.uniform(*self.gap) for _ in range(num_tokens - 1)), initial=first))


@dataclass
class _Request:
    """One that was taken: times by `time.perf_counter`, tokens as they were delivered."""

    number: int
    arrived: float
    num_prompt: int
    due: list[float]
    deliver: Deliver
    tokens: list[float] = field(default_factory=list)
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class PacedEngine:
    """An engine (`serving.engine.protocol.Engine`) whose thread delivers every token when it is due.

    Args:
        observe: told of each request that got all of its tokens, from the engine's thread.
    """

    def __init__(self, pace: Pace, *, observe: Callable[[RequestOutcome], None]) -> None:
        self.info = EngineInfo(
            engine="paced", model=MODEL, device="none", dtype="none", context_tokens=CONTEXT,
            vocab_size=VOCABULARY, num_parameters=0, num_slots=1 << 16, most_waiting=0, weight_bytes=0,
            kv_bytes_per_token=0, flops_per_token=0, head_flops=0, attention_flops=0, details={},
        )  # fmt: skip
        self._pace, self._observe = pace, observe
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, _Request]] = []  # a heap: when its next token is due, number
        self._ends: list[float] = []  # when the last token of each request is due
        self._closed = False
        self._num_taken = self._num_finished = self._num_cancelled = 0
        self._num_prompt_tokens = self._num_tokens = 0
        self._thread = threading.Thread(target=self._run, name="paced engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Ticket:
        """Take a request. Raises `RequestError` or `EngineFailed`."""
        arrived = time.perf_counter()
        if sampling.echo or sampling.logprobs:
            raise RequestError("echo, logprobs: there is no model here; leave them out")
        if len(prompt) + sampling.max_tokens > CONTEXT:
            raise RequestError(f"max_tokens: prompt and continuation exceed {CONTEXT} tokens; ask for fewer")
        with self._changed:
            if self._closed:
                raise EngineFailed("the engine is closed")
            begins = arrived
            if self._pace.slots is not None:  # every earlier request's end is known already
                busy = sorted(self._ends)[-self._pace.slots :]
                begins = max(arrived, busy[0]) if len(busy) == self._pace.slots else arrived
            due = [begins + seconds for seconds in self._pace.due(self._num_taken, sampling.max_tokens)]
            self._ends.append(due[-1])
            request = _Request(self._num_taken, arrived, len(prompt), due, deliver)
            self._num_taken += 1
            self._num_prompt_tokens += len(prompt)
            heapq.heappush(self._waiting, (due[0], request.number, request))
            self._changed.notify()
        return Ticket(request.cancel)

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                running=len(self._waiting), waiting=0, free_cache_tokens=0,
                prompt_tokens=self._num_prompt_tokens, generated_tokens=self._num_tokens,
                finished=self._num_finished, cancelled=self._num_cancelled, steps=self._num_tokens,
            )  # fmt: skip

    def failure(self) -> str | None:
        return "the engine is closed" if self._closed else None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for _, _, request in self._waiting:
            if not request.cancelled:
                request.deliver(EngineFailed("the engine is closed"))

    def _run(self) -> None:
        while (request := self._next()) is not None:
            request.tokens.append(time.perf_counter())
            last = len(request.tokens) == len(request.due)
            request.deliver([Token(WORD, None, "length" if last else None)])
            with self._changed:
                self._num_tokens += 1
                self._num_finished += last
                if not last:
                    due = request.due[len(request.tokens)]
                    heapq.heappush(self._waiting, (due, request.number, request))
            if last:
                self._observe(_outcome(request))

    def _next(self) -> _Request | None:
        """The request whose token is due first, once it is; None when the engine is closed."""
        with self._changed:
            while not self._closed:
                wait = self._waiting[0][0] - time.perf_counter() if self._waiting else None
                if wait is not None and wait <= 0:
                    *_, request = heapq.heappop(self._waiting)
                    if not request.cancelled:
                        return request
                    self._num_cancelled += 1
                else:
                    self._changed.wait(wait)
        return None


def _outcome(request: _Request) -> RequestOutcome:
    return RequestOutcome(
        index=request.number,
        scheduled=request.arrived,
        sent=request.arrived,
        tokens=tuple(request.tokens),
        ended=request.tokens[-1],
        prompt_tokens=request.num_prompt,
        output_tokens=len(request.tokens),
    )


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab.paced_engine", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    parser.add_argument(
        "--log", type=Path, required=True, metavar="FILE", help="what each request got, and when"
    )
    options = parser.parse_args()
    with options.log.open("w") as log:

        def observe(outcome: RequestOutcome) -> None:
            print(json.dumps(asdict(outcome)), file=log, flush=True)

        app = make_endpoint(PacedEngine(Pace(), observe=observe), numbered_tokenizer(VOCABULARY))
        uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
