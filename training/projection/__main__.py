"""`python -m training.projection`."""

import sys

from training.projection.command import main

sys.exit(main())
