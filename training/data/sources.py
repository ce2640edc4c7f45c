"""The entries of `data.sources`. The configuration reads them too, so this imports nothing of `training`."""

import re

from cluster.config import ConfigError, require


def parse_source(entry: str) -> tuple[str, str, float]:
    """(name, source, weight) of "name=source@weight"; without "@weight" it is 1. Raises `ConfigError`."""
    name, _, rest = entry.partition("=")
    source, at, weight = rest.rpartition("@")
    source, weight = (source, weight) if at else (rest, "1")
    named = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
    require(named and bool(source), "data.sources", f"{entry!r} is not 'name=source@weight'")
    try:
        number = float(weight)
    except ValueError:
        raise ConfigError(f"data.sources: {weight!r} of {entry!r} is not a number") from None
    require(0 < number < 1e9, "data.sources", f"the weight of {entry!r} must be positive")
    return name, source, number
