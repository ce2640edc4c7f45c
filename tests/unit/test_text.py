"""Tokens to text piece by piece: whole characters, stop strings, tokenizers that exist or are made."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from cluster.cli import UserError
from serving.text import Detokenizer, load_tokenizer, numbered_tokenizer, spell

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


def pieces(text: str, *stops: str) -> tuple[list[str], bool]:
    """What each byte of the text settles, with the end; whether a stop string was met."""
    detokenizer = Detokenizer(TOKENIZER, stops=stops)
    found = [detokenizer.add(token) for token in ids(text)]
    return [*found, detokenizer.finish()], detokenizer.stopped


def test_characters_come_whole():
    found, stopped = pieces(TEXT)
    assert "".join(found) == TEXT and not stopped
    assert "🚢" in found and "ó" in found and "�" not in "".join(found)
    assert len(found) == len(TEXT.encode()) + 1


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
        text = "".join(draw.choices("abc", k=draw.randint(0, 30)))
        stops = ["".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        detokenizer, shown, fed = Detokenizer(TOKENIZER, stops=stops), "", ""
        for character in text:
            shown += detokenizer.add(ids(character)[0])
            fed += character
            first = min((place for stop in stops if (place := fed.find(stop)) >= 0), default=None)
            assert detokenizer.stopped == (first is not None)
            if first is not None:
                assert shown == fed[:first]
                break
            assert fed.startswith(shown) and len(fed) - len(shown) < max(map(len, stops))
        else:
            assert shown + detokenizer.finish() == text


def test_any_ids_have_a_text_in_any_order():
    """Random ids hold bytes that are no characters."""
    draw, broken = random.Random(1), 0
    for _ in range(300):
        sequence = [draw.randrange(1000) if draw.random() < 0.5 else draw.randrange(256) for _ in range(40)]
        detokenizer = Detokenizer(TOKENIZER)
        shown = "".join(detokenizer.add(token) for token in sequence) + detokenizer.finish()
        whole = TOKENIZER.decode(sequence)
        assert whole.startswith(shown) and set(whole[len(shown) :]) <= {"�"}
        broken += "�" in whole
    assert broken > 200


def test_with_byte_fallback_invalid_bytes_cost_no_word():
    """`tokenizers.DecodeStream` raises "Invalid prefix" at most of these."""
    draw, broken = random.Random(1), 0
    words, high = range(257, SENTENCEPIECE.get_vocab_size()), range(1 + 0x80, 257)
    for _ in range(300):
        sequence = [draw.choice(words if draw.random() < 0.6 else high) for _ in range(40)]
        sequence[0] = sequence[-1] = SENTENCEPIECE.token_to_id("a")
        detokenizer = Detokenizer(SENTENCEPIECE)
        shown = "".join(detokenizer.add(token) for token in sequence) + detokenizer.finish()
        whole = SENTENCEPIECE.decode(sequence)
        letters = set("the list")
        assert [c for c in shown if c in letters] == [c for c in whole if c in letters]
        broken += "�" in whole
    assert broken > 200


def test_a_character_of_several_tokens_comes_whole_with_byte_fallback():
    sequence = SENTENCEPIECE.encode("the ship 世界 é").ids
    detokenizer = Detokenizer(SENTENCEPIECE, prompt=sequence[:1])
    found = [detokenizer.add(token) for token in sequence[1:]]
    assert "".join(found) == SENTENCEPIECE.decode(sequence)[len(SENTENCEPIECE.decode(sequence[:1])) :]
    assert "世" in found and "界" in found and "�" not in "".join(found)


def test_the_space_before_a_first_word_is_kept():
    the, list_ = (SENTENCEPIECE.token_to_id(word) for word in ("▁the", "▁list"))
    assert Detokenizer(SENTENCEPIECE, prompt=[the]).add(list_) == " list"
    assert Detokenizer(SENTENCEPIECE).add(list_) == "list"  # the beginning of a text


def test_bytes_that_never_become_a_character_are_not_held_for_ever():
    detokenizer = Detokenizer(TOKENIZER)
    [byte] = {ids("🚢")[1]}  # a byte that continues a character, without its beginning
    found = "".join(detokenizer.add(byte) for _ in range(100))
    assert set(found) == {"�"} and 80 <= len(found) <= 100
    assert detokenizer.num_characters == len(found)


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
