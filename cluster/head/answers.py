"""Answers the laptop's requests on the head, one round trip each. Standard library only: it starts fast.

    python3 -m cluster.head.answers status SITE.json                  one JSON object
    python3 -m cluster.head.answers submit SITE.json < REQUEST        one JSON object; see `submit`
    python3 -m cluster.head.answers follow SITE.json RUN OFFSET       the run's log from a byte on
    python3 -m cluster.head.answers stop SITE.json RUN                one JSON object
    python3 -m cluster.head.answers clear SITE.json HOST:GPU          one JSON object

A run is one submission to Ray's job server. SCRATCH/runs records every run, because Ray forgets its jobs
when it is restarted.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import select
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster import files
from cluster.head.keeper import state
from cluster.head.ray_rest import FINAL, Ray, RayDown, stranger
from cluster.heart.drained import clear as use_again
from cluster.review.status import report as report_runs

SUCCEEDED, RUN_FAILED, RUN_STOPPED, RAY_RESTARTED, RAY_DOWN = 0, 10, 11, 12, 13  # of `follow`
OUTCOMES = {"SUCCEEDED": SUCCEEDED, "FAILED": RUN_FAILED, "STOPPED": RUN_STOPPED}
REFUSED = 20  # exit code of a request that cannot be met; the message is on stderr
READ_SECONDS, STATUS_SECONDS = 0.2, 1.0
PATIENCE_SECONDS = 20.0  # for a job server that does not answer, while a run is followed
# Of the job server. A driver that is interrupted lets Ray Train give its resources back; one that is ended
# leaves its request for them standing, and an elastic run (workers.min_count) waits 3 minutes for its expiry.
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "20"}
ATTACHED = "attached"  # on stderr, once the log is being read


class Refused(Exception):
    """The request cannot be met; the message says why and what to do."""


class Head:
    """The head of a site (`cluster.laptop.commands.for_head`)."""

    def __init__(self, site: dict[str, Any]) -> None:
        self.site = site
        self.runs = Path(site["scratch"]) / "runs"
        self.ray = Ray(site["dashboard_port"])

    def status(self) -> dict[str, Any]:
        """The keeper's states of the nodes, Ray's jobs, and lines about the newest runs with their alarms.

        `problem` if Ray does not answer.
        """
        answer: dict[str, Any] = {
            **state(Path(self.site["scratch"])),
            "alive": [],
            "jobs": [],
            "problem": None,
        }
        try:
            answer["alive"] = [
                {"address": node["node_ip"], "name": node["node_name"], "resources": node["resources_total"]}
                for node in self.ray.nodes()
            ]
            answer["jobs"] = [
                {name: job.get(name) for name in ("submission_id", "status", "start_time", "end_time")}
                for job in self.ray.jobs()
            ]
        except (RayDown, ValueError) as error:
            answer["problem"] = str(error)
        if found := preflight_of(self.site):
            answer["preflight"] = {name: found[name] for name in ("passed", "time", "failures")}
        answer["outputs"] = report_runs(Path(self.site["storage"]) / "outputs")
        return answer

    def submit(self, request: dict[str, Any], package: bytes) -> dict[str, Any]:
        """Start a run, or find the one that is active.

        `request`: run (its name), config (digest of what is asked), entrypoint, package (name of the zip),
        digest (of the zip), preflight (command that has to pass first), gated (whether its verdict counts).

        Returns:
            the run's record (`resolve`), and whether it was `going` already.

        Raises:
            Refused: a run of this name asks something else, the gate is closed, or the zip is torn.
        """
        if hashlib.sha256(package).hexdigest() != request["digest"]:
            raise Refused("the code arrived incomplete; nothing was started; run the same command again")
        for key in ("gcs", "dashboard"):
            port = self.site[f"{key}_port"]
            if whose := stranger(port, self.site["name"]):
                raise Refused(
                    f"port {port} is in use by {whose}, and not by this cluster's Ray; nothing was sent "
                    f"to it. End that, or set ports.{key} in the inventory; then `make up`"
                )
        self.runs.mkdir(parents=True, exist_ok=True)
        with (self.runs / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two laptops at once
            name = request["run"]
            jobs = [job for job in self.ray.jobs() if (job.get("metadata") or {}).get("run") == name]
            for job in jobs:
                if job["status"] in FINAL:
                    continue
                if job["metadata"]["config"] != request["config"]:
                    raise Refused(
                        f"run {name} is going with another configuration: `make attach` follows it, `make "
                        "stop` ends it, and another run.name starts a second one"
                    )
                return {**self._record(job["submission_id"], name), "going": True}
            entrypoint = request["entrypoint"]
            if request["gated"] and not self._has_passed():
                entrypoint = f"{request['preflight']} && {entrypoint}"
            known = [job["submission_id"] for job in jobs]
            run_id = f"{name}-{1 + max(self._numbers(name, known), default=0)}"
            self.ray.upload(request["package"], package)
            self.ray.submit(
                {
                    "submission_id": run_id,
                    "entrypoint": entrypoint,
                    "runtime_env": {
                        "working_dir": f"gcs://{request['package']}",
                        "env_vars": {"PYTHONUNBUFFERED": "1", **STOPPING},
                    },
                    "metadata": {"run": name, "config": request["config"]},
                }
            )
            return {**self._record(run_id, name), "going": False}

    def _numbers(self, name: str, more: Iterable[str] = ()) -> list[int]:
        """The numbers of a run's submissions: night-2 is the second of 'night', night-long-1 none of them."""
        stems = (*(file.stem for file in self.runs.glob("*.json")), *more)
        ends = (stem.removeprefix(f"{name}-") for stem in stems if stem.startswith(f"{name}-"))
        return [int(end) for end in ends if end.isdigit()]

    def _has_passed(self) -> bool:
        """Whether the preflight passed, of these nodes in this session of Ray.

        Raises:
            Refused: it failed.
        """
        found = preflight_of(self.site)
        here = sorted(node["node_name"] for node in self.ray.nodes())
        if found.get("session") != self.ray.session() or found.get("nodes") != here:
            return False
        if not found["passed"]:
            raise Refused(
                f"the preflight of {found['time']} failed: {'; '.join(found['failures'])}. Mend that and run "
                "`make preflight`, or train all the same with SKIP_PREFLIGHT=1"
            )
        return True

    def _record(self, run_id: str, name: str) -> dict[str, Any]:
        """The record of a run. Makes one for a run that only Ray knows."""
        place = self.runs / f"{run_id}.json"
        if not place.exists():
            log = Path(self.site["scratch"], "ray", self.ray.session(), "logs", f"job-driver-{run_id}.log")
            token = uuid.uuid4().hex[:8]  # another cluster, or this one before a wipe, may have the same id
            files.write_json(place, {"id": run_id, "run": name, "log": str(log), "token": token})
        return json.loads(place.read_text())

    def resolve(self, run: str) -> dict[str, Any]:
        """The record of a run: id, run (its name), log (its path on the head) and token.

        `run` is an id, a name (its newest) or empty: the newest that is going, or else the newest training.
        """
        every = {file.stem: file for file in self.runs.glob("*.json")}
        if run in every:
            found = [every[run]]
        elif run:
            found = [every[f"{run}-{number}"] for number in self._numbers(run)]
        else:
            found = [every[name] for name in self._going() if name in every]
            found = found or [file for name, file in every.items() if not name.startswith("preflight-")]
            found = found or list(every.values())
        if not found:
            names = ", ".join(sorted(every)) or "none yet"
            raise Refused(f"no run {run!r} on this cluster; runs: {names}")
        return json.loads(max(found, key=lambda file: file.stat().st_mtime_ns).read_text())

    def _going(self) -> list[str]:
        try:
            return [job["submission_id"] for job in self.ray.jobs() if job["status"] not in FINAL]
        except RayDown:
            return []

    def follow(self, run: str, offset: int) -> int:
        """Write the run's log, from byte `offset` to its end, to standard output. Returns the outcome."""
        record = self.resolve(run)
        log = Path(record["log"])
        print(ATTACHED, file=sys.stderr, flush=True)
        reader = select.poll()
        reader.register(sys.stdout.fileno(), select.POLLERR)
        next_status, silent_since, outcome = 0.0, None, None
        while True:
            ended = outcome is not None
            if log.exists():
                with log.open("rb") as file:
                    file.seek(offset)
                    while chunk := file.read(1 << 16):
                        sys.stdout.buffer.write(chunk)
                        offset += len(chunk)
                sys.stdout.buffer.flush()
            if ended:
                return outcome or 0
            if reader.poll(0):  # nobody listens any more
                return RAY_DOWN
            now = time.monotonic()
            if now >= next_status:
                next_status = now + STATUS_SECONDS
                try:
                    job = self.ray.job(record["id"])
                    silent_since = None
                    if job is None:
                        outcome = RAY_RESTARTED
                    elif job["status"] in FINAL:
                        outcome = OUTCOMES[job["status"]]
                        continue
                except (RayDown, ValueError):
                    silent_since = silent_since or now
                    if now - silent_since > PATIENCE_SECONDS:
                        outcome = RAY_DOWN
            time.sleep(READ_SECONDS)

    def stop(self, run: str) -> dict[str, Any]:
        """End a run and wait for it. Its checkpoints stay."""
        record = self.resolve(run)
        job = self.ray.job(record["id"])
        if job is None or job["status"] in FINAL:
            return {"id": record["id"], "status": job["status"] if job else "ended with an earlier Ray"}
        deadline = time.monotonic() + 60
        self.ray.stop(record["id"])
        while (job := self.ray.job(record["id"]) or {"status": "STOPPED"})["status"] not in FINAL:
            if time.monotonic() > deadline:
                raise Refused(f"{record['id']} does not end; `make down` ends all of Ray")
            time.sleep(0.5)
        return {"id": record["id"], "status": job["status"]}


