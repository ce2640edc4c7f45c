"""What an endpoint can evaluate: log-likelihoods, and tasks with options of their own. No torch."""

from collections.abc import Mapping
from typing import Any

from cluster.endpoint_client import Endpoint, ask, exchange, reason

PROMPT = "The name of the"
IGNORED = "x-ignored-parameters"  # of our endpoint: what it accepted and does not know
OF_TRANSFORMERS = {  # options of `generate` that no endpoint has -> the value that changes nothing
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), 1),
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length", "penalty_alpha"), None),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}


def echo_problem(endpoint: Endpoint) -> str | None:
    """Why the endpoint does not return the log-probabilities of a prompt, in its own words; None: it does.

    Sends what lm_eval sends for a log-likelihood, with a prompt of a few tokens.

    Raises:
        UserError: it does not answer.
    """
    body = {
        "model": endpoint.model,
        "prompt": PROMPT,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    status, answer = exchange(f"{endpoint.url}/completions", body)
    if status != 200:
        return reason(status, answer)
    try:
        logprobs = answer["choices"][0]["logprobs"]
        # The prompt's tokens and one more; for each but the first, the likeliest token too.
        complete = len(logprobs["token_logprobs"]) > 2 and all(logprobs["top_logprobs"][1:])
    except (KeyError, IndexError, TypeError):
        complete = False
    return None if complete else "it answers echo=true without the prompt's logprobs and top_logprobs"


def option_problem(endpoint: Endpoint, payload: Mapping[str, Any], *, num_stops: int) -> str | None:
    """Why the endpoint does not take a request with these options, in its own words; None: it does.

    Sends the request with a short prompt, for one token. An option that the endpoint says it ignores, or that
    only transformers has, is not taken either: scores would be of another task.

    Args:
        payload: as lm_eval sends it for a task, with messages for a chat.
        num_stops: stop strings that the task has.

    Raises:
        UserError: it does not answer.
    """
    for name, neutral in OF_TRANSFORMERS.items():
        if payload.get(name, neutral) != neutral:
            return f"{name} is an option of transformers, which no endpoint has"
    if len(payload["stop"]) < num_stops:
        return f"lm_eval sends {len(payload['stop'])} of {num_stops} stop strings to a chat"
    chat = "messages" in payload
    path = "chat/completions" if chat else "completions"
    prompt: dict[str, Any] = {"prompt": PROMPT}
    if chat:
        prompt = {"messages": [{"role": "user", "content": PROMPT}]}
    reply = ask(f"{endpoint.url}/{path}", {**payload, **prompt, "max_tokens": 1})
    if reply.status != 200:
        return reason(reply.status, reply.content)
    ignored = reply.headers.get(IGNORED)
    return f"it ignores {ignored}" if ignored else None
