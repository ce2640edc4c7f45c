"""Defaults <- YAML <- dotlist: precedence, and errors that name the key, the file and the choices."""

import ast
import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import config as layered
from cluster.config import Allowed, ConfigError, key, to_dict, to_yaml, walk
from optim.geometry import NORMS
from optim.polar import METHODS
from optim.rules import SCALES
from optim.stages import LINES
from tests.training.config_refusal import Inner, Outer, load_text, refusal
from training import config as training_config
from training import optim_config
from training.config import TrainConfig, load
from training.plan import make_plan


def test_defaults_alone_are_the_schemas():
    assert layered.load(Outer) == Outer()
    assert load(settle=False) == TrainConfig()


@pytest.mark.parametrize(
    ("has_bf16", "keys", "precision"),
    [
        (True, [], "bf16"),
        (False, [], "fp32"),
        (False, ["workers.gpu=true"], "bf16"),
        (True, ["precision=fp32"], "fp32"),
        (False, ["precision=bf16"], "bf16"),
    ],
)
def test_auto_is_the_precision_that_the_device_multiplies_in(has_bf16, keys, precision, monkeypatch):
    monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda: has_bf16)
    config = load(dotlist=keys)
    assert config.precision == precision
    plan = make_plan(config)
    assert plan.is_bf16 == (precision == "bf16")
    assert plan.memory_bytes["weights"] == plan.shape.num_parameters * (2 if plan.is_bf16 else 4)
    named = "bf16, with fp32 master weights" if plan.is_bf16 else "fp32"
    assert f"{'precision':<24}{named}\n" in plan.describe() and "not tested" not in plan.describe()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert f"{'not tested':<24}nothing here has run on aarch64 yet" in plan.describe()


def test_yaml_overrides_defaults_and_the_dotlist_overrides_yaml(tmp_path):
    text = "name: file\ninner:\n  size: 2\n"
    assert load_text(tmp_path, text) == Outer(name="file", inner=Inner(size=2))
    found = load_text(tmp_path, text, "inner.size=3", "flag=true")
    assert found == Outer(name="file", flag=True, inner=Inner(size=3))


def test_the_last_of_two_arguments_for_one_key_wins():
    assert layered.load(Outer, dotlist=["inner.size=3", "inner.size=4"]).inner.size == 4


def test_a_value_may_hold_an_equals_sign_or_be_null_or_a_list():
    assert layered.load(Outer, dotlist=["name=a=b"]).name == "a=b"
    assert layered.load(Outer, dotlist=["limit=7", "limit=null"]).limit is None
    assert layered.load(Outer, dotlist=["words=[b, c d]"]).words == ("b", "c d")
    assert layered.load(Outer, dotlist=["inner.rate=2"]).inner.rate == 2.0


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_text(tmp_path, "") == load_text(tmp_path, "# only a comment\n") == Outer()


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("nope=1", "unknown key 'nope'; keys here: name, flag, limit, words, inner"),
        ("inner.sise=1", "unknown key 'inner.sise'; keys here: size, rate"),
        ("inner.deep.er=1", "unknown key 'inner.deep'; keys here: size, rate"),
        ("inner.size=two", "inner.size: "),
        ("inner.size=1.5", "inner.size: "),
        ("inner.size=true", "inner.size: "),
        ("inner.size=null", "inner.size: "),
        ("inner.size.x=1", "inner.size: "),
        ("flag=maybe", "flag: "),
        ("words=a", "words: "),
        ("inner=3", "inner: is a section, not a value; keys here: size, rate"),
        ("inner=[1]", "inner: is a section, not a value; keys here: size, rate"),
        ("name=${nope}", "name: "),
        ("name=bad", "name: must not be bad"),
    ],
)
def test_typos_and_wrong_types_name_the_key_on_the_command_line_and_in_a_file(argument, names, tmp_path):
    assert names in refusal(argument, schema=Outer)
    path, _, value = argument.partition("=")
    parts = path.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    lines[-1] += f" {value}"
    file = tmp_path / "c.yaml"
    file.write_text("\n".join(lines))
    assert names in refusal(file=file, schema=Outer)


