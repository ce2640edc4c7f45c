"""The HTTP endpoint over one engine: an ASGI application, whatever serves it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from cluster.record.origins import Origin
from serving.endpoint.bodies import MOST_BODY_BYTES, Bodies
from serving.endpoint.hosts import allowed_hosts, require_allowed
from serving.endpoint.openai_api import (
    MOST_QUOTED,
    Answer,
    CompletionRequest,
    Refusal,
    StreamOptions,
    logprobs,
    models,
    parse,
    usage,
)
from serving.endpoint.prompts import Prompts
from serving.endpoint.text import Detokenizer, spell
from serving.engine.protocol import (
    BrokenModel,
    Engine,
    EngineFailed,
    Finish,
    Overloaded,
    RequestError,
    Stream,
    Token,
    admit,
)

SPARE_BYTES = 64 << 10  # of a body, for all but its prompt
LARGE_BODY_BYTES = 64 << 10
BODY_SECONDS = 10.0

LATENCIES = {
    "time_to_first_token_seconds": "From the request's arrival here",
    "request_seconds": "From the request's arrival here to its last token",
}
FIGURES = {  # of EngineStats
    "running": "Requests in a slot",
    "waiting": "Requests that wait for a slot",
    "free_cache_tokens": "Tokens that the cache has room for",
    "prompt_tokens": "Tokens of prompts prefilled since the start",
    "generated_tokens": "Tokens sampled since the start",
    "finished": "Requests finished since the start",
    "cancelled": "Requests cancelled since the start",
    "steps": "Steps since the start",
}

Observe = Callable[[str, float], None]
Answered = TypeVar("Answered")


def make_endpoint(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    hosts: frozenset[str] | None = allowed_hosts("localhost", ()),
    body_seconds: float = BODY_SECONDS,
    observe: Observe = lambda name, seconds: None,
    origin: Origin | None = None,
) -> FastAPI:
    """POST /v1/completions; GET /v1/models, /health, /metrics.

    Args:
        hosts: names that requests may carry as Host and Origin; None: any.
        body_seconds: a body that takes longer to arrive is refused (408).
        observe: called with the name and seconds of each of LATENCIES; /metrics has them too.
        origin: of the model, for /v1/models (`cluster.record.origins`).
    """

    async def check_hosts(request: Request) -> None:
        if hosts is not None:
            require_allowed(request.headers, hosts)

    app = FastAPI(openapi_url=None, dependencies=[Depends(check_hosts)])
    service = Service(engine, tokenizer, body_seconds=body_seconds, observe=observe)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.complete(request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return models(engine.info, since=service.since, origin=origin)

    @app.get("/health")
    async def health() -> Response:
        problem = engine.failure()
        return JSONResponse({"status": problem or "ok"}, status_code=503 if problem else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await asyncio.to_thread(service.metrics.text, engine)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        service.metrics.refused.labels(str(refusal.status)).inc()
        return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return await refused(request, Refusal(error.status_code, str(error.detail), close=True))

    @app.exception_handler(Exception)
    async def broken(request: Request, _: Exception) -> Response:
        return await refused(request, Refusal(500, "the server failed; its log says why", close=True))

    return app


class Metrics:
    """Prometheus figures of one engine."""

    def __init__(self, observe: Observe) -> None:
        self._registry = registry = CollectorRegistry()
        self.refused = Counter(
            "asuncion_refused", "Requests answered with an error", ["status"], registry=registry
        )
        self._latencies = {
            name: Histogram(f"asuncion_{name}", text, registry=registry) for name, text in LATENCIES.items()
        }
        self._figures = {
            name: Gauge(f"asuncion_{name}", text, registry=registry) for name, text in FIGURES.items()
        }
        self._observe = observe

    def observe(self, name: str, seconds: float) -> None:
        """Note one of LATENCIES."""
        self._latencies[name].observe(seconds)
        self._observe(name, seconds)

    def text(self, engine: Engine) -> bytes:
        """All of them in Prometheus' text format."""
        stats = engine.stats()
        for name, gauge in self._figures.items():
            gauge.set(getattr(stats, name))
        return generate_latest(self._registry)


