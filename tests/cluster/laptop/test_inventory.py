"""A site's inventory, and the Ray YAML made from it."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.laptop import commands, inventory, keys
from cluster.session import free_ports
from tests.commands import ROOT

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
    site = commands.for_head(inventory.load(cluster))
    config = yaml.safe_load(cluster.read_text())
    assert config["worker_start_ray_commands"] == [site["reap"], site["start_worker"]]
    head = config["head_start_ray_commands"][1]
    assert head.replace(commands.AUTOSCALER, "") == site["start_head"]
    assert commands.AUTOSCALER in head and commands.AUTOSCALER not in site["start_head"]
    for start in (head, site["start_worker"]):
        assert "--num-gpus=4" in start and """--resources={"accelerator_type:A40":1}'""" in start
        assert "export NCCL_SOCKET_IFNAME==ens5f0" in start  # NCCL's own syntax for this very name
        assert "export RAY_enable_autoscaler_v2=0" in start
    assert "--dashboard-host=127.0.0.1" in head


MIXED = (
    SITE
    + """\
differs:
  w1.site: {gpus: 2, accelerator: H100, port: 2222, user: other, key: ~/.ssh/w1}
  fd00::3: {drained: true}
"""
)
MIXED = MIXED.replace("10.0.0.2, 10.0.0.3", "w1.site, 'fd00::3', fd00::4")


def test_names_ipv6_and_what_differs_reach_the_head(tmp_path):
    loaded = inventory.load(write(tmp_path, MIXED))
    assert loaded.active == ("10.0.0.1", "w1.site", "fd00::4") and loaded.drained == ("fd00::3",)
    site = commands.for_head(loaded)
    assert site["workers"] == ["w1.site", "fd00::4"] and site["drained"] == ["fd00::3"]
    assert site["logins"]["w1.site"] == {"user": "other", "port": 2222}
    assert site["logins"]["fd00::4"] == {"user": "research", "port": None}
    assert site["resources"]["w1.site"] == """--num-gpus=2 --resources={"accelerator_type:H100":1}"""
    assert site["gpus"]["fd00::4"] == {"GPU": 4, "accelerator_type:A40": 1}
    told = (tmp_path / "here.yaml").read_text()
    assert "does not know host names and IPv6 addresses, what differs between nodes: use `make up`" in told
    assert yaml.safe_load(told)["provider"]["worker_ips"] == ["w1.site", "fd00::4"]


def test_a_worker_gets_its_own_options_and_the_heads_address(tmp_path):
    """The start command itself, by a real bash; `ray` prints what it is given."""
    site = inventory.load(
        write(tmp_path, MIXED.replace("10.0.0.1", "fd00::1").replace("/local/x", "/SCRATCH"))
    )
    (tmp_path / "activate").write_text(
        "ray() { printf '<%s>' \"$@\"; echo Ray runtime started; sleep 5; }; export -f ray\n"
    )
    script = (
        commands.start_worker(site)
        .replace("/SCRATCH", str(tmp_path))
        .replace("nohup ray", "nohup bash -c 'ray \"$@\"' -")
    )
    given = {
        "ASUNCION_NODE": "w1.site",
        "ASUNCION_RESOURCES": commands.for_head(site)["resources"]["w1.site"],
    }
    two = ["--num-gpus=2", '--resources={"accelerator_type:H100":1}']
    for more, options in (
        ({}, ["--address=[fd00::1]:6379", "--num-gpus=4", '--resources={"accelerator_type:A40":1}']),
        (given | {"ASUNCION_HEAD": "10.0.0.9"}, ["--address=10.0.0.9:6379", "--node-name=w1.site", *two]),
    ):
        environment = {**os.environ, **more}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found = re.findall("<([^>]*)>", (tmp_path / "ray-start.log").read_text())
        names = ("--address", "--node", "--num-gpus", "--resources")
        assert [option for option in found if option.startswith(names)] == options


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
        (("10.0.0.3", "10.0.0.300"), "yaml:3: workers: '10.0.0.300' is not an IPv4 or IPv6 address or"),
        (("10.0.0.3", "10.0.0.3, -x"), "yaml:3: workers: '-x' is not an IPv4"),
        (("10.0.0.2, 10.0.0.3", "'fd00::2', 'FD00:0::2'"), "workers: FD00:0::2, fd00::2 named twice"),
        (("head: 10.0.0.1", "head: ''"), "head: is missing"),
        (("user: research", "user: 'a b'"), "ssh.user"),
        (("gpus: 4", "gpus: -1"), "node.gpus"),
        (("gpus: 4", "gpu: 4"), "yaml:5: unknown key 'node.gpu'"),
        (("name: here", "differs: {w9: {gpus: 2}}"), "yaml:1: differs.w9: is neither the head nor one of"),
        (("name: here", "differs: {10.0.0.2: {gpus: -2}}"), "yaml:1: differs.10.0.0.2.gpus: must lie"),
        (("name: here", "differs: {10.0.0.2: {gpu: 2}}"), "here.inventory.yaml:1: unknown key"),
        (("name: here", "differs: {10.0.0.1: {drained: true}}"), "differs.10.0.0.1.drained: the head cannot"),
        (("user: research", "port: 70000"), "yaml:4: ssh.port: must lie between 1 and 65535"),
        (("ens5f0", "'eth0; rm -rf /'"), "node.interface"),
        (("/local/x", "local/x"), "scratch: 'local/x' must be an absolute path"),
        (("/nfs/x", "/local/x"), "storage: must be another folder than scratch"),
        (("/local/x", "/local/../x"), "scratch: '/local/../x' must be an absolute path"),
        (("/local/x", f"/{'x' * 40}"), "scratch: must be at most 39 bytes long"),
        (("name: here", "name: 'a/b'"), "name: 'a/b'"),
        (
            ("name: here", "name: here\npackages: {index: 'https://me:secret@pypi.site/simple'}"),
            "packages.index",
        ),
        (("name: here", "- name"), "here.inventory.yaml: not valid YAML"),
        (
            ("name: here", "ports: {gcs: 8265}"),
            "ports: gcs, dashboard and agent must differ, and are (8265, 8265",
        ),
        (("name: here", "name: &a [*a]"), "here.inventory.yaml: "),
        (("workers: [10.0.0.2, 10.0.0.3]", "workers: &a [*a]"), "here.inventory.yaml: "),
    ],
)
def test_a_bad_inventory_is_one_message_with_file_and_key(tmp_path, change, told):
    cluster = write(tmp_path, SITE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        inventory.load(cluster)
    assert told in str(caught.value) and "here.inventory.yaml" in str(caught.value)
    assert not cluster.exists()


# of a string: what adds YAML, ends a shell's word, is an option, or is no string when it is read as YAML
HOSTILE = (
    "a\nb: 1",
    "a\rb",
    "a\x85b",
    "a\u2028b",
    "a\0b",
    "a: b",
    "a #b",
    "'",
    '"',
    "$(x)",
    "`x`",
    "a;b",
    "-a",
    "%h",
)
KEYS = ("name", "head", "external_head", "workers", "ssh.user", "ssh.key", "scratch", "storage", "python",
        "node.accelerator", "node.interface", "packages.index", "packages.proxy")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_no_string_of_the_inventory_can_add_yaml_or_shell(tmp_path, key):
    """A string that is accepted is one word, and no option, wherever it stands."""
    for text in (*HOSTILE, *(f"/a{text}" for text in HOSTILE), *(f"a{text}b" for text in HOSTILE)):
        site = yaml.safe_load(SITE)
        section, _, name = key.rpartition(".")
        (site.setdefault(section, {}) if section else site)[name] = [text] if name == "workers" else text
        cluster = write(tmp_path, json.dumps(site))
        if re.fullmatch(r"[\w./~@+=,][\w./~@+=,-]*", text):
            continue
        with pytest.raises(ConfigError, match=re.escape(key)) as caught:
            inventory.load(cluster)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["no", "null", "1e3", "0123", "~"])
