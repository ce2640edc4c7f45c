"""A run that goes back to before a loss spike and skips the batches since, killed or not."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import files
from cluster.heart.hang import Heartbeat
from cluster.record import events
from cluster.record.record import read_metrics
from cluster.runs import complete_checkpoints
from tests.commands import tiny, write_corpus
from tests.ranks import spawn
from training import config as training_config
from training.data.prepare import prepare
from training.plan import make_plan
from training.run.checkpoint import Checkpoint
from training.run.context import Context
from training.run.loop import Trainer, train
from training.run.spent import Startup
from training.run.start import Start, newest_of
from training.run.state import rewinds

pytestmark = pytest.mark.stack

NUM_STEPS = 36
BAD_BATCHES = (26, 33)  # which give a high loss
KEYS = {
    "workers__count": 2,
    "schedule__tokens": 512 * NUM_STEPS,
    "checkpoint__every_steps": 4,
    "checkpoint__max_rewinds": 1,
    "evaluation__every_steps": 100,
    "evaluation__sample_tokens": 0,
}


class Interrupted(Exception):
    """The end of a process."""


def poisoned(take_step: Callable[..., Any], *, steps: int) -> Callable[..., Any]:
    """`Trainer.take_step`, whose loss is high after a bad batch, and which raises after so many steps."""
    left = [steps]

    def take(trainer: Trainer, **options: Any) -> Any:
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        batch = trainer.step + trainer.rewinds.passed_over(trainer.step)
        return take_step(trainer, **options) + 30.0 * (batch in BAD_BATCHES)

    return take


def both(context: Context, folder: Path, data: Path) -> None:
    """A run without and one with interruptions: before and after the spike, and among the steps after."""
    take_step = Trainer.take_step
    for name, starts in (("whole", [100]), ("broken", [14, 13, 3, 100])):
        config = training_config.load(dotlist=tiny(folder, run__name=name, **KEYS))
        config.run_directory.mkdir(parents=True, exist_ok=True)
        for steps in starts:
            newest = context.gather(newest_of(config, report=print))[0]
            start = Start.of(config, make_plan(config), data, checkpoint=newest)
            Trainer.take_step = poisoned(take_step, steps=steps)  # type: ignore[method-assign]
            with suppress(Interrupted), Heartbeat(config.run_directory, rank=context.rank) as heart:
                train(
                    start, command=[], context=context, heart=heart, observe=lambda row: None,
                    asked_to_stop=lambda: False, startup=Startup(),
                )  # fmt: skip
            context.gather(None)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewinds")
    write_corpus(folder)
    data = prepare(training_config.load(dotlist=tiny(folder)).data, report=lambda _: None).absolute()
    spawn(both, folder, data, world_size=2)
    return folder / "outputs"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def test_the_batches_of_the_spike_are_skipped_and_the_record_has_every_step_once(outputs: Path) -> None:
    found = losses(outputs / "whole")
    assert [step for step, _ in found] == list(range(1, NUM_STEPS + 1))
    # The spike of batch 26, in step 27, is gone. That of batch 33 comes in step 31, after the one rewind.
    assert [step for step, loss in found if loss > 20] == [31]
    assert rewinds.read(outputs / "whole") == [{"from_step": 27, "to_step": 24}]
    told = [event for event in events.read(outputs / "whole") if "rewound" in event["kind"]]
    assert [(event["kind"], event["step"]) for event in told] == [("rewound", 27), ("not_rewound", 31)]
    assert "back to step-0000024" in told[0]["text"] and "steps 25 to 27 are skipped" in told[0]["text"]
    assert "checkpoint.max_rewinds allows" in told[1]["text"]
    assert files.read_json(outputs / "whole/provenance.json")["rewinds"] == rewinds.read(outputs / "whole")
    for path in complete_checkpoints(outputs / "whole/checkpoints"):
        Checkpoint(path).verify()
        assert Checkpoint(path).state["rewinds"] == rewinds.read(outputs / "whole")


def test_a_run_that_is_interrupted_around_its_rewind_has_the_same_losses(outputs: Path) -> None:
    assert losses(outputs / "broken") == losses(outputs / "whole")
    assert rewinds.read(outputs / "broken") == rewinds.read(outputs / "whole")
    resumed = [event["step"] for event in events.read(outputs / "broken") if event["kind"] == "restarted"]
    assert resumed == [12, 24, 24]


class OneRank(Context):
    def gather(self, value: Any) -> list[Any]:
        return [value]


def alone_in(folder: Path, saved: Any = None) -> tuple[Path, rewinds.Rewinds]:
    """The directory of a run of one rank, and its rewinds."""
    config = training_config.load(dotlist=tiny(folder, checkpoint__max_rewinds=2))
    config.run_directory.mkdir(parents=True, exist_ok=True)
    context = OneRank(0, 1, None, "none")  # type: ignore[arg-type]
    return config.run_directory, rewinds.Rewinds(config, context, saved)


def test_a_rewind_whose_event_a_kill_left_out_is_reported_once(tmp_path: Path) -> None:
    directory, _ = alone_in(tmp_path)
    files.write_json(directory / rewinds.FILE, [{"from_step": 27, "to_step": 24}])
    for _ in range(2):
        alone_in(tmp_path, SimpleNamespace(state={}))
    [event] = events.read(directory)
    assert (event["kind"], event["step"], event["to_step"]) == ("rewound", 27, 24)


def test_without_a_checkpoint_before_the_spike_the_run_goes_on(tmp_path: Path) -> None:
    directory, alone = alone_in(tmp_path)
    assert alone.wanted(True) and not alone.wanted(False)
    assert alone.go_back(25) is None and alone.passed_over(30) == 0
    [event] = events.read(directory)
    assert event["kind"] == "not_rewound" and "no sound checkpoint from before step 25" in event["text"]


@pytest.mark.parametrize("content", ["{", "[1]", "null", '[{"a": 1}]', '[{"from_step": "27", "to_step": 4}]'])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / rewinds.FILE).write_text(content)
    with pytest.raises(files.DamagedFile, match=r"rewinds.json: .*; delete it: the checkpoints name"):
        rewinds.read(tmp_path)
