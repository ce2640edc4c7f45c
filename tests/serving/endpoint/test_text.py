"""Tokens to text piece by piece: whole characters, stop strings, tokenizers that exist or are made."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from cluster.cli import UserError
from serving.endpoint.text import Detokenizer, load_tokenizer, numbered_tokenizer, spell
from tests.properties import cases

TOKENIZER = numbered_tokenizer(1000)


def sentencepiece_tokenizer() -> Tokenizer:
    """As LLaMA 1 and 2 have it: words begin with "▁", and what has no token of its own is bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁list", "a", "é", "🚢"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


SENTENCEPIECE = sentencepiece_tokenizer()
TEXT = "Asunción 🚢 a list, a list of ships"


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def shown(detokenizer: Detokenizer, sequence: Sequence[int]) -> list[str]:
    """What each token settles."""
    return [detokenizer.add(token, last=place + 1 == len(sequence)) for place, token in enumerate(sequence)]


def pieces(text: str, *stops: str) -> tuple[list[str], bool]:
    """What each byte of the text settles; whether a stop string was met."""
    detokenizer = Detokenizer(TOKENIZER, stops=stops)
    return shown(detokenizer, ids(text)), detokenizer.stopped


def test_characters_come_whole():
    found, stopped = pieces(TEXT)
    assert "".join(found) == TEXT and not stopped
    assert "🚢" in found and "ó" in found and "�" not in "".join(found)
    assert len(found) == len(TEXT.encode())


def test_a_prompt_is_spelled_with_the_places_of_its_tokens():
    assert spell(TOKENIZER, ids("aó🚢b")) == ("aó🚢b", [0, 1, 1, 2, 2, 2, 2, 3])
    words = [SENTENCEPIECE.token_to_id(word) for word in ("▁the", "▁list")]
    assert spell(SENTENCEPIECE, words) == ("the list", [0, 3])
    assert spell(TOKENIZER, []) == ("", [])


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["list"], "Asunción 🚢 a "),
        (["list of"], "Asunción 🚢 a list, a "),
        (["ships!", "nothing"], TEXT),
        (["🚢"], "Asunción "),
        (["of", "list, a"], "Asunción 🚢 a "),
        ([" list of s", "t, a li"], "Asunción 🚢 a lis"),
        (["A"], ""),
        (["ships"], "Asunción 🚢 a list, a list of "),
    ],
)
def test_text_ends_before_the_first_stop_string(stops, expected):
    found, stopped = pieces(TEXT, *stops)
    assert "".join(found) == expected
    assert stopped == (expected != TEXT)


