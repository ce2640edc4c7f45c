"""`python -m training.baseline.steps` on Ray Train's workers, as `make baseline` runs it on several nodes."""

import json

import pytest

from tests.commands import python, tiny, write_corpus
from training import config as training_config
from training.plan import make_plan

pytestmark = pytest.mark.stack
OWN = ("launcher=", "run.directory=", "schedule.tokens=", "record.wandb=")  # keys that the command sets


def test_workers_of_ray_train_measure_a_step(tmp_path):
    write_corpus(tmp_path)
    keys = [key for key in tiny(tmp_path, workers__cpus=1) if not key.startswith(OWN)]
    done = python("training.baseline.steps", "--steps", "2", "--warm-up", "1", *keys, "--ray")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    plan = make_plan(training_config.load(dotlist=[*keys, "schedule.tokens=5120"]))
    assert found["tokens_per_step"] == plan.tokens_per_step
    assert (found["num_nodes"], found["num_workers"], found["steps"]) == (1, 1, 2)
    assert found["attention_kernel"].startswith("flash_attention")
    parts = [found[f"seconds_{part}"] for part in ("data", "compute", "optimizer")]
    assert min(parts) > 0 == found["seconds_communication"]  # a single worker
    assert sum(parts) <= found["phased_step_seconds"]
    assert not list((tmp_path / "data").glob(".steps-*"))  # Ray Train's own folder is gone
