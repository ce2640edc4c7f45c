"""Says who holds what a run waits for, on a cluster that other runs use too.

Ray's placement groups are the line: a run asks for all of its workers at once, and keeps asking. This only
reads them.
"""

import time
from collections import Counter
from contextlib import suppress
from typing import Any

from cluster.record import events, heartbeat
from training.config import TrainConfig
from training.run.watch import Background


class WaitWatch(Background):
    """Reports, until the workers are there, that the run waits, for whom, and behind whom."""

    POLL_SECONDS = 5.0

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self._directory, self._workers = config.run_directory, config.workers
        self._is_shared = config.session.address != "local"
        self._began, self._told = time.time(), ""

    @property
    def waits(self) -> bool:
        """Whether the run was found waiting, and has no workers yet: nobody would stop after a step."""
        return bool(self._told) and not self._has_workers()

    def _has_workers(self) -> bool:
        return any(beat.written >= self._began for beat in heartbeat.read(self._directory))

    def run(self) -> None:
        while self._is_shared and not self.stop.wait(self.POLL_SECONDS) and not self._has_workers():
            with suppress(Exception):  # Ray's state does not answer now
                self._look()

    def _look(self) -> None:
        import ray
        from ray.util.state import list_jobs, list_placement_groups

        jobs = {job.job_id: job.submission_id or f"job {job.job_id}" for job in list_jobs(limit=10_000)}
        groups = list_placement_groups(detail=True, limit=10_000)
        text = describe(
            [group for group in groups if group.state != "REMOVED"], jobs,
            own=ray.get_runtime_context().get_job_id(), kind="GPU" if self._workers.gpu else "CPU",
            needed=self._workers.min_count or self._workers.count,
            each=1.0 if self._workers.gpu else self._workers.cpus,
            free=ray.available_resources(), total=ray.cluster_resources(),
        )  # fmt: skip
        if text and text != self._told:
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
