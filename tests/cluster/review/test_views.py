"""What the views show is there to be shown. Keys of runs: beside the tests of the commands that log them."""

import re
from pathlib import Path

import wandb

from cluster.review import views
from tests.cluster.review.panel_keys import logged, shown_by
from tests.commands import ROOT
from tests.waiting import wait_until

# section -> the test that holds its keys against what a command logged
TRAINING = ("train", "throughput", "optimizer", "noise", "validation", "health")
HELD = {
    **dict.fromkeys(TRAINING, "tests/training/test_train.py"),
    "study": "tests/training/study/test_publish.py",
    "serve": "tests/serving/bench/test_command.py",
    "parity": "tests/cluster/parity/test_parity.py",
    "preflight": "tests/cluster/preflight/test_verdict.py",
    "baseline": "tests/training/baseline/test_command.py",
    "bench": "tests/cluster/measure/test_benchmark.py",
    "evaluation": "tests/training/evaluate/test_command.py",
    "projection": "tests/training/projection/test_command.py",
}


def test_every_key_belongs_to_a_section_that_a_test_holds_against_a_run():
    names = {name for section, name in shown_by() if section in ("history", "table", "image", "summary")}
    assert {name.partition("/")[0] for name in names} - {"step", "tokens", "seconds"} == set(HELD)
    for section, file in HELD.items():
        assert re.search(rf'missing\([^)]*"{section}"', (ROOT / file).read_text()), file


def test_what_w_and_b_samples_itself_has_the_names_that_its_sampler_knows(tmp_path: Path):
    """Of the host as it is sampled here; of GPUs by the names inside the program that would sample them."""
    names = {name for section, name in shown_by() if section == "system"}
    of_gpus = {name for name in names if name.startswith("gpu.")}
    assert names - of_gpus and len({name.split(".")[1] for name in of_gpus}) == views.MOST_GPUS
    settings = wandb.Settings(
        silent=True, x_stats_sampling_interval=0.5, x_transaction_log_flush_interval=0.2, x_disable_meta=True
    )
    host = {("system", name) for name in names - of_gpus}
    with wandb.init(project="p", mode="offline", dir=tmp_path, reinit="create_new", settings=settings) as run:
        run.log({"step": 1})
        wait_until(lambda: host <= logged(tmp_path), told=f"{host} in W&B's samples")
    sampler = (Path(wandb.__file__).parent / "bin" / "wandb-symon").read_bytes()
    assert {name for name in of_gpus if f".{name.split('.')[2]}".encode() not in sampler} == set()