class Service:
    """Completions from one engine."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, body_seconds: float, observe: Observe
    ) -> None:
        self.since = int(time.time())
        self.metrics = Metrics(observe)
        self._engine, self._tokenizer = engine, tokenizer
        context = engine.info.context_tokens
        self._prompts = Prompts(tokenizer, context_tokens=context)
        # In JSON a byte of text takes up to 6 bytes, and a token id with its spaces hardly more than 24.
        largest = context * max(6 * self._prompts.longest_token, 24) + SPARE_BYTES
        self._bodies = Bodies(most_bytes=min(largest, MOST_BODY_BYTES), seconds=body_seconds)
        self._parsing = asyncio.Lock()
        self._num_encoding = 0

    async def complete(self, http: Request) -> Response:
        """The answer to POST /v1/completions. Raises `Refusal`."""
        arrived = time.perf_counter()
        async with self._bodies.receive(http) as body, self._turn(body):
            request = parse(body)
        if request.model != self._engine.info.model:
            name = request.model[:MOST_QUOTED]
            raise Refusal(
                404,
                f"model: {name!r} is not served here; {self._engine.info.model!r} is",
                param="model",
                code="model_not_found",
            )
        prompt = self._prompts.at_once(request.prompt)
        if prompt is None:
            prompt = await _unless_client_leaves(http, self._encode(str(request.prompt)))
        run = _Run(self, request, prompt, arrived=arrived)
        if request.stream:
            return _EventStream(run)
        try:
            return JSONResponse(await _unless_client_leaves(http, run.whole()))
        finally:
            run.cancel()

    def _turn(self, body: bytes) -> AbstractAsyncContextManager[None]:
        """Large bodies are parsed one at a time: other requests are served between them."""
        return self._parsing if len(body) > LARGE_BODY_BYTES else nullcontext()

    def submit(self, request: CompletionRequest, prompt: list[int]) -> Stream:
        """Hand a request to the engine. Raises `Refusal`."""
        with _refusals():
            return Stream(self._engine, prompt, request.sampling())

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def detokenizer(self, request: CompletionRequest, prompt: list[int]) -> Detokenizer:
        return Detokenizer(self._tokenizer, prompt=prompt, stops=request.stops)

    async def spell(self, prompt: list[int]) -> tuple[str, list[int]]:
        """`serving.endpoint.text.spell` in another thread: it takes about 3 ms for 1,000 tokens."""
        return await asyncio.to_thread(spell, self._tokenizer, prompt)

    async def _encode(self, prompt: str) -> list[int]:
        """The ids of a long prompt. Raises `Refusal` (429) if as many wait as the engine has room for."""
        with _refusals():
            admit(self._num_encoding, self._engine.info)
        self._num_encoding += 1
        try:
            return await self._prompts.encode(prompt)
        finally:
            self._num_encoding -= 1


class _Piece(NamedTuple):
    """What a token or an echoed prompt adds: the text that is settled, and where each token's text begins.

    `starts` are in characters of the answer's text. `finish` is the completion's: a stop string ends it
    although the engine would continue.
    """

    tokens: Sequence[Token]
    text: str
    starts: Sequence[int]
    finish: Finish | None


class _Run:
    """One completion. The engine has it from its creation until it has ended or `cancel` is called."""

    def __init__(
        self, service: Service, request: CompletionRequest, prompt: list[int], *, arrived: float
    ) -> None:
        self._service, self._request, self._arrived = service, request, arrived
        self._prompt, self._num_sent = prompt, 0
        self._text = service.detokenizer(request, prompt)
        self._stream = service.submit(request, prompt)
        self._answer = Answer(model=request.model)
        self._options = request.stream_options or StreamOptions()

    async def pieces(self) -> AsyncIterator[list[_Piece]]:
        """The pieces that have arrived since the last item. Raises `EngineFailed`."""
        num_echoed = len(self._prompt) if self._request.echo else 0
        begun, offset = False, 0
        async for tokens in self._stream:
            found: list[_Piece] = []
            if num_echoed:  # the engine delivers all of a prompt at once
                found.append(await self._echo(tokens[:num_echoed]))
                tokens, num_echoed, offset = tokens[num_echoed:], 0, len(found[0].text)
            if tokens and not begun:
                self._observe("time_to_first_token_seconds")
                begun = True
            for token in tokens:
                text = self._text.add(token.id, last=token.finish is not None)
                finish = "stop" if self._text.stopped else token.finish
                found.append(_Piece([token], text, [offset + self._text.start], finish))
                if finish is not None:
                    break
            yield found
            if found[-1].finish is not None:
                break
        self._observe("request_seconds")

    def cancel(self) -> None:
        """Cancel it in the engine, if it is still there."""
        self._stream.cancel()

    async def _echo(self, tokens: Sequence[Token]) -> _Piece:
        """A prompt: its text as it was given, or the text of its ids."""
        given = self._request.prompt
        text, starts = await self._service.spell(self._prompt)
        return _Piece(tokens, given if isinstance(given, str) else text, starts, tokens[-1].finish)

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream. Raises `Refusal`."""
        try:
            pieces = [piece async for found in self.pieces() for piece in found]
        except EngineFailed as error:
            raise _failed(error) from error
        return {**self._chunk(pieces), **self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: one for each token, then the usage if asked for, then [DONE]; or an error."""
        try:
            async for found in self.pieces():
                yield b"".join(self._event(piece) for piece in found)
            if self._options.include_usage:
                yield _event({**self._answer.nothing(), **self._usage()})
            yield b"data: [DONE]\n\n"
        except EngineFailed as error:  # the status has been sent, so an event must carry the error
            yield _event(_failed(error).body())

    def _event(self, piece: _Piece) -> bytes:
        chunk = self._chunk([piece])
        return _event({**chunk, **self._usage()} if self._options.continuous_usage_stats else chunk)

    def _chunk(self, pieces: list[_Piece]) -> dict[str, Any]:
        """The JSON of pieces that follow those sent before."""
        self._num_sent += sum(len(piece.tokens) for piece in pieces)
        asked = None
        if self._request.logprobs is not None:
            asked = logprobs(
                [token for piece in pieces for token in piece.tokens],
                [start for piece in pieces for start in piece.starts],
                text_of=self._service.token_text,
                top=bool(self._request.echo) and self._request.logprobs > 0,
            )
        text = "".join(piece.text for piece in pieces)
        return self._answer.chunk(text, finish=pieces[-1].finish, logprobs=asked)

    def _observe(self, name: str) -> None:
        self._service.metrics.observe(name, time.perf_counter() - self._arrived)

    def _usage(self) -> dict[str, Any]:
        num_prompt = len(self._prompt)
        return usage(num_prompt, self._num_sent - num_prompt if self._request.echo else self._num_sent)


class _EventStream(StreamingResponse):
    """The events of a run. However the response ends, the run ends with it."""

    def __init__(self, run: _Run) -> None:
        super().__init__(run.events(), media_type="text/event-stream")
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what an engine refuses into `Refusal`."""
    try:
        yield
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


async def _unless_client_leaves(http: Request, work: Coroutine[Any, Any, Answered]) -> Answered:
    """The result of `work`, which is cancelled if the client closes the connection. Read the body first."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(499, "the client left")  # nginx's code; nobody reads it
        return answer.result()
    finally:
        for task in (answer, left):
            task.cancel()
            with suppress(asyncio.CancelledError, Refusal):
                await task
