"""The requests of a load over HTTP: how they are written, what an endpoint takes, how answers are read."""

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cluster import endpoint_client
from cluster.cli import RunError
from cluster.endpoint_client import Endpoint
from serving.bench.latency import GIVEN_UP, RequestOutcome
from serving.bench.workload import Planned

OURS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)  # this machine's own limits
MOST_EVENT_BYTES = 16 << 20
MOST_BODY_BYTES = 64 << 10  # of a refusal
WORDS = (  # of one token in most vocabularies
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was",
    "with", "be", "by", "on", "not", "he", "his", "but", "at", "are", "this",
    "have", "from", "or", "had", "an", "they", "which", "one", "you", "were",
)  # fmt: skip


# Sends a request that was due at `scheduled`, and waits for its end; `start` is time 0 of the outcome. Errors
# are outcomes, except those of this machine, which are a `RunError`.
Send = Callable[[Planned, int, float, float], Awaitable[RequestOutcome]]


@dataclass(frozen=True)
class Dialect:
    """What an endpoint takes. `serving.bench.first_request` finds it out.

    Attributes:
        api: "completions" or "chat".
        left_out: optional fields of a request that the endpoint refuses.
        length_field: the name of the most tokens of an answer.
        token_ids: prompts may be token ids; else they are text, words in place of the ids.
        tokens_per_word, tokens_beside: of such a text; the latter are those of a chat's template.
    """

    api: str = "completions"
    left_out: frozenset[str] = frozenset()
    length_field: str = "max_tokens"
    token_ids: bool = True
    tokens_per_word: float = 1.0
    tokens_beside: float = 0.0

    def body(self, planned: Planned, *, model: str, seed: int, greedy: bool) -> dict[str, Any]:
        """The JSON of a request."""
        fields: dict[str, Any] = {
            "model": model,
            **self._prompt(planned),
            self.length_field: planned.max_tokens,
            "temperature": 0 if greedy else 1,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        return {name: value for name, value in fields.items() if name not in self.left_out}

    def _prompt(self, planned: Planned) -> dict[str, Any]:
        text = planned.prompt
        if not isinstance(text, str):
            if self.token_ids:
                return {"prompt": list(text)}
            number = max(1, round((len(text) - self.tokens_beside) / self.tokens_per_word))
            text = " ".join(WORDS[token % len(WORDS)] for token in text[:number])
        if self.api == "chat":
            turns = (*planned.history, ("user", text))
            return {"messages": [{"role": role, "content": said} for role, said in turns]}
        return {"prompt": "\n".join([*(said for _, said in planned.history), text])}

    @property
    def path(self) -> str:
        return "chat/completions" if self.api == "chat" else "completions"


@asynccontextmanager
async def over_http(
    endpoint: Endpoint, *, timeout_seconds: float, greedy: bool = True, dialect: Dialect | None = None
) -> AsyncIterator[Send]:
    """Sends requests to an endpoint over connections that are kept open.

    Args:
        timeout_seconds: for one request, from its sending to its end.
        greedy: temperature 0; else 1 with a seed for each request.
    """
    dialect = dialect or Dialect()
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),  # aiohttp would queue what exceeds 100 connections
        timeout=aiohttp.ClientTimeout(total=timeout_seconds),
        headers=endpoint_client.headers(),
        read_bufsize=1 << 20,
    )
    async with session:

        async def send(planned: Planned, index: int, scheduled: float, start: float) -> RequestOutcome:
            body = dialect.body(planned, model=endpoint.model, seed=index, greedy=greedy)
            sent = time.perf_counter()
            answer = await _post(session, f"{endpoint.url}/{dialect.path}", body)
            return _outcome(planned, index, answer, scheduled=scheduled, sent=sent, start=start)

        yield send


