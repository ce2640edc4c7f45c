"""`make test-faults`: real runs are broken in every way, resumed, and compared with undisturbed ones.

    python -m tests.faults [--runs N] [--first N] [--jobs N] [--kind WORDS] [--output FILE] [--no-output]
    python -m tests.faults --seed N          that one again, and its files stay

Seed N chooses everything about run N: its kind of fault, its setup, and the event at which it happens. What
must hold is in `tests/faults/checks.py`.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import RunError, UserError, run
from cluster.measure.benchmark import load_average, prepare_output
from cluster.record import provenance
from tests.commands import write_corpus
from tests.faults import checks
from tests.faults.arm import mount
from tests.faults.kinds import AS_ROOT, ROUND, Counts, Kind, Story, hang_at_defaults, killed, unmount
from tests.faults.ray_kinds import RAY_ROUND, SETUP
from tests.faults.runs import SETUPS, WENT_BACK, Place, forget, start

WHAT = "faults"
RUNS = 200
MOST_STARTS = 4  # after the faults, until the run has ended
RAY_EVERY = 40  # seeds, of which one is a run under Ray: it takes ten times as long
TWICE = 0.2  # share of the runs that are killed a second time while they resume
CLONE_NEWNS, MS_REC_PRIVATE = 0x20000, 0x44000


class Campaign:
    """Undisturbed runs, one of each setup, and the runs that are compared with them."""

    def __init__(self, folder: Path, *, as_root: bool) -> None:
        self._folder = folder
        write_corpus(folder)
        self._references: dict[str, Counts] = {}
        self._kinds = [
            (name, kind)
            for name, kind, times in ROUND
            for _ in range(times)
            if as_root or kind not in AS_ROOT
        ]

    def kind(self, seed: int) -> tuple[str, Kind]:
        """The kind of fault of a seed. Kinds come in turns, spread over a round."""
        if seed % RAY_EVERY == RAY_EVERY - 1:
            return RAY_ROUND[seed // RAY_EVERY % len(RAY_ROUND)]
        order = random.Random("round").sample(self._kinds, len(self._kinds))
        return order[seed % len(order)]

    def story(self, seed: int) -> tuple[str, Story]:
        """Break the run of this seed, resume it to its end, and compare it."""
        rng = random.Random(seed)
        name, happens = self.kind(seed)
        setups = [each for each in SETUPS if (each in WENT_BACK) == ("spike" in name)]
        if "exchange" in name:
            setups = [each for each in setups if SETUPS[each]["workers__count"] > 1]
        setup = SETUP if name.startswith("Ray") else rng.choice(setups)
        story = Story(Place(self._folder, f"seed-{seed}", setup), rng, self._counts(setup))
        happens(story)
        if rng.random() < TWICE and not (story.run / "summary.json").exists():
            killed(story, group=rng.choice(("call", "checkpoint", "file")), surely=False)
        for _ in range(MOST_STARTS):
            if story.start("resumed").done and (story.run / "summary.json").exists():
                story.problems += checks.at_the_end(
                    story.run, self._place(setup).directory, went_back=WENT_BACK.get(setup)
                )
                break
        else:
            story.problems.append("it did not come to its end")
        unmount(story.run)
        return name, story

    def hang(self) -> float:
        """`kinds.hang_at_defaults`. Raises `RunError`."""
        story = Story(Place(self._folder, "hang", "two"), random.Random(0), [])
        seconds = hang_at_defaults(story)
        if story.problems:
            raise RunError(f"a hang: {story.problems}")
        return seconds

    def _place(self, setup: str) -> Place:
        return Place(self._folder, f"undisturbed-{setup}", setup)

    def _counts(self, setup: str) -> Counts:
        if setup not in self._references:
            place, went_back = self._place(setup), WENT_BACK.get(setup)
            places = [self._folder / f"{setup}-{rank}.json" for rank in range(place.num_ranks)]
            specs = {rank: {"fault": "count", "to": str(file)} for rank, file in enumerate(places)}
            if went_back:  # what such a run must end with is the work of one that never meets these batches
                skipping = {"fault": "pass over", "group": "start", "at": 0, **went_back}
                self._undisturbed(place, place.directory, everywhere=skipping)
                place = Place(self._folder, f"{setup}-alone", setup)
            self._undisturbed(place, self._place(setup).directory, went_back=went_back, specs=specs)
            self._references[setup] = [files.read_json(file) for file in places]
        return self._references[setup]

    def _undisturbed(
        self, place: Place, reference: Path, *, went_back: dict[str, int] | None = None, **options: Any
    ) -> None:
        outcome = start(place, **options)
        problems = checks.after_each(place.directory, outcome, dropped=place.dropped)
        problems += checks.at_the_end(place.directory, reference, went_back=went_back)
        if problems or not outcome.done:
            raise RunError(f"the undisturbed run {place.directory}: {problems}\n{outcome.err}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"default: {RUNS}")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--seed", type=int, metavar="N", help="only this one, and keep its files")
    parser.add_argument(
        "--kind", default="", metavar="WORDS", help="only kinds with these words in their name"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"default: the baseline <hardware>_{WHAT}.json"
    )
    parser.add_argument("--no-output", action="store_true", help="write no file of results")
    options = parser.parse_args(arguments)
    seeds = range(options.first, options.first + options.runs)
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    keep = options.seed is not None
    output = None if keep or options.no_output else prepare_output(options.output, WHAT)
    return run(lambda: campaign(seeds, jobs=options.jobs, kind=options.kind, output=output, keep=keep))


def campaign(seeds: Sequence[int], *, jobs: int, kind: str, output: Path | None, keep: bool) -> None:
    """Run these seeds. Raises `RunError` if anything was wrong."""
    load, began = load_average(), time.monotonic()
    as_root = private_mounts()
    if not as_root:
        print("not root: no full disk, no read-only folder, no control group without memory")
    wrong: dict[int, list[str]] = {}
    kinds: Counter[str] = Counter()
    num_starts = 0
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    here = Campaign(folder, as_root=as_root)
    chosen = [seed for seed in seeds if kind in here.kind(seed)[0]]
    try:
        if not chosen:
            raise UserError("no run is chosen: --runs must be above 0, and --kind in the name of a kind")
        with multiprocessing.get_context("fork").Pool(jobs, _begin, (folder, as_root)) as pool:
            for told in pool.imap_unordered(partial(_tell, keep=keep), chosen):
                kinds[told.name] += 1
                num_starts += len(told.said)
                print(f"seed {told.seed:<5}{told.name:<38}{told.setup:<12}{'; '.join(told.said)}", flush=True)
                if told.problems:
                    wrong[told.seed] = told.problems
                    print("\n".join(f"    WRONG: {problem}" for problem in told.problems), flush=True)
            found = {"hang_found_seconds": round(pool.apply(_hang), 1)} if output else {}
    finally:
        if keep:
            print(f"the files: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    result: dict[str, Any] = {
        "bench": WHAT, "faulted_runs": sum(kinds.values()), "starts": num_starts, "wrong": len(wrong),
        "kinds": dict(kinds), "seeds": [chosen[0], chosen[-1]], "wrong_seeds": wrong, **found,
        "minutes": round((time.monotonic() - began) / 60, 1), "jobs": jobs, "load_average_before": load,
    }  # fmt: skip
    if output:
        about = provenance.collect(command=sys.argv, data_fingerprint=None)
        files.write_json(output, {**result, "provenance": about})
        print(f"written to {output}")
    print(json.dumps(result))
    if wrong:
        first = next(iter(wrong))
        raise RunError(f"{len(wrong)} of {sum(kinds.values())} runs went wrong; again: --seed {first}")


@dataclass(frozen=True)
class Told:
    """What came out of a story, for the process that prints."""

    seed: int
    name: str
    setup: str
    said: list[str]
    problems: list[str]


_campaign: Campaign  # of a process of the pool


def _begin(folder: Path, as_root: bool) -> None:
    global _campaign
    own = folder / str(os.getpid())
    own.mkdir()
    _campaign = Campaign(own, as_root=as_root)


def _tell(seed: int, *, keep: bool) -> Told:
    name, story = _campaign.story(seed)
    if not keep:
        forget(story.place)
    return Told(seed, name, story.place.setup, story.said, story.problems)


def _hang() -> float:
    return _campaign.hang()


def private_mounts() -> bool:
    """Mounts of this process are not seen by others, and end with it. False: only root can have that."""
    if os.geteuid() or ctypes.CDLL(None).unshare(CLONE_NEWNS):
        return False
    mount(None, "/", None, MS_REC_PRIVATE, None)
    return True
