import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.record import events
from cluster.record.alerts import Alerts
from tests.cluster.record.test_record import in_subprocess, wandb_records
from tests.cluster.review.wandb_server import WandbServer
from tests.waiting import PATIENCE_SECONDS, wait_until


def sent_by(directory, *, run_id, name="night"):
    """What a start of the run sends, in a list that grows, and the object that sends it."""
    sent = []
    alert = lambda title, text, level, **_: sent.append((title, text, level))  # noqa: E731
    alerts = Alerts(directory, run_id=run_id, name=name, alert=alert)
    alerts.send()
    return sent, alerts


def test_each_warning_and_error_is_sent_once_also_across_a_resume(tmp_path):
    events.append(tmp_path, "started", "begins")
    events.append(tmp_path, "loss_spike", "the loss is 9", step=7)
    sent, alerts = sent_by(tmp_path, run_id="a1")
    alerts.send()
    assert sent == [("loss spike, step 7: night", "the loss is 9", "WARN")]
    events.append(tmp_path, "failed", "a node was lost")  # by the launcher, after the run's mirror has ended
    assert sent_by(tmp_path, run_id="a1")[0] == [("failed: night", "a node was lost", "ERROR")]
    assert sent_by(tmp_path, run_id="a1")[0] == []


def test_a_fresh_run_of_the_same_name_sends_its_own(tmp_path):
    events.append(tmp_path, "failed", "one")
    assert len(sent_by(tmp_path, run_id="a1")[0]) == 1
    (tmp_path / events.FILE).unlink()
    events.append(tmp_path, "failed", "two")
    assert [text for _, text, _ in sent_by(tmp_path, run_id="b2")[0]] == ["two"]


def test_without_an_id_every_start_sends_all(tmp_path):
    events.append(tmp_path, "failed", "one")
    for _ in range(2):
        assert len(sent_by(tmp_path, run_id=None)[0]) == 1


def test_a_title_fits_into_what_wandb_takes(tmp_path):
    events.append(tmp_path, "loss_not_finite", "the loss is nan", step=123456)
    ((title, _, _),) = sent_by(tmp_path, run_id="a1", name="a-very-long-name" * 9)[0]
    assert len(title) == 63 and title.startswith("loss not finite, step 123456: a-very")


def test_calls_come_in_their_order_while_alerts_are_sent(tmp_path):
    calls = queue.SimpleQueue()
    sent, alerts = sent_by(tmp_path, run_id=None)
    for number in range(3):
        calls.put(number)
    assert [alerts.get(calls) for _ in range(3)] == [0, 1, 2]
    events.append(tmp_path, "failed", "one")

    def put_once_it_is_sent():
        wait_until(lambda: sent)
        calls.put(3)

    with ThreadPoolExecutor() as pool:
        pool.submit(put_once_it_is_sent)
        assert alerts.get(calls) == 3


def test_the_offline_run_of_wandb_holds_the_alerts(tmp_path):
    code = """
from pathlib import Path
from cluster.record import events
from tests.waiting import PATIENCE_SECONDS, wait_until
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
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
    alerts = [record["alert"] for record in wandb_records(tmp_path) if "alert" in record]
    assert [(alert["title"], alert["text"], alert["level"]) for alert in alerts] == [
        ("loss spike, step 1: first-light", "the loss is 9", "WARN"),
        ("failed, step 2: first-light", "out of memory", "ERROR"),
    ]


ONE_START = """
from pathlib import Path
from cluster.record import events
record.Mirror.INIT_SECONDS = record.Mirror.UPLOAD_SECONDS = PATIENCE_SECONDS
directory, mode, resume, kind = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
with open_record(directory, wandb_mode=mode, resume_step=resume or None) as run:
    run.log({"step": resume + 1, "loss": 9.0})
    events.append(directory, kind, f"a {kind}", step=resume + 1)
assert run.wandb_status.startswith(mode), run.wandb_status
"""


def start(directory, home, *arguments, server):
    process = in_subprocess(ONE_START, directory, *arguments, home=home, **server.environment)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said


def test_alerts_reach_the_server_once_online_and_by_sync(tmp_path):
    with WandbServer() as server:

        def titles():
            return [alert["title"] for alert in server.alerts]

        start(tmp_path / "online", tmp_path, "online", 0, "loss_spike", server=server)
        assert titles() == ["loss spike, step 1: first-light"]
        events.append(tmp_path / "online", "failed", "by the launcher, whose workers are gone")
        start(tmp_path / "online", tmp_path, "online", 1, "checkpoint", server=server)
        assert titles() == ["loss spike, step 1: first-light", "failed: first-light"]

        server.alerts.clear()
        start(tmp_path / "offline", tmp_path, "offline", 0, "loss_spike", server=server)
        start(tmp_path / "offline", tmp_path, "offline", 1, "loss_not_finite", server=server)
        assert titles() == []
        (newest,) = (tmp_path / "offline/wandb").glob("offline-run-*")
        sync = [Path(sys.executable).with_name("wandb"), "sync", newest]
        environment = {**os.environ, "HOME": str(tmp_path), **server.environment}
        subprocess.run(sync, cwd=tmp_path, env=environment, check=True)
        assert titles() == ["loss spike, step 1: first-light", "loss not finite, step 2: first-light"]
