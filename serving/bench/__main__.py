"""`python -m serving.bench`."""

import sys

from serving.bench.command import main

sys.exit(main())
