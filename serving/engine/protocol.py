"""The interface of an engine: token ids in, sampled tokens out, many requests at once. No torch, no HTTP.

Ours is `serving.engine.torch_engine`; a replica runs it in a process of its own (`serving.engine.process`).
vLLM brings its own endpoint (`serving.vllm_app`). `serving.endpoint.text` turns text into token ids and back.
"""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

Finish = Literal["stop", "length"]
RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_tokens: most tokens to sample, at least 1; with `echo` at least 0.
        min_tokens: no token that ends the text is sampled before this many tokens are.
        temperature: divides the logits; 0 takes the likeliest token.
        min_p: draw no token that is less likely than this share of the likeliest; in [0, 1].
        top_k: draw among this many likeliest tokens; 0: all.
        top_p: draw among the likeliest tokens whose probabilities first reach this sum; in (0, 1].
        presence_penalty: subtracted from the logit of each token that was sampled before.
        frequency_penalty: subtracted once for each time that it was.
        repetition_penalty: divides the positive logits, and multiplies the others, of tokens of prompt and
            continuation (arXiv 1909.05858).
        logit_bias: (token, what is added to its logit) pairs.
        seed: makes the draws a function of seed and prompt, whatever else is running; None draws anew. With
            the compiled decoder this holds to the bit. Without it, logits depend on the other requests by
            rounding. If two candidates are closer than that, the chosen token may differ.
        ignore_eos: continue to `max_tokens` past the end of text (for benchmarks).
        stop_ids: further tokens that end the text; `ignore_eos` does not concern them.
        logprobs: report how likely each delivered token was.
        num_likeliest: with `logprobs`, report so many of the likeliest tokens, at least 1.
        echo: deliver the prompt's tokens too, all of them before the first sampled one.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    stop_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    num_likeliest: int = 1
    echo: bool = False

    @property
    def cuts(self) -> bool:
        """It draws among some of the tokens only."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Its logits depend on the tokens before."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        return penalties != (0.0, 0.0, 1.0)

    def adjusts(self, num_sampled: int) -> bool:
        """After so many tokens it draws from other logits than the model's (`serving.engine.adjust`)."""
        return self.penalizes or bool(self.logit_bias) or num_sampled < self.min_tokens


class Score(NamedTuple):
    """How likely a token was after the tokens before it, under the model at temperature 1.

    Attributes:
        logprob: ln of its probability.
        top_id, top_logprob: of the likeliest token there, which may be itself.
        others: (id, logprob) of the next likeliest; with it, `Sampling.num_likeliest`.
    """

    logprob: float
    top_id: int
    top_logprob: float
    others: tuple[tuple[int, float], ...] = ()


class Token(NamedTuple):
    """A token that was sampled, or one of an echoed prompt.

    Attributes:
        id: in the vocabulary.
        score: None unless requested; always None for a prompt's first token, which follows nothing.
        finish: of the last token "stop" (it ends the text) or "length"; else None.
    """

    id: int
    score: Score | None
    finish: Finish | None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine serves and how: for /v1/models, for ceilings and for the record.

    Attributes:
        context_tokens: most tokens of prompt and continuation together.
        num_slots: most requests that run at once; others wait.
        most_waiting: requests that may wait for a slot.
        weight_bytes: read in each decoding step: all weights but the input embedding.
        kv_bytes_per_token: keys and values of one token in all layers, bytes.
        flops_per_token: 2 FLOPs for each weight that a decoded token is multiplied with, the head included.
        head_flops: those of the head, which a prefilled prompt takes once, for its last token.
        last_token_flops: the same of the last layer's queries, attention's output and MLP.
        attention_flops: for a token and each token that it sees: 4 * layers * heads * head_dim.
        last_attention_flops: those of the last layer, which a prefilled prompt takes for its last token.
        details: further facts for a report, such as why a kernel is not used.
    """

    engine: str
    model: str
    device: str
    dtype: str
    context_tokens: int
    vocab_size: int
    num_parameters: int
    num_slots: int
    most_waiting: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    head_flops: int
    attention_flops: int
    last_token_flops: int = 0
    last_attention_flops: int = 0
    details: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and counts since it started."""

    running: int
    waiting: int
    free_cache_tokens: int
    prompt_tokens: int
    generated_tokens: int
    finished: int
    cancelled: int
    steps: int


class RequestError(ValueError):
    """A request that this engine can never serve. The message names the parameter and the remedy."""


class ContextExceeded(RequestError):
    """Prompt and `max_tokens` exceed the model's context."""


class Overloaded(Exception):
    """The queue is full. Try again after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineFailed(RuntimeError):
    """The engine failed while it had the request. The request may be sent again elsewhere."""


class BrokenModel(EngineFailed):
    """The model's logits for the request are NaN or infinite. Others continue; a retry fails too."""

    def __init__(
        self,
        message: str = (
            "the model's logits are not finite numbers: its weights are broken, as after a diverged run; "
            "serve an earlier checkpoint"
        ),
    ) -> None:
        super().__init__(message)


# Called with the tokens of a step, in order, or with the error that ended the request; from any thread. It
# must return at once: the engine holds a lock while it runs.
Deliver = Callable[[Sequence[Token] | EngineFailed], None]


@dataclass(frozen=True)
class Ticket:
    """A request that an engine has accepted.

    Attributes:
        cancel: ends it: its slot is free within one step, and nothing is delivered after it. Thread-safe.
    """

    cancel: Callable[[], None]


