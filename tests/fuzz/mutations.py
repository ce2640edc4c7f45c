"""Damaged versions of good files: bytes flipped, cut and repeated, and values that nobody expects."""

import json
from random import Random
from typing import Any

BYTES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\n\n",
    b'"',
    b"{",
    b"]",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"null",
    b"NaN",
    b"-Infinity",
    b"9" * 5000,
    b"1e999",
    b"-1",
    b"${oc.env:HOME}",
    b"!!python/object/apply:os.system [id]",
    b"&a [*a]",
    b"*missing",
    b"\\ud800",
    b"a" * 100_000,
    b": ",
    b"- ",
    b"\t",
    b"#",
)
VALUES: tuple[Any, ...] = (
    *(None, True, "", " ", "\x00", "\ud800", "a\nb", "../../etc/passwd", "/dev/zero", "~nobody/x"),
    *("x" * 5000, "${a.b}", "None", "007", "1e6", "é", 0, -1, 1.5, 2**63, -(2**70), 10**400, 1e308),
    *(float("nan"), float("inf"), [], {}, [[]], {"a": {}}, [None], [1, "2", None], {"": 1}),
)


def damaged(good: bytes, random: Random) -> bytes:
    """A damaged version of a file: of JSON the structure or the bytes, of others the bytes."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        structured = _restructured(good, random) if random.random() < 0.6 else None
        good = _bytes(good, random) if structured is None else structured
    return good


def _bytes(good: bytes, random: Random) -> bytes:
    start = random.randint(0, len(good))
    stop = min(len(good), start + random.choice((0, 1, 2, 10, 100, 10_000)))
    match random.randrange(6):
        case 0:
            return good[:start]
        case 1:
            return good[:start] + good[stop:]
        case 2:
            return good[:stop] + good[start:]
        case 3:
            flipped = bytes(byte ^ (1 << random.randrange(8)) for byte in good[start : start + 1])
            return good[:start] + flipped + good[start + 1 :]
        case 4:
            return good[:start] + random.choice(BYTES) + good[stop:]
    lines = good.split(b"\n")  # one line gets another value after its ": "
    number = random.randrange(len(lines))
    name, colon, _ = lines[number].partition(b": ")
    lines[number] = name + (colon or b": ") + random.choice(BYTES)
    return b"\n".join(lines)


def _restructured(good: bytes, random: Random) -> bytes | None:
    """With one value of a JSON document, or of one of its lines, replaced, removed or added."""
    lines = [good] if good.lstrip()[:1] in b"[{" and _json(good) is not None else good.split(b"\n")
    number = random.randrange(len(lines))
    content = _json(lines[number])
    if content is None:
        return None
    value = random.choice(VALUES)
    place = random.choice(list(_places(content)) or [None])
    if place is None:
        content = value
    else:
        holder, key = place
        match random.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random.choice(("", "text", "\x00", "a" * 300, "__init__"))] = value
            case _:
                holder[key] = value
    lines[number] = json.dumps(content).encode()
    return b"\n".join(lines)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value inside a JSON value."""
    found, waiting = [], [content]
    while waiting:
        holder = waiting.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found
