"""Where a thing comes from, as it stands in the files: kind, name, path, commit, fingerprint, and its inputs.

Each thing holds its own origin and, inside it, the origins of what it was made from. A copy of an export or
of a baseline therefore still names its run, commit and data, also where the run directory does not exist.

    run, results    provenance.json, `inputs`
    checkpoint      state.json, `lineage`
    export          lineage.json
    JSON results    `provenance`, `inputs`
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import UserError
from cluster.record.provenance import code_version

# The origin of one thing, JSON-ready: kind, name, path, fingerprint, commit, inputs, and what `origin` adds.
Origin = dict[str, Any]

EXPORT_FILE = "lineage.json"  # in an export
STATE_FILE = "state.json"  # in a checkpoint
PROVENANCE_FILE = "provenance.json"  # in a run directory and in a folder of results
RUN_ID_FILE = "wandb_run_id"
DEEPEST = 20  # inputs of inputs; data to parity are seven
OF_OLD_STATE = "state.json, which names the shards and their sizes; not the weights"
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
        "path": None if path is None else short_path(path),
        "fingerprint": fingerprint,
        "commit": about.get("commit"),
        "dirty": about.get("dirty"),
        "time": about.get("time"),
        **more,
        "inputs": list(inputs),
    }
    return {key: value for key, value in made.items() if value is not None or key in _ALWAYS}


def of_dataset(folder: Path, fingerprint: str, *, inputs: Iterable[Origin] = ()) -> Origin:
    """A prepared folder. `fingerprint`: its manifest's, which covers tokenizer and tokens.

    Args:
        inputs: the sources of a mixture.
    """
    return origin("dataset", folder.name, path=folder, fingerprint=fingerprint, inputs=inputs)


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
    earlier = [short_commit(start) for start in about.get("earlier_starts", [])]
    return origin(
        kind,
        directory.name,
        path=directory,
        about=about,
        id=run_id.read_text().strip() if run_id.is_file() else None,
        note=f"resumed; commits of the earlier starts: {', '.join(earlier)}" if earlier else None,
        inputs=_inputs(about),
    )


def of_writer(run: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, in state.json: time, commit, and the run's origin as its input."""
    writer = of_run(run)
    about = {"time": _now(), "commit": writer["commit"], "dirty": writer.get("dirty")}
    return {**about, "inputs": [writer]}


def of_checkpoint(directory: Path) -> Origin:
    """A checkpoint of a run; one without `lineage` in its state takes it from the run directory around it.

    The fingerprint is that of state.json, which holds the SHA-256 of every shard.

    Raises:
        ValueError, OSError: state.json is damaged or missing.
    """
    content = (directory / STATE_FILE).read_bytes()
    state = files.read_json(directory / STATE_FILE)
    about = state.get("lineage")
    if about is None:
        run = of_run(directory.parent.parent)
        about = {"commit": run["commit"], "dirty": run.get("dirty"), "inputs": [run]}
    inputs = [checked(each) for each in about["inputs"]]
    name = f"{inputs[0]['name']}/{directory.name}"
    hashed = all(isinstance(shard, dict) and "sha256" in shard for shard in state["files"].values())
    return origin(
        "checkpoint", name, path=directory, about=about, inputs=inputs, step=state.get("step"),
        fingerprint=hashlib.sha256(content).hexdigest(), fingerprint_of=None if hashed else OF_OLD_STATE,
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
        whole.update(f"{name}\n{files.sha256_of(file)}\n".encode())
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
    made = checked(files.read_json(directory / EXPORT_FILE))
    sizes = dict(made.pop("sizes", {}))
    made["path"] = short_path(directory)
    if changed := sorted(name for name, size in sizes.items() if _size(directory / name) != size):
        made |= {"note": f"changed since it was exported: {', '.join(changed)}", "fingerprint": None}
    return made


def random_weights(shape: str) -> Origin:
    """Weights that were drawn at random, `model.weights=random`: no run and no data stand behind them."""
    return origin("model", shape, note="random weights: trained by no run, on no data")


def of_endpoint(model: str, url: str, said: Any) -> Origin:
    """A model behind an endpoint, by what its /v1/models says of it under `lineage`, if anything."""
    try:
        return checked(said)
    except ValueError:
        return origin("endpoint", model, url=url, note="the endpoint does not say which checkpoint it serves")


def without_places(made: Origin) -> Origin:
    """The origin without paths outside the project: clients need not know this machine's folders."""
    path = made["path"] if made["path"] and not Path(made["path"]).is_absolute() else None
    return {**made, "path": path, "inputs": [without_places(each) for each in made["inputs"]]}


def of_results(file: Path, content: Mapping[str, Any] | None = None) -> Origin:
    """A JSON file of results: a baseline, an evaluation or a benchmark.

    Raises:
        UserError: it is not one.
        ValueError: it is not JSON, or what it says of its inputs is damaged.
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
        fingerprint=files.sha256_of(file),
        hardware=hardware.get("name") if isinstance(hardware, Mapping) else None,
    )  # fmt: skip


def checked(content: Any, *, deepest: int = DEEPEST) -> Origin:
    """Check an origin from a file that others may have written. Raises `ValueError` if it is none."""
    if not isinstance(content, dict) or not deepest:
        raise ValueError(f"not an origin: {str(content)[:80]}")
    made = {**dict.fromkeys(_ALWAYS), **content}
    if not all(isinstance(made.get(key), str) for key in _ALWAYS[:2]):
        raise ValueError(f"an origin needs a kind and a name: {str(content)[:80]}")
    texts = (*_ALWAYS[2:-1], "time", "note", "url", "id", "hardware", "fingerprint_of")
    if bad := [key for key in texts if not isinstance(made.get(key), str | None)]:
        raise ValueError(f"{made['kind']} {made['name']}: {', '.join(bad)} must be text")
    if not isinstance(made["inputs"], list | None):
        raise ValueError(f"{made['kind']} {made['name']}: inputs must be a list")
    return {**made, "inputs": [checked(each, deepest=deepest - 1) for each in made["inputs"] or []]}


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


def place_of(made: Origin) -> Path | None:
    """Where it lay when its origin was written; it need not be there, or on this machine."""
    return _ROOT / made["path"] if made["path"] else None


def _inputs(about: Mapping[str, Any]) -> list[Origin]:
    """The inputs in a provenance. One from before `inputs` existed still holds the data's fingerprint."""
    if about.get("inputs"):
        return [checked(each) for each in about["inputs"]]
    fingerprint = about.get("data_fingerprint")
    return [origin("dataset", "name not recorded", fingerprint=fingerprint)] if fingerprint else []


def short_commit(about: Mapping[str, Any]) -> str:
    """The first letters of the commit, and whether the code had uncommitted changes."""
    return f"{str(about.get('commit'))[:12]}{' with uncommitted changes' * bool(about.get('dirty'))}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def short_path(path: Path) -> str:
    """Relative to the project's folder if it lies inside, else absolute."""
    path = path.absolute()
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else str(path)
