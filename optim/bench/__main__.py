"""`python -m optim.bench`."""

import sys

from optim.bench.command import main

sys.exit(main())
