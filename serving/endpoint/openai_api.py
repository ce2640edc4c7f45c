"""OpenAI's completions protocol: what a request may contain, and how answers and refusals are written.

No HTTP and no engine: bytes in, a checked `CompletionRequest` or a `Refusal` out; tokens in, JSON out.
https://platform.openai.com/docs/api-reference/completions. A parameter that this server does not implement is
refused by name, unless it has the value that changes nothing.
"""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import from_json

from cluster.record.origins import Origin
from serving.engine.protocol import EngineInfo, Finish, Sampling, Token

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MOST_STOPS, MOST_STOP_CHARACTERS = 4, 1000
LARGEST_SEED = 2**63 - 1
LARGEST_TOKEN = 2**31 - 1
MOST_ITEMS = 100  # of a list or an object other than the prompt; validation makes an error of each wrong one
MOST_QUOTED = 100  # characters of a client's words in an answer


def _one_prompt(given: Any) -> str | list[int]:
    """The one prompt. Refuses a list of millions of prompts at the first; a union type would try each."""
    nested = isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int)
    prompt = given[0] if nested else given
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(one) is int and 0 <= one <= LARGEST_TOKEN for one in prompt):
        return prompt
    raise ValueError("not one prompt")


_Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
_Zero = Annotated[float, Field(ge=0, le=0)] | None
_One = Annotated[float, Field(ge=1, le=1)] | None
_OneWhole = Annotated[int, Field(ge=1, le=1)] | None


class Refusal(Exception):
    """A request that is not served, and the HTTP answer that says why.

    Args:
        param: the request's field that is at fault, if any.
        retry_after_seconds: when to try again, if that can help.
        close: end the connection without reading the rest of the request.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_seconds, self.close = retry_after_seconds, close

    def headers(self) -> dict[str, str]:
        """Of the answer."""
        retry = {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}
        return retry | ({"Connection": "close"} if self.close else {})

    def body(self) -> dict[str, Any]:
        """The error object that OpenAI's clients expect."""
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


NEUTRAL = (
    *("n", "best_of", "suffix", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # as in vLLM: the counts in every event; GuideLLM asks for it


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: Annotated[str | list[int], PlainValidator(_one_prompt)]  # OpenAI's lists of one are taken too
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_TOKEN)] | None = DEFAULT_MAX_TOKENS  # 0: with echo
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    echo: bool | None = False  # the prompt, and with logprobs its scores, before the continuation
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # as in vLLM: go on past the end of text, for benchmarks
    user: str | None = None
    # NEUTRAL: not implemented; only the values that change nothing are accepted.
    n: _OneWhole = 1
    best_of: _OneWhole = 1
    suffix: None = None
    frequency_penalty: _Zero = 0.0
    presence_penalty: _Zero = 0.0
    repetition_penalty: _One = 1.0  # vLLM's; its bench sends it
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self) -> Sampling:
        """For the engine."""
        return Sampling(
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs is not None,
            echo=bool(self.echo),
        )


def parse(body: bytes) -> CompletionRequest:
    """The request in a body. Raises `Refusal` (400), which names the first field at fault."""
    request = _validate(body)
    if request.stream_options is not None and not request.stream:
        raise Refusal(400, "stream_options: only with stream=true", param="stream_options")
    if request.max_tokens == 0 and not request.echo:
        message = "max_tokens: should be greater than or equal to 1, or 0 with echo=true"
        raise Refusal(400, message, param="max_tokens")
    return request


def _validate(body: bytes) -> CompletionRequest:
    try:
        fields = from_json(body)
    except ValueError as error:
        raise Refusal(400, f"the body is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must be a JSON object")
    for name, value in fields.items():
        if name not in CompletionRequest.model_fields:
            name, problem = name[:MOST_QUOTED], "this server does not know this parameter; leave it out"
            raise Refusal(400, f"{name}: {problem}", param=name)
        if name != "prompt" and isinstance(value, (list, dict)) and len(value) > MOST_ITEMS:
            raise Refusal(400, f"{name}: has more than {MOST_ITEMS} items", param=name)
    try:
        return CompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        problem = first["msg"].removeprefix("Input ")
        if field == "prompt":
            ids = f"one list of token ids from 0 to {LARGEST_TOKEN}"
            problem = f"must be one text or {ids}; send a request for each prompt"
        elif field == "stop":
            size = f"of 1 to {MOST_STOP_CHARACTERS} characters each"
            problem = f"must be a text, or at most {MOST_STOPS}, {size}"
        elif first["type"] == "extra_forbidden":
            problem = "this server does not know this parameter; leave it out"
        elif field in NEUTRAL:
            problem = f"this server does not do this ({problem}); leave it out"
        raise Refusal(400, f"{field}: {problem}" if field else problem, param=field) from error


class Answer:
    """The JSON objects of one completion."""

    def __init__(self, *, model: str) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(
        self, text: str, *, finish: Finish | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One event of a stream; with all text, and the usage added, the whole answer."""
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice]}

    def nothing(self) -> dict[str, Any]:
        """An event without text, for the usage at the end of a stream that asked for it."""
        return {**self._head, "choices": []}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts as OpenAI writes them."""
    total = prompt_tokens + completion_tokens
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
    return {"usage": counts}


def logprobs(
    tokens: Sequence[Token], offsets: Sequence[int], *, text_of: Callable[[int], str], top: bool
) -> dict[str, Any]:
    """How likely each token was.

    Args:
        offsets: where each token's text begins.
        text_of: the text of a token id.
        top: report the likeliest tokens too; else `top_logprobs` is null.
    """
    return {
        "tokens": [text_of(token.id) for token in tokens],
        "token_logprobs": [token.score and token.score.logprob for token in tokens],
        "top_logprobs": [_top(token, text_of) for token in tokens] if top else None,
        "text_offset": list(offsets),
    }


def _top(token: Token, text_of: Callable[[int], str]) -> dict[str, float] | None:
    """Of the likeliest token and of the actual one. Two ids with the same text are two entries."""
    if token.score is None:
        return None
    own, likeliest = text_of(token.id), text_of(token.score.top_id)
    if own == likeliest and token.id != token.score.top_id:
        likeliest = f"token_id:{token.score.top_id}"  # as vLLM writes ids
    return {likeliest: token.score.top_logprob, own: token.score.logprob}


def models(info: EngineInfo, *, since: int, origin: Origin | None = None) -> dict[str, Any]:
    """The body of GET /v1/models. `engine_info` and `lineage`, the model's origin, are our extensions."""
    model = {
        "id": info.model,
        "object": "model",
        "created": since,
        "owned_by": "asuncion",
        "max_model_len": info.context_tokens,
        "engine_info": dataclasses.asdict(info),
        "lineage": origin,
    }
    return {"object": "list", "data": [model]}