class Engine(Protocol):
    """See the module. Every method may be called from any thread."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Ticket:
        """Take a request. Raises `RequestError`, `Overloaded`, or `EngineFailed` if the engine is broken."""

    def stats(self) -> EngineStats:
        """Never waits for a step. Raises `EngineFailed`: the engine does not answer."""

    def failure(self) -> str | None:
        """Why the engine can no longer serve, or None."""

    def close(self) -> None:
        """Stop, and end every request with `EngineFailed`."""


def check(prompt: Sequence[int], sampling: Sampling, info: EngineInfo) -> None:
    """Raise `RequestError` if the engine can never serve this request."""
    total = len(prompt) + sampling.max_tokens
    if not prompt:
        raise RequestError("prompt: is empty; give at least one token")
    check_ids("prompt", prompt, info)
    if sampling.max_tokens < (0 if sampling.echo else 1):
        raise RequestError("max_tokens: must be at least 1, or 0 to echo the prompt alone")
    if total > info.context_tokens:
        raise ContextExceeded(  # in OpenAI's words, by which clients know it
            f"prompt: This model's maximum context length is {info.context_tokens} tokens, but "
            f"{len(prompt)} of prompt and {sampling.max_tokens} of max_tokens were asked for; shorten the "
            "prompt or lower max_tokens"
        )
    if sampling.min_tokens > sampling.max_tokens:
        raise RequestError(f"min_tokens: must not exceed max_tokens, which is {sampling.max_tokens}")
    check_ids("logit_bias", [token for token, _ in sampling.logit_bias], info)
    check_ids("stop_token_ids", sampling.stop_ids, info)


def check_ids(name: str, ids: Collection[int], info: EngineInfo) -> None:
    """Raise `RequestError` if any of a field's token ids is none of the model's."""
    if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
        raise RequestError(f"{name}: token ids must lie in [0, {info.vocab_size})")


def admit(num_open: int, info: EngineInfo) -> None:
    """Raise `Overloaded` if `num_open` requests fill the slots and the queue."""
    if num_open >= info.num_slots + info.most_waiting:
        raise Overloaded(
            f"{info.most_waiting} requests are waiting already, as many as may",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )


def answer_all(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    num_new: Sequence[int],
    *,
    concurrency: int,
    note: Callable[[int, Sequence[Token]], None],
) -> None:
    """Continue every prompt greedily by `num_new` tokens, past any end of text, `concurrency` at a time.

    Args:
        note: called with the index of a prompt and its new tokens, from the engine's thread.

    Raises:
        EngineFailed: the remaining prompts are not answered.
    """
    ended: queue.SimpleQueue[EngineFailed | None] = queue.SimpleQueue()

    def submit(request: int) -> None:
        def deliver(arrived: Sequence[Token] | EngineFailed) -> None:
            if isinstance(arrived, EngineFailed):
                ended.put(arrived)
                return
            note(request, arrived)
            if arrived[-1].finish is not None:
                ended.put(None)

        sampling = Sampling(max_tokens=num_new[request], temperature=0.0, ignore_eos=True)
        engine.submit(prompts[request], sampling, deliver)

    for request in range(min(concurrency, len(prompts))):
        submit(request)
    for following in range(concurrency, concurrency + len(prompts)):
        if (failure := ended.get()) is not None:
            raise failure
        if following < len(prompts):
            submit(following)


class Streams:
    """The tokens of some requests, as an asynchronous iterator over lists of (request, tokens).

    An item holds all that arrived since the last one. `request` counts the requests from 0. Create it in the
    event loop that reads it. Call `cancel` to leave early.

    Raises:
        RequestError, Overloaded, EngineFailed: the engine refuses one of them; then it has none of them.
    """

    def __init__(self, engine: Engine, requests: Sequence[tuple[Sequence[int], Sampling]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[int, Sequence[Token] | EngineFailed]] = deque()
        self._wake = asyncio.Event()
        self._tickets: dict[int, Ticket] = {}
        self._open = set(range(len(requests)))
        try:
            for number, (prompt, sampling) in enumerate(requests):
                ticket = engine.submit(prompt, sampling, partial(self._deliver, number))
                self._tickets[number] = ticket
        except Exception:
            self.cancel()
            raise

    def cancel(self, request: int | None = None) -> None:
        """Cancel one of the requests, or all."""
        for number in list(self._tickets) if request is None else [request]:
            if ticket := self._tickets.pop(number, None):
                ticket.cancel()
            self._open.discard(number)

    def _deliver(self, request: int, tokens: Sequence[Token] | EngineFailed) -> None:
        self._arrived.append((request, tokens))
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed: nobody reads any more
            if ticket := self._tickets.get(request):
                ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Sequence[Token]]]]:
        """Raises `EngineFailed`."""
        while self._open:
            await self._wake.wait()
            self._wake.clear()
            found: list[tuple[int, Sequence[Token]]] = []
            while self._arrived:
                request, tokens = self._arrived.popleft()
                if request not in self._open:  # cancelled meanwhile
                    continue
                if isinstance(tokens, EngineFailed):
                    if found:
                        yield found
                    raise tokens
                found.append((request, tokens))
                if tokens[-1].finish is not None:
                    self._open.discard(request)
            if found:
                yield found


class Stream:
    """The tokens of one request, as an asynchronous iterator over lists. See `Streams`."""

    def __init__(self, engine: Engine, prompt: Sequence[int], sampling: Sampling) -> None:
        self._streams = Streams(engine, [(prompt, sampling)])

    def cancel(self) -> None:
        self._streams.cancel()

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        """Raises `EngineFailed`."""
        async for found in self._streams:
            yield [token for _, tokens in found for token in tokens]
