"""Ray's REST interface: whom it talks to, and what it makes of an error."""

import os
import re
import socket
import subprocess
import sys

import pytest

from cluster.head.ray_rest import Ray, _reason, listener, stranger
from cluster.private import make_token
from cluster.session import free_ports

TRACEBACK = """Traceback (most recent call last):
  File "job_head.py", line 1, in submit_job
    raise RuntimeError(1)
ray.exceptions.RuntimeEnvError: first
During handling of it another:
FileNotFoundError: [Errno 2] No such file or directory
.
"""


def test_the_reason_is_the_last_error_and_not_the_last_line():
    assert _reason(TRACEBACK) == "FileNotFoundError: [Errno 2] No such file or directory ."
    assert _reason("No available agent\n") == "No available agent"
    assert _reason("") == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can listen as another user")
def test_the_token_is_not_given_to_another_users_port(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_token()
    script = """
import os, socket
os.setuid(65534); one = socket.socket(); one.bind(("127.0.0.1", 0)); one.listen()
print(one.getsockname()[1], flush=True)
one.settimeout(2)
try:
    print(one.accept()[0].recv(4096))
except TimeoutError:
    print("nothing")
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as squatter:
        port = int(squatter.stdout.readline())
        assert listener(port) == 65534
        with pytest.raises(ValueError, match=f"port {port} is user nobody's"):
            Ray(port).is_up()
        assert stranger(port, "mine") == "user nobody"
        assert squatter.stdout.readline() == "nothing\n"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_whoever_listens_and_is_not_of_the_cluster_is_a_stranger(family):
    """Another cluster's process, or one started by hand, is a stranger though it is the same user's."""
    port = free_ports(1)[0]
    script = f"import socket, time; s = socket.socket({int(family)}); s.bind(('', {port})); s.listen()\n"
    script += "print(flush=True); time.sleep(600)"
    assert stranger(port, "mine") is None
    for cluster, told in (("mine", None), ("other", r"a process of yours, pid \d+: .*python")):
        environment = {**os.environ, "ASUNCION_CLUSTER": cluster}
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as there:
            there.stdout.readline()
            whose = stranger(port, "mine")
            there.kill()
        assert whose is None if told is None else re.match(told, whose)


def test_a_port_on_which_nobody_listens_is_a_ray_that_is_down():
    assert listener(free_ports(1)[0]) is None
    assert not Ray(free_ports(1)[0]).is_up()
