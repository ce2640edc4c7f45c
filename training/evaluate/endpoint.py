"""What an OpenAI-compatible endpoint is and can do, found out by asking it. Standard library only."""

import json
import os
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from cluster.cli import UserError

TIMEOUT_SECONDS = 30.0
KEY_VARIABLE = "OPENAI_API_KEY"  # lm_eval sends it too
PROBE = "The name of the"


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that answers.

    Attributes:
        url: ends in /v1.
        model: the name by which requests ask for the model.
        context_tokens: most tokens of prompt and continuation, where it says so.
    """

    url: str
    model: str
    context_tokens: int | None


def find(url: str, *, model: str | None) -> Endpoint:
    """The endpoint at `url`, with or without its /v1, and `model` there (None: the first that it lists).

    Raises:
        UserError: nothing answers, it is no such endpoint, or it does not serve the model.
    """
    url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    status, answer = _exchange(f"{url}/models")
    try:
        listed = {str(one["id"]): one for one in answer["data"]} if status == 200 else {}
    except (KeyError, TypeError):
        listed = {}
    if not listed:
        raise UserError(
            f"endpoint: {url}/models lists no model ({_reason(status, answer)}); is it an OpenAI-compatible "
            f"endpoint? One that asks for a key takes it from {KEY_VARIABLE}"
        )
    name = model or next(iter(listed))
    if name not in listed:
        raise UserError(f"endpoint_model: {name!r} is not served at {url}; there are: {', '.join(listed)}")
    context = listed[name].get("max_model_len")
    return Endpoint(url, name, context if isinstance(context, int) else None)


def echo_problem(endpoint: Endpoint) -> str | None:
    """Why the endpoint cannot tell the log-probabilities of a prompt, in its own words; None: it can.

    Asks what lm_eval asks for a log-likelihood, of a prompt of a few tokens.

    Raises:
        UserError: it does not answer.
    """
    body = {
        "model": endpoint.model,
        "prompt": PROBE,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    status, answer = _exchange(f"{endpoint.url}/completions", body)
    if status != 200:
        return _reason(status, answer)
    try:
        told = answer["choices"][0]["logprobs"]
        # The prompt's tokens and the one that follows; of each but the first, the likeliest token too.
        complete = len(told["token_logprobs"]) > 2 and all(told["top_logprobs"][1:])
    except (KeyError, IndexError, TypeError):
        complete = False
    return None if complete else "it answers echo=true without the prompt's logprobs and top_logprobs"


def _exchange(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """(status, JSON or text) of a GET, or with a body of a POST. Raises `UserError`: nothing answers."""
    headers = {"Content-Type": "application/json"}
    if secret := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {secret}"
    try:
        request = Request(url, data=None if body is None else json.dumps(body).encode(), headers=headers)
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            status, content = response.status, response.read()
    except HTTPError as error:
        status, content = error.code, error.read()
    except (OSError, HTTPException, ValueError) as error:  # refused, timed out, no HTTP, no URL
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"endpoint: {url} does not answer ({reason}); start it with `make serve`, or correct the address"
        ) from error
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode(errors="replace")


def _reason(status: int, answer: Any) -> str:
    """What a refusal says, in one line."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return f"{status}: {' '.join(str(text).split())[:200]}"
