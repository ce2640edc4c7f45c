"""Which batch each step is given."""

import torch

from tests.training.data.test_dataset import write_folder
from training.config import load
from training.plan import make_plan
from training.run.batches import Batches
from training.run.context import Context
from training.run.start import Start


def test_the_two_gradients_of_mars_are_of_one_batch_and_count_once(tmp_path):
    """A gradient that is skipped has lost its pair: the next batch begins another."""
    write_folder(tmp_path, shard_tokens=(400,))
    sizes = ["batch.tokens=16", "batch.sequence_length=8", "batch.micro_sequences=2", "workers.count=1"]
    batches = []
    for rule in ("muon", "mars"):
        config = load(dotlist=[*sizes, "schedule.tokens=160", f"optim.matrix.rule={rule}"])
        start = Start.of(config, make_plan(config), tmp_path)
        context = Context(0, 1, torch.device("cpu"), "torch")
        batches.append(Batches(start, context, passed_over=lambda step: 0))
    muon, mars = batches

    def same(of_mars: tuple[int, int], of_muon: int) -> bool:
        (step, skipped), expected = of_mars, muon.micro_batch(of_muon, 0)[0]
        return torch.equal(mars.micro_batch(step, 0, skipped=skipped)[0], expected)

    assert all(same((step, 0), step // 2) for step in range(8))
    assert not same((1, 0), 1)
    assert all(same((step, 1), (step + 1) // 2) for step in range(3, 9))
    assert torch.equal(muon.micro_batch(3, 0, skipped=2)[0], muon.micro_batch(3, 0)[0])
