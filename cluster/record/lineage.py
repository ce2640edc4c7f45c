"""Where a result comes from: data, run, checkpoint, export; then evaluation, serving, baseline; then parity.

    python -m cluster.record.lineage RUN      (`make lineage RUN=...`)

RUN is a run, a checkpoint, an export, a folder of results, or a JSON file of results. Prints a tree: below
each thing what it was made from, and what of it cannot be found any more. `cluster.record.origins` reads it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster import cli, files, runs
from cluster.cli import UserError
from cluster.record import origins
from cluster.record.origins import Origin


def find(name: str) -> Origin:
    """The origin of what a path names, or a run's name under outputs/.

    Raises:
        UserError: there is no such thing, or its files are damaged; the message names them.
    """
    path = runs.named(name, fits=Path.exists, lacks="no such file or folder")
    try:
        return origins.checked(_of_path(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its lineage cannot be read ({type(error).__name__}: {error})") from error


def _of_path(path: Path) -> Origin:
    if path.is_file():
        return origins.of_results(path)
    if (path / origins.EXPORT_FILE).is_file():
        return origins.of_model(path)
    if (path / origins.STATE_FILE).is_file():
        return origins.of_checkpoint(path)
    if (path / origins.PROVENANCE_FILE).is_file():
        return origins.of_run(path, kind=_kind(path))
    if (path / "config.json").is_file():
        return origins.of_model(path)
    raise UserError(
        f"{path}: has none of {origins.PROVENANCE_FILE} (a run or results), {origins.STATE_FILE} "
        f"(a checkpoint), {origins.EXPORT_FILE} (an export); name a folder that has"
    )


def _kind(directory: Path) -> str:
    """By the job type that the record keeps; without one, by what the folder holds."""
    job = files.read_json(directory / origins.PROVENANCE_FILE).get("job_type")
    if job is None:
        marks = {"requests.jsonl": "serving", "report.html": "parity"}
        job = next((kind for mark, kind in marks.items() if (directory / mark).exists()), "run")
    return {"train": "run", "serve-bench": "serving"}.get(job, job)


def brief(made: Origin | None) -> str | None:
    """One line: the thing, and of what it was made from the run's commit and the data's fingerprint."""
    if made is None:
        return None
    made = origins.checked(made)
    facts = [f"{made['kind']} {made['name']}", *([f"step {made['step']}"] if made.get("step") else [])]
    for each in origins.flat([made]):
        if each["kind"] == "run":
            facts.append(f"run at commit {origins.short_commit(each)}")
        elif each["kind"] == "dataset" and each is not made:
            facts.append(f"data {(each['fingerprint'] or 'unknown')[:12]}")
    return ", ".join([*facts, *([made["note"]] if made.get("note") else [])])


def describe(made: Origin) -> str:
    """The chain as a tree: what was asked for first, below each thing what it was made from."""
    lines = _lines(made, root=made, first="", rest="")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _lines(made: Origin, *, root: Origin, first: str, rest: str) -> Iterator[str]:
    yield f"{first}{made['kind']} {made['name']}"
    bar = f"{rest}{'│' if made['inputs'] else ' '}  "
    yield from (f"{bar}{line}" for line in _facts(made))
    yield from (f"{bar}{line}" for line in (_held(made) if made is root else _missing(made, root)))
    for place, each in enumerate(made["inputs"]):
        last = place == len(made["inputs"]) - 1
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield from _lines(each, root=root, first=f"{rest}{branch}", rest=f"{rest}{below}")


def _facts(made: Origin) -> Iterator[str]:
    if where := made["path"] or made.get("url"):
        yield f"at {where}"
    done = [f"step {made['step']}"] if made.get("step") is not None and made["kind"] != "checkpoint" else []
    done += [made["hardware"]] if made.get("hardware") else []
    done += [f"commit {origins.short_commit(made)}"] if made["commit"] else []
    done += [made["time"].replace("T", " ").replace("+00:00", " UTC")] if made.get("time") else []
    if done:
        yield ", ".join(done)
    if made["fingerprint"]:
        of = f" (of {made['fingerprint_of']})" if made.get("fingerprint_of") else ""
        yield f"fingerprint {made['fingerprint'][:12]}{of}"
    if made.get("note"):
        yield made["note"]


def _held(made: Origin) -> Iterator[str]:
    """What a run directory holds that was made from it."""
    if made["kind"] == "run" and (directory := origins.place_of(made)):
        held = [path.name for path in runs.complete_checkpoints(directory / "checkpoints")]
        held += [name for name in (runs.EXPORT, "eval.json") if (directory / name).exists()]
        yield f"holds {', '.join(held) or 'no checkpoint and no export'}"


def _missing(made: Origin, root: Origin) -> Iterator[str]:
    """What cannot be found any more, and where its facts come from."""
    path, facts = origins.place_of(made), f"these facts are from {root['path'] or root['name']}"
    if made["kind"] == "run":
        yield from _run_missing(made, path, facts)
    elif path is None:
        return
    elif not path.exists():
        pruned = "pruned, " if made["kind"] == "checkpoint" else ""
        yield f"not there ({pruned}deleted, moved, or on another machine); {facts}"
    elif made["fingerprint"] not in (None, _fingerprint_at(path, made)):
        yield f"written anew since; {facts}"


def _run_missing(made: Origin, path: Path | None, facts: str) -> Iterator[str]:
    """A run is known by its id, so one that was moved or pulled is found under outputs/."""
    there = path is not None and (path / origins.PROVENANCE_FILE).is_file()
    if there and made.get("id") in (None, _run_id(path)):
        return
    held = sorted(file.parent for file in runs.OUTPUTS.glob(f"*/{origins.RUN_ID_FILE}"))
    if found := [run for run in held if made.get("id") and _run_id(run) == made["id"]]:
        yield f"its run directory here is {origins.short_path(found[0])}"
    elif there:
        yield f"another run has taken that directory since; {facts}"
    else:
        yield f"the run directory is not there (deleted, moved, or on another machine); {facts}"


def _run_id(directory: Path | None) -> str | None:
    file = Path(directory or "") / origins.RUN_ID_FILE
    return file.read_text().strip() if file.is_file() else None


def _fingerprint_at(path: Path, made: Origin) -> str | None:
    """The fingerprint of what is there now; the recorded one of a data set, which is checked when opened."""
    if made["kind"] not in ("checkpoint", "export", "model", "baseline", "evaluation"):
        return made["fingerprint"]
    try:
        return _of_path(path)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.record.lineage", description=__doc__.splitlines()[0], epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="a path, or the name of a run under outputs/")
    options = parser.parse_args(arguments)
    return cli.run(lambda: print(describe(find(options.run))))


if __name__ == "__main__":
    sys.exit(main())
