"""What takes minutes on four hosts: `make test-cluster`. Each test brings up what it needs."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.lab.hosts import ADDRESSES, CLUSTER, CLUSTER_FILE, SCRATCH, STORAGE, Lab, missing
from tests.lab.soak import soak
from tests.waiting import wait_until
from training.model.shapes import LlamaShape, to_hf_config

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no lab here: {missing()}"),
]
SMALL = LlamaShape(
    vocab_size=320, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=128
)
LONG = {"schedule__tokens": 512 * 100_000, "checkpoint__every_steps": 20}
# Each takes the two CPUs of a host, so that there is one on every host and a lost host is always missed.
THREE = {"workers__count": 3, "workers__cpus": 2, "batch__tokens": 384, "workers__max_failures": 3}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with Lab(tmp_path_factory.mktemp("lab")) as lab:
        lab.seed_environment()
        yield lab


@pytest.fixture
def cluster(lab):
    """The lab with a cluster that is up, and no run going."""
    lab.link()
    lab.write_inventory()
    up = lab.up()
    assert up.returncode == 0, up.stdout + up.stderr
    yield lab
    lab.link()
    lab.call("cluster.laptop.remote", "stop", CLUSTER_FILE)


def follow(lab, name, **changes):
    """A run that is past its first step."""
    run = lab.start(*lab.train(run__name=name, **{**LONG, **changes}))
    run.until(r"^step [1-9]")
    return run


def test_outages_up_to_a_minute_cost_no_byte(cluster):
    """Both ways, one way, and bursts of loss. `tests.lab.soak` has a hundred, and says how soon they end."""
    cluster.link(**cluster.slow)
    found = soak(cluster, outages=6)
    assert [row["kind"] for row in found["rows"]].count("both ways") == 3
    assert found["same"] and found["num_bytes"] > 100_000


def test_ctrl_c_detaches_and_the_run_goes_on(cluster):
    run = follow(cluster, "detached")
    run.kill(2)
    assert run.wait() == 130
    assert "detached-1 goes on" in run.err and "make attach" in run.err and "make stop" in run.err
    status = cluster.call("cluster.laptop.fleet", "status", CLUSTER_FILE).stdout
    assert re.search(r"detached-1 +running", status)
    other = cluster.call(*cluster.train(run__name="detached", **{**LONG, "optim__clip": 0.5}))
    assert other.returncode == 1 and "another configuration" in other.stderr


def test_an_outage_while_up_works_is_waited_out(lab):
    lab.link(**lab.slow)
    lab.write_inventory(name="lab")
    assert lab.call("cluster.laptop.fleet", "down", CLUSTER_FILE).returncode == 0
    up = lab.start("cluster.laptop.fleet", "up", CLUSTER_FILE)
    up.until("starting Ray")
    lab.link(down=True)
    up.until("link lost")
    time.sleep(20)
    lab.link(**lab.slow)
    assert up.wait() == 0, up.out + up.err
    assert "3 of 3 nodes joined" in up.out


def test_a_lost_worker_is_waited_for(cluster):
    run = follow(cluster, "waits", **THREE)
    run.until(r"^step [3-9]\d")  # past the first checkpoint
    cluster.power_off("worker2")
    run.until(f"node {ADDRESSES['worker2']} is lost, 2 left; .* waits")
    cluster.power_on("worker2")  # the keeper on the head brings its Ray back
    run.until(f"node {ADDRESSES['worker2']} has joined")
    run.until(r"the workers were restarted, and go on from step [1-9]\d*")


def test_an_elastic_run_starts_as_soon_as_another_was_stopped(cluster):
    """It finds the cluster empty: if the stopped run had kept its resources, it would be told to wait."""
    follow(cluster, "before", **THREE)
    assert cluster.call("cluster.laptop.remote", "stop", CLUSTER_FILE).returncode == 0
    after = cluster.start(*cluster.train(run__name="elastic", **{**LONG, **THREE}, workers__min_count=1))
    after.until(r"^step [1-9]")
    assert "waits in line" not in after.out + after.err


def test_a_run_waits_for_others_on_a_full_cluster_and_one_that_fits_starts_beside_them(cluster):
    """Of six CPUs. The waiting run is on the head: the laptop that asked for it is gone."""
    follow(cluster, "large", workers__count=4)
    follow(cluster, "small", workers__count=1)
    third = cluster.start(*cluster.train(run__name="third", **LONG))
    told = (
        "the run waits in line for 2 workers: 1 of 6 CPUs are free, and it needs 2; large-1 holds 4, small-1"
    )
    third.until(told)
    fourth = cluster.start(*cluster.train(run__name="fourth", **LONG))
    fourth.until("the run waits in line behind third")
    third.kill()
    status = cluster.call("cluster.laptop.fleet", "status", CLUSTER_FILE).stdout
    assert re.search(r"run third +waiting +the run waits in line for 2 workers", status)
    stopped = cluster.call("cluster.laptop.remote", "stop", CLUSTER_FILE, "--run", "fourth")
    assert stopped.returncode == 0 and fourth.wait() == 1
    assert cluster.call("cluster.laptop.remote", "stop", CLUSTER_FILE, "--run", "large").returncode == 0
    again = cluster.start("cluster.laptop.remote", "attach", CLUSTER_FILE, "--run", "third")
    again.until(r"^step [1-9]")
    for name in ("third", "small"):
        assert cluster.call("cluster.laptop.remote", "stop", CLUSTER_FILE, "--run", name).returncode == 0


def test_a_run_goes_on_without_a_lost_worker(cluster):
    run = follow(cluster, "shrinks", **THREE, workers__min_count=1)
    run.until(r"^step [3-9]\d")
    cluster.power_off("worker1")
    try:
        run.until("is lost, 2 left; the run goes on")
        run.until(r"the workers were restarted, and go on from step [1-9]\d*")
    finally:
        cluster.power_on("worker1")


def test_a_worker_installed_anew_comes_back_by_up(cluster):
    cluster.power_off("worker1", wipe=True)
    cluster.power_on("worker1")
    _until_status(cluster, "does not accept the head's key")
    gone = cluster.up()
    assert gone.returncode == 0, gone.stdout + gone.stderr
    assert f"{ADDRESSES['worker1']}: copying environment" in gone.stdout


def test_a_head_whose_ray_was_restarted_says_so_and_the_same_command_resumes(cluster):
    run = follow(cluster, "resumes")
    run.until(r"^step [3-9]\d")
    cluster.run("head", "kill -9 $(pgrep gcs_server)")  # its own process table holds one alone
    assert run.wait() == 1
    assert "Ray on the head" in run.err and "run the same command again" in run.err
    assert cluster.up().returncode == 0
    again = cluster.start(*cluster.train(run__name="resumes", **LONG))
    again.until(r"resuming /storage/lab/outputs/resumes from step [1-9]")
    again.until("resumes-2 submitted")


def test_a_run_starts_on_a_ray_that_has_outlived_the_code_it_was_started_from(cluster):
    pids = cluster.run("head", "pgrep -x raylet").stdout
    for _ in range(2):  # each replaces the code's folder; the one before stays for one more
        assert cluster.up().returncode == 0
    assert cluster.run("head", "pgrep -x raylet").stdout == pids
    trained = cluster.call(*cluster.train(run__name="outlived"))
    assert trained.returncode == 0, trained.stderr


def test_up_does_not_restart_ray_under_a_run(cluster):
    run = follow(cluster, "undisturbed", **THREE)
    before = {name: cluster.run(name, "pgrep -x raylet").stdout for name in CLUSTER}
    assert cluster.up().returncode == 0
    assert {name: cluster.run(name, "pgrep -x raylet").stdout for name in CLUSTER} == before
    cluster.write_inventory(node__cpus=1)
    up = cluster.up()
    assert up.returncode == 1
    assert "undisturbed-1 is going on a Ray with other settings" in up.stderr and "make stop" in up.stderr
    seen = len(run.out)
    wait_until(lambda: len(run.out) > seen, told=lambda: run.out + run.err)


def test_preflight_opens_and_closes_the_gate(cluster):
    passed = cluster.call("cluster.laptop.remote", "preflight", CLUSTER_FILE)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "preflight passed on 3 nodes" in passed.stdout
    report = json.loads((cluster.storage / "lab/preflight.json").read_text())
    assert report["passed"] and sorted(report["nodes"]) == sorted(ADDRESSES[name] for name in CLUSTER)
    command = [each for each in cluster.train(run__name="gated") if each != "--skip-preflight"]
    trained = cluster.call(*command)
    assert trained.returncode == 0 and "preflight passed" not in trained.stdout  # once is enough

    failed = cluster.call("cluster.laptop.remote", "preflight", CLUSTER_FILE, "expect.gpus=8")
    assert failed.returncode == 1
    assert failed.stdout.count("0 GPUs (index none) and not 8") == 3
    refused = cluster.call(*command, "run.name=refused")
    assert refused.returncode == 1 and "preflight" in refused.stderr and "SKIP_PREFLIGHT=1" in refused.stderr
    follow(cluster, "told")  # with --skip-preflight


def test_a_baseline_trains_on_one_node_and_on_all(cluster):
    """The preflight comes first, and its report says how many nodes there are and what is between them."""
    (cluster.storage / "lab/preflight.json").unlink(missing_ok=True)
    cluster.train()  # the corpus
    more = (f"data.source={STORAGE}/corpus.jsonl", "data.vocab_size=320", "data.validation_fraction=0.2")
    shape = cluster.storage / "lab/small/config.json"
    shape.parent.mkdir(exist_ok=True)
    shape.write_text(json.dumps(to_hf_config(SMALL, dtype="bfloat16")))
    done = cluster.call(
        "training.baseline", "--cluster", CLUSTER_FILE, "rounds=2",
        f"train.shapes=[{STORAGE}/small/config.json]",
        "train.rules=[muon]", "train.tokens=64", "train.sequence_length=32", "train.most_micro_sequences=2",
        "train.steps=2", f"train.more=[{','.join(more)}]", "serve.models=[]", "wandb=disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((cluster.storage / "lab/outputs/baseline/baseline.json").read_text())
    assert found["hardware"]["num_nodes"] == 3
    alone, every = found["figures"]
    assert (alone["id"], alone["nodes"], alone["ranks"]) == ("training/small/muon", 1, 1)
    assert (every["id"], every["nodes"], every["ranks"]) == ("training/small/muon/3 nodes", 3, 3)
    assert every["tokens_per_step"] == 3 * alone["tokens_per_step"]
    (name, *_) = (name for name in every["shares"] if "network" in name)
    assert name == "share of measured network: all-reduce bus bandwidth, 3 nodes"
    assert 0 < min(every["shares"][name]) <= max(every["shares"][name]) < 1


def test_a_worker_whose_environment_was_changed_by_hand_is_named(cluster):
    """The head's environment is copied, so a version can differ only where a node was changed by hand."""
    version = f"{next(Path(ROOT, '.venv/lib').glob('python3.*/site-packages'))}/ray/_version.py"
    other = f"sed 's/^version = .*/version = \"2.59.9\"/' {version} > /tmp/version.py"
    script = f"{other} && mount --bind /tmp/version.py {version} && kill -9 $(pgrep raylet)"
    assert cluster.run("worker2", script).returncode == 0
    _until_status(cluster, "Ray 2.59.9")
    up = cluster.up()
    assert up.returncode == 1 and "2 of 3 nodes joined" in up.stderr
    assert f"{ADDRESSES['worker2']}: has Ray 2.59.9, and the head has 2.60.0" in up.stderr
    assert cluster.run("worker2", f"umount {version}; rm -r {SCRATCH}/env").returncode == 0
    assert cluster.up().returncode == 0