def preflight_of(site: dict[str, Any]) -> dict[str, Any]:
    """The newest preflight's report; empty without one, and if it is damaged: then it is made again."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = files.read_json(Path(site["storage"]) / "preflight.json")
        return {name: found[name] for name in ("passed", "time", "session", "nodes", "failures")}
    return {}


def main(arguments: list[str]) -> int:
    """One request. Returns the exit code: 0, `REFUSED`, or an outcome of `follow`."""
    verb, site, *rest = arguments
    head = Head(json.loads(Path(site).read_text()))
    try:
        if verb == "status":
            print(json.dumps(head.status()))
        elif verb == "submit":
            header, _, package = sys.stdin.buffer.read().partition(b"\n")
            if not package:
                raise Refused(
                    "the request arrived incomplete; nothing was started; run the same command again"
                )
            print(json.dumps(head.submit(json.loads(header), package)))
        elif verb == "follow":
            return head.follow(rest[0], int(rest[1]))
        elif verb == "stop":
            print(json.dumps(head.stop(rest[0])))
        elif verb == "clear":
            use_again(Path(head.site["storage"]) / "outputs", rest[0])
            print(json.dumps({"cleared": rest[0]}))
        elif verb == "resolve":
            print(json.dumps(head.resolve(rest[0])))
    except Refused as error:
        print(error, file=sys.stderr)
        return REFUSED
    except RayDown as error:
        print(f"{error}: run `make status`, and `make up` if it is down", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:
        os._exit(RAY_DOWN)  # the laptop is gone; it comes back with its own offset
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
