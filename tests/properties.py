"""How many cases a property test tries: `ASUNCION_PROPERTY_CASES`, or 1,000, which take about two seconds."""

import os

CASES = int(os.environ.get("ASUNCION_PROPERTY_CASES", "1000"))
