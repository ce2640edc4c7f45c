"""Other sites, on four hosts (`make test-cluster`): names, IPv6, ports, kinds of GPU, drained nodes."""

import json
import re
from pathlib import Path

import pytest

from tests.cluster.test_cluster_at_length import SMALL
from tests.commands import ROOT
from tests.lab.hosts import ADDRESSES, CLUSTER, CLUSTER_FILE, IPV6, SCRATCH, STORAGE, Lab, missing
from tests.standalone_python import downloads
from tests.waiting import wait_until
from training.model.shapes import to_hf_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no lab here: {missing()}"),
]


@pytest.fixture
def lab(tmp_path):
    with Lab(tmp_path) as lab:
        lab.seed_environment()
        yield lab


def up(lab):
    done = lab.up()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(lab):
    done = lab.call("cluster.laptop.fleet", "status", CLUSTER_FILE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def down(lab):
    done = lab.call("cluster.laptop.fleet", "down", CLUSTER_FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: lab.rays(name) for name in CLUSTER} == {name: [] for name in CLUSTER}


def test_names_a_port_and_two_kinds_of_gpu_and_a_worker_that_is_drained_later(lab):
    lab.run("head", "sed -i '1i 127.0.1.1 head' /etc/hosts")  # as Debian's installer writes it
    assert lab.run("worker2", "sed -i 's/^Port 22$/Port 2222/' /etc/ssh/sshd_config").returncode == 0
    lab.run("worker2", "kill -HUP $(pgrep -o sshd)")
    differs = {"worker1": {"gpus": 1}, "worker2": {"port": 2222, "gpus": 2, "accelerator": "H100"}}
    there = {"head": "head", "workers": ["worker1", "worker2"]}
    lab.write_inventory(**there, differs=differs)
    assert "3 of 3 nodes joined" in up(lab)
    said = status(lab)
    assert re.search(rf"^  worker1 +{ADDRESSES['worker1']} +1 GPU, 2 CPU A40$", said, re.MULTILINE), said
    assert re.search(rf"^  worker2 +{ADDRESSES['worker2']} +2 GPU, 2 CPU H100$", said, re.MULTILINE), said
    assert re.search(rf"^  head +{ADDRESSES['head']} +2 CPU$", said, re.MULTILINE), said
    run = lab.call(*lab.train(run__name="kind", workers__count=1, workers__accelerator="H100"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert '"worker2"' in (lab.storage / "lab/outputs/kind/provenance.json").read_text()
    _measure_a_kind(lab, "H100", host="worker2")

    differs["worker2"] |= {"gpus": 1}
    lab.write_inventory(**there, differs=differs)
    changed = lab.up()
    assert changed.returncode == 1
    assert "worker2: its Ray was started before the inventory said 1 GPU" in changed.stderr

    differs["worker2"] |= {"drained": True}
    lab.write_inventory(**there, differs=differs)
    said = up(lab)
    assert "2 nodes (1 more drained: worker2)" in said and "2 of 2 nodes joined" in said
    wait_until(lambda: lab.rays("worker2") == [], told=lambda: lab.rays("worker2"))
    assert "worker2         drained in the inventory" in status(lab)
    down(lab)


def _measure_a_kind(lab, kind, *, host):
    """A baseline of one kind of GPU, asked for on the head, is measured on a node of that kind."""
    shape, output = lab.storage / "lab/small/config.json", lab.storage / "lab/baseline.json"
    shape.parent.mkdir(exist_ok=True)
    shape.write_text(json.dumps(to_hf_config(SMALL, dtype="bfloat16")))
    data = f"data.source={STORAGE}/corpus.jsonl,data.vocab_size=320,data.validation_fraction=0.2"
    keys = (
        f"accelerator={kind}", "session.address=auto", f"directory={STORAGE}/outputs", "rounds=1",
        f"output={STORAGE}/baseline.json", "wandb=disabled", f"train.data={STORAGE}/data", "serve.models=[]",
        f"train.shapes=[{STORAGE}/small/config.json]", "train.rules=[muon]", "train.tokens=64",
        "train.sequence_length=32", "train.most_micro_sequences=2", "train.steps=2", f"train.more=[{data}]",
    )  # fmt: skip
    here = f". {SCRATCH}/activate && cd {SCRATCH}/code && python -m training.baseline {' '.join(keys)}"
    done = lab.run("head", here)  # `make baseline` would begin with a preflight, which looks for the GPUs
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["provenance"]["host"]["hostname"] == host and len(found["figures"]) == 1
    failed = lab.run("head", f"{here} train.rules=[nonsense]")
    assert failed.returncode != 0


def test_a_site_of_ipv6_addresses(lab):
    addresses = [IPV6[name] for name in CLUSTER]
    lab.write_inventory(head=addresses[0], workers=addresses[1:])
    assert "3 of 3 nodes joined" in up(lab)
    said = status(lab)
    assert all(re.search(rf"^  {each} +{each} +2 CPU$", said, re.MULTILINE) for each in addresses), said
    run = lab.call(*lab.train(run__name="six", workers__count=3, batch__tokens=384))
    assert run.returncode == 0, run.stdout + run.stderr
    pulled = lab.call("cluster.laptop.remote", "pull", CLUSTER_FILE, "--to", "/root/outputs")
    assert pulled.returncode == 0, pulled.stderr
    down(lab)


def test_a_site_without_a_python_gets_one_from_the_laptop(lab):
    home = lab.folder / "hosts/nyc/disk/home"
    (home / "python").mkdir(parents=True)
    listed = downloads(home / "python", seen_as=Path("/root/python"))
    lab.write_inventory(python="uv")
    command = f".venv/bin/python -m cluster.laptop.fleet up {CLUSTER_FILE}"
    there = f"UV_PYTHON_DOWNLOADS_JSON_URL=/root/python/{listed.name}"
    done = lab.run("nyc", f"cd {ROOT} && {there} {command}")
    assert done.returncode == 0 and "3 of 3 nodes joined" in done.stdout, done.stdout + done.stderr
    for name in CLUSTER:
        assert lab.run(name, f"ls {SCRATCH}/python/ready").returncode == 0
    assert f"{SCRATCH}/python/bin/python3 -m cluster.head.keeper" in " ".join(lab.rays("head"))
    down(lab)
