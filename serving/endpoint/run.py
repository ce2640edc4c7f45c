"""The answer to one request, from the engine's tokens to JSON and server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from serving.endpoint.answers import Layout, Piece, usage
from serving.endpoint.refusal import Refusal
from serving.endpoint.schema import ChatRequest, CompletionRequest, StreamOptions
from serving.endpoint.text import Detokenizer, spell
from serving.engine.protocol import (
    BrokenModel,
    ContextExceeded,
    Engine,
    EngineFailed,
    Overloaded,
    RequestError,
    Streams,
    Token,
)

Observe = Callable[[str, float], None]


class Prompt(NamedTuple):
    """One prompt: as it was given, and its token ids."""

    given: str | list[int]
    ids: list[int]


@dataclass
class _Choice:
    """A continuation of a prompt, as far as it has come.

    Attributes:
        num_sent: tokens of its pieces, those of an echoed prompt included.
        num_echoed: tokens of its prompt that are still to be echoed.
        offset: characters of the echoed prompt.
    """

    index: int
    prompt: Prompt
    text: Detokenizer
    num_echoed: int
    offset: int = 0
    num_sent: int = 0
    begun: bool = False
    ended: bool = False


class Run:
    """All choices of a request. The engine has them from the creation until they have ended, or `cancel`.

    Args:
        request: what was asked for. Choice i of n has the seed `seed` + i, as in vLLM.
        layout: how answers to such requests are written.
        observe: called with the name and seconds of each of `serving.endpoint.metrics.LATENCIES`.
        arrived: when the request did, by `time.perf_counter`.

    Raises:
        Refusal: the engine does not take it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        *,
        layout: Layout,
        observe: Observe,
        arrived: float,
    ) -> None:
        self._tokenizer, self._request, self._prompts = tokenizer, request, prompts
        self._layout, self._observer, self._arrived = layout, observe, arrived
        self._options = request.stream_options or StreamOptions()
        asked, number = request.scores()
        self._scores = number if asked else None
        self._choices: list[_Choice] = []
        submitted = []
        for prompt in prompts:
            sampling = request.sampling(room=engine.info.context_tokens - len(prompt.ids))
            for drawn in range(request.num_drawn):
                seed = None if sampling.seed is None else sampling.seed + drawn
                submitted.append((prompt.ids, replace(sampling, seed=seed)))
                text = Detokenizer(
                    tokenizer, prompt=prompt.ids, stops=request.stops, least_tokens=sampling.min_tokens
                )
                num_echoed = len(prompt.ids) if sampling.echo else 0
                self._choices.append(_Choice(len(self._choices), prompt, text, num_echoed))
        with refusals():
            self._streams = Streams(engine, submitted)

    def cancel(self) -> None:
        """Cancel what the engine still has of it."""
        self._streams.cancel()

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream. Raises `Refusal`."""
        pieces: list[list[Piece]] = [[] for _ in self._choices]
        try:
            async for found in self._pieces():
                for choice, piece in found:
                    choice.num_sent += len(piece.tokens)
                    pieces[choice.index].append(piece)
        except EngineFailed as error:
            raise _failed(error) from error
        n, drawn, echoed = self._request.n or 1, self._request.num_drawn, 1 if self._request.echo else 0
        kept = []
        for first in range(0, len(pieces), drawn):
            of_prompt = pieces[first : first + drawn]
            if drawn > n:
                of_prompt.sort(key=lambda each: _mean_logprob(each[echoed:]), reverse=True)
                del of_prompt[n:]
            kept += of_prompt
        scores = self._asked_scores()
        choices = [self._layout.choice(index, each, scores=scores) for index, each in enumerate(kept)]
        return {**self._layout.answer(choices, streamed=False), **self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: one for each token, then the usage if asked for, then [DONE]; or an error."""
        try:
            async for found in self._pieces():
                yield b"".join(self._event(choice, piece) for choice, piece in found)
            if self._options.include_usage:
                yield _event({**self._layout.answer([], streamed=True), **self._usage()})
            yield b"data: [DONE]\n\n"
        except EngineFailed as error:  # the status has been sent, so an event must carry the error
            yield _event(_failed(error).body())

    def _asked_scores(self) -> int | None:
        """Without those that only rank `best_of`."""
        asked = self._request.logprobs  # a number, or of a chat a truth
        return None if asked is None or asked is False else self._scores

    async def _pieces(self) -> AsyncIterator[list[tuple[_Choice, Piece]]]:
        """The pieces that have arrived since the last item. Raises `EngineFailed`."""
        begun = False
        async for arrived in self._streams:
            found: list[tuple[_Choice, Piece]] = []
            for index, tokens in arrived:
                choice = self._choices[index]
                if choice.ended:  # by a stop string, before these arrived
                    continue
                if choice.num_echoed:  # the engine delivers all of a prompt at once
                    found.append((choice, await self._echo(choice, tokens[: choice.num_echoed])))
                    tokens, choice.num_echoed = tokens[choice.num_echoed :], 0
                if tokens and not begun:
                    self._observe("time_to_first_token")
                    begun = True
                found += ((choice, piece) for piece in self._add(choice, tokens))
            yield found
        self._observe("request")

    def _add(self, choice: _Choice, tokens: Sequence[Token]) -> Iterator[Piece]:
        for token in tokens:
            ends = token.finish == "stop"  # the token that ends a text has no text itself
            text = choice.text.add(None if ends else token.id, last=token.finish is not None)
            finish = "stop" if choice.text.stopped else token.finish
            yield Piece([token], text, [choice.offset + choice.text.start], finish)
            if finish is not None:
                choice.ended = True
                self._streams.cancel(choice.index)
                return

    async def _echo(self, choice: _Choice, tokens: Sequence[Token]) -> Piece:
        """A prompt: its text as it was given, or the text of its ids."""
        given, ids = choice.prompt
        text, starts = await asyncio.to_thread(spell, self._tokenizer, ids)  # 3 ms for 1,000 tokens
        text = given if isinstance(given, str) else text
        choice.offset = len(text)
        return Piece(tokens, text, starts, tokens[-1].finish)

    def _event(self, choice: _Choice, piece: Piece) -> bytes:
        scores = self._asked_scores()
        change = self._layout.change(choice.index, piece, scores=scores, first=not choice.begun)
        choice.begun = True
        choice.num_sent += len(piece.tokens)
        chunk = self._layout.answer([change], streamed=True)
        return _event({**chunk, **self._usage()} if self._options.continuous_usage_stats else chunk)

    def _observe(self, name: str) -> None:
        self._observer(name, time.perf_counter() - self._arrived)

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, whatever its choices."""
        echoed = sum(len(each.prompt.ids) for each in self._choices if self._request.echo and each.num_sent)
        sent = sum(choice.num_sent for choice in self._choices)
        return usage(sum(len(prompt.ids) for prompt in self._prompts), sent - echoed)


def _mean_logprob(pieces: Sequence[Piece]) -> float:
    """By which the best of several continuations are chosen, as at OpenAI."""
    found = [token.score.logprob for piece in pieces for token in piece.tokens if token.score]
    return sum(found) / max(1, len(found))


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what an engine refuses into `Refusal`."""
    try:
        yield
    except ContextExceeded as error:
        raise Refusal(400, str(error), param="prompt", code="context_length_exceeded") from error
    except RequestError as error:
        raise Refusal(400, str(error), param=str(error).partition(":")[0]) from error
    except Overloaded as error:
        seconds = error.retry_after_seconds
        raise Refusal(429, str(error), code="overloaded", retry_after_seconds=seconds) from error
    except EngineFailed as error:
        raise _failed(error) from error


def _failed(error: EngineFailed) -> Refusal:
    if isinstance(error, BrokenModel):
        return Refusal(500, str(error), code="model_broken")
    return Refusal(503, str(error), code="engine_failed")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
