"""The HTTP endpoint over one engine: an ASGI application, whatever serves it."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from cluster.record.origins import Origin
from serving.endpoint.answers import ChatLayout, CompletionLayout, Layout, model
from serving.endpoint.bodies import MOST_BODY_BYTES, Bodies
from serving.endpoint.chat import ChatTemplate
from serving.endpoint.hosts import allowed_hosts, require_allowed
from serving.endpoint.keys import require_key
from serving.endpoint.metrics import Metrics
from serving.endpoint.prompts import Prompts
from serving.endpoint.refusal import Refusal
from serving.endpoint.run import Observe, Prompt, Run, refusals
from serving.endpoint.schema import (
    MOST_QUOTED,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from serving.engine.protocol import Engine, admit, check_ids

SPARE_BYTES = 64 << 10  # of a body, for all but its prompt
LARGE_BODY_BYTES = 64 << 10
BODY_SECONDS = 10.0
IGNORED = "X-Ignored-Parameters"  # the header that names what a request had and no field knows
MOST_NAMED = 500  # characters of it

Answered = TypeVar("Answered")


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """What an endpoint allows.

    Attributes:
        hosts: names that requests may carry as Host and Origin; None: any.
        origins: pages of these origins may read answers (CORS); "*": of any.
        key_digest: SHA-256, in hex, of the key that clients must send (`keys.digest_of`); None: no key.
        refuses_unknown: refuse a parameter that no field has. Else the answer's header IGNORED names it.
        body_seconds: a body that takes longer to arrive is refused (408).
    """

    hosts: frozenset[str] | None = field(default_factory=lambda: allowed_hosts("localhost", ()))
    origins: Sequence[str] = ()
    key_digest: str | None = None
    refuses_unknown: bool = False
    body_seconds: float = BODY_SECONDS


def make_endpoint(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    options: EndpointOptions | None = None,
    observe: Observe = lambda name, seconds: None,
    origin: Origin | None = None,
) -> FastAPI:
    """OpenAI's completions and chats, vLLM's tokenizer paths, health, metrics and /openapi.json.

    Args:
        template: writes chats; None: they are refused.
        observe: called with the name and seconds of each of `metrics.LATENCIES`; /metrics has them too.
        origin: of the model, for /v1/models (`cluster.record.origins`).
    """
    allows = options or EndpointOptions()

    async def check(request: Request) -> None:
        if allows.hosts is not None:
            require_allowed(request.headers, allows.hosts, origins=allows.origins)
        if allows.key_digest is not None:
            require_key(request.headers, allows.key_digest, path=request.url.path)

    app = FastAPI(
        title="Asunción", version=version("asuncion"), openapi_url=None, dependencies=[Depends(check)]
    )
    service = Service(engine, tokenizer, template=template, options=allows, observe=observe)
    _add_requests(app, service)
    _add_facts(app, service, engine, origin)
    _add_errors(app, service.metrics)
    if allows.origins:
        exposed = [IGNORED, "Retry-After"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allows.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=exposed,
        )
    return app


def _add_requests(app: FastAPI, service: "Service") -> None:
    """The paths that take a body."""
    paths: dict[str, tuple[type[Any], Callable[[Request], Coroutine[Any, Any, Response]]]] = {
        "/v1/completions": (CompletionRequest, service.complete),
        "/v1/chat/completions": (ChatRequest, service.chat),
        "/tokenize": (TokenizeRequest, service.tokenize),
        "/detokenize": (DetokenizeRequest, service.detokenize),
    }
    references = "#/components/schemas/{model}"
    kinds = [(kind, "validation") for kind, _ in paths.values()]
    _, schemas = models_json_schema(kinds, ref_template=references)  # type: ignore[arg-type]
    error = {"description": "OpenAI's error object", "content": {"application/json": {}}}
    for path, (kind, answer) in paths.items():
        schema = {"$ref": references.format(model=kind.__name__)}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        app.post(path, openapi_extra={"requestBody": body}, responses={"4XX": error, "5XX": error})(answer)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        described = app.openapi()
        described.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return described


def _add_facts(app: FastAPI, service: "Service", engine: Engine, origin: Origin | None) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        listed = model(engine.info, since=service.since, origin=origin)
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.require_model(name)
        return model(engine.info, since=service.since, origin=origin)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        problem = engine.failure()
        return JSONResponse({"status": problem or "ok"}, status_code=503 if problem else 200)

    @app.get("/version")
    async def tell_version() -> dict[str, str]:
        return {"version": app.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        with refusals():
            text = await asyncio.to_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        metrics.refused(refusal.status)
        return JSONResponse(refusal.body(), status_code=refusal.status, headers=refusal.headers())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        routes = [route for route in app.routes if isinstance(route, APIRoute)]
        here = [route for route in routes if route.path_regex.match(path)]
        allowed = sorted({method for route in here for method in route.methods or ()})
        problem = error.detail
        if error.status_code == 404:
            there = dict.fromkeys(f"{'/'.join(route.methods or ())} {route.path}" for route in routes)
            problem = f"there is no such path; there are {', '.join(there)}"
        elif error.status_code == 405:
            problem = f"no {request.method}; use {' or '.join(allowed)}"
        message = f"{path[:MOST_QUOTED]}: {problem}"
        answer = await refused(request, Refusal(error.status_code, message, close=True))
        answer.headers.update({"Allow": ", ".join(allowed)} if allowed else {})
        return answer

    @app.exception_handler(Exception)
    async def broken(request: Request, _: Exception) -> Response:
        return await refused(request, Refusal(500, "the server failed; its log says why", close=True))


class Service:
    """Answers from one engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None,
        options: EndpointOptions,
        observe: Observe,
    ) -> None:
        self.since = int(time.time())
        self.metrics = Metrics(engine, observe)
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self._refuses_unknown = options.refuses_unknown
        info = engine.info
        self._most_choices = info.num_slots + info.most_waiting
        self._prompts = Prompts(tokenizer, context_tokens=info.context_tokens)
        # In JSON a byte of text takes up to 6 bytes, and a token id with its spaces hardly more than 24.
        one = info.context_tokens * max(6 * self._prompts.longest_token, 24)
        largest = min(self._most_choices * one + SPARE_BYTES, MOST_BODY_BYTES)
        self._bodies = Bodies(most_bytes=largest, seconds=options.body_seconds)
        self._parsing = asyncio.Lock()
        self._num_encoding = 0

    async def complete(self, http: Request) -> Response:
        """The answer to POST /v1/completions. Raises `Refusal`."""
        arrived = time.perf_counter()
        request, headers = await self._request(http, CompletionRequest)
        self._require_room(len(request.prompt) * request.num_drawn, param="prompt")
        prompts = await self._encode(http, request.prompt, special=request.add_special_tokens is not False)
        layout = CompletionLayout(model=request.model, text_of=self.token_text)
        return await self._answer(http, request, prompts, layout, arrived, headers)

    async def chat(self, http: Request) -> Response:
        """The answer to POST /v1/chat/completions. Raises `Refusal`."""
        arrived = time.perf_counter()
        request, headers = await self._request(http, ChatRequest)
        self._require_room(request.num_drawn, param="n")
        text = self._render(request)
        layout = ChatLayout(model=request.model, text_of=self.token_text)
        try:
            prompts = await self._encode(http, [text], special=bool(request.add_special_tokens))
            return await self._answer(http, request, prompts, layout, arrived, headers)
        except Refusal as refusal:
            if refusal.param == "prompt":  # which a chat does not have
                refusal.param = "messages"
                refusal.args = (str(refusal).replace("prompt", "messages", 1),)
            raise

    async def tokenize(self, http: Request) -> Response:
        """The answer to POST /tokenize. Raises `Refusal`."""
        request, headers = await self._request(http, TokenizeRequest)
        chats, special = request.prompt is None, request.add_special_tokens
        text = self._render(request) if chats else str(request.prompt)
        [prompt] = await self._encode(http, [text], special=not chats if special is None else special)
        name_of = self._tokenizer.id_to_token
        body = {
            "count": len(prompt.ids),
            "max_model_len": self._engine.info.context_tokens,
            "tokens": prompt.ids,
            "token_strs": [name_of(token) for token in prompt.ids] if request.return_token_strs else None,
        }
        return JSONResponse(body, headers=headers)

    async def detokenize(self, http: Request) -> Response:
        """The answer to POST /detokenize. Raises `Refusal`."""
        request, headers = await self._request(http, DetokenizeRequest)
        with refusals():
            check_ids("tokens", request.tokens, self._engine.info)
        # `decode` would not let other threads run.
        texts = await asyncio.to_thread(
            self._tokenizer.decode_batch, [request.tokens], skip_special_tokens=False
        )
        return JSONResponse({"prompt": texts[0]}, headers=headers)

    def require_model(self, name: str) -> None:
        """Raise `Refusal` (404) unless `name` is what is served."""
        served = self._engine.info.model
        if name != served:
            message = f"model: {name[:MOST_QUOTED]!r} is not served here; {served!r} is"
            raise Refusal(404, message, param="model", code="model_not_found")

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    async def _request(self, http: Request, kind: type[Body]) -> tuple[Body, dict[str, str]]:
        """The request, and headers of its answer."""
        async with self._bodies.receive(http) as body, self._turn(body):
            request, unknown = parse(body, kind)
        if request.model is not None:
            self.require_model(request.model)
        if unknown and self._refuses_unknown:
            name = unknown[0][:MOST_QUOTED]
            message = f"{name}: this server does not know this parameter; leave it out"
            raise Refusal(400, message, param=name, code="unknown_parameter")
        named = ", ".join(quote(name[:MOST_QUOTED]) for name in unknown[:MOST_QUOTED])
        return request, {IGNORED: named[:MOST_NAMED]} if unknown else {}

    def _turn(self, body: bytes) -> AbstractAsyncContextManager[None]:
        """Large bodies are parsed one at a time: other requests are served between them."""
        return self._parsing if len(body) > LARGE_BODY_BYTES else nullcontext()

    def _require_room(self, num_choices: int, *, param: str) -> None:
        if num_choices > self._most_choices:
            message = f"{num_choices} choices at once; this server has room for {self._most_choices}"
            remedy = "send fewer prompts, or a smaller n" if param == "prompt" else "send a smaller n"
            raise Refusal(400, f"{param}: {message}; {remedy}", param=param)

    def _render(self, request: ChatRequest | TokenizeRequest) -> str:
        if self._template is None:
            message = "this model has no chat template (chat_template in tokenizer_config.json, or "
            message += "chat_template.jinja beside it), so it cannot chat; use /v1/completions"
            raise Refusal(400, message, param="messages", code="no_chat_template")
        prompted, given = request.add_generation_prompt is not False, request.chat_template_kwargs or {}
        return self._template.render(request.messages or (), add_generation_prompt=prompted, given=given)

    async def _encode(
        self, http: Request, prompts: Sequence[str | list[int]], *, special: bool
    ) -> list[Prompt]:
        """Raises `Refusal` (429) if as many long prompts wait as the engine has room for."""
        num_characters, encoded = 0, list[Prompt]()
        for prompt in prompts:
            ids = self._prompts.at_once(prompt, special=special, after=num_characters)
            if ids is None:
                ids = await _unless_client_leaves(http, self._encode_long(str(prompt), special=special))
            elif isinstance(prompt, str):
                num_characters += len(prompt)
            encoded.append(Prompt(prompt, ids))
        return encoded

    async def _encode_long(self, prompt: str, *, special: bool) -> list[int]:
        with refusals():
            admit(self._num_encoding, self._engine.info)
        self._num_encoding += 1
        try:
            return await self._prompts.encode(prompt, special=special)
        finally:
            self._num_encoding -= 1

    async def _answer(
        self,
        http: Request,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        layout: Layout,
        arrived: float,
        headers: dict[str, str],
    ) -> Response:
        run = Run(
            self._engine,
            self._tokenizer,
            request,
            prompts,
            layout=layout,
            observe=self.metrics.observe,
            arrived=arrived,
        )
        if request.stream:
            return _EventStream(run, headers)
        try:
            return JSONResponse(await _unless_client_leaves(http, run.whole()), headers=headers)
        finally:
            run.cancel()


class _EventStream(StreamingResponse):
    """The events of a run. However the response ends, the run ends with it."""

    def __init__(self, run: Run, headers: dict[str, str]) -> None:
        super().__init__(run.events(), media_type="text/event-stream", headers=headers)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()


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
