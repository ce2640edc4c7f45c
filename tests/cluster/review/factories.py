"""Run directories for the tests of this room, written by the real record."""

import json
import os
from pathlib import Path

from cluster.record.record import Record

CONFIG = """\
precision: fp32
run:
  name: {name}
  seed: {seed}
batch:
  tokens: 100
schedule:
  tokens: {tokens}
optim:
  matrix:
    rule: {rule}
    lr: 0.02
"""


def open_record(directory, *, resume_step=None, changes=None):
    return Record.open(
        directory,
        config={},
        provenance={"commit": "0123456789abcdef", "dirty": False, "config_changes": changes},
        wandb_mode="disabled",
        project="asuncion",
        group=None,
        name=directory.name,
        resume_step=resume_step,
    )


def row(step, *, loss=None, **more):
    """A row as training writes it, every second one with a validation loss."""
    loss = 5 - step / 10 if loss is None else loss
    held_out = {} if step % 2 else {"validation_loss": loss + 0.1}
    rates = {"step_seconds": 0.5, "tokens_per_second": 200.0, "mfu": None}
    learning = {"gradient_norm": 1.0, "lr": 0.02, "lr_vector": 0.003, "skipped_steps": 0}
    return {"step": step, "tokens": 100 * step, "loss": loss, **learning, **rates, **held_out, **more}


def make_run(directory: Path, rows, *, finish=True, seed=1, rule="muon", num_steps=10, changes=None) -> Path:
    """A run directory with these rows; with a summary if `finish`."""
    rows = list(rows)
    with open_record(directory, changes=changes) as record:
        config = CONFIG.format(name=json.dumps(directory.name), seed=seed, rule=rule, tokens=100 * num_steps)
        (directory / "config.yaml").write_text(config)
        for each in rows:
            record.log(each)
        if finish:
            last = rows[-1]
            held_out = [each["validation_loss"] for each in rows if "validation_loss" in each]
            record.finish(
                {
                    **{name: last[name] for name in ("step", "tokens")},
                    "validation_loss": held_out[-1],
                    "wall_seconds": 12.0,
                    "num_parameters": 1_420_000,
                    "samples": {"Returns a list of": "Returns a list of <b>results</b>"},
                    "training_seconds": 9.5,
                }
            )
    return directory


def age(directory: Path, seconds: float) -> None:
    """Make the files of a run look as old as that."""
    for file in directory.iterdir():
        then = file.stat().st_mtime - seconds
        os.utime(file, (then, then))
