from cluster.record import events
from cluster.record.alerts import Alerts
from tests.cluster.record.test_record import in_subprocess, wandb_records


def titles(alerts):
    sent = []
    alerts.send(lambda title, text, level: sent.append((title, text, level)))
    return sent


def test_each_warning_and_error_is_sent_once_also_across_a_resume(tmp_path):
    events.append(tmp_path, "started", "begins")
    events.append(tmp_path, "loss_spike", "the loss is 9", step=7)
    alerts = Alerts(tmp_path, run_id="a1", name="night")
    assert titles(alerts) == [("loss spike, step 7: night", "the loss is 9", "WARN")]
    assert titles(alerts) == []
    events.append(tmp_path, "failed", "a node was lost")  # by the launcher, after the run's mirror has ended
    again = Alerts(tmp_path, run_id="a1", name="night")
    assert titles(again) == [("failed: night", "a node was lost", "ERROR")]
    assert titles(Alerts(tmp_path, run_id="a1", name="night")) == []


def test_a_fresh_run_of_the_same_name_sends_its_own(tmp_path):
    events.append(tmp_path, "failed", "one")
    assert len(titles(Alerts(tmp_path, run_id="a1", name="night"))) == 1
    (tmp_path / events.FILE).unlink()
    events.append(tmp_path, "failed", "two")
    assert [text for _, text, _ in titles(Alerts(tmp_path, run_id="b2", name="night"))] == ["two"]


def test_a_title_fits_into_what_wandb_takes(tmp_path):
    events.append(tmp_path, "loss_not_finite", "the loss is nan", step=123456)
    ((title, _, _),) = titles(Alerts(tmp_path, run_id="a1", name="a-very-long-name" * 9))
    assert len(title) == 63 and title.startswith("loss not finite, step 123456: a-very")


def test_without_an_id_every_start_sends_all(tmp_path):
    events.append(tmp_path, "failed", "one")
    assert len(titles(Alerts(tmp_path, run_id="a1", name="night"))) == 1
    for _ in range(2):
        assert len(titles(Alerts(tmp_path, run_id=None, name="night"))) == 1
    assert len(titles(Alerts(tmp_path, run_id="a1", name="night"))) == 0


def test_the_offline_run_of_wandb_holds_the_alerts(tmp_path):
    code = """
from pathlib import Path
from cluster.record import events
from tests.waiting import wait_until
directory = Path(sys.argv[1])
with open_record(directory, wandb_mode="offline") as run:
    run.log({"step": 1, "loss": 9.0})
    events.append(directory, "loss_spike", "the loss is 9", step=1)
    # while the run goes on
    wait_until(lambda: any(b"loss spike" in file.read_bytes() for file in directory.glob("wandb/*/*.wandb")))
    events.append(directory, "failed", "out of memory", step=2)  # sent when it ends
assert run.wandb_status.startswith("offline"), run.wandb_status
"""
    process = in_subprocess(code, tmp_path, home=tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    alerts = [record["alert"] for record in wandb_records(tmp_path) if "alert" in record]
    assert [(alert["title"], alert["text"], alert["level"]) for alert in alerts] == [
        ("loss spike, step 1: first-light", "the loss is 9", "WARN"),
        ("failed, step 2: first-light", "out of memory", "ERROR"),
    ]
