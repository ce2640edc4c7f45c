"""`python -m training.export` on a real tiny run: its weights, logits, tokenizer and loss; every refusal."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.files import sha256_of
from cluster.record import lineage
from cluster.record.provenance import code_version
from tests.commands import ROOT
from training.data.dataset import Manifest, TokenDataset, validation_batches
from training.evaluate.command import main as evaluate
from training.export import main
from training.model import shapes
from training.model.llama import Llama, load_hf
from training.model.rope import RopeScaling
from training.run.checkpoint import Checkpoint
from training.run.start import _keep_tokenizer

pytestmark = pytest.mark.stack

WORDS = "the lamp of harbour ships wait in Asunción late then go return 🚢 list name"
TEXT = "the ships wait in Asunción 🚢 late"
KEYS = (
    "launcher=torch precision=bf16 run.name=tiny data.source=corpus.jsonl data.vocab_size=400 "
    "data.validation_fraction=0.1 model.num_layers=2 model.hidden_size=64 model.ffn_size=128 "
    "model.num_heads=2 model.num_kv_heads=1 model.vocab_size=512 batch.tokens=256 batch.sequence_length=32 "
    "batch.micro_sequences=2 schedule.tokens=1024 workers.count=1 record.wandb=disabled "
    "checkpoint.every_steps=2 evaluation.sequences=4 evaluation.sample_tokens=0"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/` and `outputs/tiny`, which holds the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    draw = random.Random(0)
    texts = [f"{i}: " + " ".join(draw.choices(WORDS.split(), k=60)) for i in range(200)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = subprocess.run(
        [sys.executable, "-m", "training.launch", *KEYS.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        umask=0o002,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def modes(folder: Path) -> set[tuple[bool, str]]:
    """(is a folder, permissions) of all below it."""
    return {(path.is_dir(), f"{path.stat().st_mode & 0o777:o}") for path in folder.rglob("*")}


def test_the_umask_says_who_may_read_and_write_a_run_and_its_export(trained: Path, run: Path) -> None:
    assert modes(trained / "outputs") | modes(trained / "data") == {(True, "775"), (False, "664")}
    before = os.umask(0o027)
    try:
        assert main(["tiny"]) == 0
    finally:
        os.umask(before)
    assert modes(run / "export") == {(False, "640")}


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run to damage; its folder is the working directory."""
    for name in ("data", "outputs"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs/tiny"


def test_an_evaluation_leads_back_to_the_export_the_checkpoint_the_run_and_the_data(
    trained: Path, run: Path, capsys: pytest.CaptureFixture
) -> None:
    """The whole chain for real: trained, exported, evaluated, and shown by `make lineage`."""
    assert main(["tiny", "--step", "2"]) == 0
    newer = run / "checkpoints/step-0000004"
    os.utime(newer / "COMPLETE", (0, 0))  # else the evaluation would export it first
    assert evaluate(["model=tiny", "tasks=[]", "device=cpu"]) == 0
    capsys.readouterr()
    assert lineage.main(["outputs/tiny/eval.json"]) == 0
    shown = [line.lstrip("│├└─ ") for line in capsys.readouterr().out.splitlines()]
    data = next(Path("data").glob("[!.]*/manifest.json")).parent
    saved = sha256_of(run / "checkpoints/step-0000002/state.json")
    exported = json.loads((run / "export/lineage.json").read_text())["fingerprint"]
    facts = [line for line in shown if not line.startswith(("commit ", "step ", "fingerprint "))]
    there = trained / "outputs/tiny"  # what was recorded; `run` is a copy of it
    assert facts == [
        "evaluation tiny/eval.json", f"at {run}/eval.json",
        "export tiny", f"at {run}/export",
        "checkpoint tiny/step-0000002", f"at {run}/checkpoints/step-0000002",
        "run tiny", f"at {there}",
        *[f"dataset {data.name}", f"at {trained}/data/{data.name}"],
        *[f"dataset {data.name}", f"at {run.parents[1]}/data/{data.name}"],
    ]  # fmt: skip
    prints = [sha256_of(run / "eval.json"), exported, saved, *[Manifest.read(data).fingerprint] * 2]
    assert [line for line in shown if line.startswith("fingerprint ")] == [
        f"fingerprint {each[:12]}" for each in prints
    ]
    commit = code_version()["commit"]
    assert sum(line.startswith(("commit ", "step 2, commit ")) and commit[:12] in line for line in shown) == 4


def masters(run: Path, *, step: int = 4) -> dict[str, torch.Tensor]:
    """The checkpoint's fp32 weights in their shapes, without the code under test."""
    shape = shapes.resolve(
        "llama-5m", num_layers=2, hidden_size=64, ffn_size=128, num_heads=2, num_kv_heads=1, vocab_size=512
    )
    flat = dict(Checkpoint(run / f"checkpoints/step-{step:07d}").whole("master"))
    assert set(flat) == set(shape.parameters())
    return {name: flat[name].view(size) for name, size in shape.parameters().items()}


def assert_weights(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    written = load_file(directory / "model.safetensors")
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


def test_transformers_and_our_model_compute_the_logits_of_the_masters(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["tiny", "--dtype", "float32"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line == f"{run}/export: 106,816 parameters, float32 (the fp32 master weights), step 4"
    assert_weights(run / "export", masters(run))

    ours = load_hf(run / "export", dtype=torch.float32)
    direct = Llama(ours.shape)
    weights = masters(run)
    direct.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    theirs = AutoModelForCausalLM.from_pretrained(run / "export").eval()
    assert theirs.dtype == torch.float32

    batch = torch.randint(0, 400, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = direct(batch)
        assert expected.std() > 0.1  # else any model would agree
        assert torch.equal(ours(batch), expected)
        torch.testing.assert_close(
            theirs(batch).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


def test_the_tokenizer_is_that_of_the_data_and_has_the_given_one_s_chat_template(run: Path) -> None:
    [data] = Path("data").glob("corpus-*/")
    settings = {"chat_template": [{"name": "default", "template": "{{ eos_token }}ñ"}]}
    Path("given").mkdir()
    Path("given/tokenizer_config.json").write_text(json.dumps(settings))
    opened: Any = SimpleNamespace(manifest=Manifest.read(data), directory=data)
    _keep_tokenizer(opened, run / "tokenizer", given="given/tokenizer.json")
    assert main(["tiny"]) == 0
    end_id = Manifest.read(data).end_of_text_id
    exported = AutoTokenizer.from_pretrained(run / "export")
    assert exported.chat_template == "{{ eos_token }}ñ"
    assert exported(TEXT)["input_ids"] == Tokenizer.from_file(str(data / "tokenizer.json")).encode(TEXT).ids
    assert exported.decode(exported(TEXT)["input_ids"]) == TEXT
    assert exported.eos_token_id == end_id
    assert json.loads((run / "export/config.json").read_text())["eos_token_id"] == end_id


def test_bf16_is_the_default_and_rounds_the_masters(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.endswith("bfloat16 (as trained), step 4\n")
    assert_weights(run / "export", {name: t.bfloat16() for name, t in masters(run).items()})

    config = run / "config.yaml"
    config.write_text(config.read_text().replace("precision: bf16", "precision: fp32"))
    assert main([str(run)]) == 0  # replaces the export
    assert "bfloat16 (rounded: the run trained in fp32)" in capsys.readouterr().out


def test_the_bf16_export_has_the_validation_loss_that_training_recorded(run: Path) -> None:
    assert main(["tiny"]) == 0
    model = load_hf(run / "export", dtype=torch.bfloat16)
    [data] = Path("data").glob("corpus-*/")
    dataset = TokenDataset.open(data, split="validation", sequence_length=32)
    total = 0.0
    with torch.no_grad():
        for tokens, weights in validation_batches(
            dataset, sequences=4, rank=0, world_size=1, micro_sequences=2
        ):
            batch = torch.from_numpy(tokens)
            total += model(batch[:, :-1], batch[:, 1:]).item() * weights.sum()
    recorded = json.loads((run / "summary.json").read_text())["validation_loss"]
    assert total / 4 == pytest.approx(recorded, rel=1e-6)


def test_step_and_output(run: Path) -> None:
    assert main(["tiny", "--step", "2", "--dtype", "float32", "--output", "models/two"]) == 0
    two, four = masters(run, step=2), masters(run, step=4)
    assert not torch.equal(two["model.norm.weight"], four["model.norm.weight"])
    assert_weights(Path("models/two"), two)
    assert not (run / "export").exists()


def test_a_half_written_checkpoint_is_passed_over(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "checkpoints/step-0000004/COMPLETE").unlink()
    assert main(["tiny", "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    assert "step 2" in captured.out and "step-0000004: half-written" in captured.err
    assert_weights(run / "export", masters(run, step=2))


def test_pieces_of_several_ranks_are_put_together(run: Path) -> None:
    expected = masters(run)
    split_in_two(run / "checkpoints/step-0000004")
    assert main(["tiny", "--dtype", "float32"]) == 0
    assert_weights(run / "export", expected)


def split_in_two(path: Path) -> None:
    """Rewrite a one-rank checkpoint as two ranks might have: each tensor cut at a third of its length."""
    state = json.loads((path / "state.json").read_text())
    [name] = state["files"]
    state["files"] = {}
    ranks: tuple[dict, dict] = ({}, {})
    for key, tensor in load_file(path / name).items():
        cut = len(tensor) // 3
        ranks[0][key] = tensor[:cut].clone()
        ranks[1][f"{key.rpartition('|')[0]}|{cut}"] = tensor[cut:].clone()
    (path / name).unlink()
    for rank, tensors in enumerate(ranks):
        file = path / f"rank-{rank:05d}-of-00002.safetensors"
        save_file(tensors, file)
        state["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_state(path, state)


def write_state(path: Path, state: dict) -> None:
    (path / "state.json").write_text(json.dumps(state))
    (path / "COMPLETE").write_text(f"{sha256_of(path / 'state.json')}\n")


def test_the_shape_is_the_checkpoints_and_not_a_later_configs(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 3"))
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 64,
    }
    change_state(run, lambda state: state["identity"]["model"].update(rope_scaling=scaling))
    assert main(["tiny"]) == 0
    exported = shapes.resolve(run / "export")
    assert exported.num_layers == 2
    assert exported.rope_scaling == RopeScaling(**scaling)


def change_state(run: Path, change: Callable[[dict], object]) -> None:
    path = run / "checkpoints/step-0000004"
    state = json.loads((path / "state.json").read_text())
    change(state)
    write_state(path, state)


def flip_a_bit(file: Path, *, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_the_run_directory_is_enough_and_of_two_checkpoints_the_sound_one_is_exported(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = masters(run, step=2)
    shutil.rmtree("data")
    [shard] = (run / "checkpoints/step-0000004").glob("*.safetensors")
    flip_a_bit(shard, place=-100)
    assert main(["tiny", "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    assert f"{shard}: SHA-256 " in captured.err and "step 2" in captured.out
    assert_weights(run / "export", expected)
    assert main(["tiny", "--step", "4"]) == 2  # as it was asked for by name


def no_run(run: Path) -> tuple[list[str], str]:
    return ["tinny"], "tinny: no such run: no config.yaml in "


def no_checkpoint(run: Path) -> tuple[list[str], str]:
    for mark in run.glob("checkpoints/*/COMPLETE"):
        mark.unlink()
    return ["tiny"], f"{run}/checkpoints: no complete checkpoint"


def no_such_step(run: Path) -> tuple[list[str], str]:
    return ["tiny", "--step", "3"], "--step 3: no complete checkpoint of that step in "


def no_export_there(run: Path) -> tuple[list[str], str]:
    return ["tiny", "--output", str(run)], f"{run}: exists and is no earlier export"


def output_below_a_file(run: Path) -> tuple[list[str], str]:
    return ["tiny", "--output", "outputs/tiny/config.yaml/x"], "config.yaml/x: cannot be written (Not a dir"


def missing_shard(run: Path) -> tuple[list[str], str]:
    [file] = (run / "checkpoints/step-0000004").glob("*.safetensors")
    file.unlink()
    return ["tiny", "--step", "4"], f"{file}: missing shard; "


def shard_outside(run: Path) -> tuple[list[str], str]:
    folder = run / "checkpoints/step-0000004"
    [file] = folder.glob("*.safetensors")
    file.rename(folder.with_name("elsewhere"))
    change_state(run, lambda state: state["files"].update({"../elsewhere": state["files"].pop(file.name)}))
    return ["tiny"], f"{folder}/../elsewhere: leads out of {folder}"


def shard_linked(run: Path) -> tuple[list[str], str]:
    [file] = (run / "checkpoints/step-0000004").glob("*.safetensors")
    file.rename(run / "elsewhere")
    file.symlink_to(run / "elsewhere")
    return ["tiny"], f"{file}: leads out of {file.parent}"


def missing_piece(run: Path) -> tuple[list[str], str]:
    split_in_two(run / "checkpoints/step-0000004")
    change_state(run, lambda state: state["files"].pop("rank-00001-of-00002.safetensors"))
    return ["tiny"], "has no master for elements "


def data_gone(run: Path) -> tuple[list[str], str]:
    shutil.rmtree("data")
    shutil.rmtree(run / "tokenizer")
    return ["tiny"], "/data: holds no usable prepared data with the run's fingerprint "


def other_data(run: Path) -> tuple[list[str], str]:
    change_state(run, lambda state: state["identity"].update({"data fingerprint": "0" * 64}))
    return ["tiny"], "/data: holds no usable prepared data with the run's fingerprint 000000000000…"


def damaged_tokenizer(run: Path) -> tuple[list[str], str]:
    [file] = Path("data").absolute().glob("corpus-*/tokenizer.json")
    for each in (file, run / "tokenizer/tokenizer.json"):
        each.write_text(each.read_text() + " ")
    return ["tiny"], f"{file} is missing or corrupt"


def damaged_config(run: Path) -> tuple[list[str], str]:
    (run / "config.yaml").write_text("precison: bf16\n")
    return ["tiny"], "unknown key 'precison'"


@pytest.mark.parametrize(
    "arrange",
    [
        no_run,
        no_checkpoint,
        no_such_step,
        no_export_there,
        output_below_a_file,
        missing_shard,
        shard_outside,
        shard_linked,
        missing_piece,
        data_gone,
        other_data,
        damaged_tokenizer,
        damaged_config,
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    run: Path, capsys: pytest.CaptureFixture, arrange: Callable[[Path], tuple[list[str], str]]
) -> None:
    arguments, message = arrange(run)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if not line.startswith("skipping ")]
    assert line.startswith("error: ") and message in line
    assert captured.out == "" and not (run / "export").exists()


def test_the_message_lists_what_there_is(run: Path, capsys: pytest.CaptureFixture) -> None:
    main(["tiny", "--step", "3"])
    assert capsys.readouterr().err.endswith("there are: 2, 4\n")
    main(["tinny"])
    assert capsys.readouterr().err.endswith("in outputs/ there are: tiny\n")
