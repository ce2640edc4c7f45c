"""The kinds of faults: what happens to a run, and what its faulted start must say."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.record import events
from cluster.record.record import read_metrics
from cluster.runs import complete_checkpoints
from tests.faults import checks
from tests.faults.arm import MS_REMOUNT, mount
from tests.faults.runs import NUM_STEPS, Outcome, Place, start
from tests.test_secrets import CANARIES
from training.run.checkpoint import step_of

CGROUPS = Path("/sys/fs/cgroup/memory")  # version 1; of version 2 it is the folder around
CGROUPS = CGROUPS if CGROUPS.is_dir() else CGROUPS.parent
Counts = list[dict[str, int]]  # rank -> group -> events of an undisturbed run


@dataclass
class Story:
    """One run of a campaign: its place, what chooses, and what was found."""

    place: Place
    rng: random.Random
    counts: Counts
    problems: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # one line a start
    spoiled: frozenset[int] = frozenset()  # steps of checkpoints that the story itself damaged
    keys: dict[str, Any] = field(default_factory=dict)  # of all its starts

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.place.directory

    @property
    def steps(self) -> list[int]:
        """Of the complete checkpoints, ascending."""
        return [step_of(path) for path in complete_checkpoints(self.run / "checkpoints")]

    def start(self, what: str, **options: Any) -> Outcome:
        """One start, and the checks that follow each."""
        outcome = start(self.place, **{**self.keys, **options})
        self.said.append(f"{what}: exit {outcome.codes}")
        found = checks.after_each(self.run, outcome, spoiled=self.spoiled, dropped=self.place.dropped)
        self.problems += [f"{what}: {problem}" for problem in found]
        return outcome

    def require(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(problem)

    def fails(self, outcome: Outcome, *words: str) -> None:
        """It must have failed with one message that has these words."""
        last = outcome.err.strip().splitlines()[-1:] or [""]
        began = (self.run / "metrics.jsonl").exists()  # before, an error may be one of the configuration
        self.require(set(outcome.codes) <= ({1} if began else {1, 2}), f"exit codes {outcome.codes}")
        for word in words:
            self.require(word in outcome.err, f"{word!r} is not in the message: {last[0]!r}")

    def point(self, group: str, *, share: float = 1.0) -> tuple[int, dict[str, Any]]:
        """(rank, spec) of any event of a group, in any rank that has some.

        share: of the events, from the first on; after its last ones a rank may have finished.
        """
        rank = self.rng.choice([rank for rank, counts in enumerate(self.counts) if counts.get(group)])
        return rank, {"group": group, "at": self.rng.randrange(int(share * self.counts[rank][group]))}


def killed(story: Story, *, group: str, surely: bool = True) -> None:
    """SIGKILL of a rank at an event; the others must end by themselves.

    surely: that event comes; a start that resumes may have fewer.
    """
    rank, spec = story.point(group)
    outcome = story.start(
        f"SIGKILL of rank {rank} at {group} {spec['at']}", specs={rank: {"fault": "kill", **spec}}
    )
    story.require(outcome.codes[rank] == -9 or not surely, f"exit codes {outcome.codes}")
    if -9 in outcome.codes and story.steps[-1:] != [NUM_STEPS]:  # a rank may end when no other needs it
        story.require(0 not in outcome.codes, f"exit codes {outcome.codes}")


def killed_at_any_time(story: Story) -> None:
    """SIGKILL of all ranks, as when a machine fails, some time after a row was written."""
    row, wait = story.rng.randrange(NUM_STEPS), story.rng.random() * 0.05
    meddle = at_row(story, row, partial(kill_all, wait=wait))
    story.start(f"SIGKILL of all ranks {wait:.3f} s after row {row}", meddle=meddle)


def spiked(story: Story) -> None:
    """A batch has a high loss, and a rank is killed somewhere before, in or after the rewind."""
    killed(story, group=story.rng.choice(("call", "checkpoint", "file")))


def terminated(story: Story) -> None:
    """SIGTERM to any rank: a checkpoint, exit code 143, and no step is lost."""
    rank, spec = story.point("call")
    what = f"SIGTERM to rank {rank} at call {spec['at']}"
    outcome = story.start(what, specs={rank: {"fault": "terminate", **spec}})
    if outcome.done:  # in its last step
        return
    story.require(set(outcome.codes) == {143}, f"exit codes {outcome.codes} after SIGTERM")
    rows = [row["step"] for row in read_metrics(story.run / "metrics.jsonl")]
    story.require(story.steps[-1] >= rows[-1], f"checkpoint {story.steps[-1:]}, newest row {rows[-1]}")
    story.require(events.read(story.run)[-1]["kind"] == "stopped", "the last event is not stopped")


def disk_full(story: Story) -> None:
    """The run directory is on a disk that fills up; then somebody frees space."""
    story.run.mkdir(parents=True)
    kilobytes = story.rng.randrange(200, 4000)
    mount("tmpfs", str(story.run), "tmpfs", 0, f"size={kilobytes}k,mode=755")
    outcome = story.start(f"disk of {kilobytes} kB")
    if not outcome.done:
        story.fails(outcome, "space")
    mount("tmpfs", str(story.run), "tmpfs", MS_REMOUNT, "size=64m")


def file_limit(story: Story) -> None:
    """No file may grow beyond a limit, as under a quota."""
    kilobytes = story.rng.randrange(20, 1400)
    spec = {"fault": "file size", "group": "start", "at": 0, "bytes": kilobytes << 10}
    specs = dict.fromkeys(range(story.place.num_ranks), spec)
    outcome = story.start(f"files of at most {kilobytes} kB", specs=specs)
    if not outcome.done:
        story.fails(outcome)


def read_only(story: Story) -> None:
    """The checkpoints' folder cannot be written any more."""
    rank, spec = story.point("call")
    outcome = story.start(f"read-only at call {spec['at']}", specs={rank: {"fault": "read-only", **spec}})
    if not outcome.done:
        story.fails(outcome, "Read-only", str(story.run))
    unmount(story.run / "checkpoints")


