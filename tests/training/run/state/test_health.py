"""A run that goes on without a bad GPU: on a real Ray, whose GPUs are only numbers, for want of any."""

import platform
import secrets
import tempfile
import time
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path

import pytest

from cluster.cli import RunError
from cluster.heart import drained
from cluster.record import events, heartbeat
from cluster.session import environment
from tests.commands import ROOT
from tests.waiting import wait_until
from training import config as training_config
from training.run.start import STOP
from training.run.state import health
from training.run.state.health import HealthWatch, on_sound_gpus, without_drained

pytestmark = pytest.mark.stack
HOST = platform.node()


def drain(outputs: Path, gpu: int, host: str = HOST) -> None:
    drained.add(outputs, host=host, gpu=gpu, uuid="", reason=f"GPU {gpu} of {host}: Xid 79")


@pytest.fixture(scope="module")
def ray():
    """A Ray of this machine that is told of three GPUs."""
    import ray

    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True)
        folder = stack.enter_context(made)
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        few = {"RAY_prestart_worker_first_driver": "0"}  # no worker for each CPU: nobody uses it
        stack.enter_context(environment({**few, "RAY_AUTH_TOKEN_PATH": str(token)}))
        ray.init(
            num_cpus=3, num_gpus=3, include_dashboard=False, log_to_driver=False, logging_level="WARNING",
            object_store_memory=80_000_000, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
            _temp_dir=folder,
        )  # fmt: skip
        yield ray
        ray.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Holders that look every 50 ms. Ray sends a class of a function whole, so it is quick there too."""

    class Quick(drained.Holder):
        def __init__(self, outputs):
            drained.POLL_SECONDS = 0.05
            super().__init__(outputs)

    monkeypatch.setattr(drained, "Holder", Quick)


def free_gpus(ray):
    return ray.available_resources().get("GPU", 0)


def test_ray_gives_a_drained_gpu_to_nobody_until_it_is_cleared(ray, tmp_path):
    drain(tmp_path, 1)
    drain(tmp_path, 0, "elsewhere")

    @ray.remote(num_gpus=1, num_cpus=0)
    class User:
        def gpu(self):
            return ray.get_runtime_context().get_accelerator_ids()["GPU"]

    first = User.remote()  # in use when the other one goes bad
    assert ray.get(first.gpu.remote()) == ["0"]
    for _ in range(2):  # again: it is held already
        assert [each.name for each in drained.hold(tmp_path)] == [f"{HOST}:1"]
    wait_until(lambda: free_gpus(ray) == 1, told=lambda: ray.available_resources())
    second = User.remote()
    assert ray.get(second.gpu.remote()) == ["2"]
    ray.kill(first)
    ray.kill(second)
    config = training_config.load(
        dotlist=[f"run.directory={tmp_path}", "workers.gpu=true", "workers.count=3", "run.name=night"]
    )
    with pytest.raises(RunError, match=rf"2 GPUs are left, and the run needs 3; {HOST}:1 is drained.*Xid 79"):
        without_drained(config)
    elastic = training_config.load(
        dotlist=[
            *(f"run.directory={tmp_path}", "workers.gpu=true", "workers.count=3", "run.name=night"),
            "workers.min_count=1",
        ]
    )
    assert without_drained(elastic).count == 2
    drained.clear(tmp_path, f"{HOST}:1")
    wait_until(lambda: free_gpus(ray) == 3, told=lambda: ray.available_resources())
    assert without_drained(config).count == 3


def test_a_run_goes_on_without_the_gpu_that_goes_bad_under_it(ray, tmp_path, monkeypatch):
    """The training itself is a stand-in: no GPU here could train."""
    keys = ("workers.gpu=true", "workers.count=3", "workers.min_count=2", "run.name=night")
    config = training_config.load(dotlist=[f"run.directory={tmp_path}", *keys])
    run = config.run_directory
    (run / heartbeat.FOLDER).mkdir(parents=True)
    beat = heartbeat.Beat(0, 1, "s", HOST, 1, 1, "forward", 1, 0.0, gpus="0,2")
    monkeypatch.setattr(health.heartbeat, "read", lambda directory: [beat])
    watch = HealthWatch(config)
    bad = {"host": HOST, "gpus": [], "gpus_problem": None, "disk_errors": [], "disks": {}}
    looks = chain([{**bad, "xids": [[1, 79]]}, {**bad, "xids": [[0, 79]]}], repeat({**bad, "xids": []}))
    monkeypatch.setattr(health._Node, "_look", lambda node: node._answers.put(next(looks)))
    asked = []

    def fit(workers):
        asked.append(workers.count)
        if len(asked) == 1:
            watch.look()  # the GPU of another run on this node
            assert not (run / STOP).exists() and watch.bad == []
            drained.clear(tmp_path, f"{HOST}:1")
            watch.look()
            assert (run / STOP).exists()
            raise RunError("CUDA error: unspecified launch failure")
        assert not (run / STOP).exists()
        return True

    assert on_sound_gpus(config, fit, health=watch, asked_to_stop=lambda: False)
    assert asked == [3, 2]
    told = [(event["kind"], event["text"]) for event in events.read(run)]
    assert told == [
        ("gpu_bad", f"GPU 1 of {HOST}: Xid 79, it has fallen off the bus"),
        ("gpu_bad", f"GPU 0 of {HOST}: Xid 79, it has fallen off the bus"),
        ("resumed", f"the run goes on without GPU 0 of {HOST}, from step 0"),
    ]
    assert health.line(run)["health_bad_gpus"] == 1
    again = HealthWatch(config)  # the next start: that GPU is bad still, and no rank has it
    monkeypatch.setattr(health._Node, "_look", lambda node: node._answers.put({**bad, "xids": [[0, 79]]}))
    again.look()
    assert again.bad == [] and len(events.read(run)) == len(told)
    monkeypatch.setattr(health._Node, "_look", lambda node: node._answers.put({**bad, "xids": []}))
    drained.clear(tmp_path, f"{HOST}:0")
    wait_until(lambda: free_gpus(ray) == 3)
    with pytest.raises(RunError, match="shapes differ"):  # which is no GPU's fault
        on_sound_gpus(config, _raise, health=watch, asked_to_stop=lambda: False)


def test_a_row_has_its_keys_whatever_the_file_of_the_last_look_holds(tmp_path):
    for content in (None, "{", "[]", "null", "{}"):
        if content:
            (tmp_path / "health.json").write_text(content)
        assert health.line(tmp_path) == dict.fromkeys(health.KEYS, 0)


def _raise(workers):
    raise RunError("shapes differ")


def test_a_failure_is_told_where_the_nodes_health_cannot_be_written(tmp_path):
    """Such as that of a full disk: then no file of the run can be written."""
    config = training_config.load(dotlist=[f"run.directory={tmp_path}", "launcher=torch"])
    with pytest.raises(RunError, match="shapes differ"):  # the run directory is not there
        on_sound_gpus(config, _raise, health=HealthWatch(config), asked_to_stop=lambda: False)


def test_nodes_that_do_not_answer_are_waited_for_together_and_each_is_told_once(tmp_path, monkeypatch):
    config = training_config.load(dotlist=[f"run.directory={tmp_path}", "launcher=torch"])
    run = config.run_directory
    run.mkdir()
    monkeypatch.setattr(health, "ANSWER_SECONDS", 0.5)
    sound = {"host": "sound", "gpus": [], "gpus_problem": "no driver", "xids": [], "disk_errors": []}

    def look(node):
        if node.host == "sound":
            node._answers.put({**sound, "disks": {}})

    monkeypatch.setattr(health._Node, "_look", look)
    watch = HealthWatch(config)
    watch._nodes = {name: health._Node(name, [], name) for name in (*map(str, range(9)), "sound")}
    monkeypatch.setattr(watch, "_nodes_now", lambda: list(watch._nodes.values()))
    began = time.monotonic()
    watch.look()
    watch.look()
    assert time.monotonic() - began < 9 * 0.5  # in turn
    told = [event["host"] for event in events.read(run)]
    assert told == [*map(str, range(9)), "sound"]
    assert health.line(run)["health_problems"] == 1


class Posts:
    """The contexts of two ranks, of which each is the first of its node."""

    world_size = 2

    def __init__(self, rank, left):
        self.rank, self.is_main, self._left = rank, rank == 0, left

    def post(self, name, value):
        self._left[name, self.rank] = value

    def posted(self, name, rank):
        return self._left.get((name, rank))


def test_under_torchrun_each_node_is_looked_at_and_rank_0_adds_up(tmp_path, monkeypatch):
    config = training_config.load(dotlist=[f"run.directory={tmp_path}", "launcher=torch"])
    config.run_directory.mkdir()
    bad = {"host": HOST, "gpus": [], "gpus_problem": "no driver", "xids": [], "disk_errors": [], "disks": {}}
    monkeypatch.setattr(health._Node, "_look", lambda node: node._answers.put(bad))
    left = {}
    for rank in (1, 0):
        HealthWatch(config, context=Posts(rank, left)).look()
    assert left["health", 1] == {"health_throttled_gpus": 0, "health_problems": 1}
    assert health.line(config.run_directory)["health_problems"] == 2


def test_another_node_is_asked_through_an_actor_there(ray, tmp_path):
    """That node is this one too: its clock is ours, and its disks are."""
    node = health._OtherNode(HOST, [str(tmp_path / "gone")], ray.get_runtime_context().get_node_id())
    node.begin()
    found, ahead_seconds = node.end()
    assert ahead_seconds == 0.0
    assert found["host"] == HOST and found["disks"][str(tmp_path / "gone")] == "No such file or directory"
    assert any(isinstance(free, int) for free in found["disks"].values())
    assert node.judge.findings(found, clock_seconds=ahead_seconds)[0].kind == "node_problem"
