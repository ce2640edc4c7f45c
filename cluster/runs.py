"""Which runs there are, and how far they are: what training leaves, and serving and evaluation find."""

from pathlib import Path

from cluster.cli import UserError

OUTPUTS = Path("outputs")
EXPORT = "export"  # in a run directory: the Hugging Face checkpoint


def in_folder(outputs: Path = OUTPUTS) -> list[Path]:
    """Absolute paths of the runs in a folder that have a complete checkpoint, or an export of one."""
    candidates = (path.absolute() for path in outputs.glob("*") if path.is_dir())
    return [run for run in candidates if is_run(run)]


def newest(*, key: str, instead: str) -> Path:
    """The run under OUTPUTS that was last trained or exported.

    Args:
        key: of the configuration that asks for it.
        instead: what else can be done than training one, for the message.

    Raises:
        UserError: there is none.
    """
    there = in_folder()
    if not there:
        raise UserError(
            f"{key}: no run with a complete checkpoint in {OUTPUTS.absolute()}; train one with `make train`, "
            f"{instead}"
        )
    return max(there, key=newest_at)


def unknown(name: str, *, key: str) -> UserError:
    """That `key` names neither a checkpoint nor a run, and which runs there are."""
    there = ", ".join(sorted(run.name for run in in_folder())) or "none"
    return UserError(
        f"{key}: {name!r} is neither a Hugging Face directory with a config.json nor a run with a complete "
        f"checkpoint; runs in {OUTPUTS.absolute()}: {there}; train one with `make train`"
    )


def is_run(directory: Path) -> bool:
    """Whether there is a complete checkpoint, or an export of one."""
    return newest_at(directory) > 0


def is_stale(run: Path) -> bool:
    """Whether the run has gone on since it was exported, or was never."""
    return last_exported(run) < last_trained(run)


def newest_at(run: Path) -> float:
    """When it was last trained or exported, in seconds since the epoch; 0 without either."""
    return max(last_trained(run), last_exported(run))


def last_trained(run: Path) -> float:
    """When its newest complete checkpoint was marked so, in seconds since the epoch; 0 without one."""
    return max((mark.stat().st_mtime for mark in run.glob("checkpoints/step-*/COMPLETE")), default=0.0)


def last_exported(run: Path) -> float:
    """When its export was written, in seconds since the epoch; 0 without one."""
    file = run / EXPORT / "config.json"
    return file.stat().st_mtime if file.is_file() else 0.0