def flipped_checkpoint(story: Story) -> None:
    """A bit of a file of the newest checkpoint is another one: the checkpoint before is used."""
    story.start("SIGKILL after two checkpoints", meddle=at_row(story, 5, kill_all))
    if len(story.steps) < 2:
        return
    newest = complete_checkpoints(story.run / "checkpoints")[-1]
    story.spoiled = frozenset({story.steps[-1]})
    file = story.rng.choice(sorted(newest.iterdir()))
    flip(file, story.rng)
    outcome = story.start(f"a bit of {newest.name}/{file.name} flipped")
    story.require(outcome.done and str(newest) in outcome.err, f"damage of {file} is not named")
    kinds = [event["kind"] for event in events.read(story.run)]
    story.require("checkpoint_damaged" in kinds, "no event checkpoint_damaged")


def flipped_data(story: Story) -> None:
    """A bit of a data shard is another one: it is named, and built again from the corpus."""
    story.start("SIGKILL", meddle=at_row(story, 3, kill_all))
    copy = story.place.folder / "data-copy" / story.place.name
    shutil.copytree(story.place.folder / "data", copy)
    file = story.rng.choice(sorted(copy.rglob("*.bin")))
    flip(file, story.rng)
    outcome = story.start(f"a bit of {file.name} flipped", data__directory=copy)
    story.require(outcome.done and file.name in outcome.err, f"damage of {file} is not named")
    shutil.rmtree(copy)


def not_finite(story: Story) -> None:
    """From some step on each gradient of a rank is NaN: the run fails, and no good checkpoint is replaced."""
    rank, spec = story.point("call")
    outcome = story.start(f"NaN from call {spec['at']} on", specs={rank: {"fault": "nan", **spec}})
    if not outcome.done:
        story.fails(outcome, "not finite", "optim.matrix.lr")
    else:  # the last step alone was skipped: what is done is done
        shutil.rmtree(story.run)


def directory_lost(story: Story) -> None:
    """Checkpoints are sent to a URL; the machine dies, its disk too: another one goes on from there."""
    url = story.place.folder / "far" / story.place.name
    story.keys = {"checkpoint__upload": f"file:{url}"}
    row = story.rng.randrange(NUM_STEPS)
    outcome = story.start(f"SIGKILL of all ranks after row {row}", meddle=at_row(story, row, kill_all))
    if outcome.done:  # the ranks were faster
        return
    shutil.rmtree(story.run)
    there = complete_checkpoints(url / story.place.name / "checkpoints")
    outcome = story.start("another machine")
    story.require(outcome.done, f"exit codes {outcome.codes}")
    newest = step_of(there[-1]) if there else 0
    story.require(not newest or f"fetching step {newest}" in outcome.err, f"not from step {newest}")
    steps = [step_of(path) for path in complete_checkpoints(url / story.place.name / "checkpoints")]
    story.require(steps == story.steps, f"checkpoints there: {steps}, here: {story.steps}")


def clock(story: Story) -> None:
    """The clock jumps, by up to a year."""
    rank, spec = story.point("call")
    seconds = story.rng.choice((-1, 1)) * story.rng.randrange(3600, 365 * 86400)
    outcome = story.start(
        f"clock {seconds:+d} s", specs={rank: {"fault": "clock", "seconds": seconds, **spec}}
    )
    story.require(outcome.done, f"exit codes {outcome.codes}")


def out_of_memory(story: Story) -> None:
    """An allocation fails: the message names the part and what to change."""
    rank, spec = story.point("call", share=0.9)
    outcome = story.start(f"out of memory at call {spec['at']}", specs={rank: {"fault": "memory", **spec}})
    story.fails(outcome, "out of memory", "batch.micro_sequences")


