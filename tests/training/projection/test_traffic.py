"""training/projection/traffic.py against the bytes that real ranks hand to collectives under DeepSpeed."""

from dataclasses import replace
from typing import Any

import pytest

from training import config as training_config
from training.plan import make_plan
from training.projection.traffic import Job, by_name, job_of, sent_bytes

# Matrices above PERSISTENT, so that stage 3 gathers them; an odd number of layers, so that stage 1 cuts one.
KEYS = (
    "model.shape=llama-60m",
    "model.num_layers=3",
    "model.hidden_size=320",
    "model.ffn_size=448",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.vocab_size=512",
    "batch.tokens=64",
    "batch.sequence_length=16",
    "batch.micro_sequences=1",
)
RANKS = 2
SMALL_BYTES = 1024  # norms, flags and the squares of the matrices' norms
CASES = {  # name -> (keys, stage 3's reuse distance in elements or None for its default)
    "stage 1": (("zero.stage=1",), None),
    "stage 1, fp32": (("zero.stage=1", "precision=fp32"), None),
    "stage 2": (("zero.stage=2",), None),
    "stage 3": (("zero.stage=3",), None),
    "stage 3, released": (("zero.stage=3", "zero.bucket_elements=1000"), 1_300_000),
    "stage 3, recomputed": (
        ("zero.stage=3", "zero.bucket_elements=1000", "model.activation_checkpointing=true"),
        1_300_000,
    ),
    "stage 3, prefetched": (("zero.stage=3", "zero.bucket_elements=200000"), 1_300_000),
    "stage 1, by name": (
        ("zero.stage=1", "optim.by_name=['*.mlp.*: rule=normuon','*.o_proj.*: rule=adamw']"),
        None,
    ),
    "stage 1, AdamW": (("zero.stage=1", "optim.matrix.rule=adamw"), None),
    # over two blocks of a table, and some more
    "stage 1, Scion": (("zero.stage=1", "optim.matrix.rule=scion", "model.vocab_size=1100"), None),
    "stage 3, Scion": (
        (
            *("zero.stage=3", "optim.matrix.rule=transported_scion", "model.vocab_size=1100"),
            "optim.scion.norms=['*embed*=row','*=spectral']",
        ),
        None,
    ),
}


def count(context: Any) -> dict[str, float]:
    """Case -> bytes that this rank sends in its fourth step; stage 3 knows its modules' order by then."""
    from optim.bench.traffic import Traffic

    traffic = Traffic()
    return {name: _count_one(traffic, keys, distance) for name, (keys, distance) in CASES.items()}


def _count_one(traffic: Any, keys: tuple[str, ...], distance: int | None) -> float:
    import torch

    from training.model.llama import Llama, initialize
    from training.run import engine as engines

    config = training_config.load(dotlist=[*KEYS, *keys])
    plan = make_plan(config, num_workers=RANKS)
    model = Llama(plan.shape, activation_checkpointing=config.model.recomputed_every)
    initialize(model, seed=1)
    made = engines.deepspeed_config

    def with_distance(*arguments: Any, **options: Any) -> dict[str, Any]:
        given = made(*arguments, **options)
        given["zero_optimization"] |= {"stage3_max_reuse_distance": distance} if distance else {}
        return given

    engines.deepspeed_config = with_distance
    try:
        engine, optimizer, _ = engines.build_deepspeed_engine(
            model, config, micro_batch=1, accumulation=plan.accumulation
        )
    finally:
        engines.deepspeed_config = made
    optimizer.set_factors(lr=1.0)
    tokens = torch.zeros(1, 16, dtype=torch.long)

    def step() -> None:
        for _ in range(plan.accumulation):
            engine.backward(engine(tokens, tokens))
            engine.step()

    for _ in range(3):
        step()
    with traffic.counting():
        step()
    return traffic.sent_bytes


def job(keys: tuple[str, ...], distance: int | None) -> Job:
    config = training_config.load(dotlist=[*KEYS, *keys])
    plan = make_plan(config, num_workers=RANKS)
    counted = job_of(config, plan.shape, num_ranks=RANKS, accumulation=plan.accumulation)
    assert counted is not None
    return replace(counted, reuse_distance=distance) if distance else counted


@pytest.mark.stack
def test_a_rank_sends_what_the_projection_counts_in_every_stage() -> None:
    from tests.ranks import spawn

    measured = spawn(count, world_size=RANKS)
    jobs = {name: job(*case) for name, case in CASES.items()}
    for name, each in jobs.items():
        counted = sent_bytes(each)
        for rank in range(RANKS):
            assert measured[rank][name] == pytest.approx(counted[rank], abs=SMALL_BYTES), (name, rank)
    # and the cases differ in what they are here to tell apart
    assert by_name(jobs["stage 1"])["matrices, there and back"] > 10_000
    again = {name: by_name(jobs[name]).get("weights, backward", 0) for name in CASES}
    assert again["stage 3"] == 0 < again["stage 3, prefetched"] < again["stage 3, released"]
