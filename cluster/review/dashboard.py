"""`make dashboard`: the team's W&B workspaces, and reports of studies and parities, made from code.

    python -m cluster.review.dashboard [--entity TEAM] [--project asuncion] [--report FOLDER ...]

With a W&B key it saves them to the project; the same command again updates the same ones, and replaces what
people have changed in them by hand. Without a key it writes each as a JSON file.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster.cli import RunError, UserError
from cluster.masking import mask
from cluster.record import wandb_mirror

MODES = ("auto", "offline", "online")
VIEWS_BY_NAME = """
query Views($entity: String, $project: String, $type: String, $name: String) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: $type, viewName: $name, first: 500) {
      edges { node { id name displayName description } }
    }
  }
}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.review.dashboard", description=__doc__.splitlines()[0], epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--entity", help="team or user in W&B (default: the key's own)")
    parser.add_argument("--project", default="asuncion", help="project in W&B (default: asuncion)")
    parser.add_argument(
        "--report", type=Path, action="append", default=[], metavar="FOLDER",
        help="also a W&B report of this study or parity, such as outputs/study; may be repeated",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("outputs/dashboard"), metavar="FOLDER",
                        help="for the JSON files (default: outputs/dashboard)")  # fmt: skip
    parser.add_argument("--wandb", choices=MODES, default="auto", help="default: auto, online with a key")
    parser.add_argument("--dry-run", action="store_true", help="list the views and their panels, and stop")
    options = parser.parse_args(arguments)

    def body() -> None:
        require_package()
        if options.dry_run:
            print("\n".join(describe()))
        elif _online(options.wandb):
            save(entity=options.entity, project=options.project, reports=options.report)
        else:
            write(options.output, entity=options.entity, project=options.project, reports=options.report)

    return cli.run(body)


def require_package() -> None:
    """Raises `UserError` if wandb-workspaces is not there."""
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "wandb-workspaces is not installed; it is the optional extra `review`: "
            ".venv/bin/pip install --constraint constraints.txt --editable '.[review]'"
        ) from error


def describe() -> list[str]:
    """A line for each view, and for each of its sections the panels' titles."""
    from cluster.review import views

    lines = []
    for view in views.VIEWS:
        lines.append(f"{view.title} (asuncion{view.slug}); runs: {', '.join(view.job_types) or 'all'}")
        for section in view.sections():
            titles = [getattr(panel, "title", None) or _kind(panel) for panel in section.panels]
            lines.append(f"  {section.name}: {'; '.join(titles)}")
    return lines


def _kind(panel: Any) -> str:
    """What a panel without a title is, for people."""
    table = getattr(panel, "table_name", None)
    return f"table {table}" if table else "text" if hasattr(panel, "markdown") else "all runs' differences"


def write(folder: Path, *, entity: str | None, project: str, reports: Sequence[Path]) -> None:
    """Write what `save` would send, as `view-<name>.json` and `report-<folder>.json`, and say what to do."""
    from cluster.review import views, wandb_reports

    built = {f"report-{path.name}": wandb_reports.build(path, project=project) for path in reports}
    folder.mkdir(parents=True, exist_ok=True)
    for view in views.VIEWS:
        workspace = views.build(view, entity=entity or "", project=project)
        files.write_json(folder / f"view-{view.slug}.json", spec_of(workspace))
    for name, report in built.items():
        files.write_json(folder / f"{name}.json", spec_of(report))
    print(f"{len(views.VIEWS)} views and {len(built)} reports: {folder}")
    print(
        "They are not in W&B: no key was found, or its mode is offline. To save them, run `.venv/bin/wandb "
        "login` or set WANDB_API_KEY, then run `make dashboard` again"
    )


def spec_of(made: Any) -> dict[str, Any]:
    """What W&B stores of a workspace or a report."""
    found: dict[str, Any] = json.loads(
        made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    )
    return found


def save(*, entity: str | None, project: str, reports: Sequence[Path]) -> None:
    """Save every view and report to W&B, under the names they had before if they were saved before.

    Raises:
        RunError: W&B refuses, or cannot be reached; the message names entity and project.
        UserError: a folder holds no study and no parity.
    """
    import wandb

    from cluster.review import views, wandb_reports

    for folder in reports:
        wandb_reports.read(folder)  # a wrong folder is an error before anything is saved
    wandb.setup(settings=wandb.Settings(silent=True))
    with _asking("W&B", "Check the key (`.venv/bin/wandb login --relogin`) and WANDB_BASE_URL"):
        api = wandb.Api()
        entity = entity or api.default_entity
    if not entity:
        raise UserError("--entity: this W&B key has no team or user of its own; name one")
    place = f"{entity}/{project}"
    remedy = "What is listed above is saved. Ask for the right to write there, or name another --entity"
    with _asking(place, remedy):
        for view in views.VIEWS:
            workspace = views.build(view, entity=entity, project=project)
            found = _find(api, place, "project-view", name=workspace._internal_name)
            workspace._internal_id = found["id"] if found else ""
            print(f"{'updated' if found else 'made':<8} {view.title:<24} {workspace.save().url}", flush=True)
        for folder in reports:
            report = wandb_reports.build(folder, entity=entity, project=project)
            found = _find(api, place, "runs", displayName=report.title, description=report.description)
            report.id = found["id"] if found else ""
            print(f"{'updated' if found else 'made':<8} {report.title:<24} {report.save().url}", flush=True)


def _find(api: Any, place: str, kind: str, **wanted: str) -> dict[str, Any] | None:
    """The view of this kind in the project whose fields have these values, or None.

    Raises:
        RunError: the project is not there.
    """
    from wandb_workspaces._graphql import execute_graphql

    entity, _, project = place.partition("/")
    variables = {"entity": entity, "project": project, "type": kind, "name": wanted.get("name")}
    answer = execute_graphql(api, VIEWS_BY_NAME, variables)["project"]
    if answer is None:
        raise RunError(
            f"W&B shows this key no project {place}; name an existing one with --entity and --project. "
            "The first run that is online, or `make sync`, makes it"
        )
    nodes = [edge["node"] for edge in answer["allViews"]["edges"]]
    return next((node for node in nodes if all(node[name] == value for name, value in wanted.items())), None)


@contextmanager
def _asking(what: str, remedy: str) -> Iterator[None]:
    """Turn a refusal of W&B into one message."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError) as error:
        reason = " ".join(mask(str(error)).split())[:300].rstrip(".")
        raise RunError(f"{what}: {reason}. {remedy}, then run the command again") from error


def _online(mode: str) -> bool:
    """Whether to save. auto: a key or a login is there."""
    if mode != "auto":
        return mode == "online"
    return wandb_mirror.auto_mode() == "online"


if __name__ == "__main__":
    sys.exit(main())
