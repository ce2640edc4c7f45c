"""Text to token ids and back, piece by piece, ending at stop strings. No torch, no HTTP."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.cli import UserError

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # of decoders, for bytes that are no character, or not yet
MOST_UNSETTLED = 8  # tokens: a character has 4 bytes at most, so after these the bytes are no character


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
    """For random weights: bytes as the first 256 ids, and " <id>" as the text of every other.

    So any text can be encoded, and whatever such a model says can be read.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    vocabulary |= {f"Ġ{index}": index for index in range(len(symbols), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of token ids, and where each one's begins, in characters. See `Detokenizer`."""
    detokenizer = Detokenizer(tokenizer)
    texts, starts = [], []
    for token_id in ids:
        starts.append(detokenizer.num_characters)
        texts.append(detokenizer.add(token_id))
    return "".join(texts), starts


class Detokenizer:
    """The text of one continuation as its tokens come.

    Text that may be the beginning of a stop string is held back, as are the first bytes of a character, so
    that the pieces never take anything back; what is no character by the end is left out. Special tokens
    have no text.

    `tokenizers.DecodeStream` does not do: it raises "Invalid prefix" at invalid bytes with the byte fallback
    of SentencePiece models (LLaMA 1 and 2), and so ends any request whose model says such bytes.

    Args:
        prompt: token ids before the continuation: some decoders strip the space of a text's first word.
        stops: strings that end the text; of several, the one that is complete first.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        # A token's text depends on those before it, so the last settled ones are decoded with it.
        self._settle(list(prompt[-MOST_UNSETTLED:]))
        self._held = ""
        self.num_characters = 0  # decoded so far, those held back too
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The text that is settled by one more token; it ends before the first stop string."""
        if self.stopped:
            return ""
        text = self._decode(token_id)
        self._held += text
        self.num_characters += len(text)
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - self._num_at_risk())

    def finish(self) -> str:
        """What is held back, when no more tokens come. Nothing after a stop string."""
        return "" if self.stopped else self._take(len(self._held))

    def _decode(self, token_id: int) -> str:
        """The text of one more token, or of several at once where only the last completes a character."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        incomplete = text.endswith(REPLACEMENT) or len(text) <= len(self._settled)
        if incomplete and len(self._ids) - self._num_settled <= MOST_UNSETTLED:
            return ""
        new = text[len(self._settled) :]
        self._settle(self._ids[self._num_settled :])
        return new

    def _settle(self, ids: list[int]) -> None:
        self._ids, self._num_settled, self._settled = ids, len(ids), self._tokenizer.decode(ids)

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
