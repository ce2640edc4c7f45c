"""`python -m training.study.synthetic`."""

import sys

from training.study.synthetic.command import main

sys.exit(main())
