"""The tokenizer of prepared data: trained or given, its end-of-text token and its special tokens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.data.dataset import DataError
from training.data.records import reading

END_OF_TEXT = "<|endoftext|>"
# of GPT-2 and Qwen, LLaMA 3, DeepSeek, LLaMA 2 and Mistral, Gemma, and others
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's own bars)
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "[EOS]",
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE (GPT-2's scheme) with `<|endoftext|>` as id 0. Decodes every text exactly.

    Has fewer than `vocab_size` tokens when the texts run out of pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The Hugging Face tokenizer in `path`, set to encode plain text as it stands, whatever its length.

    A text that happens to contain the name of a special token is encoded as ordinary characters.

    Raises:
        DataError: unreadable, or not a tokenizer.json.
    """
    with reading(path):
        content = path.read_bytes()
    with encoding_with(path):
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            problem = f"not a Hugging Face tokenizer.json ({error})"
            raise DataError(f"{path}: {problem}; set data.tokenizer") from error
        tokenizer.encode("")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextmanager
def encoding_with(path: Path | str) -> Iterator[None]:
    """Turn a panic of the library, which some files cause, into a `DataError` that names the file."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which exports no such class
            raise
        raise DataError(
            f"{path}: the tokenizers library fails on it ({error}); set data.tokenizer"
        ) from error


def end_of_text_id(tokenizer: Tokenizer, name: str | None = None) -> int:
    """The id of the token that ends a document: `name`, or the first of its usual names.

    Raises:
        DataError: there is none.
    """
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    # Special ones first: Gemma has </s> too, for the end of struck out text, as an ordinary token.
    usual = sorted(END_OF_TEXT_NAMES, key=lambda each: each not in special)
    for each in usual if name is None else (name,):
        if (token := tokenizer.token_to_id(each)) is not None:
            return token
    if name is not None:
        raise DataError(f"data.end_of_text: the tokenizer has no token {name!r}")
    names = " ".join(END_OF_TEXT_NAMES)
    raise DataError(f"data.tokenizer: no end-of-text token of the names {names}; name it by data.end_of_text")


def opening_only(processor: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """A tokenizer.json's `post_processor` without the special tokens after the text, and their names.

    A prompt must not end with them: what ends a document is added by `prepare`. So plain `encode` gives the
    same tokens in training, sampling, the export and serving.

    Raises:
        DataError: the post-processor is for encoder models.
    """
    kind = processor["type"] if processor else None
    if processor and kind == "TemplateProcessing":
        single, closing = list(processor["single"]), list[str]()
        while single and "SpecialToken" in single[-1]:
            closing.append(single.pop()["SpecialToken"]["id"])
        return {**processor, "single": single}, closing
    if processor and kind == "Sequence":
        parts = [opening_only(part) for part in processor["processors"]]
        return {**processor, "processors": [part for part, _ in parts]}, [
            name for _, names in parts for name in names
        ]
    if kind in (None, "ByteLevel"):
        return processor, []
    raise DataError(
        f"data.tokenizer: its post-processor {kind} is for encoder models; set data.add_special_tokens=false"
    )