def test_a_worker_without_its_ray_is_named(cluster):
    script = f"rm {SCRATCH}/env/*/bin/ray; kill -9 $(pgrep raylet)"
    assert cluster.run("worker2", script).returncode == 0
    _until_status(cluster, rf"{ADDRESSES['worker2']}.*failed")
    up = cluster.up()
    assert up.returncode == 1 and ADDRESSES["worker2"] in up.stderr, up.stdout + up.stderr
    assert cluster.run("worker2", f"rm -r {SCRATCH}/env").returncode == 0
    assert cluster.up().returncode == 0


def test_rays_own_launcher_brings_up_every_worker(lab):
    lab.link()
    lab.write_inventory()
    assert lab.call("cluster.laptop.fleet", "down", CLUSTER_FILE).returncode == 0
    for name in ("worker1", "worker2"):
        if not lab.run(name, f"ls {SCRATCH}/env/*/ready").stdout:
            lab.seed_environment(name)
    lab.call("cluster.laptop.inventory", CLUSTER_FILE)
    up = lab.run("nyc", f"cd {ROOT} && ray up -y {CLUSTER_FILE}")
    assert up.returncode == 0, up.stdout + up.stderr
    told = lambda: lab.run("nyc", f"cd {ROOT} && ray exec {CLUSTER_FILE} 'ray status'").stdout  # noqa: E731
    wait_until(lambda: "3 local.cluster.node" in told(), told=told)
    attached = lab.run("nyc", f"cd {ROOT} && echo 'hostname; exit' | timeout 60 ray attach {CLUSTER_FILE}")
    assert "head" in attached.stdout
    down = lab.run("nyc", f"cd {ROOT} && ray down -y {CLUSTER_FILE}")
    assert down.returncode == 0
    # Ray ends the head; the workers see it and end by themselves
    left = lambda: [line for name in CLUSTER for line in lab.rays(name)]  # noqa: E731
    wait_until(lambda: not left(), told=left)


