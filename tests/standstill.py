"""A command whose run stands still once a step is in its record, until it is killed.

    STANDSTILL=8 python -m tests.standstill MODULE ARGUMENT ...

Also under torchrun, and in the workers of a Ray that the command starts.
"""

import ctypes
import os
import runpy
import signal
import sys
import time
from typing import Any

from cluster import session
from cluster.process import PR_SET_PDEATHSIG
from cluster.record.record import Record

STEP = "STANDSTILL"


def watch() -> None:
    """Let this process stand still at that step, and end when its parent is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # torchrun's ranks have sessions of their own
    log, last = Record.log, int(os.environ[STEP])

    def logged(record: Record, row: dict[str, Any]) -> None:
        log(record, row)
        while row["step"] >= last:
            time.sleep(1)

    Record.log = logged  # type: ignore[method-assign]


def main() -> None:
    watch()
    options = session._options
    session._options = lambda runtime_env: options(
        {**runtime_env, "worker_process_setup_hook": "tests.standstill.watch"}
    )
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
