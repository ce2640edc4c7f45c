"""Which requests a load consists of, and when they are due: a pure function of a seed (number or text).

Prompts are lists of random token ids, so that lengths are exact and no cache of an earlier prompt helps; or
the texts of a ShareGPT-style file.
"""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

Draw = Callable[[random.Random], float]
MOST_TOKENS, MOST_SIGMA = 1_000_000_000, 10


@dataclass(frozen=True)
class Planned:
    """A request to send.

    Attributes:
        at: seconds from the start of the load; None in a closed loop, where it is sent when its turn comes.
        prompt: text, or token ids.
        max_tokens: length of the continuation, exactly where the server knows `ignore_eos`.
    """

    at: float | None
    prompt: str | tuple[int, ...]
    max_tokens: int


def lengths(text: str, *, key: str) -> Draw:
    """A function that draws lengths: "64", "uniform(16,128)", or "lognormal(64,0.5)" (median, sigma).

    Raises:
        ConfigError: it is not one of these; names `key`.
    """
    number = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
    if match := re.fullmatch(number, text):
        size = float(match[1])
        return _checked(lambda draw: size, size, size, key)
    if match := re.fullmatch(rf"uniform\({number},{number}\)", text):
        low, high = float(match[1]), float(match[2])
        if low > high:
            raise ConfigError(f"{key}: {text!r}: the smaller length comes first")
        if low % 1 or high % 1:
            raise ConfigError(f"{key}: {text!r}: the bounds must be whole numbers")
        return _checked(lambda draw: draw.randint(int(low), int(high)), low, high, key)
    if match := re.fullmatch(rf"lognormal\({number},{number}\)", text):
        median, sigma = float(match[1]), float(match[2])
        if sigma > MOST_SIGMA:
            raise ConfigError(f"{key}: {text!r}: sigma must be at most {MOST_SIGMA}")
        return _checked(lambda draw: draw.lognormvariate(math.log(median), sigma), median, median, key)
    raise ConfigError(f"{key}: {text!r} is none of 64, uniform(16,128), lognormal(64,0.5)")


def _checked(draw: Draw, smallest: float, largest: float, key: str) -> Draw:
    if smallest < 1 or largest > MOST_TOKENS:
        raise ConfigError(f"{key}: lengths must be at least 1, and at most {MOST_TOKENS}")
    return draw


def arrivals(kind: str, *, rate: float, number: int, seed: int | str) -> list[float]:
    """Seconds at which `number` requests are due, on average `rate` a second.

    Args:
        kind: "poisson" (independent exponential gaps) or "constant".
    """
    if kind == "constant":
        return [index / rate for index in range(number)]
    draw, now, found = random.Random(f"{seed}:arrivals"), 0.0, []
    for _ in range(number):
        now += draw.expovariate(rate)
        found.append(now)
    return found


def synthetic(
    number: int,
    *,
    prompt_tokens: Draw,
    output_tokens: Draw,
    vocab_size: int,
    context_tokens: int,
    seed: int | str,
    due: Sequence[float] | None = None,
) -> list[Planned]:
    """Requests of random token ids. Lengths are cut so that prompt and output fit `context_tokens`."""
    draw = random.Random(f"{seed}:prompts")
    found = []
    for index in range(number):
        size = min(max(1, round(prompt_tokens(draw))), context_tokens - 1)
        more = min(max(1, round(output_tokens(draw))), context_tokens - size)
        prompt = tuple(draw.randrange(vocab_size) for _ in range(size))
        found.append(Planned(due[index] if due is not None else None, prompt, more))
    return found


def from_trace(file: Path, *, vocab_size: int, context_tokens: int, seed: int | str) -> list[Planned]:
    """An arrival trace: JSONL of {"at_seconds", "prompt_tokens", "output_tokens"}, in order of arrival.

    Raises:
        ConfigError: the file cannot be read, or a line is not such an object; names the line.
    """
    found: list[Planned] = []
    draw = random.Random(f"{seed}:prompts")
    for number, row in _rows(file):
        try:
            at, size, more = (
                float(row["at_seconds"]),
                _whole(row["prompt_tokens"]),
                _whole(row["output_tokens"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{file}, line {number}: needs numbers at_seconds, prompt_tokens, output_tokens (whole)"
            ) from error
        if not math.isfinite(at):
            raise ConfigError(f"{file}, line {number}: at_seconds must be finite")
        if size < 1 or more < 1 or at < (found[-1].at or 0.0 if found else 0.0):
            raise ConfigError(
                f"{file}, line {number}: lengths must be at least 1, and times must not go back"
            )
        if size + more > context_tokens:
            raise ConfigError(
                f"{file}, line {number}: exceeds the model's context of {context_tokens} tokens"
            )
        found.append(Planned(at, tuple(draw.randrange(vocab_size) for _ in range(size)), more))
    if not found:
        raise ConfigError(f"{file}: holds no request")
    return found


def _whole(value: Any) -> int:
    """`value` as an int. Raises `ValueError` or `TypeError`: it is not a whole number."""
    if isinstance(value, bool) or value % 1:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def from_conversations(
    file: Path,
    number: int,
    *,
    count_tokens: Callable[[str], int],
    context_tokens: int,
    seed: int | str,
    due: Sequence[float] | None = None,
) -> list[Planned]:
    """`number` first turns of a ShareGPT-style JSONL, drawn with replacement; the reply sets the length.

    A line is {"conversations": [{"value": prompt}, {"value": reply}, ...]} or {"prompt": ..,
    "completion": ..}.
    Pairs that exceed `context_tokens` are left out, as usual with this data.

    Raises:
        ConfigError: the file cannot be read, a line is neither, or no pair fits.
    """
    pairs: list[tuple[str, int]] = []
    for line, row in _rows(file):
        try:
            if "conversations" in row:
                prompt, reply = (row["conversations"][turn]["value"] for turn in (0, 1))
            else:
                prompt, reply = row["prompt"], row["completion"]
            if not (isinstance(prompt, str) and isinstance(reply, str)):
                raise TypeError("texts are needed")
            more = count_tokens(reply)
            size = count_tokens(prompt)
        except (KeyError, IndexError, TypeError, UnicodeEncodeError) as error:
            raise ConfigError(
                f"{file}, line {line}: needs conversations with two values, or prompt and completion"
            ) from error
        if size >= 1 and more >= 1 and size + more <= context_tokens:
            pairs.append((prompt, more))
    if not pairs:
        raise ConfigError(f"{file}: no conversation fits the model's context of {context_tokens} tokens")
    chosen = random.Random(f"{seed}:prompts").choices(pairs, k=number)
    times = due if due is not None else [None] * number
    return [Planned(at, prompt, more) for at, (prompt, more) in zip(times, chosen, strict=True)]


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{file}, line {number}: no JSON object")
        found.append((number, row))
    return found
