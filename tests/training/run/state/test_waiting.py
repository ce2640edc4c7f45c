"""What is said of a run that waits for another one. `test_cluster_at_length.py` has runs that really wait."""

import fcntl
from types import SimpleNamespace

from cluster.record import events
from cluster.record.row_format import LAUNCHER_LOCK
from cluster.review.status import report
from training.run.state.waiting import Line, describe

JOBS = {"01": "night-1", "02": "noon-1", "03": "dawn-1", "04": "small-1"}


def group(job, state, *bundles):
    return SimpleNamespace(
        creator_job_id=job, state=state, bundles=[{"unit_resources": bundle} for bundle in bundles]
    )


def said(*groups, free, needed=8, own="03"):
    about = {"own": own, "kind": "GPU", "needed": needed, "each": 1.0, "total": {"GPU": 16.0}}
    return describe(list(groups), JOBS, free={"GPU": free}, **about)


def test_who_holds_the_gpus_and_who_waits_too_are_named():
    one = {"GPU": 1.0, "CPU": 4.0}
    groups = [
        group("01", "CREATED", *[one] * 10),
        group("04", "CREATED", one, one),
        group("99", "CREATED", {"CPU": 1.0}),
        group("02", "PENDING", *[one] * 8),
        group("03", "PENDING", *[one] * 8),
    ]
    text = said(*groups, free=4.0)
    assert text == (
        "the run waits in line for 8 workers: 4 of 16 GPUs are free, and it needs 8; night-1 holds 10, "
        "small-1 holds 2; noon-1 waits too"
    )
    assert said(*groups, free=4.0, needed=4) is None  # it fits beside them
    assert said(*groups, group("03", "CREATED", *[one] * 4), free=0.0) is None  # it has its workers
    assert "no run holds the others" in said(free=0.0)


def test_who_came_first_is_ahead_until_it_leaves_or_dies(tmp_path):
    night, noon, dawn = (Line(tmp_path, name) for name in ("night", "noon", "dawn"))
    assert (night.ahead(), noon.ahead(), dawn.ahead()) == ([], ["night"], ["night", "noon"])
    night.leave()
    assert dawn.ahead() == ["noon"]
    noon._file.close()  # as the end of its process does
    assert dawn.ahead() == [] and len(list((tmp_path / ".line").iterdir())) == 1
    dawn.leave()


def test_the_status_tells_that_a_run_waits_while_its_launcher_lives(tmp_path):
    run = tmp_path / "noon"
    run.mkdir()
    events.append(run, "started", "a run of 8 steps begins", step=0, num_steps=8)
    events.append(run, "waiting", "the run waits in line for 8 workers")
    with (run / LAUNCHER_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert report(tmp_path) == [f"  run {'noon':<24}waiting   the run waits in line for 8 workers"]
    assert "waits" not in report(tmp_path)[0]  # it was killed
