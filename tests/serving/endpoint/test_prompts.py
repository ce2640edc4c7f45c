"""Prompts are bounded by the context before and while they are encoded, and beside the event loop."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from serving.endpoint.prompts import PIECE_CHARACTERS, SHORT_CHARACTERS, Prompts
from serving.endpoint.refusal import Refusal
from serving.endpoint.text import numbered_tokenizer
from tests.waiting import PATIENCE_SECONDS


class Counted:
    """A tokenizer that counts the characters it is given, and waits before each text until it may go on."""

    def __init__(self, tokenizer: Tokenizer, may_go_on: Callable[[], bool] = lambda: True) -> None:
        self._tokenizer, self._may_go_on, self.num_characters = tokenizer, may_go_on, 0

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def encode_batch(self, texts: list[str], *, add_special_tokens: bool = True) -> list[object]:
        assert self._may_go_on()
        self.num_characters += sum(map(len, texts))
        return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)


def runs_of_a(longest: int) -> Tokenizer:
    """A byte-level BPE that joins up to `longest` (a power of two) letters a."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges, length = [], 1
    while length < longest:
        merges.append(("a" * length, "a" * length))
        length *= 2
        vocabulary["a" * length] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def encoded(prompts: Prompts, text: str) -> list[int]:
    at_once = prompts.at_once(text)
    return asyncio.run(prompts.encode(text)) if at_once is None else at_once


@pytest.mark.parametrize("length", [1, 100, SHORT_CHARACTERS, PIECE_CHARACTERS + 1, 5 * PIECE_CHARACTERS + 7])
@pytest.mark.parametrize("text", ["a", "ab ", "é", "\N{SAILBOAT}"])
def test_a_prompt_that_fits_to_the_token_is_the_tokenizer_s_own(text, length):
    tokenizer = runs_of_a(64)
    text = (text * length)[:length]
    ids = tokenizer.encode(text).ids
    assert encoded(Prompts(tokenizer, context_tokens=len(ids)), text) == ids
    if len(ids) > 1:
        with pytest.raises(Refusal, match="maximum context length is") as refused:
            encoded(Prompts(tokenizer, context_tokens=len(ids) - 1), text)
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


def test_what_cannot_fit_is_refused_without_a_look_at_it():
    prompts = Prompts(numbered_tokenizer(400), context_tokens=100)  # " 399" is the longest token
    with pytest.raises(Refusal, match="2000001 tokens or more"):
        prompts.at_once("a" * 8_000_001)
    with pytest.raises(Refusal, match="101 token ids"):
        prompts.at_once([1] * 101)


def test_a_dense_prompt_is_given_up_after_a_little_more_than_the_context():
    counted = Counted(runs_of_a(64))
    prompts = Prompts(counted, context_tokens=20_000)
    with pytest.raises(Refusal, match="tokens or more"):
        encoded(prompts, "b" * 1_000_000)  # by its length alone it could be 15,625 tokens
    assert counted.num_characters <= 3 * PIECE_CHARACTERS


def test_the_event_loop_goes_on_beside_a_long_prompt():
    """Each piece of it waits for a turn of the loop."""
    turns = threading.Semaphore(0)
    slow = Counted(numbered_tokenizer(400), lambda: turns.acquire(timeout=PATIENCE_SECONDS))
    prompts = Prompts(slow, context_tokens=400_000)

    async def encode() -> list[int]:
        work = asyncio.create_task(prompts.encode("a ship " * 50_000))
        while not work.done():
            turns.release()
            await asyncio.sleep(0.001)
        return work.result()

    assert len(asyncio.run(encode())) == 350_000


def test_a_caller_that_is_cancelled_ends_the_work():
    """The third piece is under way when the caller leaves: it ends, and none begins."""
    begun, gone, threads = threading.Event(), threading.Event(), set()

    def third_waits() -> bool:
        threads.add(threading.current_thread().name.rstrip("0123456789"))
        if counted.num_characters < 2 * PIECE_CHARACTERS:
            return True
        begun.set()
        return gone.wait(PATIENCE_SECONDS)

    counted = Counted(numbered_tokenizer(400), third_waits)
    prompts = Prompts(counted, context_tokens=10_000_000)

    async def leave() -> None:
        work = asyncio.create_task(prompts.encode("a ship " * 1_000_000))
        await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
        work.cancel()
        await asyncio.wait([work])

    asyncio.run(leave())
    gone.set()
    prompts._threads.shutdown()  # waits for what is under way
    assert counted.num_characters == 3 * PIECE_CHARACTERS
    assert threads == {"prompts_"}
