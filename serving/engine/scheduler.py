"""Which tokens go into the next step, and where their keys and values lie. Pure: no torch, no threads.

Continuous batching with chunked prefill: each step carries one token of every running request, and fills up
with the next tokens of prompts, first come first served. The cache is blocks of `BLOCK_TOKENS` tokens; a
request is admitted when a slot is free and there are blocks for its prompt and all of `max_tokens`, so a
running request is never preempted.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

BLOCK_TOKENS = 32


def num_blocks(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass(eq=False)
class ScheduledRequest:
    """A request and its progress.

    Attributes:
        tokens: prompt, then what was sampled.
        most_tokens: its largest length, prompt and continuation.
        scored: the tokens of its prompt get scores.
        done: tokens that are in the cache, or will be once the steps that have begun end.
        blocks: of the cache; its own until it is removed, empty before it runs.
    """

    tokens: list[int]
    most_tokens: int
    scored: bool = False
    done: int = 0
    blocks: tuple[int, ...] = ()
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def is_running(self) -> bool:
        return bool(self.blocks)

    @property
    def left(self) -> int:
        """Tokens that the next steps take.

        The token that a running step will choose counts, unless it is the request's last.
        """
        if self.done == len(self.tokens):
            return int(self.done + 1 < self.most_tokens)
        return len(self.tokens) - self.done


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a request, in one step.

    Attributes:
        blocks: those that hold tokens [0, stop). A copy: the request may be removed while the step runs.
        samples: the span ends a prompt or follows it, and another token is to follow.
        num_scored: tokens, from the first, whose successor is in a prompt that is scored.
        num_kept: tokens, from the last, that the last layer computes: all if some are scored, else the last
            one if the span samples. Of the others it has to leave nothing but keys and values.
    """

    request: ScheduledRequest
    start: int
    stop: int
    blocks: tuple[int, ...]

    @property
    def samples(self) -> bool:
        return self.request.prompt_tokens <= self.stop < self.request.most_tokens

    @property
    def num_scored(self) -> int:
        request = self.request
        return max(0, min(self.stop, request.prompt_tokens - 1) - self.start) if request.scored else 0

    @property
    def num_kept(self) -> int:
        return self.stop - self.start if self.num_scored else int(self.samples)


class Scheduler:
    """Slots, blocks and the queue of one engine. Not thread-safe: callers hold one lock.

    A request may be removed while steps that have begun still write to its blocks. Another request may get
    these at once, because steps run in the order in which they began.

    Args:
        cache_tokens: size of the cache; whole blocks of it are used.
        step_tokens: most tokens of a step, above `slots`.
    """

    def __init__(self, *, slots: int, cache_tokens: int, step_tokens: int) -> None:
        self.num_blocks = cache_tokens // BLOCK_TOKENS
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: list[ScheduledRequest] = []
        self._slots = slots
        self._step_tokens = step_tokens
        self._free = list(range(self.num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def add(self, request: ScheduledRequest) -> None:
        """Queue it. It must fit an empty cache."""
        assert num_blocks(request.most_tokens) <= self.num_blocks
        self.waiting.append(request)

    def remove(self, request: ScheduledRequest) -> bool:
        """Remove a request: its slot and blocks are free at once. False if it neither runs nor waits."""
        if request.is_running:
            self.running.remove(request)
            self._free += request.blocks
            request.blocks = ()
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return False
        return True

    def next_step(self) -> list[Span]:
        """Spans of the next step, those that decode first; empty if there is nothing to do.

        The last step may still run. Then a span may begin with the token that this step will choose, which is
        not in the request's `tokens` yet. The step before it must have ended, and its tokens been appended.
        """
        while self.waiting and len(self.running) < self._slots and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        left = {request: request.left for request in self.running}
        spans = [_begin(request, 1) for request, count in left.items() if count == 1]
        room = self._step_tokens - len(spans)
        for request, count in left.items():
            if count > 1 and room > 0:
                taken = min(count, room)
                spans.append(_begin(request, taken))
                room -= taken
        return spans

    def _admit(self, request: ScheduledRequest) -> bool:
        if num_blocks(request.most_tokens) > len(self._free):
            return False
        request.blocks = tuple(self._free.pop() for _ in range(num_blocks(request.most_tokens)))
        return True


def _begin(request: ScheduledRequest, num_tokens: int) -> Span:
    """The next tokens of a running request, which are then done."""
    start, request.done = request.done, request.done + num_tokens
    return Span(request, start, request.done, request.blocks[: num_blocks(request.done)])


def table(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """(blocks of every span, one after the other; where those of each span begin)."""
    blocks: list[int] = []
    first = []
    for span in spans:
        first.append(len(blocks))
        blocks += span.blocks
    return blocks, first


def single_first(spans: Sequence[Span]) -> list[Span]:
    """Spans of one token first, which attend together, whatever their requests."""
    return sorted(spans, key=lambda span: span.stop - span.start > 1)


def origins(spans: Sequence[Span]) -> dict[ScheduledRequest, int]:
    """Request -> what is to be added to a position for its row, where the spans lie one after the other."""
    ends = accumulate(span.stop - span.start for span in spans)
    return {span.request: end - span.stop for span, end in zip(spans, ends, strict=True)}
