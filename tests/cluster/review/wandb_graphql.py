"""What the loopback W&B server (`wandb_server.py`) keeps, and its answers to GraphQL operations."""

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

ENTITY = "team"
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
EVENTS, OUTPUT = "wandb-events.jsonl", "output.log"


@dataclass
class Run:
    """What the server has of one run."""

    id: str
    about: dict[str, Any] = field(
        default_factory=dict
    )  # of UpsertBucket: project, displayName, groupName, tags
    streams: dict[str, dict[int, str]] = field(default_factory=dict)  # file -> offset -> line
    uploaded: dict[str, bytes] = field(default_factory=dict)
    num_received: int = 0  # history lines, each time that they were sent
    complete: bool = False
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the history, in the order of their offsets, without W&B's own keys."""
        rows = [json.loads(line) for _, line in sorted(self.streams.get(HISTORY, {}).items())]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    @property
    def summary(self) -> dict[str, Any]:
        """The newest summary."""
        lines = self.streams.get(SUMMARY, {})
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with W&B's own part under `_wandb`."""
        return {key: each["value"] for key, each in json.loads(self.about.get("config") or "{}").items()}


@dataclass
class Artifact:
    """What the server has of one version of an artifact; `committed` once it is whole."""

    id: str
    type: str
    name: str
    digest: str
    about: dict[str, Any]  # of CreateArtifact: metadata, aliases, runName
    client_ids: set[str]
    committed: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    used_by: set[str] = field(default_factory=set)


