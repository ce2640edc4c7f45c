import sys

from tests.gpu.command import main

sys.exit(main())
