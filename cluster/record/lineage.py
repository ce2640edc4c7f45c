"""Where a result comes from: data, run, checkpoint, export; then evaluation, serving, baseline; then parity.

    python -m cluster.record.lineage RUN      (`make lineage RUN=...`)

RUN is a run, a checkpoint, an export, a folder of results, or a JSON file of results. Each of these holds its
own origin and, inside it, the origins of what it was made from. A copy of an export or of a baseline
therefore still names its run, commit and data, also where the run directory does not exist.

    run, results    provenance.json, `inputs`
    checkpoint      state.json, `lineage`
    export          lineage.json
    JSON results    `provenance`, `inputs`
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import cli, files, runs
from cluster.cli import UserError
from cluster.record.provenance import code_version

# The origin of one thing, JSON-ready: kind, name, path, fingerprint, commit, inputs, and what `origin` adds.
Origin = dict[str, Any]

EXPORT_FILE = "lineage.json"  # in an export
STATE_FILE = "state.json"  # in a checkpoint
PROVENANCE_FILE = "provenance.json"  # in a run directory and in a folder of results
RUN_ID_FILE = "wandb_run_id"
UPLOADABLE = ("dataset", "checkpoint", "export", "model", "baseline")  # kinds that are artifacts in W&B
OF_SHARDS = "state.json, which names the shards and their sizes; not the weights"
OF_SIZES = "config.json, names and sizes; not the weights"

_ALWAYS = ("kind", "name", "path", "fingerprint", "commit", "inputs")
_ROOT = Path(__file__).resolve().parents[2]


def origin(
    kind: str,
    name: str,
    *,
    path: Path | None = None,
    fingerprint: str | None = None,
    inputs: Iterable[Origin] = (),
    about: Mapping[str, Any] | None = None,
    **more: Any,
) -> Origin:
    """The origin of one thing.

    Args:
        kind: dataset, run, checkpoint, export, model (of others, or random), evaluation, serving, baseline,
            datasheet, parity, or another job type.
        path: where it is; kept relative to the project's folder if it lies inside.
        fingerprint: SHA-256, in hex.
        inputs: origins of what it was made from.
        about: from `provenance.collect`, of the command that made it: commit, dirty, time.
        more: step; id, of a run; fingerprint_of, where it is not of the whole content; note.
    """
    about = about or {}
    made: Origin = {
        "kind": kind,
        "name": name,
        "path": None if path is None else _short_path(path),
        "fingerprint": fingerprint,
        "commit": about.get("commit"),
        "dirty": about.get("dirty"),
        "time": about.get("time"),
        **more,
        "inputs": list(inputs),
    }
    return {key: value for key, value in made.items() if value is not None or key in _ALWAYS}


def of_dataset(folder: Path, fingerprint: str) -> Origin:
    """A prepared folder. `fingerprint`: its manifest's, which covers tokenizer and tokens."""
    return origin("dataset", folder.name, path=folder, fingerprint=fingerprint)


def of_run(directory: Path, *, kind: str = "run") -> Origin:
    """A run directory, or a folder of results. Without a provenance.json only its name is known.

    Raises:
        ValueError: provenance.json is damaged.
    """
    if not (directory / PROVENANCE_FILE).is_file():
        note = f"no {PROVENANCE_FILE} in it: its commit and data are unknown"
        return origin(kind, directory.name, path=directory, note=note)
    about = files.read_json(directory / PROVENANCE_FILE)
    run_id = directory / RUN_ID_FILE
    earlier = [_commit(start) for start in about.get("earlier_starts", [])]
    return origin(
        kind,
        directory.name,
        path=directory,
        about=about,
        id=run_id.read_text().strip() if run_id.is_file() else None,
        note=f"resumed {len(earlier)} times; earlier starts: {', '.join(earlier)}" if earlier else None,
        inputs=_inputs(about),
    )


