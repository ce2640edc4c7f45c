"""A site's inventory, and the Ray YAML made from it."""

from pathlib import Path

import pytest
import yaml

from cluster import inventory
from cluster.cli import UserError
from cluster.config import ConfigError

ROOT = Path(__file__).parents[2]
SITE = """\
name: here
head: 10.0.0.1
workers: [10.0.0.2, 10.0.0.3]
ssh: {user: research, key: ~/.ssh/cluster}
node: {gpus: 4, interface: ens5f0}
scratch: /local/x
storage: /nfs/x
"""


def write(folder, text=SITE):
    (folder / "here.inventory.yaml").write_text(text)
    return folder / "here.yaml"


def test_the_committed_yaml_is_made_from_the_committed_inventory(tmp_path):
    for name in ("asuncion.yaml", "asuncion.inventory.yaml"):
        (tmp_path / name).write_text((ROOT / "cluster" / name).read_text())
    inventory.load(tmp_path / "asuncion.yaml")
    assert (tmp_path / "asuncion.yaml").read_text() == (ROOT / "cluster/asuncion.yaml").read_text()


def test_the_yaml_is_what_rays_launcher_accepts(tmp_path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = write(tmp_path)
    inventory.load(cluster)
    config = prepare_config(yaml.safe_load(cluster.read_text()))
    validate_config(config)
    assert config["provider"] == {
        "type": "local",
        "head_ip": "10.0.0.1",
        "worker_ips": ["10.0.0.2", "10.0.0.3"],
    }
    assert config["available_node_types"]["local.cluster.node"]["min_workers"] == 2


def test_the_yaml_mounts_code_and_nothing_else(tmp_path):
    cluster = write(tmp_path)
    inventory.load(cluster)
    mounts = yaml.safe_load(cluster.read_text())["file_mounts"]
    assert sorted(mounts.values()) == sorted(inventory.CODE)
    assert all((ROOT / local).exists() for local in mounts.values())


def test_both_launchers_start_the_same_ray(tmp_path):
    cluster = write(tmp_path)
    site = inventory.load(cluster).site()
    config = yaml.safe_load(cluster.read_text())
    assert config["worker_start_ray_commands"] == [site["reap"], site["start_worker"]]
    head = config["head_start_ray_commands"][1]
    assert head.replace(inventory.AUTOSCALER, "") == site["start_head"]
    assert inventory.AUTOSCALER in head and inventory.AUTOSCALER not in site["start_head"]
    for start in (head, site["start_worker"]):
        assert "--num-gpus=4" in start and """--resources='{"accelerator_type:A40": 1}'""" in start
        assert "export NCCL_SOCKET_IFNAME==ens5f0" in start  # NCCL's own syntax for this very name
        assert "export RAY_enable_autoscaler_v2=0" in start
    assert "--dashboard-host=127.0.0.1" in head


def test_a_changed_inventory_makes_the_yaml_anew_but_no_hand_edit_is_lost(tmp_path):
    cluster = write(tmp_path)
    inventory.load(cluster)
    write(tmp_path, SITE.replace("10.0.0.3", "10.0.0.4"))
    inventory.load(cluster)
    assert "10.0.0.4" in cluster.read_text()
    edited = cluster.read_text().replace("upscaling_speed: 1.0", "upscaling_speed: 2.0")
    cluster.write_text(edited)
    with pytest.raises(UserError, match="edited by hand"):
        inventory.load(cluster)
    assert cluster.read_text() == edited


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("10.0.0.3", "10.0.0.2"), "workers: 10.0.0.2 named twice"),
        (("10.0.0.3", "10.0.0.1"), "workers: 10.0.0.1 named twice"),
        (("10.0.0.3", "10.0.0.300"), "workers: '10.0.0.300' is no IPv4 address"),
        (("head: 10.0.0.1", "head: ''"), "head: is missing"),
        (("user: research", "user: 'a b'"), "ssh.user"),
        (("gpus: 4", "gpus: -1"), "node.gpus"),
        (("gpus: 4", "gpu: 4"), "unknown key 'node.gpu'"),
        (("ens5f0", "'eth0; rm -rf /'"), "node.interface"),
        (("/local/x", "local/x"), "scratch: 'local/x' must be an absolute path"),
        (("/nfs/x", "/local/x"), "storage: must be another folder than scratch"),
        (("name: here", "name: 'a/b'"), "name: 'a/b'"),
        (("name: here", "- name"), "here.inventory.yaml: not valid YAML"),
    ],
)
def test_a_bad_inventory_is_one_message_with_file_and_key(tmp_path, change, told):
    cluster = write(tmp_path, SITE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        inventory.load(cluster)
    assert told in str(caught.value) and "here.inventory.yaml" in str(caught.value)
    assert not cluster.exists()


def test_a_missing_inventory_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"copy cluster/asuncion\.inventory\.yaml"):
        inventory.load(tmp_path / "nowhere.yaml")
