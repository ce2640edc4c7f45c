"""The record of a command that measures or computes once: a bench, a report, a preflight.

Such a command writes its own files. Its record gives them a run directory, and W&B the same result: summary,
tables, pictures and the files themselves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.record.origins import Origin
from cluster.record.record import Record

ColumnsAndRows = tuple[Sequence[str], Sequence[Sequence[Any]]]


def record_result(
    directory: Path,
    *,
    job_type: str,
    name: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    summary: Mapping[str, Any],
    wandb_mode: str,
    project: str = "asuncion",
    group: str | None = None,
    tags: Sequence[str] = (),
    inputs: Sequence[Mapping[str, Any]] = (),
    tables: Mapping[str, ColumnsAndRows] | None = None,
    images: Mapping[str, Path] | None = None,
    attachments: Sequence[Path] = (),
    outputs: Sequence[Origin] = (),
    same_run: bool = False,
    exit_code: int = 0,
) -> str:
    """Write a whole record at once, and wait for W&B within the bounds of `Mirror`. Returns W&B's status.

    Args:
        directory: the run directory; made if missing. If a file has its name, `.record` is appended.
        job_type, config, provenance, wandb_mode, project, name, tags, inputs: as in `Record.open`.
        group: in W&B; default: the job type.
        summary: JSON-ready; goes to `summary.json`.
        tables, images: what W&B shows, by name.
        attachments: files to keep in W&B.
        outputs: as in `Record.output`.
        same_run: continue the W&B run of the last time, for a report that is written again and again.
        exit_code: of the work, as W&B shows it.

    Raises:
        OSError: the directory cannot be written.
    """
    with Record.open(
        directory.with_name(f"{directory.name}.record") if directory.is_file() else directory,
        config=dict(config),
        provenance=dict(provenance),
        wandb_mode=wandb_mode,
        project=project,
        group=group or job_type,
        name=name,
        resume_step=0 if same_run else None,
        job_type=job_type,
        tags=tags,
        inputs=inputs,
    ) as record:
        for table, (columns, rows) in (tables or {}).items():
            record.table(table, columns, rows)
        for image, path in (images or {}).items():
            record.image(image, path)
        for path in attachments:
            record.file(path)
        for made in outputs:
            record.output(made)
        record.finish(dict(summary), exit_code=exit_code)
        return record.wandb_status
