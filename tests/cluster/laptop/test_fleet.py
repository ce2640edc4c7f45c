"""One `make up` or `make down` at a time; how `up` waits; `status`; a `down` while a worker is away."""

import json

import pytest

from cluster.cli import RunError
from cluster.laptop import fleet
from cluster.laptop.keys import Inventory
from cluster.laptop.ssh import LinkError

SITE = Inventory(name="lab", head="h", workers=("w1", "w2"))


def test_two_at_once_are_told_in_a_sentence_and_another_cluster_is_free(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lab, other = (Inventory(name=name, head="10.0.0.1") for name in ("lab", "other"))
    with (
        fleet._alone(lab),
        fleet._alone(other),
        pytest.raises(RunError, match=r"^lab: another `make up` .* \(pid \d+\); wait"),
        fleet._alone(lab),
    ):
        pass
    with fleet._alone(lab):
        pass


class Keeper:
    """A head whose keeper answers with these states in turn, the last one again and again."""

    address = "h"

    def __init__(self, *states, runs=True):
        self._states, self._runs = list(states), runs

    def run(self, script):
        states = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        nodes = {
            node: {"state": text.partition(" ")[0], "detail": text.partition(" ")[2], "since": 0}
            for node, text in states.items()
        }
        keeper = {"generation": "g", "nodes": nodes}
        return json.dumps({"keeper": keeper, "runs": self._runs, "said": "why", "now": 100}).encode()


def gate(monkeypatch, keeper, refusals=None):
    """(what did not join, lines) of `up`, without patience for a node that does nothing."""
    said = []
    monkeypatch.setattr(fleet, "GATE_SECONDS", 0.0)
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.0)
    return fleet._gate(SITE, keeper, "g", refusals or {}, report=said.append), said


def test_up_waits_as_long_as_a_node_installs_and_for_the_workers_behind_the_head(monkeypatch, capsys):
    waiting = {"w1": "waiting for the head", "w2": "waiting for the head"}
    keeper = Keeper(
        *[{"h": "installing environment", **waiting}] * 3,
        {"h": "joined", "w1": "copying environment", "w2": "starting Ray"},
        {"h": "joined", "w1": "joined", "w2": "joined"},
    )
    problems, said = gate(monkeypatch, keeper)
    assert problems == {} and said.count("h: installing environment") == 1
    assert "h installing, 0s so far" in capsys.readouterr().err


def test_up_names_what_does_not_move_what_failed_and_what_was_refused(monkeypatch):
    states = {"h": "joined", "w1": "failed its Ray does not join", "w2": "waiting for its host key"}
    assert gate(monkeypatch, Keeper(states))[0] == {
        "w1": "its Ray does not join",
        "w2": "waiting for its host key for 0 s",
    }
    assert gate(monkeypatch, Keeper(states), {"w2": "refuses the key"})[0]["w2"] == "refuses the key"
    with pytest.raises(RunError, match=r"^head h: no space$"):
        gate(monkeypatch, Keeper({**states, "h": "failed no space"}))
    with pytest.raises(RunError, match=r"the keeper on h ended: why; see .*keeper\.log"):
        gate(monkeypatch, Keeper(states, runs=False))


def test_status_agrees_with_itself(tmp_path, monkeypatch):
    """What a keeper said last is no news once Ray has lost the node, or once the keeper has ended."""
    (tmp_path / "x.inventory.yaml").write_text(
        "head: h\nworkers: [w1, w2, w3]\ndiffers: {w3: {drained: true}}"
    )
    nodes = {name: {"state": "joined", "detail": ""} for name in ("h", "w1")}
    nodes["w2"] = {"state": "failed", "detail": "has no rsync"}
    alive = [{"name": "h", "address": "10.0.0.1", "resources": {"CPU": 2.0}}]
    answer = {"keeper": {"nodes": nodes}, "alive": alive, "problem": None, "runs": True, "jobs": [], "now": 0}
    monkeypatch.setattr(fleet, "ask", lambda site, script: answer)
    first, *lines = fleet.status(tmp_path / "x.yaml").splitlines()
    assert first == "asuncion: 1 of 3 nodes in Ray, 1 drained"
    states = ["h 10.0.0.1 2 CPU", "w1 not in Ray", "w2 failed has no rsync", "w3 drained in the inventory"]
    assert [" ".join(line.split()) for line in lines] == states
    answer |= {"alive": [], "runs": False, "problem": "Ray does not answer"}
    said = fleet.status(tmp_path / "x.yaml")
    assert "0 of 3" in said and "joined" not in said and said.count("not in Ray") == 3
    assert "Ray does not answer; `make up` brings it up" in said and "no keeper runs on the head" in said


def test_the_head_keeps_its_key_until_every_worker_has_forgotten_it(tmp_path, monkeypatch):
    """Otherwise a second `make down` would not know which line to remove from a worker that was away."""
    forgotten, away = [], {"10.0.0.2"}

    class Node:
        def __init__(self, site, node, *, pin):
            self.address = node

        def run(self, script, *, given=b"", timeout=None):
            if self.address in away:
                raise LinkError("no answer")
            if b"def forget" in given:
                forgotten.append((self.address, "AAAA" in script))
                return b'{"removed": ["a key"]}'
            return b'{"ended": 0, "left": []}' if given else b"ssh-ed25519 AAAA asuncion lab head\n"

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(fleet, "Ssh", Node)
    site = Inventory(name="lab", head="10.0.0.1", workers=("10.0.0.2", "10.0.0.3"))
    with pytest.raises(RunError, match=r"not down: 10\.0\.0\.2 "):
        fleet._down(site, report=lambda text: None, keep_access=False)
    assert forgotten == [("10.0.0.3", True)]
    away.clear()
    fleet._down(site, report=lambda text: None, keep_access=False)
    assert sorted(forgotten[1:]) == [(f"10.0.0.{node}", True) for node in (1, 2, 3)]
    assert forgotten[-1][0] == "10.0.0.1"
