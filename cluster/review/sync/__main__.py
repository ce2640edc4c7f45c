"""`python -m cluster.review.sync`."""

import sys

from cluster.review.sync.command import main

sys.exit(main())
