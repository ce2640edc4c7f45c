"""Which model to evaluate: a Hugging Face directory, or a run, exported first where needed. No torch."""

from dataclasses import dataclass
from pathlib import Path

from cluster import runs
from cluster.cli import UserError
from training.evaluate.config import NEWEST
from training.model import shapes
from training.model.shapes import LlamaShape

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Subject:
    """A model to evaluate.

    Attributes:
        directory: of Hugging Face's layout.
        name: the run's, or the directory's.
        run: the run directory that it is the export of, if any.
        stale: it has to be exported first.
    """

    directory: Path
    name: str
    run: Path | None = None
    stale: bool = False

    def describe(self) -> str:
        """One line for people."""
        return f"{self.directory}{', exported first' if self.stale else ''}"


def find(model: str) -> Subject:
    """The model that the key `model` names. Changes nothing. Raises `UserError`: there is no such model."""
    if model == NEWEST:
        return _of_run(runs.newest(key="model", instead="or name a Hugging Face LLaMA directory"))
    for directory in (Path(model).expanduser().absolute(), (runs.OUTPUTS / model).absolute()):
        if (directory / "config.json").is_file():
            run = directory.parent
            if directory.name == runs.EXPORT and runs.last_trained(run):
                return Subject(directory, run.name, run=run)  # as it is, even if the run has gone on
            return Subject(directory, directory.name)
        if runs.is_run(directory):
            return _of_run(directory)
    raise runs.unknown(model, key="model")


def named(model: str) -> Subject | None:
    """The run under `outputs/` that has this very name, if there is one. Changes nothing."""
    return next((_of_run(run) for run in runs.in_folder() if run.name == model), None)


def update(subject: Subject) -> None:
    """Export the run again if it is stale. Raises `UserError`: it cannot be exported."""
    if subject.stale:
        from training.model.export import export

        assert subject.run is not None
        export(subject.run, dtype="bfloat16")


def check(subject: Subject) -> LlamaShape:
    """The model's shape. Raises `UserError`: it is none of ours, or has no tokenizer."""
    try:
        shape = shapes.resolve(subject.directory)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    for name in TOKENIZER_FILES:
        if not (subject.directory / name).is_file():
            raise UserError(
                f"model: {subject.directory / name} is missing; copy it there with the checkpoint"
            )
    return shape


def _of_run(run: Path) -> Subject:
    return Subject(run / runs.EXPORT, run.name, run=run, stale=runs.is_stale(run))
