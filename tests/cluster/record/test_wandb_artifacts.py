"""The lineage as W&B's artifacts, sent online to a server on loopback."""

import json

from cluster import files
from cluster.record import origins
from tests.cluster.record.test_record import in_subprocess, steps
from tests.cluster.review.wandb_server import WandbServer

RUN = """
from cluster import files
record.Mirror.INIT_SECONDS = record.Mirror.UPLOAD_SECONDS = record.Mirror.CLOSE_SECONDS = 300.0
used, made = (files.read_json(Path(path)) for path in sys.argv[2:4])
about = {"wandb_mode": "auto", "project": "asuncion", "group": None, "name": "x", "resume_step": None}
with Record.open(Path(sys.argv[1]), config={}, provenance={}, inputs=used, **about) as run:
    for step in range(1, 21):
        run.log({"step": step})
    for each in made:
        run.output(each, upload="path" in each and each["path"] is not None)
    run.finish({})
    print(run.wandb_status)
"""

DATA = origins.origin("dataset", "corpus", fingerprint="d" * 64)
TRAINED = origins.origin("run", "first", id="0123abcd", inputs=[DATA])
SAVED = origins.origin("checkpoint", "first/step-0000010", fingerprint="c" * 64, step=10, inputs=[TRAINED])


def record_online(server, directory, *, used, made):
    """Record a run in a process of its own. Returns its W&B id and status."""
    inputs = (
        directory.parent / f"{directory.name}-used.json",
        directory.parent / f"{directory.name}-made.json",
    )
    for path, content in zip(inputs, (used, made), strict=True):
        files.write_json(path, content)
    writer = in_subprocess(RUN, directory, *inputs, home=directory.parent, **server.environment)
    status, problems = writer.communicate()
    assert (problems, writer.returncode) == ("", 0)
    return (directory / "wandb_run_id").read_text().strip(), status.strip()


def test_one_version_joins_the_run_that_made_it_and_the_runs_that_used_it(tmp_path):
    with WandbServer() as server:
        trained, _ = record_online(server, tmp_path / "train", used=[DATA], made=[SAVED])
        served, status = record_online(server, tmp_path / "serve", used=[SAVED], made=[])
    assert status.startswith("online: ") and "not in W&B" not in status
    found = {artifact.name: artifact for artifact in server.artifacts}
    assert sorted(artifact.name for artifact in server.artifacts) == ["checkpoint-first", "dataset-corpus"]
    checkpoint, data = found["checkpoint-first"], found["dataset-corpus"]
    assert checkpoint.used_by == {served} and data.used_by == {trained, served}
    assert checkpoint.about["runName"] == trained  # who made it
    assert json.loads(checkpoint.about["metadata"]) == SAVED
    for artifact in found.values():
        assert list(artifact.files) == [] and len(artifact.manifest["contents"]) == 1


def test_a_server_that_refuses_artifacts_still_gets_every_row(tmp_path):
    with WandbServer() as server:
        server.refuse = lambda name: name == "CreateArtifact"
        run, _ = record_online(server, tmp_path / "train", used=[DATA], made=[SAVED])
    assert [row["step"] for row in server.runs[run].rows] == steps(tmp_path / "train") == list(range(1, 21))
    assert server.artifacts == [] and "CreateArtifact" in server.requests


def test_uploaded_files_are_those_of_the_checkpoint(tmp_path):
    folder = tmp_path / "step-0000010"
    folder.mkdir()
    (folder / "shard.bin").write_bytes(b"weights" * 1000)
    (folder / "COMPLETE").write_text("{}")
    saved = {**SAVED, "path": str(folder)}
    with WandbServer() as server:
        record_online(server, tmp_path / "train", used=[], made=[saved])
        [artifact] = server.artifacts
    assert artifact.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "latest" in {alias["alias"] for alias in artifact.about["aliases"]}
