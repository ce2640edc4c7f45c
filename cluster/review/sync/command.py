"""Sends to W&B what is only on disk: runs that were offline, and online runs whose connection broke.

    python -m cluster.review.sync [--run NAME]        `make sync`, `make sync RUN=NAME`

A run has a segment for each of its starts: `wandb/[offline-]run-TIME-ID/run-ID.wandb`. `wandb sync` sends a
whole segment, again if it is asked again, and reports success when an upload failed. So this command copies
each segment without the rows that W&B has already, and sends the copy. It marks the segment as sent
(`run-ID.wandb.synced`, W&B's own marker) only if no upload failed and W&B shows all of its rows. Whatever
ends this command, the next one sends the rest.
"""

import argparse
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from cluster import cli, files, runs
from cluster.cli import RunError
from cluster.review.run_reader import RUNNING, Run
from cluster.review.sync.segments import Segment, Staged, find, name_of
from cluster.review.sync.uploads import Uploads

FRESH_SECONDS = 60.0  # an online run's log that was written so recently may still be sent by the run itself
ENDED = ("finished", "failed")  # in W&B
LOCK, STAGE = ".sync.lock", ".sync"  # in a run's wandb/


def sync(directories: Sequence[Path]) -> None:
    """Send all segments of these run directories that are not in W&B yet.

    Raises:
        UserError: there is no API key, or the server refused it.
        RunError: the server cannot be reached, or something was not sent; the message lists what.
    """
    segments: list[Segment] = []
    problems: dict[str, str] = {}  # of a run, by its name
    for directory in directories:
        try:
            segments += find(directory)
        except OSError as error:
            problems[name_of(directory.absolute())] = files.problem_of(error)
        except ValueError as error:
            problems[name_of(directory.absolute())] = str(error)
    pending = [segment for segment in segments if not segment.sent]
    if not pending and not problems:
        print(f"nothing to send: {_runs(segments)} with W&B files, all in W&B already")
        return
    uploads = Uploads.connect()
    done: list[Staged] = []
    with ExitStack() as held:
        for run in dict.fromkeys(segment.run for segment in pending):
            try:
                if not _lock(run, held):
                    problems[name_of(run)] = "another `make sync` is sending it"
            except OSError as error:  # such as another user's run
                problems[name_of(run)] = files.problem_of(error)
        pending = [segment for segment in pending if not segment.sent]  # meanwhile, by another one
        while pending := [segment for segment in pending if segment.name not in problems]:
            batch = _oldest_of_each_run(pending)
            pending = [segment for segment in pending if segment not in batch]
            staged: list[Staged | None] = []
            for segment in batch:
                try:
                    staged.append(_stage(segment, segments, uploads))
                except OSError as error:
                    problems[segment.name] = files.problem_of(error)
            for each in _send(list(filter(None, staged)), uploads):
                if each.problem:
                    problems[each.segment.name] = each.problem
                else:
                    done.append(each)
    _conclude(done, problems, url=uploads.url)


def _stage(segment: Segment, segments: Sequence[Segment], uploads: Uploads) -> Staged | None:
    """The copy to send; None if there is nothing to do for this segment."""
    later = [each for each in segments if each.id == segment.id and each.started > segment.started]
    newest = later[-1] if later else segment
    live = Run(segment.run).state.name == RUNNING
    if newest.online and (live or time.time() - newest.log.stat().st_mtime < FRESH_SECONDS):
        print(f"{segment.name}: the run is sending its rows itself; left alone", flush=True)
        return None
    there = uploads.there(segment)
    folder = segment.run / "wandb" / STAGE / segment.log.parent.name
    staged = Staged.make(segment, folder=folder, there=there.rows, later=later, live=live and not later)
    if segment.online and there.state in ENDED and there.rows is not None and not staged.num_rows:
        staged.settle()  # the run ended in W&B, which it does only after its files
        print(f"{segment.name}: sent all of its rows itself", flush=True)
        return None
    return staged


def _send(staged: list[Staged], uploads: Uploads) -> list[Staged]:
    """Send one segment each of several runs at once, and mark those that arrived."""
    if staged:
        uploads.send(staged)
    for each in staged:
        each.settle()
        if not each.problem:
            print(_line(each), flush=True)
    return staged


def _conclude(done: list[Staged], problems: Mapping[str, str], *, url: str) -> None:
    sent = [each.segment for each in done]
    num_rows = sum(each.num_rows for each in done)
    text = f"sent {_count(num_rows, 'row')} in {_count(len(sent), 'segment')} of {_runs(sent)} to {url}"
    if going := sorted({each.segment.name for each in done if each.live}):
        text += f"; still running, so run `make sync` again later: {', '.join(going)}"
    if problems:
        lines = [f"{name}: {problem}" for name, problem in problems.items()]
        raise RunError(
            "\n".join([*lines, f"{text}; not sent whole: {', '.join(problems)}; run `make sync` again"])
        )
    print(text)


def _oldest_of_each_run(pending: Sequence[Segment]) -> list[Segment]:
    """A run's segments go one after the other: where one ends in W&B, the next begins."""
    return list({segment.id: segment for segment in reversed(pending)}.values())[::-1]


def _lock(run: Path, held: ExitStack) -> bool:
    """Hold a run's lock for as long as `held`; False if another process has it."""
    file = held.enter_context((run / "wandb" / LOCK).open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _line(staged: Staged) -> str:
    there = f", {staged.num_there:,} were there" if staged.num_there else ""
    replaced = (
        f", {staged.num_superseded:,} left out, which a later start repeats" if staged.num_superseded else ""
    )
    return f"{staged.segment.name}: {_count(staged.num_rows, 'row')} sent{there}{replaced}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _runs(segments: Sequence[Segment]) -> str:
    return _count(len({segment.id for segment in segments}), "run")


def main() -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.review.sync", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--run", default="", help="name or path of a run; default: all runs in outputs/")
    options = parser.parse_args()

    def body() -> None:
        lacks = "no W&B files (was its W&B mode `disabled`?)"
        found = lambda folder: any(_with_wandb_files(folder))  # noqa: E731
        where = runs.named(options.run, fits=found, lacks=lacks) if options.run else runs.OUTPUTS
        sync(sorted(_with_wandb_files(where)))

    with cli.sigterm_as_interrupt():
        return cli.run(body)


def _with_wandb_files(folder: Path) -> Iterator[Path]:
    """The run directories in a folder, itself included. A study has its runs in folders of its own."""
    for parent, folders, _ in os.walk(folder):
        if "wandb" in folders:
            yield Path(parent)
        folders[:] = [name for name in folders if name not in ("wandb", "checkpoints", "ray-train")]
