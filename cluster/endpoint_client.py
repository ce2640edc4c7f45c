"""A client of OpenAI-compatible endpoints: which models one serves, whether it answers, single requests.

Standard library only. Loads are sent by `serving.bench.loadgen`, which uses `Endpoint` and `headers` too.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from cluster.cli import UserError
from cluster.masking import MASK, mask

TIMEOUT_SECONDS = 30.0
KEY_VARIABLE = "OPENAI_API_KEY"  # lm_eval sends it too
# The first is vLLM's name.
CONTEXT_FIELDS = ("max_model_len", "context_length", "context_window", "max_context_length")


@dataclass(frozen=True)
class Endpoint:
    """One model at an endpoint.

    Attributes:
        url: ends in /v1.
        model: the name by which requests ask for the model.
        context_tokens: most tokens of prompt and continuation, if the endpoint says so.
    """

    url: str
    model: str
    context_tokens: int | None = None


def find(
    url: str, *, model: str | None, key: str = "endpoint", context_tokens: int | None = None
) -> tuple[Endpoint, Mapping[str, Any]]:
    """An endpoint and all that its /v1/models says of the model; nothing if it has no such list.

    Args:
        url: as in `base_of`.
        model: its name there; None: the first one listed.
        key: of the configuration that holds `url`, for messages; the model's is this with "_model" behind it.
        context_tokens: of the model, where the endpoint does not say it.

    Raises:
        UserError: the endpoint does not answer, wants a key, lists no model and none is named, does not serve
            `model`, or says that it holds fewer tokens than `context_tokens`.
    """
    url = base_of(url)
    status, answer = exchange(f"{url}/models", key=key)
    said = reason(status, answer)
    if status in (401, 403):
        raise UserError(f"{key}: {url} refuses the key ({said}); a key is taken from {KEY_VARIABLE}")
    try:
        listed = {str(one["id"]): one for one in answer["data"]} if status == 200 else {}
    except (KeyError, TypeError):
        listed = {}
    if not listed and model is None:
        raise UserError(
            f"{key}: {url}/models lists no model ({said}); correct the address, or name the model of an "
            f"OpenAI-compatible endpoint without such a list by {key}_model"
        )
    name = model or next(iter(listed))
    if listed and name not in listed:
        raise UserError(f"{key}_model: {name!r} is not served at {url}; there are: {', '.join(listed)}")
    about = listed.get(name, {})
    told = next((about[field] for field in CONTEXT_FIELDS if type(about.get(field)) is int), None)
    if told is not None and context_tokens is not None and context_tokens > told:
        raise UserError(f"{key}_context_tokens: {url} says that {name} holds {told} tokens; leave it out")
    return Endpoint(url, name, context_tokens or told), about


def base_of(url: str) -> str:
    """The URL that ends in /v1 (or in another version, if it names one), from any form that people write.

    With or without /v1, /completions, /chat/completions or /models behind it, and with any number of slashes.
    """
    scheme, separator, rest = url.strip().partition("://")
    parts = [part for part in (rest if separator else scheme).split("/") if part]
    for ending in ("models", "completions", "chat"):
        if len(parts) > 1 and parts[-1] == ending:
            parts.pop()
    if not parts or not re.fullmatch(r"v\d\w*", parts[-1]):
        parts.append("v1")
    return (f"{scheme}://" if separator else "") + "/".join(parts)


def answers(url: str) -> bool:
    """Whether a GET of `url` gives 200 within 5 seconds."""
    try:
        return exchange(url, seconds=5.0)[0] == 200
    except UserError:
        return False


class Reply(NamedTuple):
    """An answer: its content is JSON, or else text; names of headers are in lower case."""

    status: int
    content: Any
    headers: Mapping[str, str]


def exchange(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    seconds: float = TIMEOUT_SECONDS,
    key: str = "endpoint",
) -> tuple[int, Any]:
    """(status, JSON or text) of `ask`."""
    return ask(url, body, seconds=seconds, key=key)[:2]


def ask(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    seconds: float = TIMEOUT_SECONDS,
    key: str = "endpoint",
) -> Reply:
    """The answer to a GET, or with a body to a POST. Raises `UserError`: no answer, or no key."""
    carried = headers()
    try:
        request = Request(url, data=None if body is None else json.dumps(body).encode(), headers=carried)
        with _answer(request, seconds) as response:
            status, content = response.status, response.read()
            named = {name.lower(): value for name, value in response.headers.items()}
    except (OSError, HTTPException, ValueError) as error:  # refused, timed out, not HTTP, not a URL
        problem = getattr(error, "reason", None) or error
        raise UserError(
            f"{key}: {url} does not answer ({problem}); start it with `make serve`, or correct the address"
        ) from error
    try:
        return Reply(status, json.loads(content), named)
    except ValueError:
        return Reply(status, content.decode(errors="replace"), named)


def _answer(request: Request, seconds: float) -> Any:
    """The response, whatever its status. Its body is not read yet."""
    try:
        return urlopen(request, timeout=seconds)
    except HTTPError as error:
        return error


def headers() -> dict[str, str]:
    """Of a request: JSON, and the key in KEY_VARIABLE if it is set. Raises `UserError`: it is no key."""
    secret = _secret()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: has line breaks or other characters that no key has; set it again")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})


def _secret() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def reason(status: int, answer: Any) -> str:
    """What a refusal says, in one line. The key, which some servers quote, is masked however short it is."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = str(error.get("message", error) if isinstance(error, dict) else error)
    text = text.replace(_secret(), MASK) if _secret() else text
    return f"{status}: {mask(' '.join(text.split()))[:200]}"
