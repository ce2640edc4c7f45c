"""The address of a head that the inventory names."""

import socket

import pytest

from cluster.head import addresses


def names(monkeypatch, known):
    """A resolver that knows these names."""

    def getaddrinfo(name, port, type):
        if name not in known:
            raise socket.gaierror(name)
        return [
            (socket.AF_INET6 if ":" in each else socket.AF_INET, type, 0, "", (each, 0))
            for each in known[name]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_an_address_stays_what_it_is():
    assert addresses.own_address("10.0.0.1", ["w"]) == "10.0.0.1"
    assert addresses.own_address("fd00::1", []) == "fd00::1"


def test_a_name_that_leads_to_loopback_is_the_address_on_the_way_to_the_workers(monkeypatch):
    names(monkeypatch, {"head": ["::1", "127.0.1.1"], "w1": [], "w2": ["127.0.0.9"]})
    assert addresses.own_address("head", ["w1", "w2"]) == "127.0.0.1"
    assert addresses.own_address("head", []) == "127.0.1.1"  # alone, it needs no other; IPv4 comes first


def test_a_name_that_leads_to_another_machine_or_nowhere_is_refused(monkeypatch):
    names(monkeypatch, {"head": ["192.0.2.1"]})
    for name in ("head", "unknown"):
        with pytest.raises(ValueError, match=f"^{name}: no address of this machine; give"):
            addresses.own_address(name, ["w1"])
