"""The record of a run: every line that is due, of the steps that it names, interrupted or not."""

import gzip
import itertools
import json
import math
import statistics
import time
from collections import Counter, defaultdict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cluster import config as layered
from cluster import files
from cluster.record.record import read_metrics
from cluster.runs import CONFIG_FILE
from tests.commands import tiny, write_corpus
from tests.ranks import spawn
from training import config as training_config
from training.config import TrainConfig
from training.data.dataset import TokenDataset, of_share, validation_batches
from training.data.prepare import prepare
from training.model.llama import Llama
from training.plan import make_plan
from training.run.checkpoint import Checkpoint
from training.run.context import Context
from training.run.loop import Trainer
from training.run.start import Start, newest_of
from training.run.state.output import Output, open_record

pytestmark = pytest.mark.stack

NUM_STEPS = 20
STEP_SECONDS = 0.06  # the least: the steps below sleep so long
EVERY = {  # no two fall together but at the end
    "record__every_steps": 4,
    "checkpoint__every_steps": 3,
    "evaluation__every_steps": 5,
    "optim__noise__measure_every_steps": 6,
    "optim__inspect_every_steps": 7,
}
PROFILED = [2, 14]  # steps of the interrupted run
TIMES = ("step_seconds", "tokens_per_second", "mfu")


class Interrupted(Exception):
    """The end of a run before its last step."""


def run(context: Context, config: TrainConfig, data: Path, *, stop_after: int = NUM_STEPS) -> None:
    """Start or resume a run, whose steps sleep, and end it after a step."""
    start = Start.of(config, make_plan(config), data, checkpoint=newest_of(config, report=print))
    trainer = Trainer(start, context)
    take_step = trainer.take_step

    def take(**options: Any) -> Any:
        if trainer.step == stop_after:
            raise Interrupted
        time.sleep(STEP_SECONDS)
        return take_step(**options)

    trainer.take_step = take  # type: ignore[method-assign]
    with open_record(start, []) if context.is_main else nullcontext() as record, suppress(Interrupted):
        summary = trainer.run(Output(record, lambda row: None))
        if record is not None:
            record.finish(summary)


