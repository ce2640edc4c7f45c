"""The scan of listening sockets that the READMEs' tables are held against."""

import os
import socket

import pytest

from tests.listening import EVERY, compare, documented, listening, place, process


@pytest.mark.parametrize(
    ("family", "address", "told"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", EVERY),
        (socket.AF_INET6, "::", EVERY),
        (socket.AF_INET6, "::1", "::1"),
    ],
)
def test_a_real_socket_is_seen_with_its_address(family, address, told):
    try:
        one = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with one:
        assert ("driver", told, one.getsockname()[1]) in listening(os.getpid())


def test_the_kernels_digits_are_read():
    assert place("0A02000A:1F90") == ("10.0.2.10", 8080)
    assert place("0000000000000000FFFF00000100007F:0050") == ("127.0.0.1", 80)  # IPv4 in an IPv6 socket


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python\0-m\0training.launch\0a=b", "driver"),
        ("/x/python3.11\0-u\0/y/dashboard.py\0--host", "dashboard.py"),
        ("ray::DashboardAgent", "DashboardAgent"),
        ("ray::RayTrainWorker.run", "ray worker"),
        ("/x/raylet\0--a", "raylet"),
        ("python\0-c\0x", "python"),
        ("", ""),
    ],
)
def test_a_process_has_one_name(command, name):
    assert process(command.encode()) == name


def test_a_socket_without_a_row_and_a_row_without_a_socket_are_told():
    rows = {("raylet", "127.0.0.1", "any"), ("dashboard.py", "127.0.0.1", "8265")}
    assert compare({("raylet", "127.0.0.1", 5), ("dashboard.py", "127.0.0.1", 8265)}, rows) == {}
    for wrong in (("raylet", EVERY, 5), ("dashboard.py", "127.0.0.1", 8266), ("other", "127.0.0.1", 5)):
        assert compare({wrong, ("raylet", "127.0.0.1", 5)}, rows)["untold"] == {wrong}
    assert compare({("raylet", "127.0.0.1", 5)}, rows) == {"unseen": {("dashboard.py", "127.0.0.1", "8265")}}


def test_a_readmes_table_is_read():
    rows = documented("cluster/README.md", "What listens on a node")
    assert {
        ("gcs_server", EVERY, "6379"),
        ("raylet", EVERY, "any"),
        ("dashboard.py", "127.0.0.1", "8265"),
    } <= rows
