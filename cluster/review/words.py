"""Numbers and values as people write them."""

import math
from typing import Any


def number(value: Any, *, digits: int = 5) -> str:
    """A number in about so many digits, without trailing zeros: 6,500; 0.0153; 5.136; nan; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if not 1e-4 <= size < 1e15:
        return f"{value:.{digits - 1}g}"
    places = max(0, digits - 1 - math.floor(math.log10(size))) if size < 1000 else 0
    return f"{value:,.{places}f}".rstrip("0").rstrip(".") if places else f"{value:,.0f}"


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
