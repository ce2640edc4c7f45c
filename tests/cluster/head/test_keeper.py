"""What the keeper does before it trusts a Ray that answers. On real nodes: tests/cluster/test_cluster.py."""

import hashlib
import os
import threading

import pytest

from cluster.head import ray_rest
from cluster.head.keeper import Keeper
from cluster.head.shell import Failure
from cluster.session import free_ports
from tests.cluster.head.test_answers import JobServer


def test_a_ray_started_by_hand_on_the_dashboards_port_is_not_taken_for_the_clusters(tmp_path, monkeypatch):
    """Ours has died and left its marker; the user's own Ray has the port since then."""
    (tmp_path / "env").mkdir()
    (tmp_path / "env/current").write_text("abc\n")
    (tmp_path / "started").write_text(hashlib.sha256(b"headworkerabc").hexdigest())
    with JobServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        port = server.server_address[1]
        keeper = Keeper(
            {
                "name": "here", "head": "10.0.0.1", "workers": [], "drained": [], "logins": {},
                "scratch": str(tmp_path), "storage": str(tmp_path / "storage"), "generation": "g",
                "gcs_port": free_ports(1)[0], "dashboard_port": port, "setup": "true", "token": "true",
                "start_head": "head", "start_worker": "worker",
            }
        )  # fmt: skip
        with pytest.raises(
            Failure, match=rf"port {port} is in use by a process of yours, pid .* ports\.dashboard"
        ):
            keeper._bring_up_head()
        monkeypatch.setattr(ray_rest, "of_cluster", lambda name: {os.getpid(): "now it is the cluster's"})
        keeper._bring_up_head()  # it goes on as it is
        server.shutdown()
    assert (tmp_path / "started").exists()
