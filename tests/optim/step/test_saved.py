"""Checkpoints of the optimizer across world sizes and ZeRO stages."""

from pathlib import Path

import pytest
import torch

from tests.optim.step.zero_cases import LARGER, STAGES, ZeroCase, assemble, batches, build, copied_shards
from tests.ranks import spawn
from training.run.checkpoint import Checkpoint
from training.run.context import Context
from training.run.state import writer

pytestmark = pytest.mark.stack


def write_checkpoints(context: Context, root: Path, cases: list[ZeroCase]) -> None:
    for index, case in enumerate(cases):
        engine, optimizer, _ = build(case)
        tokens, targets = batches(case, context.world_size)
        for step in range(2):
            engine.backward(engine(tokens[step, 0, context.rank], targets[step, 0, context.rank]))
            engine.step()
        state = {"applied_steps": optimizer.applied_steps}
        writer.save(root / f"step-{index}", shards=optimizer.shards(), state=state, context=context)


def read_checkpoints(context: Context, root: Path, sources: int, cases: list[ZeroCase]) -> list[dict]:
    results = []
    for source in range(sources):
        saved = Checkpoint(root / f"step-{source}")
        for case in (case for case in cases if case.rule == WRITERS[source].rule):
            engine, optimizer, members = build(case)
            optimizer.load_shards(saved.read, applied_steps=saved.state["applied_steps"])
            weights_match = True
            for member in members if case.stage < 3 else []:
                shown = "point" if case.rule == "transported_scion" else "master"
                master = saved.read(member.name, shown, 0, member.parameter.numel())
                rounded = master.to(member.parameter.dtype).view_as(member.parameter)
                weights_match &= torch.equal(member.parameter.detach(), rounded)
            result = {
                "source": source,
                "case": case,
                "applied": optimizer.applied_steps,
                "weights_match": weights_match,
                "shards": copied_shards(optimizer),
            }
            tokens, targets = batches(case, 1)
            with torch.no_grad():
                result["loss"] = engine(tokens[0, 0, 0], targets[0, 0, 0]).item()
            results.append(result)
    return results


WRITERS = [
    ZeroCase(1, precision="bf16"),
    ZeroCase(1, precision="bf16", rule="transported_scion"),
    ZeroCase(2, precision="bf16", rule="normuon", matrix=LARGER),
    ZeroCase(3, precision="bf16"),
    ZeroCase(1),
]
READERS = [
    *(ZeroCase(*stage, precision="bf16") for stage in STAGES),
    ZeroCase(2, precision="bf16", offload=True),
    *(ZeroCase(stage, precision="bf16", rule="transported_scion") for stage in (0, 2, 3)),
    *(ZeroCase(stage, precision="bf16", rule="normuon", matrix=LARGER) for stage in (0, 3)),
]
RESUMED = {1: len(WRITERS), 3: len(WRITERS), 4: 3}  # ranks -> how many of the writers' checkpoints they read


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Checkpoints of 2 ranks, two steps into a run, one for each writer."""
    root = tmp_path_factory.mktemp("checkpoints")
    spawn(write_checkpoints, root, WRITERS, world_size=2)
    return root


@pytest.mark.parametrize("world_size", RESUMED)
def test_any_world_size_and_stage_resumes_identical_masters_and_state(checkpoints, world_size) -> None:
    per_rank = spawn(read_checkpoints, checkpoints, RESUMED[world_size], READERS, world_size=world_size)
    losses: dict[int, list[float]] = {}
    for results in zip(*per_rank, strict=True):
        saved = Checkpoint(checkpoints / f"step-{results[0]['source']}")
        for name, tensors in assemble(results).items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, saved.read(name, key, 0, tensor.numel())), (name, key)
        for result in results:
            assert result["applied"] == 2 and result["weights_match"]
            losses.setdefault(result["source"], []).append(result["loss"])
    # The low-precision weights were refreshed too, under ZeRO-3's partitioning as well: one loss for all,
    # but for the rounding of biases, which zero.Init changes for the rest of its process.
    for values in losses.values():
        assert max(values) - min(values) < 1e-3, losses
