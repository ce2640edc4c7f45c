"""The stand-in for W&B's server, asked by the real client."""

import json
import os
import subprocess
import sys

from tests.cluster.review.wandb_server import WandbServer
from tests.commands import ROOT

ONLINE_RUN = """
import wandb
settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
about = {"name": "first", "group": "unit", "job_type": "train", "tags": ["a40"], "config": {"lr": 0.02}}
run = wandb.init(project="asuncion", id="cafe0001", settings=settings, **about)
for step in range(1, 6):
    run.log({"step": step, "train/loss": 1 / step})
run.log({"requests": wandb.Table(columns=["a"], data=[[1], [2]])})
data = wandb.Artifact("corpus", type="dataset")
data.add_reference("outputs://corpus", name="shards")
run.use_artifact(data)
run.alert("spike", "loss 9 at step 3")
run.summary["best"] = 0.2
run.finish(exit_code=0)
api = wandb.Api().run("team/asuncion/cafe0001")
print(api.state, [row.get("step") for row in api.scan_history()])
"""


def test_the_client_finds_what_it_sent(tmp_path):
    with WandbServer() as server:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        client = subprocess.run(
            [sys.executable, "-c", ONLINE_RUN],
            cwd=ROOT,
            env={**clean, "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), **server.environment},
            capture_output=True,
            text=True,
        )
    assert client.stdout.splitlines()[-1:] == ["finished [1, 2, 3, 4, 5, None]"], client.stderr
    run = server.runs["cafe0001"]
    assert run.rows[:2] == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert (run.num_received, run.complete, run.exit_code) == (6, True, 0)
    assert run.summary["best"] == 0.2 and run.config["lr"] == 0.02
    about = {"displayName": "first", "groupName": "unit", "jobType": "train", "tags": ["a40"]}
    assert about.items() <= run.about.items()
    [table] = [content for path, content in run.uploaded.items() if path.startswith("media/table/requests")]
    assert json.loads(table)["data"] == [[1], [2]]
    assert {artifact.type for artifact in server.artifacts} == {"run_table", "dataset"}
    [corpus] = [artifact for artifact in server.artifacts if artifact.type == "dataset"]
    assert corpus.manifest["contents"]["shards"]["ref"] == "outputs://corpus"
    assert corpus.used_by == {"cafe0001"}
    assert [alert["title"] for alert in server.alerts] == ["spike"]
