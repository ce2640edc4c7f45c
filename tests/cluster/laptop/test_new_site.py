"""`make inventory`: a site's inventory from an SSH configuration, from keys, and from questions."""

import pytest
import yaml

from cluster.cli import UserError
from cluster.config import ConfigError
from cluster.laptop import inventory
from cluster.laptop.new_site import main, new_site

CONFIG = """\
Include FOLDER/more/*
Host asu-head
  HostName 198.51.100.7
  User zhang
Host asu-w1 asu-w2 !asu-x
  ProxyJump zhang@asu-head:22
Host asu-w1
  HostName 10.0.0.2
  Port 2222
Host asu-w2
  HostName fd00::3
  User=lin
Host *
  User zhang
  IdentityFile ~/.ssh/cluster
"""


@pytest.fixture
def ssh_config(tmp_path):
    (tmp_path / "more/folder").mkdir(parents=True)
    (tmp_path / "more/other").write_text("Host elsewhere\n  HostName 192.0.2.9\n")
    (tmp_path / "config").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return tmp_path / "config"


def test_an_ssh_configuration_gives_nodes_logins_and_what_differs(tmp_path, ssh_config):
    cluster = tmp_path / "mine.yaml"
    site = new_site(
        cluster, [f"from={ssh_config}", "hosts=asu-*", "node.gpus=4", "external_head=1.site"], ask=None
    )
    assert site == inventory.load(cluster) and cluster.exists()
    written = yaml.safe_load((tmp_path / "mine.inventory.yaml").read_text())
    assert written == {
        "name": "mine", "head": "198.51.100.7", "external_head": "1.site", "workers": ["10.0.0.2", "fd00::3"],
        "differs": {"10.0.0.2": {"port": 2222}, "fd00::3": {"user": "lin"}},
        "ssh": {"user": "zhang", "key": "~/.ssh/cluster"}, "node": {"gpus": 4},
    }  # fmt: skip
    assert new_site(tmp_path / "all.yaml", [f"from={ssh_config}"], ask=None).workers[0] == "192.0.2.9"


def test_questions_are_asked_for_what_is_open_and_again_after_a_bad_answer(tmp_path, capsys):
    answers = iter(["10.0.0.300", "10.0.0.1", "", "10.0.0.2, fd00::3", "me", "x", "4", "", "", ""])
    asked = []

    def ask(question):
        asked.append(question)
        return next(answers)

    site = new_site(tmp_path / "mine.yaml", ["ssh.key=~/.ssh/k"], ask=ask)
    assert (site.head, site.workers, site.ssh.user, site.node.gpus) == (
        "10.0.0.1",
        ("10.0.0.2", "fd00::3"),
        "me",
        4,
    )
    assert site.node.accelerator == "A40" and site.ssh.key == "~/.ssh/k"
    assert len(asked) == 10 and not any("key" in question for question in asked)
    said = capsys.readouterr().err
    assert "head: '10.0.0.300' is not" in said and "node.gpus" in said


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, ssh_config):
    (tmp_path / "round").write_text(f"Host a\nInclude {tmp_path}/round\n")
    for arguments, error, told in (
        ([], UserError, "head: is missing"),
        (["head=10.0.0.1", "workers=[10.0.0.1]"], ConfigError, "workers: 10.0.0.1 named twice"),
        (["hosts=a"], UserError, "hosts: .*from="),
        ([f"from={ssh_config}", "hosts=none-*"], UserError, "no host named"),
        ([f"from={tmp_path}/nowhere"], UserError, "nowhere: no such file"),
        ([f"from={tmp_path}/round"], UserError, "round: ssh refuses it: Too many recursive"),
    ):
        with pytest.raises(error, match=told):
            new_site(tmp_path / "mine.yaml", arguments, ask=None)
        assert not list(tmp_path.glob("*mine*"))
    for name in ("mine", "mine.inventory.yaml", "mi\nne.yaml", "minor/mine.yaml"):
        with pytest.raises(
            UserError, match=r"mi.*: (CLUSTER names a Ray YAML|the name has char|no such folder)"
        ):
            new_site(tmp_path / name, [], ask=lambda question: pytest.fail("asked before it is refused"))
    assert not list(tmp_path.glob("*mi*ne*"))
    new_site(tmp_path / "mine.yaml", ["head=10.0.0.1"], ask=None)
    before = (tmp_path / "mine.inventory.yaml").read_text()
    with pytest.raises(UserError, match=r"mine\.inventory\.yaml: exists already"):
        new_site(tmp_path / "mine.yaml", ["head=10.0.0.2"], ask=None)
    assert (tmp_path / "mine.inventory.yaml").read_text() == before


def test_what_differs_is_written_also_if_it_is_nothing(tmp_path):
    keys = ["head=h1", "workers=[w1,w2]", "differs={w1: {gpus: 0}, w2: {drained: true}}"]
    new_site(tmp_path / "mine.yaml", keys, ask=None)
    written = yaml.safe_load((tmp_path / "mine.inventory.yaml").read_text())
    assert written["differs"] == {"w1": {"gpus": 0}, "w2": {"drained": True}}


def test_a_user_who_ends_the_questions_gets_no_traceback(tmp_path, monkeypatch, capsys):
    def ask(question):
        raise EOFError

    monkeypatch.setattr("sys.argv", ["new_site", str(tmp_path / "mine.yaml")])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ask)
    assert main() == 130
    assert capsys.readouterr().err.strip() == "interrupted" and not list(tmp_path.iterdir())


def test_without_a_terminal_the_command_takes_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["new_site", str(tmp_path / "mine.yaml"), "head=h1"])
    assert main() == 0 and "1 nodes, head h1" in capsys.readouterr().out
    assert main() == 2 and "exists already" in capsys.readouterr().err
