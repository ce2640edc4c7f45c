"""One `make up` or `make down` at a time; what `make down` leaves if a worker is away."""

import pytest

from cluster.cli import RunError
from cluster.laptop import fleet
from cluster.laptop.keys import Inventory
from cluster.laptop.ssh import LinkError


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
