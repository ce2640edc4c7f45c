"""Prompts to token ids: long ones in other threads, and never more of a prompt than the context holds."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

from serving.endpoint.refusal import Refusal

SHORT_CHARACTERS = 4_000  # about 2 ms; longer prompts are encoded in another thread
PIECE_CHARACTERS = 16_384
NUM_THREADS = 2


class Prompts:
    """Encodes prompts for a model.

    Args:
        context_tokens: of the model.
    """

    def __init__(self, tokenizer: Tokenizer, *, context_tokens: int) -> None:
        self._tokenizer, self._context = tokenizer, context_tokens
        self.longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prompts")

    def at_once(self, prompt: str | list[int], *, special: bool = True, after: int = 0) -> list[int] | None:
        """The token ids of a prompt, or None for a long text, which `encode` takes.

        Args:
            special: add the special tokens that the tokenizer adds to a text, such as its first.
            after: characters of the same request that were encoded at once.

        Raises:
            Refusal: 400, it exceeds the context. A text of more characters than context times the longest
                token is refused before it is encoded.
        """
        if isinstance(prompt, list):
            self._require(len(prompt), "token ids")
            return prompt
        self._require(-(-len(prompt) // self.longest_token), "tokens or more")
        if len(prompt) >= SHORT_CHARACTERS - after:
            return None
        ids = self._tokenizer.encode(prompt, add_special_tokens=special).ids
        self._require(len(ids), "tokens")
        return ids

    async def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """The token ids of a long text, encoded in another thread. Raises `Refusal` as `at_once` does.

        If the caller is cancelled, the thread stops after the current piece.
        """
        stop = threading.Event()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._encode, prompt, stop, special)
        finally:
            stop.set()

    def _encode(self, prompt: str, stop: threading.Event, special: bool) -> list[int]:
        """Count tokens piece by piece first: a whole text would take 200 bytes a token, without limit."""
        least = 0
        if len(prompt) > PIECE_CHARACTERS:
            for piece in _pieces(prompt):
                if stop.is_set():
                    raise Refusal(499, "the client left")
                # In the whole text, at most this many tokens at a cut would be different.
                least += max(0, self._ids(piece) - 2 * self.longest_token)
                self._require(least, "tokens or more")
        # `encode` would not let other threads run.
        ids = self._tokenizer.encode_batch([prompt], add_special_tokens=special)[0].ids
        self._require(len(ids), "tokens")
        return ids

    def _ids(self, piece: str) -> int:
        return len(self._tokenizer.encode_batch([piece])[0].ids)

    def _require(self, number: int, of_what: str) -> None:
        if number > self._context:
            raise Refusal(
                400,
                f"prompt: This model's maximum context length is {self._context} tokens, but the prompt has "
                f"{number} {of_what}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE_CHARACTERS):
        yield text[start : start + PIECE_CHARACTERS]
