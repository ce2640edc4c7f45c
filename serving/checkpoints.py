"""Which model to serve: a Hugging Face directory, or a run, which is exported first if needed. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import runs
from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.record import origins
from cluster.record.origins import Origin
from serving.config import ModelConfig
from serving.endpoint.chat import load_template
from serving.endpoint.text import TOKENIZER_FILE, load_tokenizer
from training.model import shapes
from training.model.chat_template import special_tokens
from training.model.shapes import LlamaShape
from training.model.stored import locate

INSTEAD = "name a Hugging Face directory, or use model.weights=random model.shape=llama-5m"


@dataclass(frozen=True)
class Served:
    """What to serve.

    Attributes:
        directory: of Hugging Face's layout; None for random weights.
        name: what clients call the model.
        stale_run: the run that `export_if_stale` must first write to `directory`, if any.
    """

    directory: Path | None
    name: str
    stale_run: Path | None = None


def find(config: ModelConfig) -> Served:
    """The model that `model.*` names. Changes nothing. Raises `UserError`: there is no such model."""
    if config.weights == "random":
        return Served(None, config.name or f"{Path(str(config.shape)).stem}-random")
    given = Path(config.path).expanduser()
    if given.is_file() or given.suffix == ".gguf":
        raise UserError(
            f"model.path: {config.path!r} is a file (GGUF and pickles are not read); give a directory with "
            "config.json and model.safetensors"
        )
    model = runs.find(config.path, key="model.path", instead=INSTEAD)
    return Served(model.directory, config.name or model.name, stale_run=model.run if model.stale else None)


def export_if_stale(served: Served, *, report: Callable[[str], None]) -> None:
    """Export the run if its export is missing or older than its newest checkpoint, and `report` that.

    Raises:
        UserError: the run cannot be exported; the message is the exporter's.
    """
    run = served.stale_run
    if run is None:
        return
    report(f"exporting {run}")
    from training.run.export import export  # needs torch

    try:
        export(run, dtype="bfloat16")
    except (UserError, ConfigError) as error:
        raise UserError(f"{run}: cannot be exported: {error}") from error


def origin_of(config: ModelConfig, served: Served) -> Origin:
    """Where the weights come from; of a stale run only after `export_if_stale`."""
    if served.directory is None:
        return origins.random_weights(str(config.shape))
    return origins.of_model(served.directory)


def check(config: ModelConfig, served: Served) -> LlamaShape:
    """The shape of a model that has been exported, all of whose files are what they should be.

    Of the weights only the headers are read.

    Raises:
        UserError: a file is missing, damaged, or of a model that we cannot serve.
    """
    shape = shape_of(config, served)
    if served.directory is not None:
        try:
            locate(served.directory, shape)
            shapes.eos_ids(served.directory, vocab_size=shape.vocab_size)
        except ValueError as error:
            raise UserError(f"model.path: {error}") from error
        tokenizer = load_tokenizer(served.directory)
        if (size := tokenizer.get_vocab_size()) > shape.vocab_size:
            problem = f"has {size} tokens, config.json only {shape.vocab_size}"
            raise UserError(f"model.path: {served.directory / TOKENIZER_FILE}: {problem}; copy both again")
        load_template(served.directory)
    return shape


def eos_ids(directory: Path) -> list[int]:
    """The tokens that end a text: those that the model's files name, and the tokenizer's own, as in vLLM.

    The two differ where somebody has tuned a model for chats and left its config.json as it was.

    Raises:
        ValueError, UserError: a file is damaged.
    """
    found, own = shapes.eos_ids(directory), special_tokens(directory).get("eos_token")
    token = None if own is None else load_tokenizer(directory).token_to_id(own)
    return found if token is None or token in found else [*found, token]


def shape_of(config: ModelConfig, served: Served) -> LlamaShape:
    """The shape of a model that has been exported. Raises `UserError`: we cannot serve it."""
    try:
        return shapes.resolve(served.directory or str(config.shape))
    except ValueError as error:
        key = "model.path" if served.directory else "model.shape"
        raise UserError(f"{key}: {error}") from error
