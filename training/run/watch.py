"""What the launcher shows while Ray's workers train: the rows of the record, and nodes that come and go."""

import threading
from collections.abc import Callable
from typing import Any

from cluster.progress import Progress
from cluster.record.record import follow
from training.config import TrainConfig
from training.run.checkpoint import step_of
from training.run.start import PARTITION, newest_of


class ShowRows:
    """Shows rows in the progress line; before the first, how the parameters were divided."""

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._partition = config.run_directory / PARTITION
        self._progress = progress
        self._any = False

    def __call__(self, row: dict[str, Any]) -> None:
        if not self._any:
            self._progress.note(self._partition.read_text().rstrip())
            self._any = True
        self._progress.update(row)


class _Background:
    """`run` in a thread for the length of a `with` block; it returns once `stop` is set."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()


class NodeWatch(_Background):
    """Reports which nodes are lost or have joined while a run is going, and what the run does about it."""

    POLL_SECONDS = 2.0

    def __init__(self, config: TrainConfig, *, report: Callable[[str], None]) -> None:
        super().__init__()
        self._workers = config.workers
        self._report = report

    def run(self) -> None:
        before = self._alive()
        while not self.stop.wait(self.POLL_SECONDS):
            now = self._alive()
            for node in sorted(before - now):
                self._report(f"node {node} is lost, {len(now)} left; {self._consequence()}")
            for node in sorted(now - before):
                self._report(f"node {node} has joined, {len(now)} now")
            before = now

    def _consequence(self) -> str:
        if self._workers.max_failures == 0:
            return "if it had workers, the run ends (workers.max_failures=0); the same command resumes it"
        if self._workers.min_count is None:
            return "if it had workers, the run waits until all can run again (workers.min_count is null)"
        return f"the run goes on with the workers that fit, at least {self._workers.min_count}"

    def _alive(self) -> set[str]:
        import ray

        return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


class Follower(_Background):
    """Shows the rows of `metrics.jsonl` while the workers write it, from the step after `first_step` on.

    When Ray restarts the workers, the record goes back to their checkpoint; this reports it and follows.
    """

    def __init__(self, config: TrainConfig, progress: Progress, *, first_step: int) -> None:
        super().__init__()
        self._config = config
        self._note = progress.note
        self._show = ShowRows(config, progress)
        self._first_step = first_step

    def run(self) -> None:
        last = -1
        for row in follow(self._config.run_directory / "metrics.jsonl", stop=self.stop.is_set):
            if row["step"] <= last:
                newest = newest_of(self._config, report=self._note)
                step = step_of(newest) if newest else 0
                self._note(f"the workers were restarted, and go on from step {step}")
                self._first_step = step + 1 if newest else 0
            last = row["step"]
            if row["step"] >= self._first_step:
                self._show(row)
