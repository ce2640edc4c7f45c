"""Answers as OpenAI writes them: tokens in, JSON out. No HTTP and no engine."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cluster.record.origins import Origin
from serving.engine.protocol import EngineInfo, Finish, Token

TextOf = Callable[[int], str]  # of a token id


class Piece(NamedTuple):
    """What tokens, or an echoed prompt, add to a choice.

    Attributes:
        text: that is settled.
        starts: where the text of each token begins, in characters of the choice's text.
        finish: of the choice: a stop string ends it although the engine would continue.
    """

    tokens: Sequence[Token]
    text: str
    starts: Sequence[int]
    finish: Finish | None


class Layout:
    """How the answers to one kind of request are written.

    Args:
        text_of: of a token.
    """

    prefix: str  # of the answers' ids

    def __init__(self, *, model: str, text_of: TextOf) -> None:
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._model, self._text_of = model, text_of

    def choice(self, index: int, pieces: Sequence[Piece], *, scores: int | None) -> dict[str, Any]:
        """A whole choice. `scores`: how many of the likeliest tokens are asked for; None: no scores."""
        raise NotImplementedError

    def change(self, index: int, piece: Piece, *, scores: int | None, first: bool) -> dict[str, Any]:
        """What an event adds to a choice; `first` of it."""
        raise NotImplementedError

    def answer(self, choices: Sequence[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        """All but the usage."""
        raise NotImplementedError

    def _of(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": list(choices)}


class CompletionLayout(Layout):
    """Of /v1/completions."""

    prefix = "cmpl"

    def choice(self, index: int, pieces: Sequence[Piece], *, scores: int | None) -> dict[str, Any]:
        told = None if scores is None else logprobs(pieces, text_of=self._text_of, number=scores)
        text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def change(self, index: int, piece: Piece, *, scores: int | None, first: bool) -> dict[str, Any]:
        return self.choice(index, [piece], scores=scores)

    def answer(self, choices: Sequence[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        return self._of("text_completion", choices)


class ChatLayout(Layout):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def choice(self, index: int, pieces: Sequence[Piece], *, scores: int | None) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        told = self._logprobs(pieces, scores)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": pieces[-1].finish}

    def change(self, index: int, piece: Piece, *, scores: int | None, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        told = self._logprobs([piece], scores)
        return {
            "index": index,
            "delta": {**delta, "content": piece.text},
            "logprobs": told,
            "finish_reason": piece.finish,
        }

    def answer(self, choices: Sequence[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        return self._of("chat.completion.chunk" if streamed else "chat.completion", choices)

    def _logprobs(self, pieces: Sequence[Piece], number: int | None) -> dict[str, Any] | None:
        if number is None:
            return None
        content = []
        for token in _tokens(pieces):
            assert token.score is not None
            likeliest = [self._scored(*each) for each in _likeliest(token, number)]
            own = self._scored(token.id, token.score.logprob)
            content.append({**own, "top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts as OpenAI writes them."""
    total = prompt_tokens + completion_tokens
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
    return {"usage": counts}


def logprobs(pieces: Sequence[Piece], *, text_of: TextOf, number: int) -> dict[str, Any]:
    """How likely each token was, and which `number` tokens were the likeliest, as /v1/completions has it.

    The actual token is always among these, as in vLLM.
    """
    tokens = list(_tokens(pieces))
    return {
        "tokens": [text_of(token.id) for token in tokens],
        "token_logprobs": [token.score and token.score.logprob for token in tokens],
        "top_logprobs": [_top(token, number, text_of) for token in tokens],
        "text_offset": [start for piece in pieces for start in piece.starts],
    }


def _tokens(pieces: Sequence[Piece]) -> Iterator[Token]:
    return (token for piece in pieces for token in piece.tokens)


def _likeliest(token: Token, number: int) -> list[tuple[int, float]]:
    """(id, log-probability) of the likeliest tokens where this one stands."""
    assert token.score is not None
    return [(token.score.top_id, token.score.top_logprob), *token.score.others][:number]


def _top(token: Token, number: int, text_of: TextOf) -> dict[str, float] | None:
    """Two ids with the same text are two entries."""
    if token.score is None:
        return None
    own, found = text_of(token.id), dict[str, float]()
    for token_id, logprob in _likeliest(token, number):
        text = text_of(token_id)
        if token_id != token.id and (text == own or text in found):
            text = f"token_id:{token_id}"  # as vLLM writes ids
        found[text] = logprob
    return found | {own: token.score.logprob}


def model(info: EngineInfo, *, since: int, origin: Origin | None = None) -> dict[str, Any]:
    """The body of GET /v1/models/{model}. `engine_info` and `lineage`, its origin, are our extensions."""
    return {
        "id": info.model,
        "object": "model",
        "created": since,
        "owned_by": "asuncion",
        "max_model_len": info.context_tokens,
        "engine_info": dataclasses.asdict(info),
        "lineage": origin,
    }
