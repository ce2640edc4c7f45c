"""Requests that are cancelled at any moment: blocks, tokens and ends of the others, and their own."""

import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.decoder import Chosen
from serving.engine.protocol import (
    BrokenModel,
    EngineFailed,
    EngineInfo,
    Overloaded,
    Sampling,
    Score,
    Ticket,
    Token,
)
from serving.engine.sampling import choose
from serving.engine.scheduler import BLOCK_TOKENS, ScheduledRequest, Scheduler, Span
from serving.engine.torch_engine import TorchEngine
from tests.properties import cases
from tests.waiting import PATIENCE_SECONDS, wait_until

VOCABULARY, CONTEXT, SLOTS, WAITING, NUM_BLOCKS = 17, 100, 3, 3, 7
BAD = 13  # where a text has this token, the logits are not numbers


def following(tokens: Sequence[int]) -> int | None:
    """The next token of `Remembering`; None where there is none."""
    return None if BAD in tokens else (sum(tokens) * 5 + len(tokens)) % VOCABULARY


class Remembering:
    """A decoder whose cache holds tokens, and whose next token depends on all that it finds there.

    Args:
        interrupt: called between all that a step reads and writes.
    """

    def __init__(self, interrupt: Callable[[], None]) -> None:
        self._interrupt = interrupt
        self._cache = [[-1] * BLOCK_TOKENS for _ in range(NUM_BLOCKS)]

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        self._interrupt()
        for span in spans:
            for place in range(span.start, span.stop):
                block = self._cache[span.blocks[place // BLOCK_TOKENS]]
                block[place % BLOCK_TOKENS] = self._token(span, place)
            self._interrupt()
        logits = []
        for span in spans:
            if span.samples:
                logits.append(self._after(span))
                self._interrupt()
        return torch.tensor(logits).view(-1, VOCABULARY)

    def _token(self, span: Span, place: int) -> int:
        return span.request.tokens[place]

    def _after(self, span: Span) -> list[float]:
        token = following([token for block in span.blocks for token in self._cache[block]][: span.stop])
        return [math.nan if token is None else float(i == token) for i in range(VOCABULARY)]

    def scored(self) -> Iterator[torch.Tensor]:
        yield from ()


class Ahead(Remembering):
    """The same as an `AheadDecoder`, whose steps take the tokens that the last one chose."""

    def __init__(self, interrupt: Callable[[], None]) -> None:
        super().__init__(interrupt)
        self.num_ahead = 0  # tokens that the host did not know
        self._logits = torch.empty(0)
        self._sampling: list[ScheduledRequest] = []
        self._chosen: dict[ScheduledRequest, int] = {}

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        self._logits = super().forward(spans)
        self._sampling = [span.request for span in spans if span.samples]
        return self._logits

    def _token(self, span: Span, place: int) -> int:
        if place < len(span.request.tokens):
            return super()._token(span, place)
        self.num_ahead += 1
        return max(self._chosen[span.request], 0)

    def choose(
        self,
        samplings: Sequence[Sampling],
        chances: Sequence[random.Random],
        changed: Mapping[int, torch.Tensor] | None = None,
    ) -> Chosen:
        found = choose(self._logits, samplings, chances, changed)
        self._chosen = dict(zip(self._sampling, found[0], strict=True))

        def read() -> tuple[list[int], list[Score | None]]:
            self._interrupt()
            return found

        return read


@dataclass(eq=False)
class Client:
    """One request, and what it heard."""

    prompt: list[int]
    max_tokens: int
    interrupt: Callable[[], None]
    echo: bool = False
    min_tokens: int = 0
    heard: list[Token] = field(default_factory=list)
    error: EngineFailed | None = None
    ended: bool = False
    cancelled: bool = False
    ticket: Ticket | None = None

    def submit(self, engine: TorchEngine) -> None:
        sampling = Sampling(
            max_tokens=self.max_tokens, min_tokens=self.min_tokens, temperature=0.0, ignore_eos=True,
            echo=self.echo,
        )  # fmt: skip
        self.ticket = engine.submit(self.prompt, sampling, self.take)

    def take(self, outcome: Sequence[Token] | EngineFailed) -> None:
        assert not self.ended and not self.cancelled, "told after its end"
        if isinstance(outcome, EngineFailed):
            self.error, self.ended = outcome, True
        else:
            self.heard += outcome
            self.ended = outcome[-1].finish is not None
        self.interrupt()

    def cancel(self) -> None:
        """A second cancel, or one after the end, does nothing."""
        assert self.ticket is not None
        self.ticket.cancel()
        self.cancelled = self.cancelled or not self.ended

    def check(self) -> None:
        """It ended once, and all that it heard is what it would have heard alone."""
        assert self.ended != self.cancelled
        text, token = list(self.prompt), following(self.prompt)
        while token is not None and len(text) < len(self.prompt) + self.max_tokens:
            text.append(token)
            token = following(text)
        whole = len(text) == len(self.prompt) + self.max_tokens
        expected = text if self.echo and text != self.prompt else text[len(self.prompt) :]
        heard = [token.id for token in self.heard]
        if self.ended and (self.error is None or isinstance(self.error, BrokenModel)):
            assert heard == expected and whole == (self.error is None)
        else:
            assert heard == expected[: len(heard)]


def make_engine(
    interrupt: Callable[[], None], kind: type[TorchEngine] = TorchEngine, *, ahead: bool = False
) -> TorchEngine:
    info = EngineInfo(
        engine="fake", model="remembering", device="cpu", dtype="none", context_tokens=CONTEXT,
        vocab_size=VOCABULARY, num_parameters=0, num_slots=SLOTS, most_waiting=WAITING, weight_bytes=1,
        kv_bytes_per_token=1, flops_per_token=1, head_flops=0, attention_flops=0, details={},
    )  # fmt: skip
    scheduler = Scheduler(slots=SLOTS, cache_tokens=NUM_BLOCKS * BLOCK_TOKENS, step_tokens=40)
    decoder = Ahead(interrupt) if ahead else Remembering(interrupt)
    looking = decoder if isinstance(decoder, Ahead) else None
    return kind(decoder, scheduler, info=info, eos_ids=[], ahead=looking)


def check_blocks(scheduler: Scheduler) -> None:
    """Each block belongs to one request, or is free."""
    held = [block for request in scheduler.running for block in request.blocks]
    assert sorted([*held, *scheduler._free]) == list(range(NUM_BLOCKS))
    assert not any(request.blocks for request in scheduler.waiting)


class Stepped(TorchEngine):
    """An engine whose steps are taken by its test, one after the other, in the test's own thread."""

    def _work(self) -> None:
        pass


class Interleaving:
    """Requests that come and go as `choices` say: between steps, within them, in deliveries."""

    def __init__(self, choices: bytes, *, ahead: bool) -> None:
        self.engine = make_engine(self.act, Stepped, ahead=ahead)
        self.clients: list[Client] = []
        self._choices = iter(choices)
        self._acting = False

    def act(self) -> bool:
        """One choice: nothing (half of them), a cancel, or a new request. False when there is none left."""
        choice = next(self._choices, None)
        if choice is None or self._acting:
            return choice is not None
        self._acting = True
        check_blocks(self.engine._scheduler)
        kind, number = choice % 8, choice // 8
        if kind in (3, 4, 5) and self.clients:
            self.clients[-1 - number % len(self.clients)].cancel()
        elif kind > 5:
            self.submit(number)
        check_blocks(self.engine._scheduler)
        self._acting = False
        return True

    def submit(self, number: int) -> None:
        size, max_tokens = (1, 2, 31, 33, 45, 64)[number % 6], (1, 3, 6, 33)[number // 6 % 4]
        client = Client([number % VOCABULARY] * size, max_tokens, self.act, echo=number % 5 == 0)
        stats = self.engine.stats()
        try:
            client.submit(self.engine)
            self.clients.append(client)
        except Overloaded:
            assert stats.running + stats.waiting == SLOTS + WAITING

    def run(self) -> None:
        more = True
        while more or self.busy():
            more = self.act()
            if self.busy():
                assert self.engine._step()

    def busy(self) -> bool:
        stats = self.engine.stats()
        return stats.running + stats.waiting > 0


@settings(max_examples=cases(), deadline=None)
@given(choices=st.binary(min_size=12, max_size=24), ahead=st.booleans())
def test_cancels_at_any_moment_of_a_step_change_nothing_for_the_others(choices, ahead):
    run = Interleaving(choices, ahead=ahead)
    run.run()
    for client in run.clients:
        client.check()
    stats = run.engine.stats()
    assert stats.free_cache_tokens == NUM_BLOCKS * BLOCK_TOKENS
    assert stats.finished == sum(client.ended and client.error is None for client in run.clients)
    assert stats.cancelled == sum(client.cancelled for client in run.clients)


def test_every_step_begins_before_the_last_one_s_tokens_are_read():
    """Also those in which a prompt joins, or a request has ended."""
    run = Interleaving(b"", ahead=True)
    decoder = run.engine._decoder
    for prompt, max_tokens in ((1, 9), (1, 7), (75, 4)):
        client = Client([3] * prompt, max_tokens, lambda: None)
        client.submit(run.engine)
        run.clients.append(client)
        run.engine._step()  # begins one more, which the next request misses
    assert [len(client.heard) for client in run.clients] == [3, 1, 0]
    run.run()
    for client in run.clients:
        client.check()
    # Every token but those that end a request is unknown when the step that takes it begins.
    assert decoder.num_ahead == 8 + 6 + 3 and run.engine.stats().steps == 9


def test_steps_wait_for_tokens_only_until_min_tokens_are_there():
    run = Interleaving(b"", ahead=True)
    client = Client([3], 9, lambda: None, min_tokens=4)
    client.submit(run.engine)
    run.run()
    client.check()
    assert run.engine._decoder.num_ahead == 9 - 4


def test_a_client_that_raises_ends_the_engine_and_every_request_hears_it_once(capfd):
    engine = make_engine(lambda: time.sleep(0.001))
    clients = [Client([1], 60, lambda: None) for _ in range(SLOTS + WAITING - 1)]
    told: list[object] = []

    def broken(outcome: Sequence[Token] | EngineFailed) -> None:
        told.append(outcome)
        raise ZeroDivisionError("of the client")

    engine.submit([1], Sampling(max_tokens=60), broken)
    with suppress(EngineFailed):
        for client in clients:
            client.submit(engine)
    wait_until(engine.failure)
    for client in clients:
        assert client.ticket is None or "of the client" in str(client.error)
    assert len(told) == 2 and engine.stats().free_cache_tokens == NUM_BLOCKS * BLOCK_TOKENS
    assert "of the client" in str(engine.failure()) and "ZeroDivisionError" in capfd.readouterr().err


def test_cancels_by_many_threads_change_nothing_for_the_others():
    """Real threads, which take turns every few bytecodes; most requests are cancelled at some moment."""
    engine = make_engine(lambda: time.sleep(1e-5))  # lets another thread run in the middle of a step
    clients: list[Client] = []
    failures: list[BaseException] = []

    def more() -> bool:
        return sum(client.cancelled for client in clients) < 200

    def load(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while more():
                client = Client([draw.randrange(VOCABULARY)] * draw.choice((1, 33, 64)), 6, lambda: None)
                try:
                    client.submit(engine)
                except Overloaded:
                    continue
                clients.append(client)
                patience = draw.choice((0, 1, 5, 20, 1000))
                while not client.ended and patience:
                    engine.stats()
                    patience -= 1
                if not client.ended and more():  # the last ones are there when it closes
                    client.cancel()
        except BaseException as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=load, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    finally:
        sys.setswitchinterval(before)
        engine.close()
    assert not failures and not more() and engine.failure() == "the engine was closed"
    for client in clients:
        client.check()
        assert client.error is None or isinstance(client.error, BrokenModel) or "closed" in str(client.error)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_cache_tokens) == (0, 0, NUM_BLOCKS * BLOCK_TOKENS)
    assert stats.finished == sum(client.ended and client.error is None for client in clients)
    assert stats.cancelled == sum(client.cancelled for client in clients)
    check_blocks(engine._scheduler)
