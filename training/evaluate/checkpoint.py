"""Which model to evaluate: a Hugging Face directory, or a run, exported first if needed. No torch."""

from cluster import runs
from cluster.cli import UserError
from cluster.runs import ModelDirectory
from training.model import shapes
from training.model.shapes import LlamaShape

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def find(model: str) -> ModelDirectory:
    """The model that the key `model` names. Changes nothing. Raises `UserError`: there is no such model."""
    return runs.find(model, key="model", instead="or name a Hugging Face LLaMA directory")


def named(model: str) -> ModelDirectory | None:
    """The run under `outputs/` with exactly this name, if there is one. Changes nothing."""
    return next((runs.of_run(run) for run in runs.in_folder() if run.name == model), None)


def export_if_stale(model: ModelDirectory) -> None:
    """Export the run again if it is stale. Raises `UserError`: it cannot be exported."""
    if model.stale:
        from training.run.export import export

        assert model.run is not None
        export(model.run, dtype="bfloat16")


def shape_of(model: ModelDirectory) -> LlamaShape:
    """The model's shape. Raises `UserError`: an unsupported model, or no tokenizer."""
    try:
        shape = shapes.resolve(model.directory)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    for name in TOKENIZER_FILES:
        if not (model.directory / name).is_file():
            raise UserError(f"model: {model.directory / name} is missing; copy it there with the checkpoint")
    return shape