def _until_status(lab, pattern):
    """Wait until `make status` says so: Ray takes a while to miss a node."""

    def said():
        return lab.call("cluster.laptop.fleet", "status", CLUSTER_FILE).stdout

    wait_until(lambda: re.search(pattern, said()), told=said)


# --- errors: a lab of their own each, without a cluster


@pytest.fixture
def bare(tmp_path):
    with Lab(tmp_path) as lab:
        lab.seed_environment()
        yield lab


def test_a_wrong_key_is_tried_once(bare):
    bare.run("nyc", "ssh-keygen -q -t ed25519 -N '' -f /root/other")
    bare.write_inventory(ssh={"user": "root", "key": "/root/other"})
    before = (bare.folder / "head.log").read_text()
    up = bare.up()
    assert up.returncode == 1
    assert f"{ADDRESSES['head']}: refuses the key /root/other for user root" in up.stderr
    assert "link lost" not in up.stdout + up.stderr
    said = (bare.folder / "head.log").read_text().removeprefix(before)
    assert said.count("Connection closed by authenticating user root") == 1, said


def test_a_worker_that_is_off_or_refuses_the_key_is_named_and_the_others_join(bare):
    """`up` does not wait for a worker that stays off: it says so, and ends."""
    bare.power_off("worker1")
    bare.run("worker2", "rm /root/.ssh/authorized_keys")
    up = bare.up()
    assert up.returncode == 1 and "1 of 3 nodes joined" in up.stderr
    assert re.search(rf"{ADDRESSES['worker1']}: .*is it on", up.stderr)
    assert f"{ADDRESSES['worker2']}: refuses the key" in up.stderr
    bare.power_on("worker1")  # and later it joins by itself, once `up` has let the head's key in
    again = bare.up()
    assert "2 of 3 nodes joined" in again.stderr


