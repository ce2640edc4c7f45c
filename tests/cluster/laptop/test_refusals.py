"""What ssh refuses for good is told at once, by the real ssh and sshd, and never called a lost link."""

import pytest

from tests.commands import ROOT
from tests.lab.hosts import ADDRESSES, CLUSTER_FILE, Lab, missing

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no lab here: {missing()}"),
]
KEY = "/root/.ssh/id_ed25519"
REFUSALS = {  # what is done to the laptop -> the inventory's changes, and what is told
    f"chmod 644 {KEY}": ({}, f"ssh refuses {KEY}, which others can read: `chmod 600` it"),
    "ssh-keygen -q -t ed25519 -N secret -f /root/locked": (
        {"ssh": {"user": "root", "key": "/root/locked"}},
        "the key /root/locked has a passphrase, and no agent holds it: `ssh-add /root/locked`",
    ),
    ": another user": (
        {"ssh": {"user": "nobody-there", "key": KEY}},
        f"refuses the key {KEY} for user nobody-there; set ssh.user and ssh.key in the inventory",
    ),
    "echo 'NoSuchOption yes' > /root/.ssh/config": ({}, "line 1: Bad configuration option: nosuchoption"),
    "echo 'KexAlgorithms diffie-hellman-group1-sha1' > /root/.ssh/config": ({}, "no algorithm in common"),
}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("refusing")) as lab:
        yield lab


@pytest.mark.parametrize("change", REFUSALS)
def test_a_permanent_refusal_is_told_at_once_and_is_no_lost_link(refusing, change):
    changes, told = REFUSALS[change]
    refusing.write_inventory(**changes)
    assert (done := refusing.run("nyc", change)).returncode == 0, done.stderr
    up = refusing.up()
    refusing.run("nyc", f"chmod 600 {KEY}; rm -f /root/.ssh/config")
    assert up.returncode == 1 and told in up.stderr, up.stderr
    assert "link lost" not in up.stdout + up.stderr


def test_an_agent_with_seven_other_keys_does_not_stand_in_the_way(refusing):
    refusing.write_inventory()
    script = f"""eval $(ssh-agent) > /dev/null
    for i in 1 2 3 4 5 6 7; do ssh-keygen -q -t ed25519 -N '' -f other$i; ssh-add -q other$i; done
    ssh-keyscan {ADDRESSES["head"]} > .asuncion/lab/known_hosts 2> /dev/null
    cd {ROOT} && .venv/bin/python -m cluster.laptop.fleet status {CLUSTER_FILE}
    kill $SSH_AGENT_PID"""
    said = refusing.run("nyc", script).stderr
    assert "this cluster is not up: run `make up`" in said, said  # says the head
