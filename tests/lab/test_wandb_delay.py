from cluster.record.record import read_metrics
from tests.lab import wandb_delay


def test_a_dry_run_names_the_situations(capsys):
    assert wandb_delay.main(["--dry-run", "--rounds", "3"]) == 0
    assert capsys.readouterr().out.startswith("3 rounds of off, well, unreachable, cut, slow: 40 s")


def test_a_row_that_the_file_lacks_is_lost(monkeypatch):
    monkeypatch.setattr(wandb_delay, "read_metrics", lambda path: read_metrics(path)[:-1])
    found = wandb_delay.one_run("off", seconds=0.0)
    assert found["lost_rows"] == 2 and found["num_steps"] == {"on": 1, "off": 1}
    assert len(found["moved_percent"]) == 1 and found["step_ms"] >= found["log_ms"] > 0
    assert found["wandb_status"] == "disabled: as configured"
