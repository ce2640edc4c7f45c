"""`python -m cluster.preflight`."""

import sys

from cluster.preflight.command import main

sys.exit(main())