@dataclass
class _Streamed:
    """An answer as it came: its events, the server's counts, what went wrong, when it ended.

    Attributes:
        events: when each event that may hold a token arrived, and whether it has text; None: it has none, and
            says that the answer ends.
        detail: what the server said of an error.
    """

    events: list[tuple[float, bool | None]] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    detail: str | None = None
    finished: bool = False
    ended: float = 0.0

    def tokens(self) -> list[float]:
        """When each token arrived.

        If there are as many events as the server counts tokens, each is one. If there are more, those without
        text are none: some servers begin or end with such an event. If the server does not count, events are
        tokens, but for such an end. Several tokens in one event have one time.
        """
        count = self.usage.get("completion_tokens")
        if count is None or count == len(self.events):
            return [moment for moment, has_text in self.events if has_text is not None or count is not None]
        return [moment for moment, has_text in self.events if has_text] or [at for at, _ in self.events]


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> _Streamed:
    """Send one request and read its answer. Raises `RunError`: this machine has no connection left."""
    streamed = _Streamed()
    try:
        async with session.post(url, json=body) as answer:
            if answer.status != 200:
                streamed.error = f"HTTP {answer.status}"
                streamed.detail = _detail(answer.status, await answer.content.read(MOST_BODY_BYTES))
            elif "json" in answer.content_type and "stream" not in answer.content_type:
                streamed.error = "no stream"
                streamed.detail = _detail(answer.status, await answer.content.read(MOST_BODY_BYTES))
            else:
                streamed.error = await _read(answer, streamed)
    except asyncio.CancelledError:  # the load is over; what has arrived counts
        streamed.error = GIVEN_UP
    except TimeoutError:
        streamed.error = "timeout"
    except (aiohttp.ClientPayloadError, ConnectionError):
        streamed.error = "broken off"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        streamed.error, streamed.detail = "malformed event", str(problem)[:200]
    except aiohttp.ClientError as problem:
        if isinstance(problem, OSError) and problem.errno in OURS:
            raise RunError(
                f"the load generator cannot open another connection ({problem.strerror}), which is no fault "
                "of the server; raise the limit (ulimit -n), or lower the load"
            ) from problem
        streamed.error, streamed.detail = f"connection: {type(problem).__name__}", str(problem)[:200]
    streamed.ended = time.perf_counter()
    return streamed


def _detail(status: int, content: bytes) -> str:
    """A refusal in one line, without the key."""
    try:
        said: Any = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode(errors="replace")
    return _words(status, said)


def _words(status: int, said: Any) -> str:
    return endpoint_client.reason(status, said).partition(": ")[2]


def _outcome(
    planned: Planned, index: int, answer: _Streamed, *, scheduled: float, sent: float, start: float
) -> RequestOutcome:
    tokens, asked = answer.tokens(), planned.max_tokens
    got = answer.usage.get("completion_tokens", len(tokens))
    error = answer.error
    if error is None and got > asked:  # fewer are no error: the model may end its answer
        error = f"{got} of {asked} tokens"
    size = len(planned.prompt) if not isinstance(planned.prompt, str) else 0
    return RequestOutcome(
        index=index,
        scheduled=scheduled - start,
        sent=sent - start,
        tokens=tuple(moment - start for moment in tokens),
        ended=answer.ended - start,
        prompt_tokens=answer.usage.get("prompt_tokens", size),
        output_tokens=got,
        asked_tokens=asked,
        error=error,
        detail=answer.detail,
    )


async def _read(answer: aiohttp.ClientResponse, streamed: _Streamed) -> str | None:
    """Note the events of an answer. Returns what is wrong with it, if anything."""
    async for moment, data in server_sent_events(answer.content.iter_any()):
        if data == b"[DONE]":
            streamed.finished = True
            break
        event: dict[str, Any] = json.loads(data)
        if event.get("error"):
            streamed.detail = _words(answer.status, event)
            return "error event"
        for name, count in (event.get("usage") or {}).items():
            if name in ("prompt_tokens", "completion_tokens"):
                streamed.usage[name] = _count(count)
                streamed.finished = True
        for choice in event["choices"][:1]:
            ends = bool(choice.get("finish_reason"))
            streamed.finished = streamed.finished or ends
            delta = choice.get("delta")
            has_text = bool(choice.get("text")) if delta is None else _is_token(delta)
            if has_text or delta is None or "role" not in delta:  # a chat's first event names the speaker
                streamed.events.append((moment, None if ends and not has_text else has_text))
    if not streamed.finished:
        return "broken off"
    return None if streamed.events else "no tokens"


def _is_token(delta: dict[str, Any]) -> bool:
    """Whether a chat's event holds text, of the answer or of the reasoning before it, or a call."""
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"usage of {value!r} tokens")
    return value


async def server_sent_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[float, bytes]]:
    """(when its last byte arrived, data) of each event, however the chunks cut them.

    https://html.spec.whatwg.org/multipage/server-sent-events.html, without multi-line data, which no
    OpenAI-compatible server sends. Raises `ValueError`: an event is longer than MOST_EVENT_BYTES.
    """
    held = b""
    async for chunk in chunks:
        moment = time.perf_counter()
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield moment, line[5:].strip()
        if len(held) > MOST_EVENT_BYTES:
            raise ValueError(f"an event of more than {MOST_EVENT_BYTES} bytes")
