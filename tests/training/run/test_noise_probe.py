"""Noise measured in a run: against gradients taken by hand, and without a trace in the run."""

import pytest
import torch

from cluster.config import load
from cluster.record.record import read_metrics
from optim import noise
from optim.geometry import parse_norm
from tests.commands import python, tiny, write_corpus
from tests.ranks import spawn
from training.config import TrainConfig
from training.model.llama import Llama, initialize
from training.plan import resolve_shape
from training.run.context import Context
from training.run.engine import build_deepspeed_engine, zero_init
from training.run.noise_probe import measure_noise

pytestmark = pytest.mark.stack

KEYS = (
    *("model.num_layers=1", "model.hidden_size=32", "model.ffn_size=64", "model.num_heads=2"),
    *("model.num_kv_heads=1", "model.vocab_size=64", "precision=fp32", "optim.matrix.dtype=fp32"),
)
NUM_STEPS, SAMPLES = 3, 4


def tokens(step: int, index: int, rank: int) -> torch.Tensor:
    seed = 100 * step + 10 * index + rank
    return torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(seed))


def run(context: Context, stage: int, probed: bool) -> dict:
    """A few steps, with a measurement between any two or without; the last measurement and the weights."""
    config = load(TrainConfig, dotlist=[*KEYS, f"zero.stage={stage}"])
    with zero_init(config):
        model = Llama(resolve_shape(config), activation_checkpointing=False)
    initialize(model, seed=5)
    engine, optimizer, members = build_deepspeed_engine(model, config, micro_batch=2, accumulation=2)
    found = {}
    for step in range(NUM_STEPS):
        batches = [(t[:, :-1], t[:, 1:]) for t in (tokens(step, i, context.rank) for i in range(SAMPLES))]
        if probed:
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            norm = parse_norm("frobenius")
            found = measure_noise(engine.module, members, batches, norm=norm, context=context)
            found["weights"], found["batches"] = before, context.gather(batches)
        for micro in range(2):
            engine.backward(engine(*batches[micro]))
            engine.step()
    shards = {(name, start): tensors["master"].clone() for name, start, tensors in optimizer.shards()}
    return {"found": found, "shards": shards}


def runs(context: Context, stages: tuple[int, ...]) -> list[list[dict]]:
    return [[run(context, stage, probed) for probed in (True, False)] for stage in stages]


@pytest.fixture(scope="module", params=[1, 2], ids=lambda world: f"{world} ranks")
def results(request) -> list[list[list[dict]]]:
    """Per rank, per stage 0 to 2: the run with measurements and the one without."""
    return spawn(runs, (0, 1, 2), world_size=request.param)


def test_a_run_is_the_same_bit_for_bit_with_and_without(results):
    for stages in results:
        for probed, plain in stages:
            assert probed["shards"].keys() == plain["shards"].keys()
            for key, shard in probed["shards"].items():
                assert torch.equal(shard, plain["shards"][key]), key


def test_what_is_measured_is_the_noise_of_each_ranks_own_gradients(results):
    for stage in range(3):
        found = results[0][stage][0]["found"]
        assert all(rank[stage][0]["found"]["noise"] == found["noise"] for rank in results)
        config = load(TrainConfig, dotlist=KEYS)
        model = Llama(resolve_shape(config), activation_checkpointing=False)
        model.load_state_dict(found["weights"], strict=False)  # the head is the embedding
        assert len(found["noise"]) == 7
        for number, (name, measured) in enumerate(found["noise"].items()):
            gradients = []
            for inputs, targets in found["batches"][number % len(results)]:
                model.zero_grad()
                model(inputs, targets).backward()
                gradients.append(dict(model.named_parameters())[name].grad.clone())
            expected = noise.measure(gradients, norm=parse_norm("frobenius"))
            assert measured == pytest.approx(expected, rel=1e-4), name
            pairs = [(gradients[i] - gradients[i + 1]) / 2**0.5 for i in range(0, SAMPLES, 2)]
            by_hand = sum(pair.norm().item() for pair in pairs) / len(pairs)
            assert measured["noise_primal"] == pytest.approx(by_hand, rel=1e-4)


def test_a_run_logs_it(tmp_path):
    """Through the whole command: the row holds every hidden matrix and the medians."""
    write_corpus(tmp_path)
    keys = tiny(tmp_path, run__name="noisy", optim__noise__measure_every_steps=4)
    done = python("training.launch", *keys)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "outputs" / "noisy" / "metrics.jsonl")
    measured = [row for row in rows if "noise" in row]
    assert [row["step"] for row in measured] == [4, 8]
    for row in measured:
        assert len(row["noise"]) == 2 * 7
        assert 0 < row["noise_tail_index_median"] < 50
        assert row["noise_to_signal_dual_median"] > 0