class State:
    """Runs, artifacts and alerts. A method `_Name` answers the operation `Name`."""

    url: str

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.alerts: list[dict[str, Any]] = []
        self._artifacts: list[Artifact] = []

    @property
    def artifacts(self) -> list[Artifact]:
        """Those that were committed, the oldest first."""
        return [artifact for artifact in self._artifacts if artifact.committed]

    def file_stream(self, run_id: str, request: dict[str, Any]) -> dict[str, Any]:
        """Take in rows, summary, system metrics and console lines, and the end of the run."""
        run = self.runs[run_id]
        for name, chunk in request.get("files", {}).items():
            lines = run.streams.setdefault(name, {})
            lines.update(enumerate(chunk["content"], start=chunk["offset"]))
            run.num_received += len(chunk["content"]) if name == HISTORY else 0
        if request.get("complete"):
            run.complete, run.exit_code = True, request["exitcode"]
        return {"exitcode": None, "limits": {}}

    def upload(self, kind: str, owner: str, name: str, content: bytes) -> None:
        """Take in a file of a run, a file of an artifact, or an artifact's manifest."""
        if kind == "run":
            self.runs[owner].uploaded[name] = content
        elif kind == "artifact":
            self._artifact(owner).files[name] = content
        else:
            self._artifact(owner).manifest = json.loads(content)

    def graphql(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The answer to an operation, by its name. An unknown one raises `LookupError`."""
        answer = getattr(self, f"_{name}", None)
        if answer is None:
            raise LookupError(f"this server does not know {name}")
        return answer(given)

    def _Viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        about = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}
        return {"viewer": about}

    _GetDefaultEntity = _Viewer

    def _ServerFeaturesQuery(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        inserted = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], Run(given["name"]))
        run.about.update({key: value for key, value in given.items() if value is not None})
        run.complete = run.complete and not inserted and given.get("displayName") is None
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        return {"model": {**self._project(given["project"]), "bucket": self._bucket(run) if run else None}}

    def _bucket(self, run: Run) -> dict[str, Any]:
        streams = {name: [line for _, line in sorted(lines.items())] for name, lines in run.streams.items()}
        counts = {name: len(streams.get(name, [])) for name in (HISTORY, EVENTS, OUTPUT)}
        about = run.about
        return {
            "id": run.id, "name": run.id, "displayName": about.get("displayName", run.id),
            "description": None, "config": about.get("config", "{}"), "sweepName": None,
            "project": self._project(about["project"]), "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": counts[HISTORY], "eventsLineCount": counts[EVENTS],
            "logLineCount": counts[OUTPUT], "historyTail": json.dumps(streams.get(HISTORY, [])[-1:]),
            "eventsTail": json.dumps(streams.get(EVENTS, [])[-1:]), "tags": about.get("tags", []),
            "notes": about.get("notes"), "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip

    def _project(self, name: str | None) -> dict[str, Any]:
        return {"id": name, "name": name, "entity": {"id": ENTITY, "name": ENTITY}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        paths = {name: f"{self.url}/upload/run/{given['run']}/{quote(name)}" for name in given["files"]}
        files = [{"name": name, "uploadUrl": path} for name, path in paths.items()]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _Run(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        return {"project": {"run": self._seen_by_api(run) if run else None}}

    def _seen_by_api(self, run: Run) -> dict[str, Any]:
        state = "running" if not run.complete else "failed" if run.exit_code else "finished"
        steps = [json.loads(line)["_step"] for line in run.streams.get(HISTORY, {}).values()]
        about = {"group": run.about.get("groupName"), "jobType": run.about.get("jobType"), "state": state}
        return {
            **self._bucket(run), **about, "projectId": "1", "user": {"name": ENTITY, "username": ENTITY},
            "commit": None, "readOnly": False,
            "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "systemMetrics": "{}",
            "historyKeys": {"lastStep": max(steps, default=-1), "keys": {}},
        }  # fmt: skip

    def _RunHistoryKeys(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._Run(given)

    def _RunParquetHistory(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": []}}}}

    def _HistoryPage(self, given: dict[str, Any]) -> dict[str, Any]:
        lines = [line for _, line in sorted(self.runs[given["run"]].streams.get(HISTORY, {}).items())]
        asked = range(given["minStep"], given["maxStep"])
        return {
            "project": {"run": {"history": [line for line in lines if json.loads(line)["_step"] in asked]}}
        }

    def _NotifyScriptableRunAlert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _FetchArtifactDigestAlgorithm(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _XXHashDigestsEnabled(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        about = given["input"]
        key = (about["artifactTypeName"], about["artifactCollectionName"], about["digest"])
        same = [each for each in self._artifacts if (each.type, each.name, each.digest) == key]
        artifact = same[0] if same else Artifact(f"artifact-{len(self._artifacts)}", *key, about, set())
        if not same:
            self._artifacts.append(artifact)
        artifact.client_ids.add(about["clientID"])
        state = "COMMITTED" if artifact.committed else "PENDING"
        found = {"id": artifact.id, "state": state, "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": found}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/upload/manifest/{given['artifactID']}/manifest"
        file = {"id": given["artifactID"], "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": given["artifactID"], "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": file["name"], "uploadHeaders": [], "uploadMultipartUrls": None,
                "uploadUrl": f"{self.url}/upload/artifact/{file['artifactID']}/{quote(file['name'])}",
                "artifact": {"id": file["artifactID"]},
            }
            for file in given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _UseArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["input"]["artifactID"])
        artifact.used_by.add(given["input"]["runName"])
        return {"useArtifact": {"artifact": {"id": artifact.id}}}

    def _ArtifactByID(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["id"])
        project = {**self._project(artifact.about["projectName"]), "internalId": "1"}
        sequence = {"__typename": "ArtifactSequence", "id": "1", "name": artifact.name, "project": project}
        return {"artifact": {
            "id": artifact.id, "artifactSequence": sequence, "versionIndex": 0,
            "artifactType": {"name": artifact.type}, "description": None, "metadata": None,
            "ttlDurationSeconds": 0, "ttlIsInherited": False, "tags": [], "historyStep": None,
            "state": "COMMITTED" if artifact.committed else "PENDING", "size": 0, "digest": artifact.digest,
            "commitHash": "", "fileCount": len(artifact.files), "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None, "aliases": [],
        }}  # fmt: skip

    def _ClientIDMapping(self, given: dict[str, Any]) -> dict[str, Any]:
        mine = [each.id for each in self._artifacts if given["clientID"] in each.client_ids]
        return {"clientIDMapping": {"serverID": mine[0]} if mine else None}

    def _artifact(self, artifact_id: str) -> Artifact:
        return next(each for each in self._artifacts if each.id == artifact_id)
