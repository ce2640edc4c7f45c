"""`python -m training.baseline`."""

import sys

from training.baseline.command import main

sys.exit(main())
