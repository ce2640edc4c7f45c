"""The line of runs on a cluster that is full, and who holds what a run waits for.

A run asks Ray for all of its workers at once, by a placement group, and Ray gives it these when they are
free. Of several requests that wait, Ray 2.60 serves the newest. So a run asks only once no run that came
before it waits still.
"""

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.record import events, heartbeat, row_format
from training.config import TrainConfig
from training.run.watch import Background

FOLDER = ".line"  # below the folder of the runs


class Line:
    """A place in the line of the runs below a folder: a file, whose lock ends with its process."""

    def __init__(self, outputs: Path, run: str) -> None:
        folder = outputs / FOLDER
        folder.mkdir(exist_ok=True)
        self._place = folder / f"{time.time_ns()}-{run}"
        new = folder / f".{self._place.name}"
        self._file = new.open("w")
        row_format.claim(self._file.fileno())
        new.rename(self._place)

    def ahead(self) -> list[str]:
        """The runs that came before and wait still."""
        found = []
        for place in sorted(self._place.parent.glob("[0-9]*")):
            if place.name >= self._place.name:
                break
            if row_format.is_being_written(place):
                found.append(place.name.partition("-")[2])
            else:
                place.unlink(missing_ok=True)
        return found

    def leave(self) -> None:
        """The run has its workers, or has ended."""
        self._place.unlink(missing_ok=True)
        self._file.close()


class WaitWatch(Background):
    """Keeps a run's place in the line until its workers are there, and reports for whom it waits."""

    POLL_SECONDS = 1.0
    QUIET_POLLS = 5  # after which an ordinary start has its workers

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self._directory, self._workers = config.run_directory, config.workers
        self._line: Line | None = None
        if config.session.address != "local":
            with suppress(OSError):  # a folder of others: then there is no line
                self._line = Line(config.run_directory.parent, config.run.name)
        self._began, self._told = time.time(), ""

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._line:
            self._line.leave()

    @property
    def waits(self) -> bool:
        """Whether the run was found waiting, and has no workers yet: nobody would stop after a step."""
        return bool(self._told) and not self._has_workers()

    def wait_for_turn(self) -> None:
        """Return once no run that came before waits still."""
        while self._line and (ahead := self._line.ahead()):
            self._tell(f"the run waits in line behind {', '.join(ahead)}")
            time.sleep(self.POLL_SECONDS)

    def _has_workers(self) -> bool:
        return any(beat.written >= self._began for beat in heartbeat.read(self._directory))

    def run(self) -> None:
        polls = 0
        while self._line and not self.stop.wait(self.POLL_SECONDS):
            if self._has_workers():
                self._line.leave()
                return
            polls += 1
            if polls % self.QUIET_POLLS == 0 and not self._line.ahead():
                with suppress(Exception):  # Ray's state does not answer now
                    self._look()

    def _look(self) -> None:
        import ray
        from ray.util.state import list_jobs, list_placement_groups

        context = ray.get_runtime_context()
        # without the address, any Ray of this machine may answer
        here: dict[str, Any] = {"address": context.gcs_address, "limit": 10_000}
        jobs = {job.job_id: job.submission_id or f"job {job.job_id}" for job in list_jobs(**here)}
        groups = list_placement_groups(detail=True, **here)
        text = describe(
            [group for group in groups if group.state != "REMOVED"], jobs,
            own=context.get_job_id(), kind="GPU" if self._workers.gpu else "CPU",
            needed=self._workers.min_count or self._workers.count,
            each=1.0 if self._workers.gpu else self._workers.cpus,
            free=ray.available_resources(), total=ray.cluster_resources(),
        )  # fmt: skip
        if text:
            self._tell(text)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            events.append(self._directory, "waiting", text)


def describe(
    groups: list[Any], jobs: dict[str, str], *, own: str, kind: str, needed: int, each: float,
    free: dict[str, float], total: dict[str, float],
) -> str | None:  # fmt: skip
    """One sentence: what a run waits for, who holds it and who waits too; None if it waits for nothing.

    Args:
        groups: Ray's placement groups (`ray.util.state`), those of other jobs too.
        jobs: Ray's id of a job -> its name.
        own: id of the run's job.
        kind: "GPU" or "CPU", of which each of the `needed` workers takes `each`.
    """
    created = [group for group in groups if group.state == "CREATED"]
    if any(group.creator_job_id == own for group in created) or free.get(kind, 0.0) >= needed * each:
        return None
    held: Counter[str] = Counter()
    for group in created:
        if amount := sum(bundle["unit_resources"].get(kind, 0.0) for bundle in group.bundles):
            held[jobs.get(group.creator_job_id, f"job {group.creator_job_id}")] += amount
    waiting = sorted(
        {
            jobs.get(group.creator_job_id, f"job {group.creator_job_id}")
            for group in groups
            if group.state == "PENDING" and group.creator_job_id != own
        }
    )
    holders = ", ".join(f"{name} holds {amount:g}" for name, amount in held.most_common())
    others = f"; {', '.join(waiting)} wait{'s' * (len(waiting) == 1)} too" if waiting else ""
    return (
        f"the run waits in line for {needed} workers: {free.get(kind, 0.0):g} of {total.get(kind, 0.0):g} "
        f"{kind}s are free, and it needs {needed * each:g}; {holders or 'no run holds the others'}{others}"
    )
