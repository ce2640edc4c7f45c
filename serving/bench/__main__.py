"""`python -m serving.bench`; with `bench.compare` the races of `serving.peers`, which use this room."""

import sys

from serving.bench.command import main
from serving.peers.command import compare

sys.exit(main(compare=compare))
