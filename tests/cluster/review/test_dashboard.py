"""`make dashboard` as a user runs it: without a key, against a stand-in of W&B's server, and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.review import views
from cluster.review.dashboard import spec_of
from tests.cluster.review.views_server import ViewsServer
from tests.commands import ROOT

NAMES = {view.slug for view in views.VIEWS}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login, settings or key of the user."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with ViewsServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def dashboard(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.review.dashboard", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def write_study(folder: Path) -> Path:
    """What `make study` leaves, of a study of two rules."""
    folder.mkdir()
    rules = {"muon": {"title": "Muon"}, "adamw": {"title": None}}
    study = {"name": "small", "smoke": True, "rules": rules, "claims": {"reference": "adamw"}}
    (folder / "results.json").write_text(json.dumps({"study": study, "runs": []}))
    (folder / "report.md").write_text(
        "# Study small-smoke\n\n**A miniature.**\n\n## Claims\n\n- Muon needs 0.7 of the tokens.\n\n"
        "## Final validation losses\n\n| rule | mean |\n|---|---|\n| Muon | 3.1 |\n\n"
        "![loss_tokens](figures/loss_tokens.png)\n"
    )
    return folder


def test_without_a_key_each_view_is_a_file_and_the_command_says_how_to_save_it(tmp_path: Path):
    study = write_study(tmp_path / "small")
    done = dashboard("--output", tmp_path / "views", "--report", study)
    assert done.returncode == 0, done.stderr
    assert f"{len(NAMES)} views and 1 reports" in done.stdout
    assert "wandb login" in done.stdout and "make dashboard" in done.stdout
    files = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "views").iterdir()}
    assert set(files) == {f"view-{name}" for name in NAMES} | {"report-small"}
    assert files["view-training"]["section"]["panelBankConfig"]["sections"][0]["name"] == "Loss"


def test_a_view_is_the_same_each_time_it_is_built():
    """Names and the ids of panels too, or W&B would keep a new view and forget what people did to a panel."""
    for view in views.VIEWS:
        one, other = (views.build(view, entity="team", project="p") for _ in range(2))
        assert spec_of(one) == spec_of(other) and one._internal_name == other._internal_name
        panels = [p["__id__"] for s in sections(spec_of(one)) for p in s["panels"]]
        assert len(set(panels)) == len(panels) > 0
    assert len({views.internal_name(view) for view in views.VIEWS}) == len(views.VIEWS)


def sections(spec: dict) -> list[dict]:
    return spec["section"]["panelBankConfig"]["sections"]


def test_a_second_dashboard_updates_the_views_and_reports_of_the_first(server: ViewsServer, tmp_path: Path):
    study = write_study(tmp_path / "small")
    done = dashboard("--report", study)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("made ") == len(NAMES) + 1 and "nw=asunciontraining" in done.stdout
    assert set(server.names("project-view")) == {f"nw-asuncion{name}-v" for name in NAMES}
    assert list(server.names("runs").values()) == ["Study small-smoke"]
    first = {key: view["spec"] for key, view in server.views.items()}
    server.views["theirs"] = {**server.views["view0"], "name": "nw-other-v"}  # somebody's copy of a view
    again = dashboard("--report", study)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("updated ") == len(NAMES) + 1 and "made " not in again.stdout
    assert set(server.views) == {*first, "theirs"}
    assert {key: view["spec"] for key, view in server.views.items() if key != "theirs"} == first


def test_what_w_and_b_refuses_is_one_message_that_names_the_remedy(server: ViewsServer, tmp_path: Path):
    done = dashboard("--entity", "others")
    assert done.returncode == 1 and done.stdout == ""
    assert "no project others/asuncion" in done.stderr and "--entity and --project" in done.stderr
    server.refuse = "permission denied"
    done = dashboard()
    assert done.returncode == 1 and done.stdout == ""
    assert "team/asuncion: " in done.stderr and "permission denied. What is listed above" in done.stderr
    server.key = "another"
    done = dashboard()
    assert done.returncode == 1 and "wandb login --relogin" in done.stderr
    assert "Traceback" not in done.stderr and server.views == {}


def test_a_folder_without_a_study_or_parity_is_refused_before_anything_is_saved(server: ViewsServer):
    done = dashboard("--report", "training")
    assert done.returncode == 2 and "training: no study" in done.stderr and server.num_requests == 0


BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wandb_workspaces":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Refuse())
from cluster.review import dashboard
sys.exit(dashboard.main([]))
"""


def test_without_the_package_the_message_names_the_extra():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "extra `review`" in done.stderr and "'.[review]'" in done.stderr