def test_pieces_never_show_what_a_stop_string_takes_back():
    """On random texts of few letters, against cutting the whole text."""
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("abc", k=draw.randint(1, 30)))
        stops = ["".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        detokenizer, told = Detokenizer(TOKENIZER, stops=stops), ""
        for place, [token] in enumerate(map(ids, text)):
            told += detokenizer.add(token, last=place + 1 == len(text))
            fed = text[: place + 1]
            expected, stopped = until_stop(fed, stops)
            assert detokenizer.stopped == stopped
            if stopped:
                assert told == expected
                break
            assert fed.startswith(told) and len(fed) - len(told) < max(map(len, stops))
        else:
            assert told == text


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A whole text until the stop string that is complete first, and whether there is one."""
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(ends)[1]], True) if ends else (text, False)


def with_specials(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<added>", "�"])
    return tokenizer


def words_tokenizer(decoder: Any, *words: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return with_specials(tokenizer)


# Each with the ids that are drawn: letters, bytes whole and broken, special tokens, ids without a token.
TOKENIZERS = {
    "byte level": with_specials(numbered_tokenizer(260)),
    "byte fallback": with_specials(sentencepiece_tokenizer()),
    "metaspace": words_tokenizer(decoders.Metaspace(), "▁", "▁the", "▁a", "list", "▁▁"),
    "word pieces": words_tokenizer(decoders.WordPiece(), "the", "##list", ".", "'", "a", "##s"),
    "suffixes": words_tokenizer(decoders.BPEDecoder(), "the</w>", "li", "st</w>", "a</w>"),
    "no decoder": words_tokenizer(None, "the", "list", "a"),
}


def drawn_ids(name: str) -> list[int]:
    """Ids of few bytes, so that characters are often complete: a, space, é, 🚢, and bytes that never are."""
    tokenizer, size = TOKENIZERS[name], TOKENIZERS[name].get_vocab_size()
    ends = [*range(size - 4, size), size + 5]  # special and added tokens, and an id without a token
    text = "a é🚢"
    if name == "byte level":
        return [*ids(text), ids("é")[0], 256, *ends]
    if name == "byte fallback":
        in_bytes = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🚢界".encode()]
        return [*in_bytes, *range(257, size - 4), *ends]
    return [*range(size - 4), *ends]


DRAWN = {name: drawn_ids(name) for name in TOKENIZERS}


@settings(max_examples=cases(), deadline=None)
@given(
    name=st.sampled_from(list(TOKENIZERS)),
    choices=st.binary(max_size=60),
    num_prompt=st.integers(0, 30),
    stops=st.sampled_from([(), ("�",), ("🚢",), ("a", " l"), (" the", "st a"), ("é ",), ("��",)]),
)
def test_pieces_are_what_decoding_everything_at_once_gives(name, choices, num_prompt, stops):
    tokenizer, known = TOKENIZERS[name], DRAWN[name]
    sequence = [known[choice % len(known)] for choice in choices]
    prompt, rest = sequence[:num_prompt], sequence[num_prompt:]
    before, whole = (tokenizer.decode(part) for part in (prompt, sequence))
    num_before = next(n for n in range(len(before), -1, -1) if whole.startswith(before[:n]))
    expected, stopped = until_stop(whole[num_before:], stops)
    detokenizer = Detokenizer(tokenizer, prompt=prompt, stops=stops)
    assert "".join(shown(detokenizer, rest)) == (expected if rest else "")
    assert detokenizer.stopped == (stopped and bool(rest))
    text, starts = spell(tokenizer, sequence)
    assert text == whole and starts == sorted(starts)


@pytest.mark.parametrize("name", ["byte fallback", "metaspace"])
@pytest.mark.parametrize("without_text", ["<s>", "</s>", None])
def test_any_number_of_tokens_without_text_keeps_the_space_of_the_next_word(name, without_text):
    tokenizer = TOKENIZERS[name]
    the = tokenizer.token_to_id("▁the")
    skipped = 10_000 if without_text is None else tokenizer.token_to_id(without_text)
    for count in (1, 8, 9, 40):
        detokenizer = Detokenizer(tokenizer, prompt=[the] + [skipped] * count)
        assert detokenizer.add(the) == " the"
        texts = shown(Detokenizer(tokenizer), [the, *[skipped] * count, the])
        assert "".join(texts) == "the the"
        assert Detokenizer(tokenizer, prompt=[skipped] * count).add(the) == "the"  # the text's first word


def test_a_run_of_bytes_comes_when_it_has_ended_and_is_valid_as_a_whole():
    """As the decoder does it, which makes replacement characters of all bytes if one is invalid."""
    of = SENTENCEPIECE.token_to_id
    ship = [of(f"<0x{byte:02X}>") for byte in "🚢".encode()]
    assert shown(Detokenizer(SENTENCEPIECE), [*ship, of("a")]) == ["", "", "", "", "🚢a"]
    assert shown(Detokenizer(SENTENCEPIECE), [*ship, ship[0], of("a")])[-1] == "�" * 5 + "a"
    assert shown(Detokenizer(SENTENCEPIECE), ship) == ["", "", "", "🚢"]
    assert shown(Detokenizer(SENTENCEPIECE, prompt=ship[:2]), [*ship[2:], of("a")])[-1] == "🚢a"
    assert shown(Detokenizer(SENTENCEPIECE, prompt=[*ship * 9, *ship[:2]]), ship[2:]) == ["", "🚢" * 10]
    assert shown(Detokenizer(SENTENCEPIECE, prompt=ship * 9), [of("a")]) == ["a"]
    stopping = Detokenizer(SENTENCEPIECE, stops=["🚢"])
    assert "".join(shown(stopping, ship)) == "" and stopping.stopped


def test_a_character_that_the_prompt_begins_is_the_continuation_s():
    first, *others = ids("🚢")
    prompt = [*ids("a"), first]
    assert shown(Detokenizer(TOKENIZER, prompt=prompt), others) == ["", "", "🚢"]
    assert shown(Detokenizer(TOKENIZER, prompt=prompt), ids("b")) == ["b"]


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    detokenizer = Detokenizer(TOKENIZER)
    [byte] = {ids("🚢")[1]}  # a byte that continues a character, without its beginning
    found = [detokenizer.add(byte) for _ in range(100)]
    assert found == [""] + ["�"] * 99 and detokenizer.start == 99


def test_places_of_tokens_are_exact_behind_what_was_held_back():
    of = SENTENCEPIECE.token_to_id
    ships = [of(f"<0x{byte:02X}>") for byte in "🚢🚢".encode()]
    text, starts = spell(SENTENCEPIECE, [of("a"), *ships, of("▁the"), of("a")])
    assert text == "a🚢🚢 thea" and starts == [0] + [1] * 8 + [3, 7]
    assert spell(TOKENIZER, [ids("🚢")[0], *ids("bc")]) == ("�bc", [0, 1, 2])


@pytest.mark.parametrize("vocab_size", [256, 257, 1000, 8192])
def test_every_id_of_random_weights_has_a_text_and_every_text_has_ids(vocab_size):
    tokenizer = numbered_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT
    assert tokenizer.decode([vocab_size - 1]) == (f" {vocab_size - 1}" if vocab_size > 256 else "�")


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"tokenizer\.json: missing; export the run again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
