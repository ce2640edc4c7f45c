"""The lineage in W&B: data sets, checkpoints, exports and baselines as artifacts by reference.

An artifact holds a reference to where the thing lies, its fingerprint, and its origin
(`cluster.record.origins`) as metadata; files only where a key asks for them. Whoever makes a thing and
whoever uses it log the same artifact. W&B knows it by its digest, so both mean one version, and its graph
leads from one run to the other.

What wandb 0.31 does, and why `run.log_artifact` and `run.use_artifact` are not called:
- Offline, `use_artifact` raises. Online, it waits until the server has the artifact, and both ask the server
  first. A record published as here goes to W&B's log on disk and is sent in the background, in both modes.
- `add_reference("file://...")` fails if the folder is not on this machine, and reads every file in it; with
  `checksum=False` its digest is of the path, so another content at the same path would be the same version.
"""

import re
from typing import Any

from cluster.masking import mask
from cluster.record.origins import Origin, place_of

KINDS = ("dataset", "checkpoint", "export", "model", "baseline")
MAX_NAME = 128  # letters; W&B refuses longer names


def log(run: Any, made: Origin, *, used: bool, upload: bool = False) -> list[str]:
    """Log one thing as an artifact of W&B's `run`, made or `used` by it. Returns problems, for the status.

    Kinds that are runs in W&B, or stand for no files, are left out. With `upload` the artifact holds the
    files of the thing's folder. wandb copies them first, because a checkpoint may be pruned before it is
    sent.
    """
    if made["kind"] in KINDS:
        try:
            _log(run, made, used=used, upload=upload)
        except Exception as error:  # rows count more than lineage, which the files have too
            reason = " ".join(mask(str(error)).split())[:200]
            return [f"{made['kind']} {made['name']} is not in W&B: {type(error).__name__}: {reason}"]
    return []


def _log(run: Any, made: Origin, *, used: bool, upload: bool) -> None:
    import wandb
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    of_run, _, part = made["name"].partition("/")
    place = place_of(made)
    reference = place.as_uri() if place else f"asuncion:{made['kind']}/{made['name']}"
    artifact = wandb.Artifact(_plain(f"{made['kind']}-{of_run}"), type=made["kind"], metadata=made)
    if upload and place is not None:
        artifact.add_dir(str(place))
    else:
        artifact.manifest.add_entry(
            ArtifactManifestEntry(path=part or of_run, ref=reference, digest=made["fingerprint"] or reference)
        )
    artifact.finalize()
    aliases = [] if used else ["latest", *([f"step-{made['step']}"] if "step" in made else [])]
    # `is_user_created` keeps W&B from showing a run that only uses the thing as its maker.
    run._interface.publish_artifact(run, artifact, aliases, is_user_created=used, use_after_commit=used)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:MAX_NAME]