def test_a_second_user_has_a_cluster_on_the_same_hosts(bare):
    """Who forgets the ports is told whose they are; with ports of their own both work, and one ends alone."""
    assert bare.up().returncode == 0
    theirs = {"name": "bobs", "scratch": "/scratch/bob", "storage": "/storage/bob"}
    user = """useradd -m -p '*' bob && mkdir -p ~bob/.ssh /scratch/bob /storage/bob && chmod 711 /root
    cp /root/.ssh/authorized_keys ~bob/.ssh/ && chown -R bob ~bob /storage/bob"""
    for name in CLUSTER:
        assert (done := bare.run(name, user)).returncode == 0, done.stderr
        if name == "head":
            bare.seed_environment(scratch="/scratch/bob")
        assert bare.run(name, "chown -R bob /scratch/bob").returncode == 0
    key = {"user": "bob", "key": "/root/.ssh/id_ed25519"}
    for ports, told in (
        ({}, "port 6379 is in use by user root; end that, or set ports.gcs in the inventory"),
        ({"gcs": 6380}, "port 8265 is user root's, not your Ray's; set ports.dashboard in the inventory"),
        (
            {"gcs": 6380, "dashboard": 8266},
            "port 52365 is in use by user root; end that, or set ports.agent",
        ),
        ({"gcs": 6380, "dashboard": 8266, "agent": 52366}, None),
    ):
        bare.write_inventory(ssh=key, ports=ports, **theirs)
        up = bare.up()
        assert up.returncode == bool(told) and (told or "3 of 3 nodes joined") in up.stdout + up.stderr
    trained = bare.call(*bare.train(run__name="bobs"))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert bare.call("cluster.laptop.fleet", "down", CLUSTER_FILE).returncode == 0
    bare.write_inventory()
    status = bare.call("cluster.laptop.fleet", "status", CLUSTER_FILE)
    assert "3 of 3 nodes in Ray" in status.stdout


