"""How long `make train` takes to its first step, by part, where the data are ready.

    python -m tests.lab.startup [--rounds 5] [--output FILE] [--dry-run] [key=value ...]

Each round is one start of the default run, of two steps, in a folder of its own; an unmeasured one goes
first and prepares the data. The parts are those of the event `first_step` (`training.run.spent.Startup`). The
aim is 20 s on two cores. Measure on an idle machine; a round takes about half a minute there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import process
from cluster.cli import RunError
from cluster.record import events
from tests.lab import starts
from training.run.spent import SUFFIX

WHAT = "startup"
AIM_SECONDS = 20.0
KEYS = ("schedule.tokens=8192", "record.wandb=offline")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    return starts.command(
        arguments,
        start,
        about=__doc__,
        what=WHAT,
        module="training.launch",
        keys=KEYS,
        aim_seconds=AIM_SECONDS,
    )


def start(folder: Path, name: str, keys: Sequence[str]) -> dict[str, float]:
    """One run; `<part>_seconds` until its first step, and in all.

    Raises:
        RunError: it failed, or reported none.
    """
    places = (f"run.name={name}", f"run.directory={folder}/outputs", f"data.directory={folder}/data")
    done = process.run([sys.executable, "-m", "training.launch", *KEYS, *keys, *places])
    first_steps = [each for each in events.read(folder / "outputs" / name) if each["kind"] == "first_step"]
    if done.returncode or not first_steps:
        raise RunError(f"{name} did not finish (exit code {done.returncode}):\n{done.stderr}")
    parts = {key: value for key, value in first_steps[0].items() if key.endswith(SUFFIX)}
    return {f"first_step{SUFFIX}": sum(parts.values()), **parts}


if __name__ == "__main__":
    sys.exit(main())