def test_a_name_that_looks_like_something_else_in_yaml_stays_text(tmp_path, text):
    site = yaml.safe_load(SITE)
    site |= {"ssh": {"user": "user", "key": text}, "external_head": "1e3", "name": text.replace("~", "on")}
    cluster = write(tmp_path, json.dumps(site))
    inventory.load(cluster)
    made = yaml.safe_load(cluster.read_text())
    assert made["cluster_name"] == site["name"] and made["provider"]["external_head_ip"] == "1e3"
    assert made["auth"] == {"ssh_user": "user", "ssh_private_key": text}


def test_a_line_break_in_the_files_own_name_or_in_the_preflights_keys_is_refused(tmp_path):
    write(tmp_path).with_name("here.inventory.yaml").rename(tmp_path / "a\nb: 1.inventory.yaml")
    with pytest.raises(UserError, match="cannot be printed"):
        inventory.load(tmp_path / "a\nb: 1.yaml")
    cluster = write(tmp_path, SITE + 'preflight: ["a=1\\n2"]\n')
    with pytest.raises(ConfigError, match=r"preflight: .*cannot be printed"):
        inventory.load(cluster)


def test_nothing_in_a_scratch_folder_of_another_is_run(tmp_path):
    """The commands themselves, by a real shell: scratch is another user's, a link, or our own."""
    marks = tmp_path / "ran"
    packages = keys.PackagesConfig(index="http://index/simple", proxy="http://proxy:3128")
    site = keys.Inventory(head="10.0.0.1", scratch="/SCRATCH", python="sh", packages=packages)
    scratch = tmp_path / "s"
    for name in ("cluster/head/setup.sh", "cluster/head/reap.py"):
        file = scratch / "code" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"echo {name} $PIP_INDEX_URL $PIP_PROXY >> {marks}")
    link = tmp_path / "l"
    link.symlink_to(scratch)
    for command in (commands.setup(site), commands.reap(site)):
        for place in (scratch, link):
            marks.unlink(missing_ok=True)
            done = subprocess.run(
                ["bash", "-c", command.replace("/SCRATCH", str(place))], capture_output=True, text=True
            )
            assert marks.exists() == (done.returncode == 0) == (place == scratch)
            assert done.stderr == (
                "" if place == scratch else f"{place} is not yours: set scratch in the inventory\n"
            )
            if "setup" in command and place == scratch:
                assert marks.read_text().split()[1:] == [packages.index, packages.proxy]


@pytest.mark.cluster  # it makes a virtual environment
def test_an_index_that_does_not_answer_is_told_with_the_keys(tmp_path):
    """The set-up itself, by a real bash and a real pip; nothing listens at that index."""
    root = ROOT
    packages = keys.PackagesConfig(index=f"http://127.0.0.1:{free_ports(1)[0]}/simple")
    site = keys.Inventory(head="10.0.0.1", scratch="/SCRATCH", python=sys.executable, packages=packages)
    command = commands.setup(site).replace("/SCRATCH/code", str(root)).replace("/SCRATCH", f"{tmp_path}/s")
    (tmp_path / "s").mkdir(mode=0o700)
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert packages.index in last and "packages.proxy in the inventory" in last
    assert not list((tmp_path / "s/env").glob("*/ready")) and not (tmp_path / ".bashrc").exists()


def test_a_missing_inventory_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"`make inventory CLUSTER=cluster/mine\.yaml` makes both"):
        inventory.load(tmp_path / "nowhere.yaml")
