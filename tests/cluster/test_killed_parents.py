"""Commands that are killed by SIGKILL, in the middle of what they do: nothing that they started goes on.

cluster/process.py has the means, and tests/cluster/test_process.py their details.
"""

import json
import os
from pathlib import Path

import psutil
import pytest

from cluster.session import free_ports
from tests.cluster.test_process import alive
from tests.commands import TINY, started, write_corpus
from tests.waiting import wait_until
from training.model.shapes import LlamaShape, to_hf_config
from training.study.config import OWN_KEYS

pytestmark = pytest.mark.stack

END_SECONDS = 30.0  # below the 40 s for which an embedded Ray's agents go on without us (cluster/process.py)


def study(folder: Path) -> list[object]:
    """A study on an embedded Ray, of runs that take longer than the test."""
    own = ("data.source", "record.wandb", *OWN_KEYS)
    common = {name: value for name, value in TINY.items() if name not in own} | {
        "data.source": write_corpus(folder),
        "data.directory": folder / "data",
        "schedule.tokens": 512 * 100_000,
        "evaluation.tuning_sequences": 4,
    }
    config = {
        "directory": str(folder / "outputs"),
        "rules": {"adamw": {"keys": ["optim.matrix.rule=adamw"], "grid": [0.001]}, "muon": {"grid": [0.02]}},
        "widths": {"w64": {"hidden_size": 64, "ffn_size": 128, "num_heads": 2, "num_kv_heads": 1}},
        "common_keys": [f"{name}={value}" for name, value in common.items()],
        "claims": {"reference": "adamw", "rule": "muon"},
        "wandb": "disabled",
    }
    (folder / "study.yaml").write_text(json.dumps(config))
    return ["training.study", "--config", folder / "study.yaml"]


def app(folder: Path) -> list[object]:
    return [
        "serving.app", "model.weights=random", "model.shape=llama-5m", "deployment.cpus=1",
        f"deployment.port={free_ports(1)[0]}",
    ]  # fmt: skip


def baseline(folder: Path) -> list[object]:
    shape = LlamaShape(
        vocab_size=320, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=128
    )
    (folder / "config.json").write_text(json.dumps(to_hf_config(shape, dtype="bfloat16")))
    return [
        "training.baseline", "rounds=3", f"train.shapes=[{folder}/config.json]", "train.rules=[muon]",
        "serve.models=[]", f"train.data={folder}/data", f"directory={folder}", f"output={folder}/out.json",
        "wandb=disabled",
    ]  # fmt: skip


def lines(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        try:
            found.append(" ".join(process.cmdline()))
        except psutil.Error:  # it has just ended
            found.append("")
    return found


@pytest.mark.parametrize(
    ("make", "grandchild"),
    [(study, "training.launch"), (app, "haproxy.cfg"), (baseline, "training.baseline.ceilings")],
    ids=["study", "app", "baseline"],
)
def test_what_a_killed_command_has_started_ends(make, grandchild, tmp_path):
    below: list[psutil.Process] = []

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        below[:] = psutil.Process(process.pid).children(recursive=True)
        return any(grandchild in line for line in lines(below))

    with started(*make(tmp_path), RAY_TMPDIR=f"/tmp/ray-{os.getpid()}") as process:
        wait_until(reached, told=grandchild)
        process.kill()
        process.wait()
        assert lines(alive(below, within_seconds=END_SECONDS)) == []