def killed_for_memory(story: Story) -> None:
    """The kernel kills a rank, because its container has no memory left: the message says so, and where."""
    rank, spec = story.point("call", share=0.9)
    group = CGROUPS / f"faults-{os.getpid()}-{story.place.name}"
    fault = {"fault": "cgroup", "cgroup": str(group), **spec}
    try:
        outcome = story.start(f"rank {rank} killed for memory at call {spec['at']}", specs={rank: fault})
    finally:
        with suppress(FileNotFoundError):  # the fault did not come to make it
            group.rmdir()
    story.require(outcome.codes[rank] == -9, f"exit codes {outcome.codes}")
    found = [event["text"] for event in events.read(story.run) if event["kind"] == "out_of_memory"]
    story.require(len(found) == 1, f"{len(found)} events out_of_memory")
    for words in (f"rank {rank} (", "killed by the kernel: out of memory", "batch.micro_sequences"):
        story.require(words in "".join(found) and words in outcome.err, f"{words!r} is not said")


def hung(story: Story, *, how: str, group: str = "call") -> None:
    """A rank makes no progress any more: it is named, the stacks are there, and the run fails."""
    rank, spec = story.point(group, share=0.9)
    specs = {rank: {"fault": how, **spec}}
    outcome = story.start(f"rank {rank}: {how} at {group} {spec['at']}", specs=specs, workers__hang_seconds=2)
    if outcome.done and group == "tensors":  # the last one, from which the other rank had all that it needs
        return
    story.fails(outcome, f"rank {rank}", "workers.hang_seconds")
    stacks = sorted(file.name for file in (story.run / "ranks").glob("*.stacks"))
    story.require(len(stacks) == story.place.num_ranks, f"stacks: {stacks}")
    story.require("hung" in [event["kind"] for event in events.read(story.run)], "no event hung")


def wandb_away(story: Story) -> None:
    """W&B does not answer, and a rank is killed beside."""
    key = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": CANARIES["WANDB_API_KEY"]}
    story.keys = {"environment": key, "record__wandb": "online"}
    killed(story, group="call")


def hang_at_defaults(story: Story) -> float:
    """Seconds until a stopped rank of a run with the default `workers.hang_seconds` has ended it."""
    stopped: list[float] = []

    def stop(pids: list[int]) -> None:
        os.kill(pids[-1], signal.SIGSTOP)
        stopped.append(time.monotonic())

    steps_only = {"checkpoint__every_steps": 1000, "evaluation__every_steps": 1000}  # others may take longer
    outcome = story.start("SIGSTOP of rank 1", meddle=at_row(story, 6, stop), **steps_only)
    story.fails(outcome, "workers.hang_seconds")
    return time.monotonic() - stopped[0]


# --- what happens to a run from outside


def at_row(story: Story, step: int, act: Callable[[list[int]], None]) -> Callable[[list[int]], None]:
    """Act once, when a row of this step is in the record."""
    metrics, acted = story.run / "metrics.jsonl", []

    def meddle(pids: list[int]) -> None:
        if not acted and pids and metrics.exists():
            rows = read_metrics(metrics)
            if rows and rows[-1]["step"] >= step:
                acted.append(step)
                act(pids)

    return meddle


def kill_all(pids: list[int], *, wait: float = 0.0) -> None:
    """SIGKILL of processes, after some seconds."""
    time.sleep(wait)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def flip(file: Path, rng: random.Random) -> None:
    """Another bit somewhere in a file; an empty one gets a byte."""
    content = bytearray(file.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def unmount(folder: Path) -> None:
    """Undo `mount`, if it happened."""
    while f" {folder} " in Path("/proc/self/mounts").read_text():
        subprocess.run(["umount", "-l", folder], check=True)


Kind = Callable[[Story], None]
AS_ROOT = (disk_full, read_only, killed_for_memory)
ROUND: list[tuple[str, Kind, int]] = [  # name, what happens, how often in a round
    ("SIGKILL in a step", partial(killed, group="call"), 6),
    ("SIGKILL in the exchange", partial(killed, group="exchange"), 4),
    ("SIGKILL around a checkpoint's files", partial(killed, group="checkpoint"), 6),
    ("SIGKILL in a checkpoint's shard", partial(killed, group="tensors"), 3),
    ("SIGKILL around any file", partial(killed, group="file"), 4),
    ("SIGKILL of all ranks", killed_at_any_time, 2),
    ("SIGTERM", terminated, 3),
    ("disk full", disk_full, 2),
    ("files limited", file_limit, 1),
    ("checkpoints read-only", read_only, 1),
    ("bit flipped in a checkpoint", flipped_checkpoint, 2),
    ("bit flipped in the data", flipped_data, 1),
    ("run directory lost", directory_lost, 1),
    ("gradients not finite", not_finite, 2),
    ("loss spike", spiked, 3),
    ("clock jump", clock, 1),
    ("out of memory", out_of_memory, 1),
    ("killed for memory", killed_for_memory, 1),
    ("hung worker", partial(hung, how="stand still"), 2),
    ("hung in a checkpoint's write", partial(hung, how="stand still", group="tensors"), 1),
    ("hung while the group forms", partial(hung, how="stop", group="group"), 1),
    ("stopped worker", partial(hung, how="stop"), 1),
    ("W&B unreachable", wandb_away, 1),
]
