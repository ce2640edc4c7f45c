"""A client of OpenAI-compatible endpoints: which models one serves, whether it answers, single requests.

Standard library only. Loads are sent by `serving.bench.loadgen`, which uses `Endpoint` and `headers` too.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from cluster.cli import UserError

TIMEOUT_SECONDS = 30.0
KEY_VARIABLE = "OPENAI_API_KEY"  # lm_eval sends it too


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


def find(url: str, *, model: str | None, key: str = "endpoint") -> tuple[Endpoint, Mapping[str, Any]]:
    """An endpoint and all that its /v1/models says of the model.

    Args:
        url: with or without /v1.
        model: its name there; None: the first one listed.
        key: of the configuration that holds `url`, for messages; the model's is this with "_model" behind it.

    Raises:
        UserError: the endpoint does not answer, lists no models, or does not serve `model`.
    """
    url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    status, answer = exchange(f"{url}/models", key=key)
    try:
        listed = {str(one["id"]): one for one in answer["data"]} if status == 200 else {}
    except (KeyError, TypeError):
        listed = {}
    if not listed:
        raise UserError(
            f"{key}: {url}/models lists no model ({reason(status, answer)}); is it an OpenAI-compatible "
            f"endpoint? A key is taken from {KEY_VARIABLE}"
        )
    name = model or next(iter(listed))
    if name not in listed:
        raise UserError(f"{key}_model: {name!r} is not served at {url}; there are: {', '.join(listed)}")
    context = listed[name].get("max_model_len")
    return Endpoint(url, name, context if isinstance(context, int) else None), listed[name]


def answers(url: str) -> bool:
    """Whether a GET of `url` gives 200 within 5 seconds."""
    try:
        return exchange(url, seconds=5.0)[0] == 200
    except UserError:
        return False


def exchange(
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    seconds: float = TIMEOUT_SECONDS,
    key: str = "endpoint",
) -> tuple[int, Any]:
    """(status, JSON or text) of a GET, or with a body of a POST. Raises `UserError`: no answer, or no key."""
    carried = headers()
    try:
        request = Request(url, data=None if body is None else json.dumps(body).encode(), headers=carried)
        with _answer(request, seconds) as response:
            status, content = response.status, response.read()
    except (OSError, HTTPException, ValueError) as error:  # refused, timed out, not HTTP, not a URL
        problem = getattr(error, "reason", None) or error
        raise UserError(
            f"{key}: {url} does not answer ({problem}); start it with `make serve`, or correct the address"
        ) from error
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode(errors="replace")


def _answer(request: Request, seconds: float) -> Any:
    """The response, whatever its status. Its body is not read yet."""
    try:
        return urlopen(request, timeout=seconds)
    except HTTPError as error:
        return error


def headers() -> dict[str, str]:
    """Of a request: JSON, and the key in KEY_VARIABLE if it is set. Raises `UserError`: it is no key."""
    secret = os.environ.get(KEY_VARIABLE, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{KEY_VARIABLE}: has line breaks or other characters that no key has; set it again")
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})


def reason(status: int, answer: Any) -> str:
    """What a refusal says, in one line."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return f"{status}: {' '.join(str(text).split())[:200]}"
