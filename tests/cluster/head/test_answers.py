"""The head's memory of runs. Ray's job server is a stand-in; the real one runs in test_cluster.py."""

import hashlib
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.head import ray_rest
from cluster.head.answers import Head, Refused
from cluster.head.ray_rest import Ray, RayDown
from cluster.record import events
from cluster.session import free_ports
from tests.cluster.review.factories import make_run, row

REQUEST = {
    "run": "night",
    "config": "a",
    "entrypoint": "train",
    "package": "x.zip",
    "preflight": "check",
    "gated": False,
    "digest": hashlib.sha256(b"code").hexdigest(),
}


NODE = {"node_ip": "10.0.0.1", "node_name": "10.0.0.1", "resources_total": {"CPU": 2}}


class JobServer(ThreadingHTTPServer):
    """Keeps jobs in memory, as Ray's does."""

    def __init__(self):
        self.jobs: dict[str, dict] = {}
        self.uploads: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self):
        if self.path == "/api/jobs/":
            self._answer(list(self.server.jobs.values()))
        elif self.path.startswith("/api/jobs/"):
            job = self.server.jobs.get(self.path.rpartition("/")[2])
            self._answer(job or {}, 200 if job else 404)
        elif self.path == "/api/version":
            self._answer({"session_name": "session_now"})
        else:
            self._answer({"data": {"result": {"result": [NODE]}}})

    def do_PUT(self):
        self.server.uploads[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self):
        request = json.loads(self._body())
        job = {**request, "status": "RUNNING", "start_time": len(self.server.jobs)}
        self.server.jobs[request["submission_id"]] = job
        self._answer({})

    def _body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _answer(self, obj, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(obj).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with JobServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def head(server, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_rest, "of_cluster", lambda name: {os.getpid(): "the stand-in"})
    ports = {"dashboard_port": server.server_address[1], "gcs_port": free_ports(1)[0]}
    return Head({"name": "here", "scratch": str(tmp_path), "storage": str(tmp_path), **ports})


def test_another_ray_on_the_clusters_ports_is_sent_nothing(head, server, monkeypatch):
    monkeypatch.setattr(ray_rest, "of_cluster", lambda name: {})  # this process is another Ray now
    told = r"in use by a process of yours, pid \d+.* nothing was sent to it.* set ports\."
    with pytest.raises(Refused, match=f"port {head.site['dashboard_port']} is {told}dashboard "):
        head.submit(REQUEST, b"code")
    with socket.socket() as other:
        other.bind(("", head.site["gcs_port"]))
        other.listen()
        with pytest.raises(Refused, match=f"port {head.site['gcs_port']} is {told}gcs "):
            head.submit(REQUEST, b"code")
    assert not server.jobs and not server.uploads


def test_a_run_that_is_going_is_found_and_not_started_twice(head, server):
    first, again = head.submit(REQUEST, b"code"), head.submit(REQUEST, b"code")
    assert first == {**again, "going": False} and again["going"] and first["id"] == "night-1"
    assert first["log"] == f"{head.site['scratch']}/ray/session_now/logs/job-driver-night-1.log"
    assert list(server.jobs) == ["night-1"] and server.uploads == {"x.zip": b"code"}
    with pytest.raises(Refused, match="another configuration"):
        head.submit({**REQUEST, "config": "b"}, b"code")


def test_a_run_that_has_ended_is_started_again_under_the_next_number(head, server):
    head.submit(REQUEST, b"code")
    server.jobs["night-1"]["status"] = "FAILED"
    assert head.submit(REQUEST, b"code")["id"] == "night-2"
    server.jobs.clear()  # Ray was restarted, and has forgotten
    assert head.submit(REQUEST, b"code")["id"] == "night-3"


def test_runs_are_found_by_id_by_name_and_by_age(head, server):
    for name in ("night", "night-long", "day"):
        head.submit({**REQUEST, "run": name}, b"code")
    server.jobs["night-1"]["status"] = "STOPPED"
    head.submit(REQUEST, b"code")
    assert head.resolve("night")["id"] == "night-2"
    assert head.resolve("night-1")["id"] == "night-1"
    assert head.resolve("night-long")["id"] == "night-long-1"
    assert head.resolve("")["id"] == "night-2"
    head.submit({**REQUEST, "run": "preflight"}, b"code")
    for name in ("preflight-1", "day-1", "night-2"):
        server.jobs[name]["status"] = "SUCCEEDED"
    assert head.resolve("")["id"] == "night-long-1"  # the only one that is going
    server.jobs["night-long-1"]["status"] = "SUCCEEDED"
    assert head.resolve("")["id"] == "night-2"  # not the preflight
    with pytest.raises(Refused, match="no run 'noon' on this cluster; runs: day-1, night-1"):
        head.resolve("noon")


def test_the_preflight_comes_first_where_it_has_not_passed_and_closes_the_gate_where_it_failed(
    head, server, tmp_path
):

    gated = {**REQUEST, "gated": True}
    head.submit(gated, b"code")
    assert server.jobs["night-1"]["entrypoint"] == "check && train"
    server.jobs["night-1"]["status"] = "SUCCEEDED"
    report = {
        "passed": True,
        "session": "session_now",
        "nodes": ["10.0.0.1"],
        "time": "today",
        "failures": [],
    }
    (tmp_path / "preflight.json").write_text(json.dumps(report))
    head.submit(gated, b"code")
    assert server.jobs["night-2"]["entrypoint"] == "train"
    server.jobs["night-2"]["status"] = "SUCCEEDED"
    failed = {**report, "passed": False, "failures": ["10.0.0.1: 7 GPUs and not 8"]}
    (tmp_path / "preflight.json").write_text(json.dumps(failed))
    with pytest.raises(Refused, match=r"7 GPUs and not 8.*SKIP_PREFLIGHT=1"):
        head.submit(gated, b"code")
    stale = [{**failed, "nodes": ["10.0.0.1", "10.0.0.2"]}, {**failed, "session": "an earlier one"}]
    for text in (*map(json.dumps, stale), "{", "[]", '{"session": "session_now"}'):
        (tmp_path / "preflight.json").write_text(text)
        assert "problem" in head.status()  # which a damaged report does not end
        number = head.submit(gated, b"code")["id"]
        assert server.jobs[number]["entrypoint"] == "check && train"
        server.jobs[number]["status"] = "SUCCEEDED"


def test_a_ray_that_is_down_is_said_to_be(server):
    port = server.server_address[1]
    assert Ray(port).is_up()
    server.shutdown()
    server.server_close()
    assert not Ray(port).is_up()
    with pytest.raises(RayDown, match=f"does not answer at http://127.0.0.1:{port}"):
        Ray(port).jobs()


def test_code_that_arrived_incomplete_starts_nothing(head, server):
    with pytest.raises(Refused, match="arrived incomplete"):
        head.submit(REQUEST, b"cod")
    assert server.jobs == {} and server.uploads == {}


def test_a_run_that_only_ray_knows_is_followed_too(head, server):
    head.submit(REQUEST, b"code")
    (head.runs / "night-1.json").unlink()  # the head went down between the two
    assert head.submit(REQUEST, b"code")["id"] == "night-1"
    (head.runs / "night-1.json").unlink()
    server.jobs["night-1"]["status"] = "FAILED"
    assert head.submit(REQUEST, b"code")["id"] == "night-2"


def test_the_status_holds_the_newest_runs_and_their_alarms(head, tmp_path):
    run = make_run(tmp_path / "outputs" / "night", [row(step) for step in range(3)], finish=False)
    events.append(run, "node_lost", "node 10.0.0.2 is lost, 1 left")
    first, alarm = head.status()["outputs"]
    assert first.split()[:2] == ["run", "night"] and "step 2" in first
    assert alarm.endswith("error: node 10.0.0.2 is lost, 1 left")