def test_a_port_in_use_is_named(bare):
    listen = "import socket, time; s = socket.socket(); s.bind(('', 6379)); s.listen(); time.sleep(600)"
    bare.run("head", f'setsid nohup python3 -c "{listen}" > /dev/null 2>&1 < /dev/null & sleep 1')
    up = bare.up()
    assert up.returncode == 1
    assert "port 6379 is in use by a process of yours, pid" in up.stderr and "ports.gcs" in up.stderr


def test_a_full_disk_is_named(bare):
    full = f"mkdir -p {SCRATCH} && mount -t tmpfs -o size=64k,mode=755 tmpfs {SCRATCH}"
    assert bare.run("head", full).returncode == 0
    up = bare.up()
    assert up.returncode == 1
    assert "No space left" in up.stderr and "set scratch in the inventory" in up.stderr


def test_a_full_disk_on_a_worker_is_named_and_the_other_joins(bare):
    full = f"mkdir -p {SCRATCH} && mount -t tmpfs -o size=64k,mode=755 tmpfs {SCRATCH}"
    assert bare.run("worker1", full).returncode == 0
    up = bare.up()
    assert up.returncode == 1 and "2 of 3 nodes joined" in up.stderr
    assert re.search(rf"{ADDRESSES['worker1']}: .*make room, or set scratch in the inventory", up.stderr)
    assert bare.run("worker1", f"umount {SCRATCH}").returncode == 0
    assert bare.up().returncode == 0


def test_a_worker_whose_scratch_is_another_users_is_named_and_the_other_joins(bare):
    plant = f"""mkdir -p {SCRATCH}/code/cluster/head && cd {SCRATCH}
    echo 'touch /tmp/ran' | tee activate code/cluster/head/setup.sh && chown -R 65534 ."""
    assert bare.run("worker1", plant).returncode == 0
    up = bare.up()
    assert up.returncode == 1 and "2 of 3 nodes joined" in up.stderr
    assert f"{ADDRESSES['worker1']}: {SCRATCH}: belongs to user 65534" in up.stderr
    assert bare.run("worker1", f"ls /tmp/ran; rm -r {SCRATCH}").stdout == ""
    assert bare.up().returncode == 0


def test_a_worker_whose_token_was_planted_is_named(bare):
    """And a home that others can read gets closed."""
    plant = "mkdir -m 755 ~/.ray && echo planted > ~/.ray/auth_token"
    assert bare.run("worker1", f"{plant} && chown 65534 ~/.ray/auth_token").returncode == 0
    assert bare.run("worker2", f"{plant} && chmod 644 ~/.ray/auth_token").returncode == 0
    up = bare.up()
    assert up.returncode == 1 and "2 of 3 nodes joined" in up.stderr
    told = f"{ADDRESSES['worker1']}: /root/.ray/auth_token (Ray's): may be the token of another user"
    assert told in up.stderr, up.stderr
    said = bare.run(
        "worker2", "stat -c '%a %u' ~/.ray ~/.ray/auth_token; cat ~/.ray/auth_token"
    ).stdout.split()
    assert said[:4] == ["700", "0", "600", "0"] and said[4] != "planted"
    assert bare.run("worker1", "rm ~/.ray/auth_token").returncode == 0
    assert bare.up().returncode == 0


def test_a_changed_host_key_is_refused(bare):
    assert bare.up().returncode == 0
    bare.run("nyc", "pkill -x ssh; rm -f /root/.asuncion/lab/[0-9a-f]*")  # the open connection
    new = "rm /etc/ssh/host_key*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/host_key"
    assert bare.run("head", f"{new}; kill -HUP $(pgrep -o sshd)").returncode == 0
    time.sleep(1)
    status = bare.call("cluster.laptop.fleet", "status", CLUSTER_FILE)
    assert status.returncode == 1
    assert "its host key is not the pinned one" in status.stderr and "ssh-keygen -R" in status.stderr
