"""`python -m cluster.parity`."""

import sys

from cluster.parity.command import main

sys.exit(main())
