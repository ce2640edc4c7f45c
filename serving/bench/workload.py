"""Which requests a load consists of, and when they are due: a pure function of a seed (number or text).

Prompts are random token ids, so that lengths are exact and no cache of an earlier prompt helps; or what files
hold (`serving.bench.inputs`). Lengths that do not fit the model are refused, never cut.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from cluster.config import ConfigError

MOST_TOKENS, MOST_SIGMA = 1_000_000_000, 10
USUAL_SIGMAS = 4  # where a lognormal length without a bound of its own ends


@dataclass(frozen=True)
class Planned:
    """A request to send.

    Attributes:
        at: seconds from the start of the load; None in a closed loop, where it is sent when its turn comes.
        prompt: text, or token ids.
        max_tokens: length of the continuation, exactly where the server knows `ignore_eos`.
        history: (role, text) of the turns before, oldest first.
        follows: it is the next turn of the request before it in the plan, sent when that one has ended.
    """

    at: float | None
    prompt: str | tuple[int, ...]
    max_tokens: int
    history: tuple[tuple[str, str], ...] = ()
    follows: bool = False


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens: whole numbers from 1 to `most`. Drawn by calling it."""

    draw: Callable[[random.Random], float]
    most: int

    def __call__(self, chance: random.Random) -> int:
        return max(1, round(self.draw(chance)))


def lengths(text: str, *, key: str) -> Lengths:
    """ "64", "uniform(16,128)", "lognormal(64,0.5)" (median, sigma), or "lognormal(64,0.5,200)" (and most).

    A lognormal length above its bound is drawn again; without a bound it ends USUAL_SIGMAS above the median.

    Raises:
        ConfigError: it is not one of these; names `key`.
    """
    number = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
    if match := re.fullmatch(number, text):
        size = float(match[1])
        return _checked(lambda chance: size, size, size, key)
    if match := re.fullmatch(rf"uniform\({number},{number}\)", text):
        low, high = float(match[1]), float(match[2])
        if low > high:
            raise ConfigError(f"{key}: {text!r}: the smaller length comes first")
        if low % 1 or high % 1:
            raise ConfigError(f"{key}: {text!r}: the bounds must be whole numbers")
        return _checked(lambda chance: chance.randint(int(low), int(high)), low, high, key)
    if match := re.fullmatch(rf"lognormal\({number},{number}(?:,{number})?\)", text):
        median, sigma = float(match[1]), float(match[2])
        if sigma > MOST_SIGMA:
            raise ConfigError(f"{key}: {text!r}: sigma must be at most {MOST_SIGMA}")
        most = float(match[3]) if match[3] else min(median * math.exp(USUAL_SIGMAS * sigma), MOST_TOKENS)
        if most < median:
            raise ConfigError(f"{key}: {text!r}: the third number is the largest length, above the median")
        return _checked(lambda chance: _at_most(most, chance, median, sigma), median, most, key)
    raise ConfigError(
        f"{key}: {text!r} is none of 64, uniform(16,128), lognormal(64,0.5), lognormal(64,0.5,200)"
    )


def _at_most(most: float, chance: random.Random, median: float, sigma: float) -> float:
    while (size := chance.lognormvariate(math.log(median), sigma)) > most:
        pass
    return size


def _checked(draw: Callable[[random.Random], float], smallest: float, largest: float, key: str) -> Lengths:
    if smallest < 1 or largest > MOST_TOKENS:
        raise ConfigError(f"{key}: lengths must be at least 1, and at most {MOST_TOKENS}")
    return Lengths(draw, max(1, round(largest)))


def require_fit(
    prompt_tokens: Lengths, output_tokens: Lengths, prefix_tokens: int, context_tokens: int
) -> None:
    """Raise a `ConfigError` unless the longest prompt with the longest answer fits the model's context."""
    longest = prefix_tokens + prompt_tokens.most + output_tokens.most
    if longest > context_tokens:
        parts = [f"{prefix_tokens} of load.prefix_tokens"] * bool(prefix_tokens)
        parts += [
            f"{prompt_tokens.most} of load.prompt_tokens",
            f"{output_tokens.most} of load.output_tokens",
        ]
        raise ConfigError(
            f"load.prompt_tokens: a request may have {longest} tokens ({', '.join(parts)}), and the model "
            f"holds {context_tokens}; ask for fewer, or bound a lognormal length: lognormal(64,0.5,MOST)"
        )


def arrivals(kind: str, *, rate: float, number: int, seed: int | str) -> list[float]:
    """Seconds at which `number` requests are due: the first of `endless_arrivals`."""
    return list(islice(endless_arrivals(kind, rate=rate, seed=seed), number))


def endless_arrivals(kind: str, *, rate: float, seed: int | str) -> Iterator[float]:
    """Seconds at which requests are due, on average `rate` a second, without end.

    Args:
        kind: "poisson" (independent exponential gaps) or "constant".
    """
    if kind == "constant":
        index = 0
        while True:
            yield index / rate
            index += 1
    draw, now = random.Random(f"{seed}:arrivals"), 0.0
    while True:
        now += draw.expovariate(rate)
        yield now


def synthetic(
    number: int,
    *,
    prompt_tokens: Callable[[random.Random], float],
    output_tokens: Callable[[random.Random], float],
    vocab_size: int,
    seed: int | str,
    due: Sequence[float] | None = None,
    prefix_tokens: int = 0,
    prefixes: int = 1,
) -> list[Planned]:
    """Requests of random token ids, of which each prompt begins with one of `prefixes` shared ones."""
    draw = random.Random(f"{seed}:prompts")
    shared = [token_ids(f"{seed}:prefix:{i}", prefix_tokens, vocab_size) for i in range(prefixes)]
    found = []
    for index in range(number):
        size, more = max(1, round(prompt_tokens(draw))), max(1, round(output_tokens(draw)))
        prompt = tuple(draw.randrange(vocab_size) for _ in range(size))
        if prefix_tokens:
            prompt = shared[draw.randrange(prefixes)] + prompt
        found.append(Planned(due[index] if due is not None else None, prompt, more))
    return found


def token_ids(seed: str, number: int, vocab_size: int) -> tuple[int, ...]:
    """Random ones, which `seed` alone decides."""
    draw = random.Random(seed)
    return tuple(draw.randrange(vocab_size) for _ in range(number))
