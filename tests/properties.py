"""How many cases a property test tries."""

import os

USUAL = 1000  # of a property whose cases take about a millisecond


def cases(usual: int = USUAL) -> int:
    """`ASUNCION_PROPERTY_CASES`, of every property test, or else the usual number of this one."""
    return int(os.environ.get("ASUNCION_PROPERTY_CASES", usual))
