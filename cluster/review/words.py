"""Numbers and values as people write them."""

import math
from typing import Any

from cluster import display


def amount(value: Any, *, digits: int = 5) -> str:
    """A number to about `digits` digits, without trailing zeros: 6,500; 0.0153; 5.136; nan; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    text = display.number(value, digits=digits)
    return text.rstrip("0").rstrip(".") if "." in text and "·" not in text else text


def shortened(text: str, *, most: int) -> str:
    """`text`, without its middle where it is longer than `most` characters."""
    kept = (most - 1) // 2
    return text if len(text) <= most else f"{text[:kept]}…{text[-kept:]}"


def plain(value: Any) -> str:
    """A value of a configuration as one would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "[]"
    return str(value)


def commit(provenance: dict[str, Any]) -> str:
    """The short commit; "with uncommitted changes" where the code had such."""
    short = str(provenance.get("commit", "unknown"))[:10]
    return f"{short} with uncommitted changes" if provenance.get("dirty") else short
