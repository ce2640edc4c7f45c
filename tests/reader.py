"""A client of an engine."""

import threading
from collections.abc import Sequence

from serving.engine.protocol import Engine, EngineFailed, Sampling, Token
from tests.waiting import PATIENCE_SECONDS


class Reader:
    """A request's tokens as they come."""

    def __init__(self, engine: Engine, prompt: Sequence[int], sampling: Sampling) -> None:
        self.tokens: list[Token] = []
        self.error: EngineFailed | None = None
        self._done = threading.Event()
        self.prompt = prompt
        self.ticket = engine.submit(prompt, sampling, self._take)

    def _take(self, tokens: Sequence[Token] | EngineFailed) -> None:
        if isinstance(tokens, EngineFailed):
            self.error = tokens
        else:
            self.tokens += tokens
        if self.error or self.tokens[-1].finish:
            self._done.set()

    def wait(self) -> list[int]:
        assert self._done.wait(PATIENCE_SECONDS), "the request did not end"
        return [token.id for token in self.tokens]
