"""A run's checkpoint as a Hugging Face LLaMA directory: `python -m training.export RUN`.

Needs neither GPU nor Ray: it reads the run directory and the prepared data (for the tokenizer), nothing else.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster import cli, runs
from cluster.cli import UserError
from training import config as training_config
from training.config import RunConfig, TrainConfig
from training.data.dataset import MANIFEST_FILE, DataError, Manifest, sha256_of
from training.model.hf import save_hf
from training.model.shapes import LlamaShape, RopeScaling
from training.run import checkpoint
from training.run.checkpoint import Checkpoint

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CONFIG_FILE = "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    options = _parser().parse_args(arguments)

    def body() -> None:
        run = find_run(options.run)
        print(export(run, output=options.output, step=options.step, dtype=options.dtype).describe())

    return cli.run(body)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=(
            "Write a checkpoint of a run as a Hugging Face LLaMA directory (config.json, model.safetensors,\n"
            "tokenizer), which transformers, vLLM and training.model.llama load. The directory appears\n"
            "whole or not at all, and replaces an earlier export."
        ),
        epilog="examples:\n  python -m training.export first-light\n"
        "  python -m training.export outputs/first-light --step 200 --dtype float32 --output /tmp/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", metavar="RUN", help=f"a run directory, or the name of one under {RunConfig().directory}/"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: <run>/export")
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint to take; default: the newest complete one"
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="bfloat16",
        help="bfloat16 (default): the master weights rounded, which is exactly what bf16 training computed "
        "with; float32: the master weights themselves",
    )
    return parser


@dataclass(frozen=True)
class Export:
    """What was written, and from what. `precision` is that of the run (`precision` in its config)."""

    directory: Path
    num_parameters: int
    dtype: str
    precision: str
    step: int

    def describe(self) -> str:
        """One line for people."""
        origin = "the fp32 master weights"
        if self.dtype == "bfloat16":
            origin = "as trained" if self.precision == "bf16" else "rounded: the run trained in fp32"
        return (
            f"{self.directory}: {self.num_parameters:,} parameters, {self.dtype} ({origin}), step {self.step}"
        )


def find_run(name_or_path: str) -> Path:
    """The run directory of a path, or else of a run's name under `outputs/`. Raises `UserError`."""
    outputs = Path(RunConfig().directory)
    candidates = [Path(name_or_path).expanduser().absolute(), (outputs / name_or_path).absolute()]
    for directory in candidates:
        if (directory / CONFIG_FILE).is_file():
            return directory
    there = ", ".join(sorted(file.parent.name for file in outputs.glob(f"*/{CONFIG_FILE}"))) or "none"
    searched = " nor ".join(map(str, dict.fromkeys(candidates)))
    raise UserError(
        f"{name_or_path}: no such run: no {CONFIG_FILE} in {searched}; runs in {outputs}/: {there}"
    )


def export(run: Path, *, output: Path | None = None, step: int | None = None, dtype: str) -> Export:
    """Write the checkpoint of `step` (None: the newest complete one) to `output` (None: `<run>/export`).

    Model and data are those that the checkpoint names; the run's config.yaml says only where data is kept.

    Args:
        dtype: a key of `DTYPES`.

    Raises:
        UserError: no such checkpoint, a damaged one, the data's tokenizer is gone, or `output` cannot be
            written.
        ConfigError: config.yaml cannot be used.
    """
    config = training_config.load(file=run / CONFIG_FILE)
    saved = Checkpoint(_checkpoint_directory(run / "checkpoints", step=step))
    shape = _shape(saved.state["identity"]["model"])
    directory = (output.expanduser() if output else run / "export").absolute()
    data, manifest = find_data(config, fingerprint=saved.state["identity"]["data fingerprint"], run=run)
    try:
        save_hf(
            directory,
            shape=shape,
            tensors=_masters(saved, shape),
            dtype=DTYPES[dtype],
            tokenizer_file=data / manifest.tokenizer_file,
            eos_id=manifest.end_of_text_id,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{directory}: cannot be written ({reason}); free space there or choose another --output"
        ) from error
    return Export(directory, shape.num_parameters, dtype, config.precision, saved.state["step"])


def find_data(config: TrainConfig, *, fingerprint: str, run: Path) -> tuple[Path, Manifest]:
    """The prepared folder under `data.directory` with this fingerprint, its tokenizer intact.

    The fingerprint covers the tokenizer, so of several such folders any will do; the first by name is taken.

    Raises:
        UserError: there is none.
    """
    root = Path(config.data.directory).expanduser().absolute()
    unusable = []
    for file in sorted(root.glob(f"[!.]*/{MANIFEST_FILE}")):  # the dot: folders half-written by prepare
        try:
            manifest = Manifest.read(file.parent)
        except DataError as error:
            unusable.append(f"; {error}")
            continue
        if manifest.fingerprint == fingerprint:
            tokenizer = file.parent / manifest.tokenizer_file
            if tokenizer.is_file() and sha256_of(tokenizer) == manifest.tokenizer_sha256:
                return file.parent, manifest
            unusable.append(f"; {tokenizer} is missing or corrupt")
    raise UserError(
        f"{root}: holds no usable prepared data with the run's fingerprint {fingerprint[:12]}…, whose "
        f"tokenizer the export needs; start in the folder where the run was started, or make it again with "
        f"`python -m training.data.prepare --config {run / CONFIG_FILE}`{''.join(unusable)}"
    )


def _checkpoint_directory(root: Path, *, step: int | None) -> Path:
    if step is None:
        newest = checkpoint.newest_complete(root, report=lambda note: print(note, file=sys.stderr))
        if newest is None:
            raise UserError(f"{root}: no complete checkpoint; train until the first one is written")
        return newest
    complete = {int(path.name.removeprefix("step-")): path for path in runs.complete_checkpoints(root)}
    if step not in complete:
        steps = ", ".join(map(str, sorted(complete))) or "none"
        raise UserError(f"--step {step}: no complete checkpoint of that step in {root}; there are: {steps}")
    return complete[step]


def _shape(fields: dict[str, Any]) -> LlamaShape:
    scaling = fields["rope_scaling"]
    return LlamaShape(**fields | {"rope_scaling": RopeScaling(**scaling) if scaling else None})


def _masters(saved: Checkpoint, shape: LlamaShape) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 master weights in their shape), one parameter in memory at a time."""
    for name, size in shape.parameters().items():
        yield name, saved.read(name, "master", 0, math.prod(size)).view(size)


if __name__ == "__main__":
    sys.exit(main())
