"""Watches the nodes while a run goes on, and takes a run off a GPU that goes bad.

The launcher asks every node (`cluster.machine.health`), judges (`cluster.heart.health`) and reports: events,
`health.json` for the record and `make status`, alerts in W&B.
"""

import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import files
from cluster.cli import RunError
from cluster.heart import drained
from cluster.heart.health import GPU_BAD, NODE_PROBLEM, Finding, Judge
from cluster.machine.health import Node
from cluster.record import events, heartbeat
from cluster.review.status import HEALTH_FILE
from cluster.session import KIND
from training.config import TrainConfig, WorkersConfig
from training.run.checkpoint import step_of
from training.run.start import STOP, newest_of
from training.run.watch import Background

if TYPE_CHECKING:
    from training.run.context import Context

ANSWER_SECONDS = 20.0  # a driver that hangs, hangs whoever asks
KEYS = (  # of a row, from the file
    *("health_bad_gpus", "health_throttled_gpus", "health_problems"),
    "health_straggler_seconds",
)


class HealthWatch(Background):
    """Looks at every node for the length of a `with` block.

    Args:
        context: under torchrun, of a node's first rank, which looks at its own node; rank 0 adds up what they
            found.

    Attributes:
        bad: the GPUs that went bad under this run, as findings.
    """

    POLL_SECONDS = 10.0

    def __init__(self, config: TrainConfig, *, context: "Context | None" = None) -> None:
        super().__init__()
        self._config, self._directory = config, config.run_directory
        self._context = context
        self._outputs = config.run_directory.parent
        self._drained_before = {each.name for each in drained.read(self._outputs)}  # no rank has these
        self._in_ray = config.launcher == "ray"
        self._nodes: dict[str, _Node] = {}  # by Ray's id
        self._lock = threading.Lock()
        self.bad: list[Finding] = []

    def run(self) -> None:
        problem = ""
        while not self.stop.wait(self.POLL_SECONDS):
            try:
                self.look()
            except Exception as error:  # of the storage, of Ray, of a store: the next look may succeed
                if problem != (problem := repr(error)):
                    print(f"health of the nodes: {problem}", file=sys.stderr)

    def look(self) -> None:
        """Ask all nodes at once, and report what is new."""
        with self._lock:
            for node in self._nodes_now():
                node.begin()
            for name, node in list(self._nodes.items()):
                try:
                    found, ahead_seconds = node.end()
                except TimeoutError:
                    self._report_silent(node)
                    continue
                except Exception as error:  # any: it is lost, as `NodeWatch` reports; or it is asked anew
                    print(f"health of {node.host}: {error!r}", file=sys.stderr)
                    del self._nodes[name]
                    continue
                node.is_silent = False
                for finding in node.judge.findings(found, clock_seconds=ahead_seconds):
                    self._report(finding)
            self._write()

    def _report(self, finding: Finding) -> None:
        if finding.kind == GPU_BAD and f"{finding.host}:{finding.gpu}" in self._drained_before:
            return
        events.append(
            self._directory, finding.kind, finding.text, host=finding.host, gpu=finding.gpu, uuid=finding.uuid
        )
        if finding.kind != GPU_BAD or finding.gpu is None:
            return
        drained.add(self._outputs, host=finding.host, gpu=finding.gpu, uuid=finding.uuid, reason=finding.text)
        beats = heartbeat.read(self._directory)
        if (
            self._config.workers.gpu
            and self._in_ray
            and any(beat.may_use(finding.host, finding.gpu, finding.uuid) for beat in beats)
        ):
            self.bad.append(finding)
            (self._directory / STOP).touch()

    def _report_silent(self, node: "_Node") -> None:
        if not node.is_silent:
            node.is_silent = True
            silent = f"{node.host} does not answer within {ANSWER_SECONDS:g} s"
            text = f"{silent}; does its GPU driver hang, or its storage?"
            events.append(self._directory, NODE_PROBLEM, text, host=node.host)

    def _write(self) -> None:
        judges = [node.judge for node in self._nodes.values()]
        counts = {
            "health_throttled_gpus": sum(judge.num_throttled for judge in judges),
            "health_problems": sum(len(judge.open) for judge in judges),
        }
        if self._context:
            self._context.post("health", counts)
            if not self._context.is_main:
                return
            every = [self._context.posted("health", rank) or {} for rank in range(self._context.world_size)]
            counts = {name: sum(each.get(name, 0) for each in every) for name in counts}
        fraction = self._config.record.straggler_fraction
        stragglers = heartbeat.straggler_seconds(heartbeat.read(self._directory), fraction=fraction)
        files.write_json(
            self._directory / HEALTH_FILE,
            {
                "time": time.time(),
                "health_bad_gpus": len(drained.read(self._outputs)),
                **counts,
                "health_straggler_seconds": stragglers,
            },
        )

    def _nodes_now(self) -> list["_Node"]:
        """The launcher's node, which this process asks, and those of the ranks, which an actor each asks."""
        here, hosts = "", {"": platform.node()}  # by Ray's id
        if self._in_ray:
            import ray

            here = ray.get_runtime_context().get_node_id()
            hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        ranks, shared = {beat.host for beat in heartbeat.read(self._directory)}, [str(self._directory)]
        for name in set(self._nodes) - set(hosts):
            del self._nodes[name]
        for name, host in hosts.items():
            if name not in self._nodes and (name == here or host in ranks):
                self._nodes[name] = (_Node if name == here else _OtherNode)(host, shared, name)
        return list(self._nodes.values())


