"""A laptop, a slow link and a cluster of three real hosts: from `make up` to `make down`."""

import json
import re
import time

import pytest

from cluster.laptop.ssh import CONNECT_SECONDS, RETRY_SECONDS
from tests.intruder import attack
from tests.lab.hosts import ADDRESSES, CLUSTER, CLUSTER_FILE, PYTHON, SCRATCH, Lab, missing
from tests.listening import compare, documented, listening_there
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(missing() is not None, reason=f"no lab here: {missing()}"),
]
OUTAGE_SECONDS = 3  # once the loss is noticed, 10 s after it; test_cluster_at_length.py: a minute


def test_a_run_survives_the_link_and_the_laptop(tmp_path):
    with Lab(tmp_path) as lab:
        lab.link(**lab.slow)
        _require_no_scratch_of_another(lab)
        lab.seed_environment()
        _have_odd_logins(lab)
        up = lab.up()
        assert up.returncode == 0, up.stdout + up.stderr
        assert "3 of 3 nodes joined" in up.stdout
        _require_no_key_of_the_laptop(lab)
        status = lab.call("cluster.laptop.fleet", "status", CLUSTER_FILE)
        assert status.returncode == 0 and "3 of 3 nodes in Ray" in status.stdout

        # far longer than the test: `stop` ends it
        command = lab.train(run__name="night", schedule__tokens=512 * 20_000, checkpoint__every_steps=200)
        first = lab.start(*command)
        first.until(r"^step [1-9]")
        _require_nothing_for_others(lab)
        _require_what_listens_is_documented(lab)
        lab.link(down=True)
        first.until("link lost")
        time.sleep(OUTAGE_SECONDS)
        lab.link(**lab.slow)
        first.until("link is back")
        # 5 s is the aim on a machine that is not busy: a pause, and an attempt that may begin in the outage
        assert max(RETRY_SECONDS) + CONNECT_SECONDS <= 5
        first.kill()
        first.wait()

        again = lab.start(*command)  # the same command finds the run that is going
        again.until("night-1 is going: attached")
        again.until(r"^step [1-9]")
        stopped = lab.call("cluster.laptop.remote", "stop", CLUSTER_FILE)
        assert stopped.returncode == 0 and "night-1: stopped" in stopped.stderr
        assert again.wait() == 1 and "night-1 was stopped" in again.err
        status = lab.call("cluster.laptop.fleet", "status", CLUSTER_FILE)
        assert re.search(
            r"^  run night +stopped +step [\d,]+ of 20,000; .*the same command", status.stdout, re.MULTILINE
        )
        there = lab.log_on_head("night-1")
        assert lab.log_on_laptop("night-1") == there
        assert (first.out + again.out).encode() == there  # no line lost, none repeated

        pulled = lab.call("cluster.laptop.remote", "pull", CLUSTER_FILE, "--to", "/root/outputs")
        assert pulled.returncode == 0, pulled.stderr
        ours = tmp_path / "hosts/nyc/disk/home/outputs/night"
        theirs = lab.storage / "lab/outputs/night"
        assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
        assert not (ours / "checkpoints").exists() and any((theirs / "checkpoints").iterdir())

        down = lab.call("cluster.laptop.fleet", "down", CLUSTER_FILE)
        assert down.returncode == 0, down.stdout + down.stderr
        assert down.stdout.count("none left") == len(CLUSTER)
        assert {name: lab.rays(name) for name in CLUSTER} == {name: [] for name in CLUSTER}
        ours = "ls -d ~/.ssh/asuncion* ~/.ray/auth_token; grep -H asuncion ~/.ssh/authorized_keys ~/.bashrc"
        assert {name: lab.run(name, ours).stdout for name in CLUSTER} == dict.fromkeys(CLUSTER, "")


def _have_odd_logins(lab):
    """Logins that print and change the folder; an ssh configuration that would put itself in the way."""
    for name in CLUSTER:
        done = lab.run(name, "echo 'echo Welcome; printf 3.12; echo mind the gap >&2; cd /var' > ~/.bashrc")
        assert done.returncode == 0, done.stderr
    config = "Host *\n RemoteCommand tmux\n RequestTTY force\n LocalForward 22 127.0.0.1:22\n"
    config += " PermitLocalCommand yes\n LocalCommand echo local\n"
    done = lab.run("nyc", f"echo '{config}' > ~/.ssh/config; chmod 600 ~/.ssh/config")
    assert done.returncode == 0, done.stderr


def _require_no_key_of_the_laptop(lab):
    """The laptop's private key is on no node, and the token is readable by nobody else."""
    secret = (lab.folder / "key_user").read_text().splitlines()[2]
    for name in CLUSTER:
        found = lab.run(name, f"grep -rlF -- '{secret}' /root/.ssh /root/*.pem /scratch 2> /dev/null").stdout
        assert found == ""
        assert lab.run(name, "stat -c %a /root/.ray/auth_token").stdout.strip() == "600"
    pinned = lab.run("nyc", "cat /root/.asuncion/lab/known_hosts").stdout
    assert all(ADDRESSES[name] in pinned for name in CLUSTER)
    state = json.loads(lab.run("head", "cat /scratch/lab/keeper.json").stdout)
    assert set(state["nodes"]) == {ADDRESSES[name] for name in CLUSTER}


def _require_no_scratch_of_another(lab):
    """A folder that somebody else has put there is refused, and nothing in it is run."""
    plant = f"""mkdir -p {SCRATCH}/code/cluster && cd {SCRATCH} && echo 'touch /tmp/ran' > activate
    echo 'open("/tmp/ran", "w")' | tee code/cluster/head/keeper.py > code/cluster/head/answers.py
    echo {{}} > code/site.json && chown -R 65534 ."""
    assert lab.run("head", plant).returncode == 0
    for verb in ("up", "status", "down"):
        done = lab.call("cluster.laptop.fleet", verb, CLUSTER_FILE)
        assert done.returncode == 1
        assert f"{SCRATCH}: belongs to user 65534" in done.stderr or f"{SCRATCH} is not yours" in done.stderr
    assert lab.run("head", f"ls /tmp/ran; rm -r {SCRATCH}").stdout == ""


def _require_nothing_for_others(lab):
    """Another user of a node reads no file of Ray's, plants none, and runs no job."""
    places = f"{SCRATCH} {SCRATCH}/ray /root/.ray"
    for name in ("head", "worker1"):
        listed = lab.run(name, f"find {places} -maxdepth 4 -type d,s,f -printf '%y%p\\n'").stdout
        paths = {line[1:]: line[0] for line in listed.splitlines()}
        assert any(path.endswith("working_dir_files") for path in paths) and "s" in paths.values()
        could, statuses = attack(lab.command(name, PYTHON, "-I"), paths, [None, "0" * 64])
        assert could == [] and set(statuses) <= {401, 403} and len(statuses) == 2


def _require_what_listens_is_documented(lab):
    """On all hosts together: each row of the tables, and nothing else but sshd."""
    heading = "What listens on a node"
    rows = documented("cluster/README.md", heading) | documented("training/README.md", heading)

    def differences():
        found = set()
        for name in CLUSTER:
            for process, address, port in listening_there(lab.command(name, PYTHON)):
                if process != "sshd:":
                    found.add((process, "node" if address == ADDRESSES[name] else address, port))
        return compare(found, rows)

    wait_until(lambda: "unseen" not in differences(), told=differences)  # some of Ray starts later
    assert differences() == {}
