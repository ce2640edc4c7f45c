import fcntl
import io
import os
import pty
import struct
import termios

from cluster.progress import Progress, fit


def row(step, **values):
    return {
        "step": step,
        "loss": 5.1234,
        "tokens_per_second": 9812.0,
        "mfu": 0.412,
        "step_seconds": 1.0,
        **values,
    }


def test_a_plain_line_holds_every_figure_and_its_unit():
    stream = io.StringIO()
    Progress(250, stream=stream).update(row(120, validation_loss=5.4))
    assert stream.getvalue() == "step 120/250  loss 5.123  val 5.400  9.8k tok/s  MFU 41.2%  ETA 2m10s\n"


def test_what_is_unknown_is_left_out_and_the_validation_loss_is_kept():
    stream = io.StringIO()
    now = iter(range(0, 1000, 100))
    progress = Progress(250, stream=stream, clock=lambda: next(now))
    progress.update({"step": 0, "validation_loss": 9.0})
    progress.update(row(1, mfu=None))
    assert stream.getvalue().splitlines() == [
        "step 0/250  val 9.000",
        "step 1/250  loss 5.123  val 9.000  9.8k tok/s  ETA 4m09s",
    ]


def test_plain_lines_come_at_most_every_five_seconds_plus_first_and_last():
    stream, now = io.StringIO(), [0.0]
    with Progress(100, stream=stream, clock=lambda: now[0]) as progress:
        for step in range(1, 101):
            now[0] += 0.25
            progress.update(row(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        "1/100", "21/100", "41/100", "61/100", "81/100", "100/100",
    ]  # fmt: skip


def test_a_run_that_stops_early_still_shows_its_last_step():
    stream = io.StringIO()
    with Progress(100, stream=stream, clock=lambda: 0.0) as progress:
        progress.update(row(1))
        progress.update(row(2))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "2/100"]


def test_one_slow_step_does_not_move_the_eta():
    stream, now = io.StringIO(), iter(range(0, 1000, 10))
    progress = Progress(100, stream=stream, clock=lambda: next(now))
    for step in range(1, 11):
        progress.update(row(step, step_seconds=600.0 if step == 10 else 2.0))
    assert stream.getvalue().splitlines()[-1].endswith("ETA 3m00s")


def on_terminal(columns, use):
    """What `use(progress)` writes on a terminal of that width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written = b""
    with os.fdopen(slave, "w") as stream:
        with Progress(250, stream=stream) as progress:
            use(progress)
        print("END", file=stream, flush=True)
        while not written.endswith(b"END\r\n"):
            written += os.read(master, 100_000)
    os.close(master)
    return written.removesuffix(b"END\r\n").decode().replace("\r\n", "\n")


def test_a_terminal_rewrites_the_line_within_its_width():
    written = on_terminal(40, lambda progress: [progress.update(row(step)) for step in (119, 120)])
    first, second = written.removesuffix("\n").split("\r")[1:]
    assert second == "step 120/250  loss 5.123  ETA 2m10s"
    assert len(first) < 40 and len(second) < 40 and written.count("\n") == 1


def test_a_note_stands_on_a_line_of_its_own():
    def use(progress):
        progress.update(row(1))
        progress.note("checkpoint saved")
        progress.update(row(2))

    *_, noted, last = on_terminal(120, use).removesuffix("\n").split("\n")
    assert noted.endswith("\rcheckpoint saved")
    assert last.split("\r")[-1].startswith("step 2/250")


def test_the_last_but_one_field_is_left_out_first():
    assert fit(["step 1/2", "loss 1", "ETA 1s"], width=200) == "step 1/2  loss 1  ETA 1s"
    assert len(fit(["step 1000/2000", "loss 1", "ETA 1s"], width=10)) == 9
