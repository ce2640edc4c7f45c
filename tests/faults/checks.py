"""What must hold after every start of a run, and once it has been resumed to its end."""

import stat
from pathlib import Path
from typing import Any

from cluster import files
from cluster.record import events
from cluster.record.record import read_metrics
from cluster.runs import complete_checkpoints
from tests.faults.runs import KEEP, NUM_STEPS, Outcome
from tests.test_secrets import found_in, found_under
from training.run.checkpoint import Checkpoint, CheckpointError, step_of
from training.run.state import rewinds

PRIVATE = ("failure.log", "stacks")  # files whose name begins so are their owner's alone
TIMED = ("second", "mfu", "optimizer_")  # in the keys of what is no function of the run's configuration


def after_each(
    run: Path, outcome: Outcome, *, spoiled: frozenset[int] = frozenset(), dropped: range = range(0)
) -> list[str]:
    """What is wrong after a start, faulted or not.

    Args:
        spoiled: steps whose checkpoints somebody damaged.
        dropped: steps whose checkpoints the run itself deletes when it goes back.
    """
    problems = [f"left over: {each}" for each in outcome.leftovers]
    if outcome.late:
        problems.append("a rank did not end by itself")
    if "Traceback" in outcome.err:
        problems.append(f"a traceback: {outcome.err.strip().splitlines()[-1]}")
    problems += [
        f"canary {name} in what was printed" for name in found_in((outcome.out + outcome.err).encode())
    ]
    if not run.exists():
        return problems
    problems += [f"canaries {names} in {file}" for file, names in found_under(run).items()]
    problems += _modes(run) + _checkpoints(run, spoiled, dropped)
    finished = (run / "summary.json").exists()
    last = max(map(step_of, complete_checkpoints(run / "checkpoints")), default=0)
    if finished and last != NUM_STEPS:
        problems.append(f"there is a summary, and the newest checkpoint is of step {last}")
    if outcome.done != ("validation loss" in outcome.out) and "is complete at step" not in outcome.err:
        problems.append(f"exit codes {outcome.codes}, and the output ends with {outcome.out[-100:]!r}")
    if outcome.done and not finished:
        problems.append("it says that it is done, without a summary")
    return problems


def at_the_end(run: Path, reference: Path, *, went_back: dict[str, int] | None = None) -> list[str]:
    """What differs from the undisturbed run, once the run has ended.

    went_back: the one rewind that the run must have made, and that the record must name.
    """
    problems = []
    expected_rewinds = [went_back] if went_back else []
    told = [(event["step"], event["to_step"]) for event in events.read(run) if event["kind"] == "rewound"]
    if rewinds.read(run) != expected_rewinds or told != [tuple(each.values()) for each in expected_rewinds]:
        problems.append(f"rewinds: {rewinds.read(run)}, reported {told}, expected {expected_rewinds}")
    ours, theirs = (_newest_state(each) for each in (run, reference))
    if ours.get("files") != theirs["files"]:
        problems.append("the weights or the optimizer's state are not those of the undisturbed run")
    if (rows := _rows(run)) != (expected := _rows(reference)):
        where = next(
            (i for i, pair in enumerate(zip(rows, expected, strict=False)) if pair[0] != pair[1]), None
        )
        problems.append(
            f"metrics.jsonl: {len(rows)} rows instead of {len(expected)}, first difference {where}"
        )
    ends = [event["kind"] for event in events.read(run) if event["kind"] in (*events.STARTS, *events.ENDS)]
    expected_ends = [kind in events.STARTS for kind in ends]
    if expected_ends != [i % 2 == 0 for i in range(len(ends))] or ends[-1:] != ["finished"]:
        problems.append(f"events.jsonl: starts and ends do not alternate: {ends}")
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    if len(complete_checkpoints(run / "checkpoints")) != KEEP:
        problems.append(f"checkpoints: {folders}")
    stray = [
        str(file.relative_to(run)) for file in run.rglob("*") if file.name.endswith((".tmp", ".partial"))
    ]
    return problems + [f"left behind: {name}" for name in stray]


def _modes(run: Path) -> list[str]:
    problems = []
    for path in [run, *run.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if not path.is_symlink() and mode & 0o022:
            problems.append(f"{path.relative_to(run.parent)}: others may write it ({mode:o})")
        if path.is_file() and path.name.startswith(PRIVATE) and mode & 0o077:
            problems.append(f"{path.relative_to(run.parent)}: others may read it ({mode:o})")
    return problems


def _checkpoints(run: Path, spoiled: frozenset[int], dropped: range) -> list[str]:
    """Complete ones are readable, and the newest that was reported is there."""
    problems = []
    complete = complete_checkpoints(run / "checkpoints")
    for path in complete:
        try:
            if step_of(path) not in spoiled:
                Checkpoint(path).verify()
        except CheckpointError as error:
            problems.append(f"a COMPLETE checkpoint is unreadable: {error}")
    reported = [event["step"] for event in events.read(run) if event["kind"] == "checkpoint"]
    reported = [step for step in reported if step not in dropped]
    lost = max(reported, default=0) - max(map(step_of, complete), default=0)
    if lost > 0 and max(reported) not in spoiled:
        problems.append(f"the checkpoint of step {max(reported)} was reported, and is gone")
    return problems


def _newest_state(run: Path) -> dict[str, Any]:
    complete = complete_checkpoints(run / "checkpoints")
    return files.read_json(complete[-1] / "state.json") if complete else {}


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not any(part in k for part in TIMED)} for row in rows]
