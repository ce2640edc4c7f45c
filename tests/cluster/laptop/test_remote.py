"""What the laptop takes from a head without trusting it, and what it asks of the preflight."""

import shlex

import pytest

from cluster import config as layered
from cluster.cli import RunError
from cluster.laptop.keys import DiffersConfig, Inventory
from cluster.laptop.remote import _plain, _preflight_arguments
from cluster.preflight.command import PreflightConfig
from cluster.preflight.verdict import NodeExpectConfig


@pytest.mark.parametrize("name", ["night", "night-1-0a1b2c3d.log", "v1.2_b", "7"])
def test_the_name_of_a_run_is_taken(name):
    assert _plain(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", ".ssh", "-e", "a\nb", "a\0b", "a b"]
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(RunError, match="nothing was written"):
        _plain(name)


def test_the_preflight_expects_of_each_node_what_the_inventory_says():
    differs = {"10.0.0.2": DiffersConfig(gpus=2, accelerator="H100"), "fd00::3": DiffersConfig(drained=True)}
    site = Inventory(head="h", workers=("10.0.0.2", "fd00::3", "w4"), differs=differs)
    asked = layered.load(PreflightConfig, dotlist=shlex.split(_preflight_arguments(site)))
    assert (asked.expect.nodes, asked.expect.gpus, asked.expect.accelerator) == (3, 8, "A40")
    assert asked.expect.differs["10.0.0.2"] == NodeExpectConfig(gpus=2, accelerator="H100")
    assert asked.expect.drained == ("fd00::3",)
