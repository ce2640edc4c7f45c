"""Finds runs and their checkpoints: the only code that searches `outputs/`.

find("newest", key="model", instead="or name ...")     what to serve or evaluate: a run or a HF directory
directory_of("first-light")                            a run directory, also one without a checkpoint
named("first-light", fits=..., lacks="no ...")         any path, or any name in outputs/
in_folder()                                            all runs with a complete checkpoint or an export
complete_checkpoints(run / "checkpoints")              step folders that are whole, the oldest first
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.cli import UserError

OUTPUTS = Path("outputs")
CONFIG_FILE = "config.yaml"  # in a run directory: the resolved configuration
EXPORT = "export"  # in a run directory: the Hugging Face checkpoint
COMPLETE = "COMPLETE"  # in a checkpoint: the file that is written last
NEWEST = "newest"


@dataclass(frozen=True)
class ModelDirectory:
    """A model that a key names.

    Attributes:
        directory: in Hugging Face's layout; missing or outdated if `stale`.
        name: the run's, or the directory's.
        run: the run directory that it is the export of, if any.
        stale: the run has to be exported first.
    """

    directory: Path
    name: str
    run: Path | None = None
    stale: bool = False

    def describe(self) -> str:
        """One line for people."""
        return f"{self.directory}{', exported first' if self.stale else ''}"


def find(model: str, *, key: str, instead: str) -> ModelDirectory:
    """The model that `model` names: NEWEST, a Hugging Face directory, a run directory, or a run's name.

    Args:
        key: of the configuration that names it, for messages.
        instead: what can be done instead of training a run, for the message that there is none.

    Raises:
        UserError: there is no such model, or no run at all; the message lists the runs.
    """
    if model == NEWEST:
        return of_run(_newest(key=key, instead=instead))
    for directory in _places(model):
        if (directory / "config.json").is_file():
            run = directory.parent
            if directory.name == EXPORT and _last_trained(run):
                return ModelDirectory(directory, run.name, run=run)  # as it is, even if the run has gone on
            return ModelDirectory(directory, directory.name)
        if _newest_at(directory):
            return of_run(directory)
    there = ", ".join(sorted(run.name for run in in_folder())) or "none"
    raise UserError(
        f"{key}: {model!r} is neither a Hugging Face directory with a config.json nor a run with a complete "
        f"checkpoint; runs in {OUTPUTS.absolute()}: {there}; train one with `make train`"
    )


def directory_of(run: str) -> Path:
    """The run directory of a path, or else of a run's name in OUTPUTS. Raises `UserError`."""
    has_config = lambda place: (place / CONFIG_FILE).is_file()  # noqa: E731
    return named(run, fits=has_config, lacks=f"no such run: no {CONFIG_FILE}")


def named(name: str, *, fits: Callable[[Path], bool], lacks: str) -> Path:
    """The path of that name, or else the one of that name in OUTPUTS.

    Args:
        fits: whether a path is what is looked for.
        lacks: for the message, before "in" and the places.

    Raises:
        UserError: neither fits; the message lists what there is in OUTPUTS.
    """
    places = dict.fromkeys(_places(name))
    if name and (place := next(filter(fits, places), None)):
        return place
    there = ", ".join(sorted(path.name for path in OUTPUTS.glob("*") if fits(path))) or "none"
    searched = " nor ".join(map(str, places))
    raise UserError(f"{name or 'RUN'}: {lacks} in {searched}; in {OUTPUTS}/ there are: {there}")


def of_run(run: Path) -> ModelDirectory:
    """The export of a run; stale if the run was never exported or has trained on since."""
    return ModelDirectory(run / EXPORT, run.name, run=run, stale=_last_exported(run) < _last_trained(run))


def in_folder(outputs: Path = OUTPUTS) -> list[Path]:
    """Absolute paths of the runs in a folder that have a complete checkpoint, or an export of one."""
    candidates = (path.absolute() for path in outputs.glob("*") if path.is_dir())
    return [run for run in candidates if _newest_at(run)]


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root`, half-written ones too, the oldest first; no copy that a user made."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def complete_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root` that are marked complete, the oldest first."""
    return [path for path in checkpoints(root) if (path / COMPLETE).exists()]


def _places(name_or_path: str) -> tuple[Path, Path]:
    return Path(name_or_path).expanduser().absolute(), (OUTPUTS / name_or_path).absolute()


def _newest(*, key: str, instead: str) -> Path:
    there = in_folder()
    if not there:
        raise UserError(
            f"{key}: no run with a complete checkpoint in {OUTPUTS.absolute()}; train one with `make train`, "
            f"{instead}"
        )
    return max(there, key=_newest_at)


def _newest_at(run: Path) -> float:
    """When it was last trained or exported, in seconds since the epoch; 0 without either."""
    return max(_last_trained(run), _last_exported(run))


def _last_trained(run: Path) -> float:
    """When its newest complete checkpoint was marked so, in seconds since the epoch; 0 without one."""
    complete = complete_checkpoints(run / "checkpoints")
    return max(((path / COMPLETE).stat().st_mtime for path in complete), default=0.0)


def _last_exported(run: Path) -> float:
    """When its export was written, in seconds since the epoch; 0 without one."""
    file = run / EXPORT / "config.json"
    return file.stat().st_mtime if file.is_file() else 0.0
