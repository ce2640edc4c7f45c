"""`make test-faults`: real runs are broken in every way, resumed, and compared with undisturbed ones.

    python -m tests.faults [--runs N] [--first N] [--kind WORDS] [--output FILE] [--no-output]
    python -m tests.faults --seed N          that one again, and its files stay

Seed N chooses everything about run N: its kind of fault, its setup, and the event at which it happens. What
must hold is in `tests/faults/checks.py`.
"""

import argparse
import ctypes
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster import files
from cluster.cli import RunError, run
from cluster.measure.benchmark import load_average, prepare_output
from cluster.record import provenance
from tests.commands import write_corpus
from tests.faults import checks
from tests.faults.arm import mount
from tests.faults.kinds import AS_ROOT, ROUND, Counts, Kind, Story, hang_at_defaults, killed, unmount
from tests.faults.ray_kinds import RAY_ROUND, SETUP
from tests.faults.runs import SETUPS, Place, forget, start

WHAT = "faults"
RUNS = 240
MOST_STARTS = 4  # after the faults, until the run has ended
RAY_EVERY = 30  # seeds, of which one is a run under Ray: it takes ten times as long
TWICE = 0.2  # share of the runs that are killed a second time while they resume
CLONE_NEWNS, MS_REC_PRIVATE = 0x20000, 0x44000


class Campaign:
    """Undisturbed runs, one of each setup, and the runs that are compared with them."""

    def __init__(self, folder: Path, *, as_root: bool) -> None:
        self._folder = folder
        self._references: dict[str, Counts] = {}
        self._kinds = [
            (name, kind)
            for name, kind, times in ROUND
            for _ in range(times)
            if as_root or kind not in AS_ROOT
        ]
        write_corpus(folder)

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
        setups = [each for each in SETUPS if "exchange" not in name or SETUPS[each]["workers__count"] > 1]
        setup = SETUP if name.startswith("Ray") else rng.choice(setups)
        story = Story(Place(self._folder, f"seed-{seed}", setup), rng, self._counts(setup))
        happens(story)
        if rng.random() < TWICE and not (story.run / "summary.json").exists():
            killed(story, group=rng.choice(("call", "checkpoint", "file")), surely=False)
        for _ in range(MOST_STARTS):
            if story.start("resumed").done and (story.run / "summary.json").exists():
                story.problems += checks.at_the_end(story.run, self._place(setup).directory)
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
            place = self._place(setup)
            places = [self._folder / f"{setup}-{rank}.json" for rank in range(place.num_ranks)]
            specs = {rank: {"fault": "count", "to": str(file)} for rank, file in enumerate(places)}
            outcome = start(place, specs=specs)
            problems = checks.after_each(place.directory, outcome) + checks.at_the_end(*2 * [place.directory])
            if problems or not outcome.done:
                raise RunError(f"the undisturbed run {place.directory}: {problems}\n{outcome.err}")
            self._references[setup] = [files.read_json(file) for file in places]
        return self._references[setup]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"default: {RUNS}")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first seed (default: 0)")
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
    keep = options.seed is not None or options.no_output
    output = None if keep else prepare_output(options.output, WHAT)
    return run(lambda: campaign(seeds, kind=options.kind, output=output, keep=options.seed is not None))


def campaign(seeds: Sequence[int], *, kind: str, output: Path | None, keep: bool) -> None:
    """Run these seeds. Raises `RunError` if anything was wrong."""
    load, began = load_average(), time.monotonic()
    as_root = private_mounts()
    if not as_root:
        print("not root: no full disk and no read-only folder")
    wrong: dict[int, list[str]] = {}
    kinds: Counter[str] = Counter()
    num_starts = 0
    with ExitStack() as stack:
        name = (
            tempfile.mkdtemp(prefix="faults-") if keep else stack.enter_context(tempfile.TemporaryDirectory())
        )
        here = Campaign(Path(name), as_root=as_root)
        for seed in seeds:
            if kind not in here.kind(seed)[0]:
                continue
            name, story = here.story(seed)
            kinds[name] += 1
            num_starts += len(story.said)
            print(f"seed {seed:<5}{name:<38}{story.place.setup:<8}{'; '.join(story.said)}", flush=True)
            if story.problems:
                wrong[seed] = story.problems
                print("\n".join(f"    WRONG: {problem}" for problem in story.problems), flush=True)
            if keep:
                print(f"its files: {story.run}, and {story.place.folder / 'logs' / story.place.name}")
            else:
                forget(story.place)
        found = {"hang_found_seconds": round(here.hang(), 1)} if output else {}
    result: dict[str, Any] = {
        "bench": WHAT, "faulted_runs": sum(kinds.values()), "starts": num_starts, "wrong": len(wrong),
        "kinds": dict(kinds), "seeds": [seeds[0], seeds[-1]], "wrong_seeds": wrong,
        **found,
        "minutes": round((time.monotonic() - began) / 60, 1), "load_average_before": load,
    }  # fmt: skip
    if output:
        about = provenance.collect(command=sys.argv, data_fingerprint=None)
        files.write_json(output, {**result, "provenance": about})
        print(f"written to {output}")
    print(json.dumps(result))
    if wrong:
        raise RunError(
            f"{len(wrong)} of {sum(kinds.values())} runs went wrong; again: --seed {next(iter(wrong))}"
        )


def private_mounts() -> bool:
    """Mounts of this process are not seen by others, and end with it. False: only root can have that."""
    if os.geteuid() or ctypes.CDLL(None).unshare(CLONE_NEWNS):
        return False
    mount(None, "/", None, MS_REC_PRIVATE, None)
    return True
