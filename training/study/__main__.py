"""`python -m training.study`."""

import sys

from training.study.command import main

sys.exit(main())
