"""A run's checkpoint as a Hugging Face LLaMA directory; `training.export` is the command, serving calls it.

Reads the run directory alone, unless the tokenizer in it is damaged: then that of the prepared data. Needs
neither GPU nor Ray.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from cluster import runs
from cluster.cli import UserError
from cluster.files import sha256_of
from cluster.record import origins
from cluster.runs import CONFIG_FILE
from training import config as training_config
from training.config import TrainConfig
from training.data.dataset import MANIFEST_FILE, DataError, Manifest
from training.model import rope
from training.model.hf import save_hf
from training.model.shapes import LlamaShape
from training.run import checkpoint
from training.run.checkpoint import Checkpoint
from training.run.start import TOKENIZER


@dataclass(frozen=True)
class Export:
    """What was written, and from what. `precision` is that of the run (`precision` in its config)."""

    directory: Path
    num_parameters: int
    dtype: str
    precision: str
    step: int
    averaged: bool

    def describe(self) -> str:
        """One line for people."""
        origin = f"{'the averages of ' * self.averaged}the fp32 master weights"
        if self.dtype == "bfloat16" and self.averaged:
            origin += ", rounded"
        elif self.dtype == "bfloat16":
            origin = "as trained" if self.precision == "bf16" else "rounded: the run trained in fp32"
        return (
            f"{self.directory}: {self.num_parameters:,} parameters, {self.dtype} ({origin}), step {self.step}"
        )


def export(
    run: Path,
    *,
    output: Path | None = None,
    step: int | None = None,
    dtype: str,
    averaged: bool = False,
) -> Export:
    """Write the checkpoint of `step` (None: the newest complete one) to `output` (None: `<run>/export`).

    Model and data are those that the checkpoint names; the run's config.yaml says only where data is kept.

    Args:
        dtype: 'bfloat16' or 'float32'.
        averaged: the averages of the weights (`optim.average_decay`) in place of the weights.

    Raises:
        UserError: no such checkpoint, a damaged one, the data's tokenizer is gone, or `output` cannot be
            written.
        ConfigError: config.yaml cannot be used.
    """
    config = training_config.load(file=run / CONFIG_FILE)
    if averaged and not config.optim.average_decay:
        raise UserError(
            f"--averaged: {run} has no averaged weights; a run keeps them with optim.average_decay"
        )
    saved = Checkpoint(_checkpoint_directory(run / "checkpoints", step=step))
    shape = _shape(saved.state["identity"]["model"])
    directory = (output.expanduser() if output else run / "export").absolute()
    fingerprint = saved.state["identity"]["data fingerprint"]
    kept, _ = _search([run / TOKENIZER / MANIFEST_FILE], fingerprint)
    data, manifest = kept or find_data(config, fingerprint=fingerprint, run=run)
    try:
        save_hf(
            directory,
            shape=shape,
            tensors=_tensors(saved, shape, "average" if averaged else "master"),
            dtype=getattr(torch, dtype),
            tokenizer_file=data / manifest.tokenizer_file,
            eos_id=manifest.end_of_text_id,
            bos_id=next(iter(Tokenizer.from_file(str(data / manifest.tokenizer_file)).encode("").ids), None),
            checkpoint=origins.of_checkpoint(saved.path),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{directory}: cannot be written ({reason}); free space there or choose another --output"
        ) from error
    return Export(directory, shape.num_parameters, dtype, config.precision, saved.state["step"], averaged)


def find_data(config: TrainConfig, *, fingerprint: str, run: Path) -> tuple[Path, Manifest]:
    """The prepared folder under `data.directory` with this fingerprint, its tokenizer intact.

    The fingerprint covers the tokenizer, so of several such folders any will do; the first by name is taken.

    Raises:
        UserError: there is none.
    """
    root = Path(config.data.directory).expanduser().absolute()
    found, unusable = _search(sorted(root.glob(f"[!.]*/{MANIFEST_FILE}")), fingerprint)  # "." is half-written
    if found is None:
        raise UserError(
            f"{root}: holds no usable prepared data with the run's fingerprint {fingerprint[:12]}…; run this "
            f"where the run was started, or prepare the data with `python -m training.data.prepare --config "
            f"{run / CONFIG_FILE}`{''.join(unusable)}"
        )
    return found


def _search(manifests: Iterable[Path], fingerprint: str) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """The first folder with this fingerprint whose tokenizer is intact; why others are not usable."""
    unusable = []
    for file in manifests:
        try:
            manifest = Manifest.read(file.parent)
        except DataError as error:
            unusable.append(f"; {error}")
            continue
        if manifest.fingerprint == fingerprint:
            tokenizer = file.parent / manifest.tokenizer_file
            if tokenizer.is_file() and sha256_of(tokenizer) == manifest.tokenizer_sha256:
                return (file.parent, manifest), unusable
            unusable.append(f"; {tokenizer} is missing or corrupt")
    return None, unusable


def _checkpoint_directory(root: Path, *, step: int | None) -> Path:
    if step is None:
        newest = checkpoint.newest_sound(root, report=lambda note: print(note, file=sys.stderr))
        if newest is None:
            raise UserError(f"{root}: no complete checkpoint; train until the first one is written")
        return newest
    complete = {checkpoint.step_of(path): path for path in runs.complete_checkpoints(root)}
    if step not in complete:
        steps = ", ".join(map(str, sorted(complete))) or "none"
        raise UserError(f"--step {step}: no complete checkpoint of that step in {root}; there are: {steps}")
    Checkpoint(complete[step]).verify()
    return complete[step]


def _shape(fields: dict[str, Any]) -> LlamaShape:
    return LlamaShape(**fields | {"rope_scaling": rope.from_fields(fields["rope_scaling"])})


def _tensors(saved: Checkpoint, shape: LlamaShape, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 masters or averages in their shape), one parameter in memory at a time."""
    for name, size in shape.parameters().items():
        yield name, saved.read(name, kind, 0, math.prod(size)).view(size)
