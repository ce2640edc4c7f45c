"""What ssh says when it fails, in words that name the node and the remedy; and patience with a lost link."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import RunError
from cluster.laptop.keys import DiffersConfig, Inventory
from cluster.laptop.ssh import LinkError, NodeError, Ssh, patiently, rsync, transfer
from tests.waiting import PATIENCE_SECONDS

SITE = Inventory(name="here", head="10.0.0.1", workers=("10.0.0.2",))


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return Ssh(SITE, "10.0.0.2")


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("research@10.0.0.2: Permission denied (publickey).", NodeError, "refuses the key .*ssh-copy-id"),
        ("@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\nVerification failed.", NodeError, "ssh-keygen -R"),
        ("Host key verification failed.", NodeError, "not pinned .*make up"),
        ("ssh: Could not resolve hostname 10.0.0.2: unknown", NodeError, "check the address"),
        ("ssh: Could not resolve hostname h: Temporary failure in name resolution", LinkError, "Temporary"),
        ("Unable to negotiate with 10.0.0.2 port 22: no matching key exchange method found. Their offer: x",
         NodeError, "no algorithm in common .*Their offer: x"),
        ("/h/.ssh/config: line 3: Bad configuration option: x\nterminating", NodeError, "line 3: Bad"),
        ("Bad owner or permissions on /root/.ssh/config", NodeError, "Bad owner .*see ~/.ssh/config"),
        ("Received disconnect: Too many authentication failures", NodeError, "refuses the key"),
        ("channel 0: open failed: administratively prohibited: open failed", NodeError, "AllowTcpForwarding"),
        ("WARNING: UNPROTECTED PRIVATE KEY FILE!\nPermission denied (publickey).", NodeError, "chmod 600"),
        ("ssh: connect to host 10.0.0.2 port 22: Connection refused", LinkError, "Connection refused"),
        ("ssh: connect to host 10.0.0.2 port 22: Connection timed out", LinkError, "timed out"),
        ("", LinkError, "the connection broke"),
        ("channel 0: open failed: connect failed: No route to host\nConnection closed by UNKNOWN port 65535",
         LinkError, "No route to host"),
    ],
)  # fmt: skip
def test_a_failure_is_explained(node, said, kind, told):
    error = node.explain(said)
    assert type(error) is kind
    with pytest.raises(kind, match=rf"10\.0\.0\.2: .*{told}"):
        raise error


def test_a_worker_is_reached_through_the_head_by_the_same_pinned_keys(node, tmp_path):
    arguments = node.arguments()
    proxy = next(part for part in arguments if part.startswith("ProxyCommand="))
    assert "-W '[%h]:%p' research@10.0.0.1" in proxy
    for text in (proxy, " ".join(arguments)):
        assert f"UserKnownHostsFile={tmp_path}/.asuncion/here/known_hosts" in text
        assert "StrictHostKeyChecking=yes" in text and "ForwardAgent=no" in text
    assert "ControlPath=" in proxy and "%%C" in proxy  # ssh expands % of a ProxyCommand itself
    assert "accept-new" in " ".join(Ssh(SITE, "10.0.0.2", pin=True).arguments())


def test_a_node_has_a_port_a_user_and_a_key_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    differs = {"fd00::2": DiffersConfig(port=2222, user="other", key="~/two")}
    node = Ssh(replace(SITE, workers=("fd00::2",), differs=differs), "fd00::2")
    arguments = node.arguments()
    assert arguments[-1] == "other@fd00::2" and f"IdentityFile={tmp_path}/two" in arguments
    assert "Port=2222" in arguments and "HostKeyAlias=fd00::2" in arguments
    (proxy,) = [part for part in arguments if part.startswith("ProxyCommand=")]
    assert "research@10.0.0.1" in proxy and "Port=" not in proxy and "two" not in proxy
    assert "-p 2222 -i ~/two other@fd00::2`" in str(node.explain("Permission denied (publickey)."))
    assert rsync(node, "/s", Path("t"), exclude=())[-2] == "other@[fd00::2]:/s/"


def test_a_key_with_a_passphrase_is_told_from_one_that_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, phrase in (("locked", "secret"), ("open", "")):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", tmp_path / name], check=True)
        site = replace(SITE, ssh=replace(SITE.ssh, key=f"~/{name}"))
        error = Ssh(site, "10.0.0.2").explain("Permission denied (publickey).")
        assert (f"`ssh-add {tmp_path}/locked`" in str(error)) == (name == "locked")
        assert ("ssh-copy-id" in str(error)) == (name == "open")


def test_sockets_have_a_short_path_whatever_the_home_is_called(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / ("long" * 40)))
    (option,) = [part for part in Ssh(SITE, "10.0.0.1").options() if part.startswith("ControlPath=")]
    folder = Path(option.removeprefix("ControlPath=")).parent
    assert len(str(folder)) + 1 + 40 + 17 < 104  # %C, and what ssh adds while it makes the socket
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_lost_link_is_waited_for_and_told_once(monkeypatch):
    monkeypatch.setattr("cluster.laptop.ssh.RETRY_SECONDS", (0.0,))
    answers = iter([LinkError("gone"), LinkError("gone"), "here"])
    said = []

    def attempt():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(attempt, patience=PATIENCE_SECONDS, report=said.append) == "here"
    assert len(said) == 2 and "link lost: gone" in said[0] and "link is back" in said[1]


def test_patience_ends(monkeypatch):
    monkeypatch.setattr("cluster.laptop.ssh.RETRY_SECONDS", (0.01,))

    def attempt():
        raise LinkError("gone")

    with pytest.raises(LinkError, match="gave up after"):
        patiently(attempt, patience=0.05, report=lambda text: None)


def test_a_refusal_is_not_tried_again():
    def attempt():
        calls.append(1)
        raise NodeError("no")

    calls = []
    with pytest.raises(NodeError):
        patiently(attempt, patience=PATIENCE_SECONDS, report=lambda text: None)
    assert len(calls) == 1


def test_a_transfer_is_repeated_while_the_link_is_lost_and_only_then(node, tmp_path):
    told, mark = [], tmp_path / "mark"

    def sent(script):
        return transfer(node, ["bash", "-c", script], patience=PATIENCE_SECONDS, report=told.append)

    broken = f"test -e {mark} && echo sent && exit; touch {mark}; echo 'rsync: broken' >&2; exit 12"
    assert sent(broken) == "sent\n"
    assert len(told) == 2 and "link lost: 10.0.0.2: rsync: broken" in told[0] and "is back" in told[1]
    with pytest.raises(RunError, match=r"^10\.0\.0\.2: rsync: no such folder$"):
        sent("echo 'mind the gap' >&2; echo 'rsync: no such folder' >&2; exit 23")
    with pytest.raises(RunError, match="rsync: no such command"):
        transfer(node, ["/nowhere/rsync"], patience=PATIENCE_SECONDS, report=told.append)
    assert len(told) == 2