class _Node:
    """This node, asked in a thread that nobody waits for: a driver that hangs, hangs whoever asks it."""

    def __init__(self, host: str, shared: Sequence[str], node_id: str) -> None:
        self.host, self.judge, self.is_silent = host, Judge(), False
        self._node_id = node_id
        self._folders: dict[str, Any] = {"own": ".", "shared": shared}
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked: Any = None  # the open question
        self._until = 0.0  # when it should have been answered
        self._node: Any = None

    def begin(self) -> None:
        """Ask, unless an earlier question is open."""
        if self._asked is None:
            self._asked, self._until = self._ask(), time.monotonic() + ANSWER_SECONDS

    def _ask(self) -> Any:
        threading.Thread(target=self._look, daemon=True).start()
        return True

    @property
    def _patience(self) -> float:
        """Seconds for which the answer may still be waited for."""
        return max(0.0, self._until - time.monotonic())

    def _look(self) -> None:
        try:
            self._node = self._node or Node(**self._folders)
            self._answers.put(self._node.look())
        except Exception as error:  # `end` raises it
            self._answers.put(error)

    def end(self) -> tuple[dict[str, Any], float]:
        """`Node.look`, and by how many seconds the node's clock is ahead. Raises `TimeoutError`."""
        try:
            answer = self._answers.get(timeout=self._patience)
        except queue.Empty:
            raise TimeoutError(self.host) from None
        self._asked = None
        if isinstance(answer, Exception):
            raise answer
        return answer, 0.0


class _OtherNode(_Node):
    """Another one, asked through an actor there. It reserves nothing."""

    def _ask(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._node is None:
            place = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
            kind = ray.remote(Node).options(num_cpus=0, scheduling_strategy=place)
            self._node = kind.remote(**self._folders)
        return self._node.look.remote()

    def end(self) -> tuple[dict[str, Any], float]:
        import ray

        answer = ray.get(self._asked, timeout=self._patience)  # Ray's GetTimeoutError is a TimeoutError
        self._asked = None
        before = time.time()
        there = ray.get(self._node.clock.remote(), timeout=ANSWER_SECONDS)
        after = time.time()
        if before <= there <= after:  # the answer may have taken so long, on a busy node
            return answer, 0.0
        return answer, there - (before + after) / 2


def line(directory: Path) -> dict[str, Any]:
    """What a row of the record says of the nodes' health, by the newest look."""
    found = None
    with suppress(OSError, ValueError):  # no look yet
        found = files.read_json(directory / HEALTH_FILE)
    return {key: found.get(key, 0) if isinstance(found, dict) else 0 for key in KEYS}


def on_sound_gpus(
    config: TrainConfig,
    fit: Callable[[WorkersConfig], bool],
    *,
    health: HealthWatch,
    asked_to_stop: Callable[[], bool],
) -> bool:
    """The result of `fit`, which is repeated without the GPUs that went bad under it.

    Args:
        fit: trains with these workers; whether it took its last step.

    Raises:
        RunError: `fit`'s, or too few GPUs are left.
    """
    workers = without_drained(config)
    while True:
        num_bad = len(health.bad)
        try:
            finished = fit(workers)
        except RunError:
            with suppress(OSError, ValueError):  # such as a full disk, of which the error tells
                health.look()  # a GPU that has just failed is known now
            if len(health.bad) == num_bad:
                raise
        else:
            if finished or asked_to_stop() or len(health.bad) == num_bad:
                return finished
        workers = without_drained(config)
        names = ", ".join(f"GPU {bad.gpu} of {bad.host}" for bad in health.bad[num_bad:])
        newest = newest_of(config, report=lambda _: None)
        text = f"the run goes on without {names}, from {newest.name if newest else 'step 0'}"
        events.append(config.run_directory, "resumed", text, step=step_of(newest) if newest else 0)
        (config.run_directory / STOP).unlink(missing_ok=True)


def without_drained(config: TrainConfig) -> WorkersConfig:
    """The workers for which there are GPUs that are not drained. Ray gives those to nobody from now on.

    Raises:
        RunError: there are fewer than `workers.min_count`, or than `workers.count`, or one is still in use.
    """
    workers, outputs = config.workers, config.run_directory.parent
    if not workers.gpu or not drained.read(outputs):
        return workers
    try:
        held = drained.hold(outputs)
    except TimeoutError as error:
        raise RunError(str(error)) from error
    import ray

    kind = f"{KIND}{workers.accelerator}"
    nodes = [node for node in ray.nodes() if node["Alive"]]
    used = [node for node in nodes if workers.accelerator is None or kind in node["Resources"]]
    hosts = {node["NodeManagerHostname"] for node in used}
    num_held = sum(each.host in hosts for each in held)
    left = int(sum(node["Resources"].get("GPU", 0) for node in used)) - num_held
    if left >= workers.count:
        return workers
    if workers.min_count is not None and left >= workers.min_count:
        return replace(workers, count=left)
    raise RunError(
        f"{left} GPUs are left, and the run needs {workers.min_count or workers.count}; "
        f"{'; '.join(map(str, held))}; set workers.min_count, or mend them and `make clear` them"
    )
