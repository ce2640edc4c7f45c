"""A first request to an endpoint: whether it answers as a load needs it, and which fields it takes."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from typing import NoReturn

from cluster.cli import RunError, UserError
from cluster.endpoint_client import KEY_VARIABLE, Endpoint
from serving.bench.latency import RequestOutcome
from serving.bench.wire import WORDS, Dialect, over_http
from serving.bench.workload import Planned

OPTIONAL = ("ignore_eos", "stream_options", "seed", "temperature")  # the first to do without stands first
EFFECTS = {
    "ignore_eos": "answers may end early, and lengths are as the server counts them",
    "stream_options": "the server may not count tokens; then each event counts as one",
    "seed": "answers are not repeatable",
    "temperature": "the server's own temperature holds",
}
SHORT, LONG = (
    len(WORDS),
    2 * len(WORDS),
)  # words of the texts that calibrate prompts; each as often as the others
TOKEN_IDS = tuple(range(32, 40))
NUM_TOKENS = 4  # to ask for


def find_dialect(
    endpoint: Endpoint, *, api: str, timeout_seconds: float, key: str, report: Callable[[str], None]
) -> Dialect:
    """What the endpoint takes: fields that it refuses are left out, one after another, and reported.

    Where prompts must be text, a second and longer request tells how many tokens a word has.

    Raises:
        UserError: the endpoint refuses the request (4xx), in its own words.
        RunError: it fails otherwise.
    """
    dialect = Dialect(api=api, token_ids=api == "completions")
    asked: set[Dialect] = set()
    while (outcome := _ask(endpoint, dialect, SHORT, timeout_seconds)).error is not None:
        asked.add(dialect)
        narrower = _without(dialect, outcome)
        if narrower is None or narrower in asked:
            _refuse(endpoint, dialect, outcome, key)
        dialect = narrower
    for name in OPTIONAL:
        if name in dialect.left_out:
            report(f"{endpoint.url} refuses {name}: {EFFECTS[name]}")
    return dialect if dialect.token_ids else _calibrated(endpoint, dialect, outcome, timeout_seconds, report)


def _ask(endpoint: Endpoint, dialect: Dialect, num_words: int, timeout_seconds: float) -> RequestOutcome:
    """The outcome of one request. A text's tokens are 0 unless the server counts them."""

    async def ask() -> RequestOutcome:
        async with over_http(endpoint, timeout_seconds=timeout_seconds, dialect=dialect) as send:
            return await send(Planned(None, prompt, NUM_TOKENS), 0, 0.0, 0.0)

    prompt: str | tuple[int, ...] = TOKEN_IDS
    if not dialect.token_ids:
        prompt = " ".join(islice(cycle(WORDS), num_words))
    return asyncio.run(ask())


def _without(dialect: Dialect, outcome: RequestOutcome) -> Dialect | None:
    """The dialect without what a refusal names, or without the next optional field; None: nothing is left."""
    if outcome.error not in ("HTTP 400", "HTTP 422"):
        return None
    said = outcome.detail or ""
    if "max_completion_tokens" in said and dialect.length_field != "max_completion_tokens":
        return replace(dialect, length_field="max_completion_tokens")
    left = [name for name in OPTIONAL if name not in dialect.left_out]
    named = [name for name in left if name in said]
    if dialect.token_ids and not named and "prompt" in said:
        return replace(dialect, token_ids=False)
    if left:
        return replace(dialect, left_out=dialect.left_out | {(named or left)[0]})
    return replace(dialect, token_ids=False, left_out=frozenset()) if dialect.token_ids else None


def _refuse(endpoint: Endpoint, dialect: Dialect, outcome: RequestOutcome, key: str) -> NoReturn:
    error = outcome.error or ""
    said = ": ".join(filter(None, [error, outcome.detail]))
    message = f"{key}: {endpoint.url}/{dialect.path} does not serve a first request ({said})"
    if error in ("HTTP 401", "HTTP 403"):
        raise UserError(f"{message}; a key is taken from {KEY_VARIABLE}")
    if error in ("HTTP 404", "HTTP 405"):
        other = "completions" if dialect.api == "chat" else "chat"
        raise UserError(f"{message}; correct the address or {key}_model, or try load.api={other}")
    if error.startswith("HTTP 4") and error != "HTTP 429":
        raise UserError(message)
    raise RunError(message)


def _calibrated(
    endpoint: Endpoint,
    dialect: Dialect,
    short: RequestOutcome,
    timeout_seconds: float,
    report: Callable[[str], None],
) -> Dialect:
    """With the tokens of a word and of a chat's template, from two texts whose tokens the server counts.

    short: of the request with the shorter text.
    """
    long = _ask(endpoint, dialect, LONG, timeout_seconds)
    per_word = (long.prompt_tokens - short.prompt_tokens) / (LONG - SHORT)
    if long.error or per_word <= 0:
        why = f"refuses a longer one ({long.error})" if long.error else "does not count their tokens"
        report(f"prompts are text, and {endpoint.url} {why}: a word is taken for one token")
        return dialect
    beside = max(0.0, short.prompt_tokens - SHORT * per_word)
    report(f"prompts are text: about {per_word:.2f} tokens a word, and {beside:.0f} beside them")
    return replace(dialect, tokens_per_word=per_word, tokens_beside=beside)
