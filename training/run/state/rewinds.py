"""Going back to before a loss spike, with the batches since then skipped.

`rewinds.json` in the run directory is written before a step is taken again, so that a run which is killed
then goes on with the same batches as one which is not. Each later checkpoint holds the rewinds too.
"""

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import files
from cluster.record import events
from cluster.runs import COMPLETE, checkpoints, complete_checkpoints
from training.config import TrainConfig
from training.run.checkpoint import Checkpoint, DamagedError, step_directory, step_of

if TYPE_CHECKING:
    from training.run.context import Context

FILE = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """After step `from_step` the run went back to the checkpoint of step `to_step`."""

    from_step: int
    to_step: int


class Rewinds:
    """Those of a run, the oldest first. Collective; every rank knows the same.

    Args:
        saved: the checkpoint that the run continues from. Without one it has none, and FILE is removed.
    """

    def __init__(self, config: TrainConfig, context: "Context", saved: Checkpoint | None) -> None:
        self._directory, self._context = config.run_directory, context
        self._most, self._line_steps = config.checkpoint.max_rewinds, config.record.every_steps
        found: list[dict[str, int]] = []
        if context.is_main and saved is None:
            (self._directory / FILE).unlink(missing_ok=True)
        elif context.is_main and saved is not None:
            found = read(self._directory) or saved.state.get("rewinds", [])
        self._all = [Rewind(**each) for each in context.gather(found)[0]]
        if context.is_main:
            self._report()

    def passed_over(self, step: int) -> int:
        """Steps' worth of batches that are skipped before the batch which follows `step` steps."""
        return sum(each.from_step - each.to_step for each in self._all if step >= each.to_step)

    def as_json(self) -> list[dict[str, int]]:
        """For a checkpoint's state."""
        return [asdict(each) for each in self._all]

    def wanted(self, spiked: bool) -> bool:
        """Whether rank 0 saw a spike, and the run is to go back after one."""
        return self._most > 0 and self._context.gather(spiked)[0]

    def go_back(self, step: int) -> Path | None:
        """The newest sound checkpoint from before the line of `step`, once later ones are gone.

        None, and an event that says why, if there is none or the run went back often enough.
        """
        found: Path | None = None
        if self._context.is_main:
            found = self._choose(step)
        path = self._context.gather(found)[0]
        if path is not None:
            self._all.append(Rewind(step, step_of(path)))
            if self._context.is_main:
                self._record(path)
            self._context.gather(None)
        return path

    def _choose(self, step: int) -> Path | None:
        first = (step - 1) // self._line_steps * self._line_steps
        problem = f"the run went back {len(self._all)} times, as often as checkpoint.max_rewinds allows"
        if len(self._all) < self._most:
            problem = f"there is no sound checkpoint from before step {first + 1}"
            for path in reversed(complete_checkpoints(self._directory / "checkpoints")):
                with suppress(DamagedError):
                    if step_of(path) <= first:
                        Checkpoint(path).verify()
                        return path
        events.append(
            self._directory, "not_rewound", f"the run goes on after the spike: {problem}", step=step
        )
        return None

    def _record(self, path: Path) -> None:
        """The later checkpoints go first: if the run is killed then, it meets the same spike again."""
        for later in checkpoints(path.parent):
            if later > path:
                (later / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(later)
        files.write_json(self._directory / FILE, self.as_json())
        self._report()

    def _report(self) -> None:
        """Append the event of each rewind that has none: a start that was killed may have left one out."""
        reported = sum(event["kind"] == "rewound" for event in events.read(self._directory))
        for number, each in enumerate(self._all[reported:], reported + 1):
            text = (
                f"back to {step_directory(Path(), each.to_step)}, from before the loss spike; the batches of "
                f"steps {each.to_step + 1} to {each.from_step} are skipped ({number} of at most {self._most} "
                "times: checkpoint.max_rewinds)"
            )
            events.append(self._directory, "rewound", text, step=each.from_step, to_step=each.to_step)


def read(directory: Path) -> list[dict[str, Any]]:
    """The rewinds of the run in this directory. Raises `files.DamagedFile`."""
    file = directory / FILE
    if not file.is_file():
        return []
    try:
        found = [asdict(Rewind(**each)) for each in files.read_json(file)]
        if all(isinstance(step, int) for each in found for step in each.values()):
            return found
        problem = "a step that is no whole number"
    except (files.DamagedFile, TypeError) as error:
        problem = str(error).removeprefix(f"{file}: ")
    raise files.DamagedFile(f"{file}: {problem}; delete it: the checkpoints name the rewinds too")
