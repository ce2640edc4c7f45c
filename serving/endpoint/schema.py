"""What requests may contain: every field once, with its bounds. Checks and /openapi.json follow from it.

OpenAI's fields (https://platform.openai.com/docs/api-reference) and vLLM's. A field with the name of one of
`Sampling` reaches the engine. null is the default, everywhere. `Only` marks a field that this server does not
implement: it takes only the values that change nothing.
"""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema, from_json

from serving.endpoint.refusal import Refusal
from serving.engine.protocol import Sampling

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 1000
MOST_LOGPROBS = 20
MOST_CHOICES = 128
LARGEST_SEED = 2**63 - 1
LARGEST_TOKEN = 2**31 - 1
MOST_ITEMS = 1024  # of a list or an object other than prompts and messages
MOST_MESSAGES = 16_384  # while they are checked, no other request is served
MOST_QUOTED = 100  # characters of a client's words in an answer


class Only:
    """Marks a field that takes only values which change nothing."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = (*neutral, None)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self._neutral]}

    def _check(self, given: Any) -> Any:
        if any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in self._neutral):
            return given
        raise PydanticCustomError("unsupported", "this server does not do this; leave it out")


def _whole(given: Any) -> Any:
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(type(one) is int and 0 <= one <= LARGEST_TOKEN for one in given)


def _prompts(given: Any) -> list[str | list[int]]:
    """A list of prompts. Refuses a list of millions of wrong ones at the first; a union would try each."""
    one = isinstance(given, str) or (isinstance(given, list) and (not given or type(given[0]) is int))
    prompts = [given] if one else given
    texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if texts or (isinstance(prompts, list) and all(map(_are_ids, prompts))):
        return prompts
    raise PydanticCustomError(
        "invalid_type", f"must be a text, a list of token ids from 0 to {LARGEST_TOKEN}, or a list of either"
    )


def _biases(given: Any) -> dict[int, float]:
    """Token ids to biases; JSON has them as texts."""
    keys = isinstance(given, dict) and all(key.isdecimal() and len(key) < 11 for key in given)
    if keys and all(type(value) in (int, float) and -100 <= value <= 100 for value in given.values()):
        return {int(key): float(value) for key, value in given.items()}
    raise PydanticCustomError("invalid_type", "must map token ids to biases between -100 and 100")


def _text(given: Any) -> Any:
    """The text of a message's content."""
    if given is None:
        return ""
    if not isinstance(given, list):
        return given
    texts = [part["text"] for part in given if _is_text(part)]
    if len(texts) < len(given):
        raise PydanticCustomError("unsupported", "this server takes a text, or a list of text parts")
    return "\n".join(texts)  # as vLLM joins them


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


_PROMPTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
    ]
}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}
_BIASES = {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}

WHOLE = BeforeValidator(_whole)  # 16.0 is a whole number; it stands behind the bounds
TokenId = Annotated[int, Field(ge=0, le=LARGEST_TOKEN), WHOLE]
_Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    def check(self) -> None:
        """What no single field can say. Raises `Refusal`."""


class StreamOptions(_Strict):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # vLLM's: the counts in every event; GuideLLM asks for it


class _Request(_Strict):
    """What completions and chats have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST_TOKEN), WHOLE] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGEST_TOKEN), WHOLE] | None = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=LARGEST_TOKEN), WHOLE] | None = 0  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    presence_penalty: _Penalty | None = 0.0
    frequency_penalty: _Penalty | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases), WithJsonSchema(_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED), WHOLE] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = False  # go on past the end of text, for benchmarks
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    skip_special_tokens: Annotated[Any, Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    length_penalty: Annotated[Any, Only(1.0)] = None
    prompt_logprobs: Annotated[Any, Only()] = None
    truncate_prompt_tokens: Annotated[Any, Only()] = None
    allowed_token_ids: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([])] = None
    structured_outputs: Annotated[Any, Only()] = None
    guided_json: Annotated[Any, Only()] = None
    guided_regex: Annotated[Any, Only()] = None
    guided_choice: Annotated[Any, Only()] = None
    guided_grammar: Annotated[Any, Only()] = None

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_drawn(self) -> int:
        """Choices of a prompt, of which the best `n` are answered."""
        return self.n or 1

    def sampling(self, *, room: int) -> Sampling:
        """For the engine. `room`: tokens that the context has left after the prompt."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name in _SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        asked, number = self.scores()
        return Sampling(
            **given
            | {
                "max_tokens": self.most_tokens(room),
                "top_k": max(0, self.top_k or 0),
                "logit_bias": tuple((self.logit_bias or {}).items()),
                "stop_ids": frozenset(self.stop_token_ids or ()),
                "logprobs": asked,
                "num_likeliest": max(1, number),
            }
        )

    def most_tokens(self, room: int) -> int:
        raise NotImplementedError

    def scores(self) -> tuple[bool, int]:
        """Whether log-probabilities are asked for, and of how many of the likeliest tokens."""
        raise NotImplementedError

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options: only with stream=true", param="stream_options")


