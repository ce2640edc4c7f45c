"""Every committed configuration file loads with its schema and, for training, makes a plan."""

import importlib
from pathlib import Path

import pytest

from cluster.config import to_yaml, walk
from training.config import TrainConfig, settled
from training.plan import make_plan
from training.study.config import StudyConfig
from training.study.plan import StudyPlan

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("*/configs/**/*.y*ml"))

each_file = pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])


def load(file: Path, dotlist: tuple[str, ...] = ()):
    """The file, with the schema of its room; a study's and a benchmark's have their own."""
    room = file.relative_to(ROOT).parts[0]
    folder = next((name for name in ("study", "bench") if file.name.startswith(name)), "")
    return importlib.import_module(f"{room}.{folder}.config".replace("..", ".")).load(
        file=file, dotlist=dotlist
    )


def test_there_are_files_and_all_of_them_end_in_yaml():
    assert ROOT / "training/configs/a40_1b4.yaml" in FILES
    assert all(file.suffix == ".yaml" for file in FILES)


@each_file
def test_it_loads_and_reads_back_equal(file, tmp_path):
    config = load(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert importlib.import_module(type(config).__module__).load(file=copy) == config


@each_file
def test_its_comment_says_when_to_use_it_and_how(file):
    comment = file.read_text().partition("\n\n")[0].split("\n", 1)
    assert comment[0].startswith("# ") and "# Use it " in comment[1] and "#   make " in comment[1]


@each_file
def test_it_says_something_that_the_defaults_do_not(file):
    config = load(file)
    changed = [
        name
        for (name, value, _), (_, default, _) in zip(walk(config), walk(type(config)()), strict=True)
        if value != default
    ]
    assert changed


@each_file
def test_a_training_file_makes_a_plan(file):
    config = load(file)
    if not isinstance(config, TrainConfig):
        pytest.skip("not a training configuration")
    plan = make_plan(config)
    tokens = (
        plan.accumulation * plan.num_workers * config.batch.micro_sequences * config.batch.sequence_length
    )
    assert tokens == plan.tokens_per_step == config.batch.tokens
    assert plan.num_steps * plan.tokens_per_step <= config.schedule.tokens
    assert config.schedule.tokens - plan.num_steps * plan.tokens_per_step < plan.tokens_per_step
    if plan.device:
        assert plan.total_memory_bytes < plan.device.memory_gb * 1e9
    assert f"{plan.shape.num_parameters:,}" in plan.describe()


@pytest.mark.parametrize("dotlist", [(), ("smoke=true",)])
@each_file
def test_a_study_file_makes_runs_that_can_be_planned(file, dotlist):
    if not isinstance(load(file), StudyConfig):
        pytest.skip("not a study")
    config = load(file, dotlist)
    plan = StudyPlan(config)
    if not dotlist:
        plan.check()
    runs = plan.typical_runs()[: 9 if dotlist else None]  # loading each rule's configuration takes a while
    assert len({plan.configs.of(run).run.name for run in runs}) == len(runs)
    assert config.claims.reference and config.claims.rule


def test_the_default_study_is_the_one_of_the_design():
    config = load(ROOT / "training/configs/study.yaml")
    assert list(config.rules) == ["adamw", "muon", "scion", "transported_scion"]
    assert {len(rule.grid) for rule in config.rules.values()} == {4}
    assert config.equal_effort and len(config.seeds) >= 3 and len(config.widths) >= 2
    assert config.claims.token_ratio == 0.75


def test_the_defaults_make_a_plan_too():
    plan = make_plan(settled(TrainConfig()))
    assert plan.num_workers == 2 and plan.accumulation >= 1 and plan.num_steps >= 100


def test_the_a40_file_is_the_run_of_the_design():
    config = load(ROOT / "training/configs/a40_1b4.yaml")
    plan = make_plan(config)
    assert plan.shape.num_parameters == 1_420_396_544 and plan.num_workers == 8
    assert plan.device.name == "NVIDIA A40" and config.workers.gpu
    assert 19.5 < config.schedule.tokens / plan.shape.num_parameters < 20.5