@dataclasses.dataclass(frozen=True)
class Named:
    items: dict[str, Inner] = key(dict, "sections by a name of the user's")
    numbers: tuple[int, ...] = key((), "some numbers")


def test_sections_by_name_merge_and_name_their_keys(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("items:\n  a: {size: 2}\n")
    found = layered.load(Named, file=file, dotlist=["items.a.rate=3", "items.b.size=4"])
    assert found.items == {"a": Inner(2, 3.0), "b": Inner(size=4)}
    assert "unknown key 'items.a.sise'; keys here: size, rate" in refusal("items.a.sise=1", schema=Named)
    for wrong in ("items=[1]", "items=1"):
        assert "items: is a mapping of names to Inner" in refusal(wrong, schema=Named)
    assert "an item could not be converted to Integer" in refusal("numbers=[x]", schema=Named)


def test_the_message_says_which_layer_is_wrong(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("inner:\n  sise: 1\n")
    assert refusal(file=file, schema=Outer).startswith(f"{file}: unknown key 'inner.sise'")
    file.write_text("inner:\n  size: 1\n")
    assert refusal("inner.sise=1", file=file, schema=Outer).startswith("inner.sise=1: unknown key")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("inner: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "not valid YAML"),
        ("\tname: x\n", "not valid YAML"),
        ("- name\n- flag\n", "holds a list; the top level must be a mapping"),
        ("42\n", "the top level must be a mapping"),
        ("nonsense\n", "unknown key 'nonsense'"),
        ("inner:\n", "inner: is a section"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(text, problem, tmp_path):
    with pytest.raises(ConfigError) as raised:
        load_text(tmp_path, text)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'c.yaml'}: {problem}") and "\n" not in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert refusal(file=missing) == f"{missing}: cannot be read (No such file or directory); check the path"
    assert refusal(file=tmp_path).startswith(f"{tmp_path}: cannot be read (Is a directory)")


@pytest.mark.parametrize("argument", ["batch.tokens", "--help", "=3", ""])
def test_an_argument_without_a_key_or_value_says_what_was_expected(argument):
    assert refusal(argument) == f"{argument!r}: expected key=value, for example batch.tokens=16384"


def test_a_value_that_is_no_yaml_is_quoted():
    assert refusal("batch.tokens=[1").startswith("'batch.tokens=[1': not a valid value")


@pytest.mark.parametrize(
    "dotlist",
    [
        (),
        ("optim.matrix.lr=1e-7", "optim.vector.eps=1e-30", "schedule.tokens=28400000000"),
        ("zero.stage=3", "zero.init=true", "workers.accelerator=A40", "model.num_layers=3"),
        (
            'evaluation.prompts=["a: b", "é\\n", "1"]',
            "record.group=null",
            "run.name='1e3'",
            "run.directory=~/x",
        ),
    ],
)
def test_yaml_round_trip(dotlist, tmp_path):
    config = load(dotlist=dotlist)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load(file=file) == config
    assert to_dict(config)["batch"] == dataclasses.asdict(config.batch)


def test_every_leaf_survives_the_dotlist():
    leaves = [(name, value) for name, value, _ in walk(load()) if isinstance(value, str | int | float)]
    assert load(dotlist=[f"{name}={value}" for name, value in leaves]) == load()


def test_it_is_frozen_at_every_level():
    config = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.precision = "fp32"
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section):
            first = dataclasses.fields(section)[0].name
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(section, first, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.matrix.lr = 1.0
    assert isinstance(config.evaluation.prompts, tuple)


def test_walk_yields_the_leaves_in_order():
    assert list(walk(Outer())) == [
        ("name", "x", "a name"),
        ("flag", False, "a flag"),
        ("limit", None, "a limit"),
        ("words", ("a",), "some words"),
        ("inner.size", 1, "a size"),
        ("inner.rate", 0.5, "a rate"),
    ]


def test_every_key_of_a_training_run_is_explained_once():
    leaves = list(walk(load()))
    assert len(leaves) > 50
    names = [name for name, _, _ in leaves]
    assert len(set(names)) == len(names)
    unexplained = [name for name, _, doc in leaves if len(doc.split()) < 2]
    assert not unexplained


REFUSED = {
    "launcher": ["slurm"],
    "precision": ["fp16", "BF16"],
    "load": ["gpt2", "'hf:'"],
    "run.name": ["a/b", "..", ".hidden", "''", "a b", "-x", "é"],
    "checkpoint.upload": ["backup", "/mnt/backup", "s3://name:secret@bucket"],
    "run.seed": ["-1", str(2**63)],
    "data.source": ["''"],
    "data.sources": ["[x]", "[a=]", "[a=x@b]", "[a=x@0]", "[a=x@-1]", "[a b=x]", "[a=x,a=y]", "[a=x@nan]"],
    "data.vocab_size": ["299", "1000001"],
    "data.validation_fraction": ["0", "0.5", "-0.1", "nan"],
    "data.max_bad_fraction": ["-0.1", "1.1", "nan"],
    "data.shard_tokens": ["999", "-1"],
    "batch.tokens": ["0", "-8"],
    "batch.sequence_length": ["0"],
    "batch.micro_sequences": ["0"],
    "schedule.tokens": ["0", "-1"],
    "schedule.decay": ["exponential"],
    "schedule.warmup_fraction": ["-0.1", "1.1", "0.6", "nan"],  # 0.6 with decay_fraction 0.5 makes 1.1
    "schedule.decay_fraction": ["-0.1", "1.1"],
    "schedule.final_fraction": ["-0.1", "1.1"],
    "optim.clip": ["-1", "nan"],
    "optim.z_loss": ["-1", "nan"],
    "model.loss_tokens": ["-1"],
    "model.checkpoint_every": ["0", "-1"],
    "zero.communication_dtype": ["fp16"],
    "optim.max_skipped_fraction": ["-0.1", "1.1", "nan"],
    "optim.inspect_every_steps": ["0", "-1"],
    "optim.matrix.rule": ["lion"],
    "optim.matrix.lines": ["both"],
    "optim.matrix.polar_steps": ["2", "13"],
    "optim.matrix.row_alpha": ["-1"],
    "optim.matrix.row_divisor": ["sqrt"],
    "optim.matrix.row_length": ["paper"],
    "optim.matrix.correction": ["-1", "nan"],
    "optim.matrix.ahead": ["far"],
    "optim.by_name": [
        f"['{entry}']" for entry in ("*.mlp.*", "*.mlp.*: rul=muon", "*: lr=0", "*: per_head=true", ": lr=1")
    ],
    "optim.final_weight_decay": ["-0.1", "1.1"],
    "optim.qk_clip": ["-1", "nan"],
    "optim.average_decay": ["-0.1", "1"],
    "optim.matrix.row_beta2": ["1", "-0.1"],
    "optim.matrix.velocity_decay": ["1", "-0.1"],
    "optim.matrix.lookahead": ["-1"],
    "optim.matrix.ramp_steps": ["-1"],
    "optim.noise.inject": ["cauchy", "student"],  # the default clips
    "optim.noise.moment": ["1", "2.1"],
    "optim.noise.scale": ["-1", "nan"],
    "optim.noise.measure_every_steps": ["-1"],
    "optim.noise.samples": ["1"],
    "optim.noise.norm": ["nuclear"],
    "optim.scion.norms": [
        f"['{entry}']" for entry in ("=spectral", "*=spectrum", "*=schatten:x", "*=spectral@x", "*=sign@0")
    ],
    "optim.scion.transport": ["-1", "nan"],
    "optim.scion.transport_cap": ["-1"],
    "optim.matrix.method": ["svd"],
    "optim.matrix.scale": ["frobenius"],
    "optim.matrix.dtype": ["fp16"],
    "optim.matrix.lr": ["0", "-1", "nan"],
    "optim.matrix.momentum": ["1", "-0.1"],
    "optim.matrix.weight_decay": ["-0.1"],
    "optim.vector.lr": ["0", "nan"],
    "optim.vector.beta1": ["1", "-0.1"],
    "optim.vector.beta2": ["1", "-0.1"],
    "optim.vector.eps": ["0", "-1e-8"],
    "optim.vector.weight_decay": ["-0.1"],
    "zero.stage": ["4", "-1"],
    "zero.init": ["true"],  # the default stage is 1
    "zero.bucket_elements": ["0"],
    "workers.count": ["0"],
    "workers.cpus": ["0", "-1"],
    "workers.max_failures": ["-1"],
    "workers.hang_seconds": ["-1"],
    "workers.min_count": ["0", "3"],
    "checkpoint.every_steps": ["0"],
    "checkpoint.keep": ["0"],
    "checkpoint.keep_every_steps": ["-1", "30"],  # 30: the default checkpoint.every_steps is 25
    "checkpoint.max_rewinds": ["-1"],
    "evaluation.every_steps": ["0"],
    "evaluation.sequences": ["0"],
    "evaluation.tuning_sequences": ["-1"],
    "evaluation.sample_tokens": ["-1"],
    "record.every_steps": ["0"],
    "record.spike_deviations": ["-1"],
    "record.stalled_minutes": ["-1"],
    "record.straggler_fraction": ["-1"],
    "record.disk_free_gb": ["-1"],
    "record.wandb": ["on"],
    "session.object_store_megabytes": ["79"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_value_names_its_key(name):
    for value in REFUSED[name]:
        assert refusal(f"{name}={value}").startswith(f"{name}: "), value


SOURCES = (training_config, optim_config)
REFUSED_TOGETHER = {
    "optim.matrix.ahead": ("optim.matrix.rule=adamw", "optim.matrix.ahead=transport"),
    "optim.matrix.warm_start": ("optim.matrix.rule=adamw", "optim.matrix.warm_start=true"),
    "optim.scion.transport_scheduled": ("optim.scion.transport_scheduled=true",),
    "optim.final_weight_decay": ("optim.final_weight_decay=0.5", "optim.scion.constrained=true"),
    "checkpoint.max_rewinds": ("optim.matrix.rule=mars", "checkpoint.max_rewinds=1"),
    "zero.offload_optimizer": ("zero.stage=0", "zero.offload_optimizer=true"),
    "optim.noise.tail": ("optim.clip=0", "optim.noise.inject=student", "optim.noise.tail=1.5"),
}


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (REFUSED_TOGETHER["optim.noise.tail"], "optim.noise.tail"),
        (("optim.clip=0", "optim.noise.inject=stable", "optim.noise.tail=2.1"), "optim.noise.tail"),
        (("zero.stage=3", "optim.noise.measure_every_steps=1"), "optim.noise.measure_every_steps"),
        (("optim.clip=0", "optim.noise.inject=gaussian"), "optim.noise.scale"),
    ],
)
def test_noise_that_cannot_be_is_refused(keys, name):
    assert refusal(*keys).startswith(f"{name}: ")


def test_offload_is_refused_in_stage_0_which_has_no_shards():
    message = refusal(*REFUSED_TOGETHER["zero.offload_optimizer"])
    assert message == "zero.offload_optimizer: needs zero.stage>=1"
    for stage in (1, 2, 3):
        assert load(dotlist=[f"zero.stage={stage}", "zero.offload_optimizer=true"]).zero.offload_optimizer


@pytest.mark.parametrize("rule", ["transported_scion", "ema_nesterov"])
def test_a_rule_that_looks_ahead_needs_a_copy_of_the_weights(rule):
    keys = [f"optim.matrix.rule={rule}", "zero.stage=0", "precision=fp32"]
    with pytest.raises(ConfigError, match=r"^optim\.matrix\.rule: .* use zero\.stage=1 or precision=bf16$"):
        make_plan(load(dotlist=keys))
    offload = ["zero.stage=3", "zero.offload_optimizer=true", "workers.gpu=true"]
    with pytest.raises(ConfigError, match=r"use zero\.offload_optimizer=false or zero\.stage=2$"):
        make_plan(load(dotlist=[keys[0], *offload]))
    nowhere = {"transported_scion": "optim.scion.transport=0", "ema_nesterov": "optim.matrix.lookahead=0"}
    for allowed in (["zero.stage=1"], ["precision=bf16"], [nowhere[rule]]):
        assert make_plan(load(dotlist=[*keys, *allowed])).num_steps > 0


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (("*.mlb.*: lr=1",), "'*.mlb.*' matches no hidden matrix; there are model.layers.*.mlp.down_proj"),
        (("lm_head*: lr=1",), "'lm_head*' matches no hidden matrix"),
        (("*.mlp.*: lr=1", "*.up_proj.*: lr=2"), "'*.mlp.*' and '*.up_proj.*' match model.layers.0.mlp.up_"),
        (("*: rule=normuon lines=row_column",), "'*': optim.matrix.lines: row_column is not for normuon"),
        (("*: lr=1", "*: lr=2"), "'*' stands there twice"),
    ],
)
def test_patterns_of_names_that_cannot_be_meant_are_refused_by_key_and_pattern(entries, problem):
    with pytest.raises(ConfigError, match=f"^optim\\.by_name: {re.escape(problem)}"):
        make_plan(load(dotlist=[f"optim.by_name={list(entries)}"]))


def test_a_pattern_changes_its_keys_and_leaves_the_others():
    optim = load(dotlist=["optim.matrix.momentum=0.8", "optim.by_name=['*.mlp.*: rule=normuon lr=1']"]).optim
    changed = optim.matrices["*.mlp.*"]
    assert (changed.rule, changed.lr, changed.momentum) == ("normuon", 1.0, 0.8)
    found = optim.pattern_of(["a.mlp.up.weight", "a.self_attn.q_proj.weight"])
    assert found == {"a.mlp.up.weight": "*.mlp.*", "a.self_attn.q_proj.weight": ""}


def limited(schema: type, prefix: str = "") -> Iterator[str]:
    """The keys that do not allow every value of their type."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from limited(field.type, f"{prefix}{field.name}.")
        elif field.metadata["allowed"] != Allowed():
            yield f"{prefix}{field.name}"


def test_every_check_of_the_schema_is_exercised_above():
    """The keys with limits, and those that `require` names in the source, are keys and are refused here."""
    named = set(limited(TrainConfig))
    for call in itertools.chain(*(ast.walk(ast.parse(Path(each.__file__).read_text())) for each in SOURCES)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "require":
            argument = call.args[1]
            assert isinstance(argument, ast.Constant)
            named.add(argument.value)
    assert len(named) > 50
    refused = set(REFUSED) | set(REFUSED_TOGETHER)
    assert named <= refused <= {name for name, _, _ in walk(load())}


@pytest.mark.parametrize(
    "argument",
    ["zero.stage=0", "optim.clip=0", "evaluation.sample_tokens=0", "optim.matrix.momentum=0",
     "optim.vector.beta1=0", "schedule.warmup_fraction=0.5", "data.vocab_size=300", "run.seed=0"],
)  # fmt: skip
def test_values_on_the_allowed_side_of_a_border_are_taken(argument):
    name, _, value = argument.partition("=")
    found = {key_name: leaf for key_name, leaf, _ in walk(load(dotlist=[argument]))}
    assert found[name] == float(value)


def test_the_choices_are_those_that_the_optimizer_has():
    assert set(optim_config.ORTHOGONALISATIONS) == set(METHODS)
    assert set(optim_config.NORMS) == set(NORMS)
    assert set(optim_config.LINES["muon_plus"]) == set(LINES)
    assert set(optim_config.UPDATE_SCALES) == set(SCALES)


def test_the_run_directory_is_absolute_and_knows_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(dotlist=["run.directory=~/out", "run.name=r"]).run_directory == tmp_path / "out" / "r"
    monkeypatch.chdir(tmp_path)
    assert load(dotlist=["run.name=r"]).run_directory == tmp_path / "outputs" / "r"