def of_writer(run: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, in state.json: time, commit, and the run's origin as its input."""
    writer = of_run(run)
    about = {"time": _now(), "commit": writer["commit"], "dirty": writer.get("dirty")}
    return {**about, "inputs": [writer]}


def of_checkpoint(directory: Path) -> Origin:
    """A checkpoint of a run; one without `lineage` in its state takes it from the run directory around it.

    Raises:
        ValueError, OSError: state.json is damaged or missing.
    """
    content = (directory / STATE_FILE).read_bytes()
    state = files.read_json(directory / STATE_FILE)
    about = state.get("lineage")
    if about is None:
        run = of_run(directory.parent.parent)
        about = {"commit": run["commit"], "dirty": run.get("dirty"), "inputs": [run]}
    inputs = [_checked(each) for each in about["inputs"]]
    name = f"{inputs[0]['name']}/{directory.name}"
    return origin(
        "checkpoint", name, path=directory, about=about, inputs=inputs, step=state.get("step"),
        fingerprint=hashlib.sha256(content).hexdigest(), fingerprint_of=OF_SHARDS,
    )  # fmt: skip


def write_export(folder: Path, checkpoint: Origin, **about: Any) -> None:
    """Write lineage.json into a folder that holds the rest of an export of `checkpoint`.

    Its fingerprint is the SHA-256 over names and SHA-256 of all other files.

    Args:
        about: further facts, such as dtype.
    """
    parts = {file.name: file for file in sorted(folder.iterdir()) if file.name != EXPORT_FILE}
    whole = hashlib.sha256()
    for name, file in parts.items():
        with file.open("rb") as stream:
            whole.update(f"{name}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    sizes = {name: file.stat().st_size for name, file in parts.items()}
    made = origin(
        "export", checkpoint["inputs"][0]["name"], about={"time": _now(), **code_version()},
        inputs=[checkpoint], fingerprint=whole.hexdigest(), step=checkpoint.get("step"), sizes=sizes, **about,
    )  # fmt: skip
    files.write_json(folder / EXPORT_FILE, made)


def of_model(directory: Path) -> Origin:
    """An export of ours by its lineage.json, wherever it was copied; else a model whose origin is unknown.

    Raises:
        OSError: it is no Hugging Face directory.
    """
    note = f"no {EXPORT_FILE} in it: which run or publisher it comes from is not recorded"
    if (directory / EXPORT_FILE).is_file():
        try:
            return _of_export(directory)
        except (ValueError, TypeError) as error:  # no reason not to serve it
            note = f"{EXPORT_FILE} is damaged: {error}"
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    about = [(directory / "config.json").read_text(), *((name, _size(directory / name)) for name in names)]
    return origin(
        "model", directory.name, path=directory, fingerprint_of=OF_SIZES,
        fingerprint=hashlib.sha256(repr(about).encode()).hexdigest(),
        note=note,
    )  # fmt: skip


def _of_export(directory: Path) -> Origin:
    made = _checked(files.read_json(directory / EXPORT_FILE))
    sizes = dict(made.pop("sizes", {}))
    made["path"] = _short_path(directory)
    if changed := sorted(name for name, size in sizes.items() if _size(directory / name) != size):
        made |= {"note": f"changed since it was exported: {', '.join(changed)}", "fingerprint": None}
    return made


def random_weights(shape: str) -> Origin:
    """Weights that were drawn at random, `model.weights=random`: no run and no data stand behind them."""
    return origin("model", shape, note="random weights: trained by no run, on no data")


def of_endpoint(model: str, url: str, said: Any) -> Origin:
    """A model behind an endpoint, by what its /v1/models says of it under `lineage`, if anything."""
    try:
        return _checked(said)
    except ValueError:
        return origin("endpoint", model, url=url, note="the endpoint does not say which checkpoint it serves")


def without_places(made: Origin) -> Origin:
    """For clients, who need not know this machine's folders: without paths from outside the project's."""
    path = made["path"] if made["path"] and not Path(made["path"]).is_absolute() else None
    return {**made, "path": path, "inputs": [without_places(each) for each in made["inputs"]]}


def of_results(file: Path, content: Mapping[str, Any] | None = None) -> Origin:
    """A JSON file of results: a baseline, an evaluation or a benchmark.

    Raises:
        UserError: it is not one.
        ValueError: it is not JSON.
    """
    content = files.read_json(file) if content is None else content
    about = content.get("provenance") if isinstance(content, Mapping) else None
    if not isinstance(about, Mapping):
        raise UserError(f"{file}: holds no `provenance`; name a file that a command of this project wrote")
    kind = "baseline" if "cells" in content else "evaluation" if "scores" in content else "benchmark"
    name = file.stem if kind != "evaluation" else f"{content['model']['name']}/{file.name}"
    hardware = content.get("hardware")
    return origin(
        kind, name, path=file, about=about, inputs=_inputs(about),
        fingerprint=hashlib.sha256(file.read_bytes()).hexdigest(),
        hardware=hardware.get("name") if isinstance(hardware, Mapping) else None,
    )  # fmt: skip


def _checked(content: Any) -> Origin:
    """An origin out of a file that others may have written. Raises `ValueError`: it is none."""
    if not isinstance(content, dict):
        raise ValueError(f"not an origin: {str(content)[:80]}")
    made = {**dict.fromkeys(_ALWAYS), **content}
    if not all(isinstance(made.get(key), str) for key in _ALWAYS[:2]):
        raise ValueError(f"an origin needs a kind and a name: {str(content)[:80]}")
    texts = (*_ALWAYS[2:-1], "time", "note", "url", "id", "hardware", "fingerprint_of")
    if bad := [key for key in texts if not isinstance(made.get(key), str | None)]:
        raise ValueError(f"{made['kind']} {made['name']}: {', '.join(bad)} must be text")
    return {**made, "inputs": [_checked(each) for each in made["inputs"] or []]}


def unique(origins: Iterable[Origin]) -> list[Origin]:
    """Each once, in order: the figures of a baseline share their models."""
    return list({repr(sorted(each.items(), key=str)): each for each in origins}.values())


def flat(origins: Iterable[Origin]) -> Iterator[Origin]:
    """These and all that they were made from, each once by kind, name and fingerprint."""
    seen = set()
    waiting = list(origins)
    while waiting:
        each = waiting.pop(0)
        if (key := (each["kind"], each["name"], each["fingerprint"])) not in seen:
            seen.add(key)
            yield each
        waiting += each["inputs"]


def find(name: str) -> Origin:
    """The origin of what a path names, or a run's name under outputs/.

    Raises:
        UserError: there is no such thing, or its files are damaged; the message names them.
    """
    places = [Path(name).expanduser().absolute(), (runs.OUTPUTS / name).absolute()]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(f"{name}: no such file or folder, and no such run in {runs.OUTPUTS.absolute()}")
    try:
        return _of_path(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its lineage cannot be read ({type(error).__name__}: {error})") from error


def _of_path(path: Path) -> Origin:
    if path.is_file():
        return of_results(path)
    if (path / EXPORT_FILE).is_file():
        return of_model(path)
    if (path / STATE_FILE).is_file():
        return of_checkpoint(path)
    if (path / PROVENANCE_FILE).is_file():
        return of_run(path, kind=_kind(path))
    if (path / "config.json").is_file():
        return of_model(path)
    raise UserError(
        f"{path}: neither a run ({PROVENANCE_FILE}), a checkpoint ({STATE_FILE}), an export ({EXPORT_FILE}) "
        "nor results; name one of these"
    )


def _kind(directory: Path) -> str:
    """By the job type that the record keeps; without one, by what the folder holds."""
    job = files.read_json(directory / PROVENANCE_FILE).get("job_type")
    if job is None:
        marks = {"requests.jsonl": "serving", "report.html": "parity"}
        job = next((kind for mark, kind in marks.items() if (directory / mark).exists()), "run")
    return {"train": "run", "serve-bench": "serving"}.get(job, job)


# --- for people ---------------------------------------------------------------------------------------------


def describe(made: Origin) -> str:
    """The chain as a tree: what was asked for first, below each thing what it was made from."""
    lines = _lines(made, root=made, first="", rest="")
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _lines(made: Origin, *, root: Origin, first: str, rest: str) -> Iterator[str]:
    yield f"{first}{made['kind']} {made['name']}"
    bar = f"{rest}{'│' if made['inputs'] else ' '}    "
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
    done += [f"commit {_commit(made)}"] if made["commit"] else []
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
    if made["kind"] == "run":
        directory = _ROOT / made["path"]
        held = [path.name for path in runs.complete_checkpoints(directory / "checkpoints")]
        held += [name for name in (runs.EXPORT, "eval.json") if (directory / name).exists()]
        yield f"holds {', '.join(held) or 'no checkpoint and no export'}"


def _missing(made: Origin, root: Origin) -> Iterator[str]:
    """What cannot be found any more, and where its facts come from."""
    if made["path"] is None:
        return
    path = _ROOT / made["path"]
    facts = f"what is said here is from the {root['kind']}"
    if made["kind"] == "run":
        if (found := _run_with(made.get("id"), [path, *_siblings()])) == path:
            return
        if found is not None:
            yield f"its run directory is now {_short_path(found)}"
        elif (path / PROVENANCE_FILE).is_file():
            yield f"another run has taken that directory since; {facts}"
        else:
            yield f"the run directory is not there (deleted, moved, or on another machine); {facts}"
    elif not path.exists():
        pruned = "pruned, " if made["kind"] == "checkpoint" else ""
        yield f"not there ({pruned}deleted, moved, or on another machine); {facts}"
    elif made["fingerprint"] not in (None, _fingerprint_at(path, made)):
        yield f"written anew since; {facts}"


def _fingerprint_at(path: Path, made: Origin) -> str | None:
    """Of what lies there now; of a data set, which is checked where it is opened, the recorded one."""
    if made["kind"] not in ("checkpoint", "export", "model", "baseline", "evaluation"):
        return made["fingerprint"]
    try:
        return _of_path(path)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run_with(run_id: str | None, places: Iterable[Path]) -> Path | None:
    """The first directory that holds the run of this id."""
    for place in places:
        if run_id and (place / RUN_ID_FILE).is_file() and (place / RUN_ID_FILE).read_text().strip() == run_id:
            return place
    return None


def _siblings() -> list[Path]:
    return sorted(file.parent.absolute() for file in runs.OUTPUTS.glob(f"*/{RUN_ID_FILE}"))


def _inputs(about: Mapping[str, Any]) -> list[Origin]:
    """Of a provenance; one that was written before there were inputs still holds the data's fingerprint."""
    if about.get("inputs") is not None:
        return [_checked(each) for each in about["inputs"]]
    fingerprint = about.get("data_fingerprint")
    return [origin("dataset", "name not recorded", fingerprint=fingerprint)] if fingerprint else []


def _commit(about: Mapping[str, Any]) -> str:
    return f"{str(about.get('commit'))[:12]}{' with uncommitted changes' * bool(about.get('dirty'))}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _short_path(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else str(path)


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
