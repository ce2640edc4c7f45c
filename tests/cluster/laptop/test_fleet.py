"""One `make up` or `make down` at a time."""

import pytest

from cluster.cli import RunError
from cluster.laptop import fleet
from cluster.laptop.inventory import Inventory


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
