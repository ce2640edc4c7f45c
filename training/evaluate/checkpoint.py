"""Which checkpoint to evaluate: a Hugging Face directory, or a run, exported first where needed. No torch."""

from dataclasses import dataclass
from pathlib import Path

from cluster import runs
from cluster.cli import UserError
from training.evaluate.config import NEWEST
from training.model import shapes
from training.model.shapes import LlamaShape

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class HfCheckpoint:
    """A checkpoint in Hugging Face's layout.

    Attributes:
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

    def export_if_stale(self) -> None:
        """Export the run again if it is stale. Raises `UserError`: it cannot be exported."""
        if self.stale:
            from training.export import export

            assert self.run is not None
            export(self.run, dtype="bfloat16")

    def shape(self) -> LlamaShape:
        """The model's shape. Raises `UserError`: an unsupported model, or no tokenizer."""
        try:
            shape = shapes.resolve(self.directory)
        except ValueError as error:
            raise UserError(f"model: {error}") from error
        for name in TOKENIZER_FILES:
            if not (self.directory / name).is_file():
                raise UserError(
                    f"model: {self.directory / name} is missing; copy it there with the checkpoint"
                )
        return shape


def find(model: str) -> HfCheckpoint:
    """The checkpoint that the key `model` names. Changes nothing. Raises `UserError`: there is none."""
    if model == NEWEST:
        return _of_run(runs.newest(key="model", instead="or name a Hugging Face LLaMA directory"))
    for directory in (Path(model).expanduser().absolute(), (runs.OUTPUTS / model).absolute()):
        if (directory / "config.json").is_file():
            run = directory.parent
            if directory.name == runs.EXPORT and runs.last_trained(run):
                return HfCheckpoint(directory, run.name, run=run)  # as it is, even if the run has gone on
            return HfCheckpoint(directory, directory.name)
        if runs.is_run(directory):
            return _of_run(directory)
    raise runs.unknown(model, key="model")


def named(model: str) -> HfCheckpoint | None:
    """The checkpoint of the run under `outputs/` with exactly this name, if there is one. Changes nothing."""
    return next((_of_run(run) for run in runs.in_folder() if run.name == model), None)


def _of_run(run: Path) -> HfCheckpoint:
    return HfCheckpoint(run / runs.EXPORT, run.name, run=run, stale=runs.is_stale(run))