def both(context: Context, folder: Path, data: Path, keys: dict[str, object]) -> tuple[Path, Path]:
    """The folders of a run without and of one with interruptions."""
    of = {
        name: training_config.load(
            dotlist=tiny(
                folder, run__name=f"{name}-{context.world_size}", record__profile_steps=profiled, **keys
            )
        )
        for name, profiled in (("whole", "[]"), ("broken", str(PROFILED)))
    }
    run(context, of["whole"], data)
    files.write_text(of["whole"].run_directory / CONFIG_FILE, layered.to_yaml(of["whole"]))
    for stop in (11, 13, NUM_STEPS):  # checkpoints at 9, after the line at 8, and at 12, with that line
        run(context, of["broken"], data, stop_after=stop)
    return of["whole"].run_directory, of["broken"].run_directory


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of the run without and of the one with interruptions, on two ranks."""
    folder = tmp_path_factory.mktemp("loop")
    corpus = write_corpus(folder)
    keys = {"workers__count": 2, "schedule__tokens": 512 * NUM_STEPS, **EVERY}
    keys |= {"batch__document_masks": "true", "evaluation__sequences": 40}
    keys["evaluation__frequency_deciles"] = "true"
    keys["data__sources"] = f'["most={corpus}@3","rest={corpus}@1"]'
    data = prepare(training_config.load(dotlist=tiny(folder, **keys)).data, report=lambda _: None).absolute()
    return spawn(both, folder, data, keys, world_size=2)[0]


@pytest.fixture(scope="module")
def runs(folders) -> list[tuple[list[dict], dict]]:
    """Their rows and summaries."""
    return [(read_metrics(f / "metrics.jsonl"), files.read_json(f / "summary.json")) for f in folders]


def steps_with(rows: list[dict], name: str) -> list[int]:
    return [row["step"] for row in rows if name in row]


def test_everything_comes_as_often_as_asked_whatever_else_is_due(runs):
    (rows, _), _ = runs
    assert steps_with(rows, "loss") == [4, 8, 12, 16, 20]
    assert steps_with(rows, "validation_loss") == [0, 5, 10, 15, 20]
    assert steps_with(rows, "noise") == [6, 12, 18]
    assert steps_with(rows, "optimizer_update_rms") == [7, 14]
    assert steps_with(rows, "optimizer_attention_logit_max") == [7, 14]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert all(row["tokens"] == 512 * row["step"] for row in rows)


def test_of_a_mixture_each_source_is_counted_and_evaluated(runs):
    (rows, summary), _ = runs
    for row in rows:
        if "loss" in row:
            assert row["source_tokens_most"] + row["source_tokens_rest"] == row["tokens"]
            assert row["source_tokens_most"] == pytest.approx(row["tokens"] * 3 / 4, abs=64)
            assert row["source_epochs_most"] > row["source_epochs_rest"] > 0
        if "validation_loss" in row:
            by_weight = 0.75 * row["validation_loss_most"] + 0.25 * row["validation_loss_rest"]
            assert row["validation_loss"] == pytest.approx(by_weight)
    assert summary["validation_loss_most"] > 0


@pytest.fixture(scope="module")
def last(folders) -> tuple[TrainConfig, Llama, dict[str, TokenDataset]]:
    """The configuration of the uninterrupted run, its model at the last checkpoint, and its data."""
    config = training_config.load(file=folders[0] / CONFIG_FILE)
    saved = Checkpoint(newest_of(config, report=print))
    shape = make_plan(config).shape
    model = Llama(shape).requires_grad_(False)
    weights = {
        name: saved.read(name, "master", 0, math.prod(size)).view(size)
        for name, size in shape.parameters().items()
    }
    model.load_state_dict(weights, strict=not shape.tied)
    data, length = prepare(config.data, report=lambda _: None), config.batch.sequence_length
    splits = ("train", "validation")
    return config, model, {x: TokenDataset.open(data, split=x, sequence_length=length) for x in splits}


def losses_by_document(model: Llama, tokens: torch.Tensor, *, end: int) -> torch.Tensor:
    """[32] of tokens [33], each document by itself."""
    ends = [place + 1 for place in range(31) if tokens[place] == end]
    pairs = itertools.pairwise([0, *ends, 32])
    logits = torch.cat([model(tokens[None, start:stop])[0] for start, stop in pairs])
    return F.cross_entropy(logits, tokens[1:], reduction="none")


def test_with_document_masks_a_held_out_token_is_predicted_from_its_own_document(last, runs):
    config, model, data = last
    held_out = data["validation"]
    size, share = config.evaluation.sequences, held_out.shares["most"]
    chosen = validation_batches(
        held_out, sequences=of_share(size, share), rank=0, world_size=1, micro_sequences=1,
        within=held_out.parts["most"],
    )  # fmt: skip
    alone, crossing = [], []
    for sample, _ in chosen:
        tokens, end = torch.from_numpy(sample[0]), held_out.manifest.end_of_text_id
        alone.append(losses_by_document(model, tokens, end=end).mean().item())
        crossing.append(F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:]).item())
    recorded = runs[0][1]["validation_loss_most"]
    error = abs(statistics.fmean(alone) - recorded)
    assert error < 0.01 and abs(statistics.fmean(crossing) - recorded) > 3 * error


def test_the_loss_of_each_decile_of_the_training_text(last, runs):
    """By hand, from whole samples; the rarest tokens have the highest loss."""
    config, model, data = last
    training, held_out = data["train"], data["validation"]
    text = training.samples(range(training.num_samples))[:, 1:].ravel()
    decile, seen = {}, 0
    for token, count in sorted(Counter(text.tolist()).items(), key=lambda pair: (-pair[1], pair[0])):
        decile[token] = int(10 * (seen + count / 2) / len(text))
        seen += count
    losses, alone = defaultdict(list), {"rank": 0, "world_size": 1, "micro_sequences": 1}
    for source, share in held_out.shares.items():
        chosen = {"sequences": round(config.evaluation.sequences * share), "within": held_out.parts[source]}
        for sample, _ in validation_batches(held_out, **chosen, **alone):
            tokens = torch.from_numpy(sample[0])
            each = losses_by_document(model, tokens, end=held_out.manifest.end_of_text_id)
            for token, loss in zip(tokens[1:].tolist(), each.tolist(), strict=True):
                losses[decile.get(token, 9) + 1].append(loss)
    recorded = runs[0][1]
    for number, expected in losses.items():
        assert recorded[f"validation_loss_decile_{number}"] == pytest.approx(
            statistics.fmean(expected), abs=0.02
        )
    assert len(losses) > 5 and statistics.fmean(losses[10]) > statistics.fmean(losses[min(losses)])


def test_an_interrupted_run_records_line_for_line_what_an_uninterrupted_one_does(runs):
    (whole, _), (broken, _) = runs

    def timeless(row: dict) -> dict:
        return {key: value for key, value in row.items() if key not in TIMES and not key.endswith("seconds")}

    assert [timeless(row) for row in broken] == [timeless(row) for row in whole]


def test_named_steps_leave_a_trace_of_each_rank_and_change_nothing(folders, runs):
    """That they change nothing is what the test above compares."""
    whole, broken = folders
    traces = sorted((broken / "profiles").iterdir())
    assert [file.name for file in traces] == [
        f"step-{step:07d}-rank{rank}.json.gz" for step in PROFILED for rank in (0, 1)
    ]
    assert not (whole / "profiles").exists()
    trace = json.loads(gzip.decompress(traces[0].read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_the_time_of_a_step_is_that_of_the_steps_it_is_divided_by(runs):
    """Checkpoints, evaluations and measurements come between the steps of every line here."""
    for rows, summary in runs:
        times = [row["step_seconds"] for row in rows if "loss" in row]
        assert len(times) == 5 and min(times) >= STEP_SECONDS
        assert summary["median_step_seconds"] >= STEP_SECONDS
        assert summary["tokens_per_second"] == pytest.approx(512 / summary["median_step_seconds"])
        assert summary["wall_seconds"] >= NUM_STEPS * STEP_SECONDS  # of all starts, as `tokens` is
        assert summary["noise_seconds"] > 0
