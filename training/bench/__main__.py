"""`python -m training.bench`."""

import sys

from training.bench.command import main

sys.exit(main())
