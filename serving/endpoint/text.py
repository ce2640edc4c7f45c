"""Text to token ids and back, piece by piece, ending at stop strings. No torch, no HTTP."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.cli import UserError

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders write it for bytes that are not, or not yet, a character
CONTEXT_TOKENS = 4  # decoded with new ones: a text's first may lose a space; a character has up to 4 bytes


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises `UserError`."""
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"{file}: missing; export the run again, or copy the tokenizer beside the weights")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise UserError(f"{file}: not a tokenizer ({error}); copy it again") from error


def numbered_tokenizer(vocab_size: int) -> Tokenizer:
    """For random weights: the first 256 ids are bytes, and the text of every other id is " <id>".

    So any text can be encoded, and any output of such a model can be read.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    vocabulary |= {f"Ġ{index}": index for index in range(len(symbols), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of token ids, and where the text of each begins, in characters. See `Detokenizer`."""
    detokenizer = Detokenizer(tokenizer)
    texts, starts = [], []
    for place, token_id in enumerate(ids):
        texts.append(detokenizer.add(token_id, last=place + 1 == len(ids)))
        starts.append(detokenizer.start)
    return "".join(texts), starts


class Detokenizer:
    """The text of one continuation as its tokens arrive.

    The pieces, joined, are `Tokenizer.decode` of prompt and continuation together, without that of the
    prompt. If the continuation changes the end of the prompt's text, for example by completing a character,
    the pieces begin with what has changed.

    A piece is final. So these are held back: the first bytes of a character; text that may begin a stop
    string; and tokens that stand for single bytes, until another token follows, because SentencePiece's
    decoder (LLaMA 1 and 2) turns a whole run of them into replacement characters if any part of it is
    invalid. Special tokens, and ids that have no token, have no text.

    `tokenizers.DecodeStream` is not used: with that decoder it raises "Invalid prefix" at invalid bytes.

    Args:
        prompt: token ids before the continuation: some decoders strip the space of a text's first word.
        stops: strings that end the text; of several, the one that is complete first.
        least_tokens: the text of so many first tokens holds no stop.

    Attributes:
        start: where the text of the last token begins, in characters. All tokens of one character, or of one
            run of bytes, have the same start.
        stopped: a stop string is complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        least_tokens: int = 0,
    ) -> None:
        self._tokenizer, self._stops, self._special = tokenizer, stops, _special_tokens(tokenizer)
        self._ids = self._end_of(prompt)  # the last tokens that have text
        self._in_bytes = bool(self._ids) and _is_byte(tokenizer.id_to_token(self._ids[-1]))
        self._text = self._settled = tokenizer.decode(self._ids)  # when last decoded; what of it is settled
        self._num_left = least_tokens
        self._num_settled = 0  # characters of the continuation
        self._held = ""  # the last of these, while they may begin a stop string
        self.start = 0
        self.stopped = False

    def add(self, token_id: int | None, *, last: bool = False) -> str:
        """The text that one more token settles; it ends before the first stop string.

        Args:
            token_id: None: a token without text.
            last: no more tokens come, so nothing is held back.
        """
        if self.stopped:
            return ""
        self._num_left -= 1
        if self._num_left >= 0:
            return self._settle(token_id, last=last)
        self._held += self._settle(token_id, last=last)
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - (0 if last else self._num_at_risk()))

    def _settle(self, token_id: int | None, *, last: bool) -> str:
        """The text that no later token can change."""
        self.start = self._num_settled
        token = None if token_id is None else self._token(token_id)
        if token_id is not None and token is not None:
            in_bytes_before, self._in_bytes = self._in_bytes, _is_byte(token)
            if in_bytes_before and not self._in_bytes:
                self._text = self._tokenizer.decode(self._ids)  # the run of bytes ends before this token
            self._ids.append(token_id)
        if not last and (token is None or self._in_bytes):
            return ""
        before, self._text = self._text, self._tokenizer.decode(self._ids)
        end = len(self._text)
        if not last and self._text.endswith(REPLACEMENT):
            end -= 1  # perhaps the first bytes of a character
        begin = _num_common(self._settled, self._text)
        self.start += max(0, min(_num_common(before, self._text), end) - begin)
        new = self._text[begin:end]
        if new:
            self._settled = self._text[:end]
            self._num_settled += len(new)
        self._forget()
        return new

    def _forget(self) -> None:
        """Drop tokens that no longer matter, so that each token costs the same."""
        if len(self._ids) > 2 * CONTEXT_TOKENS:
            num_pending = len(self._text) - len(self._settled)
            del self._ids[:-CONTEXT_TOKENS]
            self._text = self._tokenizer.decode(self._ids)
            self._settled = self._text[: len(self._text) - num_pending]

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that have text: a run of bytes and CONTEXT_TOKENS before it."""
        found: list[int] = []
        num_bytes = 0
        for token_id in reversed(prompt):
            if (token := self._token(token_id)) is None:
                continue
            if len(found) == num_bytes and _is_byte(token):
                num_bytes += 1
            found.append(token_id)
            if len(found) - num_bytes == CONTEXT_TOKENS:
                break
        return found[::-1]

    def _token(self, token_id: int) -> str | None:
        """None if it has no text."""
        token = self._tokenizer.id_to_token(token_id)
        return None if token in self._special else token

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _num_at_risk(self) -> int:
        """Length of the longest end of what is held that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Tokens that `Tokenizer.decode` leaves out."""
    added = tokenizer.get_added_tokens_decoder().values()
    return frozenset(token.content for token in added if token.special)


def _is_byte(token: str | None) -> bool:
    """Whether a token stands for one byte, as "<0xE4>" does. In other tokenizers it is only held back."""
    return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _num_common(first: str, second: str) -> int:
    """Length of the beginning that both have."""
    if second.startswith(first):
        return len(first)
    differ = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, len(second))
