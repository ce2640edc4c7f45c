"""Tokens to text piece by piece: whole characters, stop strings, tokenizers that exist or are made."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cluster.cli import UserError
from serving.text import Detokenizer, load_tokenizer, numbered_tokenizer

TOKENIZER = numbered_tokenizer(1000)
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