_SAMPLING = {field.name for field in dataclasses.fields(Sampling)}


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    echo: bool | None = False  # the prompt, and with logprobs its scores, before the continuation
    suffix: Annotated[Any, Only("")] = None

    @property
    def num_drawn(self) -> int:
        return max(self.n or 1, self.best_of or 1)

    def most_tokens(self, room: int) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def scores(self) -> tuple[bool, int]:
        ranked = self.num_drawn > (self.n or 1)
        return ranked or self.logprobs is not None, self.logprobs or 0

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens: should be greater than or equal to 1, or 0 with echo=true"
            raise Refusal(400, message, param="max_tokens", code="integer_below_min_value")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise Refusal(400, "best_of: must be at least n", param="best_of")
        if self.stream and self.num_drawn > (self.n or 1):
            raise Refusal(400, "best_of: above n it does not go with stream=true", param="best_of")


class Message(_Strict):
    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text), WithJsonSchema(_CONTENT)] = ""
    name: str | None = None
    tool_calls: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only()] = None


_Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: _Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGEST_TOKEN), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LARGEST_TOKEN), WHOLE] | None = None  # its older name
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Annotated[Any, Only()] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    documents: Annotated[Any, Only([])] = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    echo: Annotated[Any, Only(False)] = None

    def most_tokens(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or max(1, room)

    def scores(self) -> tuple[bool, int]:
        return bool(self.logprobs), self.top_logprobs or 0

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs: only with logprobs=true", param="top_logprobs")


class TokenizeRequest(_Strict):
    """The body of POST /tokenize, as vLLM has it."""

    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool | None = None  # default: true with prompt, false with messages
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise Refusal(400, "prompt: give either prompt or messages", param="prompt")


class DetokenizeRequest(_Strict):
    """The body of POST /detokenize, as vLLM has it."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


Body = TypeVar("Body", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def parse(body: bytes, kind: type[Body]) -> tuple[Body, list[str]]:
    """The request in a body, and the names in it that no field has.

    Raises `Refusal` (400), which names the first field at fault.
    """
    try:
        fields = from_json(body)
    except ValueError as error:
        raise Refusal(400, f"the body is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refusal(400, "the body must be a JSON object")
    known = {name: value for name, value in fields.items() if name in kind.model_fields}
    for name, value in known.items():
        long = isinstance(value, (list, dict)) and len(value) > MOST_ITEMS
        if long and name not in ("prompt", "messages", "tokens"):
            raise Refusal(400, f"{name}: has more than {MOST_ITEMS} items", param=name)
    try:
        request = kind.model_validate(known)
    except ValidationError as error:
        raise _refusal(error) from error
    request.check()
    return request, [name for name in fields if name not in known]


# pydantic's error types, as OpenAI names them; with "integer" or "decimal" before those of a bound.
_CODES = {
    "missing": "missing_required_parameter",
    "unsupported": "unsupported_value",
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
    "literal_error": "invalid_value",
    "string_too_short": "invalid_value",
    "string_too_long": "string_above_max_length",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
}


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_input=False)[0]
    field = _path(first["loc"])
    code = _CODES.get(first["type"], "invalid_type")
    if code.endswith("_value") and code.startswith(("below", "above")):
        bound = next((first["ctx"][name] for name in ("gt", "ge", "lt", "le") if name in first["ctx"]), 0)
        code = f"{'integer' if isinstance(bound, int) else 'decimal'}_{code}"
    problem = first["msg"].removeprefix("Input ")
    if first["type"] == "missing":
        problem = "missing; it is required"
    elif field == "stop":
        size = f"of 1 to {MOST_STOP_CHARACTERS} characters each"
        problem, code = f"must be a text, or at most {MOST_STOPS}, {size}", "invalid_value"
    return Refusal(400, f"{field}: {problem}" if field else problem, param=field, code=code)


def _path(places: tuple[int | str, ...]) -> str | None:
    """As OpenAI writes it, such as messages[0].role; without pydantic's names of a union's members."""
    path = ""
    for place in places[:3]:
        if isinstance(place, int):
            path += f"[{place}]"
        elif not path or place in Message.model_fields:
            path += f".{place}" if path else place
        else:
            break
    return path or None
