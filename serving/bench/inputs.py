"""Loads from files as they are published: traces of arrivals, and conversations.

A trace is JSONL or CSV. Its columns say which: ours, Mooncake's, Azure's, BurstGPT's. Conversations are
ShareGPT's JSON array, or such objects as lines. Numbers are strict, and only a newline ends a line.
"""

import csv
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from serving.bench.workload import Planned, token_ids

BLOCK_TOKENS = 512  # of one of Mooncake's hash_ids: https://github.com/kvcache-ai/Mooncake
ROLES = {  # as ShareGPT and its relatives name who speaks
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
_CSV = {  # time, prompt, answer -> of which trace
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): "Azure's",
    ("Timestamp", "Request tokens", "Response tokens"): "BurstGPT's",
}
_JSONL = (("at_seconds", "prompt_tokens", "output_tokens"), ("timestamp", "input_length", "output_length"))
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")

Turn = tuple[str, str]  # role, text
Report = Callable[[str], None]


def _silent(_: str) -> None:
    pass


# --- traces -----------------------------------------------------------------------------------------------


def from_trace(
    file: Path, *, vocab_size: int, context_tokens: int, seed: int | str, report: Report = _silent
) -> list[Planned]:
    """Requests at the times of a trace, in order of arrival.

    - JSONL of {"at_seconds", "prompt_tokens", "output_tokens"};
    - Mooncake's JSONL of {"timestamp" (ms), "input_length", "output_length"[, "hash_ids"]}: prompts share the
      blocks of BLOCK_TOKENS tokens that have the same id (https://github.com/kvcache-ai/Mooncake); times
      begin at the first row;
    - Azure's CSV of TIMESTAMP, ContextTokens, GeneratedTokens
      (https://github.com/Azure/AzurePublicDataset), and BurstGPT's of Timestamp (s), Request tokens, Response
      tokens (https://github.com/HPMLL/BurstGPT), whose rows without a response are failures and are left out.
      Their times begin at their first row.

    Args:
        report: told how many rows were left out.

    Raises:
        ConfigError: the file cannot be read, a row is not such an object, or it exceeds `context_tokens`;
            names the line.
    """
    found: list[Planned] = []
    draw = random.Random(f"{seed}:prompts")
    num_failures = 0
    for line, at, size, more, blocks in _arrivals(file):
        if more == 0 and blocks is None:
            num_failures += 1
            continue
        if size < 1 or more < 1 or at < ((found[-1].at or 0.0) if found else 0.0):
            raise ConfigError(f"{file}, line {line}: lengths must be at least 1, and times must not go back")
        if size + more > context_tokens:
            raise ConfigError(
                f"{file}, line {line}: exceeds the model's context of {context_tokens} tokens "
                f"({size} + {more}); take the row out, or use a model with a longer context"
            )
        needed = (blocks or ())[: -(-size // BLOCK_TOKENS)]
        shared = (token_ids(f"{seed}:block:{block}", BLOCK_TOKENS, vocab_size) for block in needed)
        prompt = tuple(chain.from_iterable(shared))[:size]
        prompt += tuple(draw.randrange(vocab_size) for _ in range(size - len(prompt)))
        found.append(Planned(at, prompt, more))
    if num_failures:
        report(f"{file}: {num_failures} rows without a response are left out")
    if not found:
        raise ConfigError(f"{file}: holds no request")
    return found


Arrival = tuple[int, float, int, int, Sequence[int] | None]  # line, seconds, prompt, answer, blocks


def _arrivals(file: Path) -> Iterator[Arrival]:
    """The rows of a trace. `blocks` are None where an answer of 0 tokens is a failure: in BurstGPT's."""
    text = _text(file)
    first = text.lstrip().partition("\n")[0]
    if first.startswith(("{", "[")) or "," not in first:
        yield from _json_arrivals(file, text)
    else:
        yield from _csv_arrivals(file, text)


def _json_arrivals(file: Path, text: str) -> Iterator[Arrival]:
    begin = None
    for line, row in _objects(file, text):
        names = next((names for names in _JSONL if names[0] in row), _JSONL[0])
        try:
            at, size, more = _number(row[names[0]]), _whole(row[names[1]]), _whole(row[names[2]])
            blocks = [_whole(block) for block in row.get("hash_ids") or ()]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{file}, line {line}: needs finite numbers {', '.join(names)} (the last two whole), and "
                "hash_ids whole if any"
            ) from error
        if names[0] == "timestamp":
            begin = at if begin is None else begin
            at = (at - begin) / 1e3
        yield line, at, size, more, blocks


def _csv_arrivals(file: Path, text: str) -> Iterator[Arrival]:
    rows = _cells(file, text)
    head = [name.strip() for name in next(rows)]
    names = next((names for names in _CSV if set(names) <= set(head)), None)
    if names is None:
        known = "; ".join(f"{whose} {', '.join(names)}" for names, whose in _CSV.items())
        raise ConfigError(f"{file}, line 1: has the columns {', '.join(head)[:200]}; known are {known}")
    places, begin = [head.index(name) for name in names], None
    for line, row in enumerate(rows, start=2):
        if not any(row):
            continue
        try:
            at, size, more = (row[place].strip() for place in places)
            moment = _seconds(at) if names[0] == "TIMESTAMP" else float(_digits(at))
            sizes = int(_digits(size, whole=True)), int(_digits(more, whole=True))
        except (IndexError, ValueError) as error:
            raise ConfigError(
                f"{file}, line {line}: needs {', '.join(names)}: a time and two whole numbers"
            ) from error
        begin = moment if begin is None else begin
        yield line, moment - begin, *sizes, None if names[0] == "Timestamp" else ()


def _cells(file: Path, text: str) -> Iterator[list[str]]:
    rows = csv.reader(line.removesuffix("\r") for line in text.split("\n"))
    try:
        yield from rows
    except csv.Error as error:  # a NUL, a field of megabytes
        raise ConfigError(f"{file}, line {rows.line_num}: no CSV ({error})") from error


def _digits(text: str, *, whole: bool = False) -> str:
    """A number without sign, exponent or underscore. Raises `ValueError`: it is none."""
    if not _NUMBER.fullmatch(text) or len(text) > 30 or (whole and "." in text):
        raise ValueError(f"{text!r} is no number")
    return text


def _seconds(text: str) -> float:
    """Of a time such as 2023-11-16 18:15:46.6805900: Azure writes seven decimals, Python reads six."""
    match = re.fullmatch(r"(\S+[ T][\d:]+)(?:\.(\d+))?(?:Z|\+00:00)?", text)
    if match is None:
        raise ValueError(f"{text!r} is no time")
    fraction = float(f"0.{match[2]}") if match[2] else 0.0
    return datetime.fromisoformat(match[1]).replace(tzinfo=UTC).timestamp() + fraction


def _number(value: Any) -> float:
    """A number of JSON. Raises `ValueError`: it is none, or infinite."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def _whole(value: Any) -> int:
    """`value` as an int. Raises `ValueError`: it is not a whole number."""
    if _number(value) % 1:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


# --- conversations ----------------------------------------------------------------------------------------


def read_conversations(
    file: Path,
    *,
    count_tokens: Callable[[str], int],
    context_tokens: int,
    tokens_beside: int = 0,
    turns: str = "first",
    report: Report = _silent,
) -> list[list[Planned]]:
    """The requests of each conversation in a file; the reply sets the length.

    A conversation is {"conversations": [{"from", "value"}, ...]} (ShareGPT), {"messages": [{"role",
    "content"}, ...]}, or {"prompt", "completion"}. An exchange is a user's turn and the assistant's reply to
    it, wherever they stand. Without names the two speak in turn. What exceeds `context_tokens` with all that
    comes before it is left out, as usual with these data.

    Args:
        tokens_beside: of each turn that is sent, what stands before and behind its text.
        turns: "first": one exchange, without what was said before it. "all": every exchange with its history;
            each follows the one before.
        report: told how many conversations were left out.

    Raises:
        ConfigError: the file cannot be read, an item is none of these, or no exchange fits.
    """
    usable: list[list[Planned]] = []
    num_read, history = 0, turns == "all"
    for item, row in _conversations(file):
        num_read += 1
        said = _turns(file, item, row)
        found = _exchanges(said, count_tokens, context_tokens, tokens_beside, history=history)
        if exchanges := list(found if history else islice(found, 1)):
            usable.append(exchanges)
    if not usable:
        raise ConfigError(
            f"{file}: no conversation fits the model's context of {context_tokens} tokens: none of "
            f"{num_read} has a user's turn and a reply that do"
        )
    if num_read > len(usable):
        report(f"{file}: {num_read - len(usable)} of {num_read} conversations have no exchange that fits")
    return usable


def draw_requests(conversations: Sequence[list[Planned]], number: int, *, seed: int | str) -> list[Planned]:
    """`number` requests, of conversations drawn with replacement."""
    draw, found = random.Random(f"{seed}:prompts"), list[Planned]()
    while len(found) < number:
        found += draw.choice(conversations)
    return found[:number]


def _exchanges(
    turns: Sequence[Turn],
    count_tokens: Callable[[str], int],
    context_tokens: int,
    tokens_beside: int,
    *,
    history: bool,
) -> Iterator[Planned]:
    """Of one conversation, from its first to the last one that fits."""
    size_of = cache(lambda place: count_tokens(turns[place][1]))  # most turns of a file are never needed
    follows = False
    for place in range(1, len(turns)):
        if (turns[place - 1][0], turns[place][0]) != ("user", "assistant"):
            continue
        before = sum(map(size_of, range(place - 1))) if history else 0
        before += tokens_beside * (place if history else 1)
        size, more = size_of(place - 1), size_of(place)
        if before + size + more > context_tokens:
            break
        if size >= 1 and more >= 1:
            said = tuple(turns[: place - 1]) if history else ()
            yield Planned(None, turns[place - 1][1], more, said, follows=follows)
            follows = True


def _turns(file: Path, item: str, row: Mapping[str, Any]) -> list[Turn]:
    """Who said what. Turns of others than user, assistant and system, such as tools, are left out."""
    try:
        if "prompt" in row and "completion" in row:
            said = [("user", row["prompt"]), ("assistant", row["completion"])]
        else:
            name, role, text = ("conversations", "from", "value")
            if name not in row:
                name, role, text = ("messages", "role", "content")
            said = [
                (ROLES.get(str(turn[role]).lower(), "") if role in turn else ("user", "assistant")[place % 2],
                 turn[text])
                for place, turn in enumerate(row[name])
            ]  # fmt: skip
        for _, text in said:
            text.encode()  # a lone surrogate is no text
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ConfigError(
            f"{file}, {item}: needs conversations of texts (from, value), messages (role, content), or "
            "prompt and completion"
        ) from error
    return [(role, text) for role, text in said if role]


def _conversations(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each object with its place for messages. An array is read whole; anything else line by line."""
    text = _text(file)
    if not text.lstrip().startswith("["):
        yield from ((f"line {line}", row) for line, row in _objects(file, text))
        return
    try:
        rows = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: no JSON ({error})") from error
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, item {place}: no JSON object")
        yield f"item {place}", row


def _objects(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL and their lines. U+2028 and its like, which JSON texts may hold, end none."""
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {line}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, line {line}: no JSON object")
        yield line, row


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's; values must be finite")


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
