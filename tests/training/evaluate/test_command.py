"""`python -m training.evaluate` with the real harness: its numbers against our own and transformers'."""

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from cluster.cli import UserError
from cluster.session import free_ports
from optim.precision import cpu_has_bf16
from tests.cluster.review.panel_keys import missing
from tests.training.evaluate.trained_run import (
    CHOICES,
    QUESTIONS,
    SEQUENCE_LENGTH,
    continuation_of,
    evaluate,
    log_likelihood,
    metric,
    refusal,
    scores,
    write_task,
)
from training.data.dataset import Manifest
from training.evaluate import harness
from training.evaluate.command import main
from training.model.llama import Llama
from training.run.export import export

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("no_ranks", "working_directory")]


def test_a_runs_scores_are_those_that_we_compute_and_nothing_is_asked_of_the_network(
    trained: Path, tasks: Path, model: Llama, tokenizer: Tokenizer, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **_: asked.append(names) or [])
    export(trained / "outputs/tiny", dtype="float32")  # newer than the checkpoint, so it is taken as it is
    result, last, out = evaluate(capsys, f"tasks=[{tasks}]", "device=cpu", "batch_size=4")
    assert asked == []
    assert result["model"]["run"] == str(trained / "outputs/tiny") and result["model"]["dtype"] == "float32"
    assert last["file"] == str(trained / "outputs/tiny/eval.json")

    likelihoods = [
        [log_likelihood(model, *continuation_of(tokenizer, question, choice)) for choice in CHOICES]
        for question in QUESTIONS
    ]
    right = [max(range(4), key=row.__getitem__) == i % 4 for i, row in enumerate(likelihoods)]
    accuracy = sum(right) / len(right)
    assert 0 < accuracy < 1  # else a constant would do
    found = scores(result)
    choose = found["choose"]
    assert choose["value"] == pytest.approx(accuracy) and choose["metric"] == "acc"
    assert choose["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(right) - 1)))
    assert (choose["samples"], choose["of_samples"], choose["version"]) == (24, 24, "1.5")
    mean = sum(row[i % 4] for i, row in enumerate(likelihoods)) / len(likelihoods)
    assert found["continue"]["value"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["continue"]["stderr"] > 0 and found["continue"]["higher_is_better"] is False
    assert found["complete"]["value"] == 6 / 8
    assert last["scores"]["complete/exact_match,none"] == 6 / 8
    assert result["provenance"]["packages"]["lm_eval"] == result["lm_eval"] == "0.4.13"
    assert [line for line in out.splitlines() if line.startswith("choose ") and "24/24" in line]


def test_a_group_of_tasks_with_examples_and_an_included_file(
    trained: Path, tasks: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import manager

    (trained / "group").mkdir()
    for name in ("choose.yaml", "both.yaml"):
        (trained / "group" / name).write_text((tasks / name).read_text())
    (trained / "group/copy.yaml").write_text("include: choose.yaml\ntask: copy\nnum_fewshot: 0\n")
    monkeypatch.setattr(manager, "__file__", str(trained / "group/manager.py"))  # not its own 14,000 tasks
    result, _, _ = evaluate(
        capsys, "tasks=[group/both.yaml]", "model=hf", "output=group.json", "num_fewshot=2", "device=cpu",
        "wandb=offline",
    )  # fmt: skip
    assert missing(trained / "group", "evaluation") == set()
    found = scores(result)
    assert (found["choose"]["num_fewshot"], found["copy"]["num_fewshot"]) == (2, 0)  # 0 was said
    assert found["both"]["group"] and not found["choose"]["group"]
    assert found["both"]["value"] == pytest.approx((found["choose"]["value"] + found["copy"]["value"]) / 2)
    assert "the model is not a run" in result["perplexity"]["left_out"]


def test_perplexity_is_that_of_transformers_on_the_validation_shards(
    trained: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    result, last, _ = evaluate(
        capsys, f"model={trained / 'hf'}", f"data={data_of(trained)}", f"sequence_length={SEQUENCE_LENGTH}",
        "output=ours.json", "device=cpu", "batch_size=7",
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(trained / "hf").eval()
    manifest = json.loads((data_of(trained) / "manifest.json").read_text())
    losses: list[float] = []
    for shard in manifest["validation"]["shards"]:
        raw = (data_of(trained) / shard["file"]).read_bytes()
        ids = torch.tensor([int.from_bytes(raw[i : i + 2], "little") for i in range(0, len(raw), 2)])
        for start in range(0, len(ids) - SEQUENCE_LENGTH, SEQUENCE_LENGTH):
            piece = ids[None, start : start + SEQUENCE_LENGTH + 1]
            with torch.no_grad():
                logits = theirs(piece[:, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:]).item())
    mean = sum(losses) / len(losses)
    entry = result["perplexity"]
    assert entry["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5) == last["perplexity"]
    assert entry["num_sequences"] == entry["of_sequences"] == len(losses) > 10
    assert entry["tokens"] == len(losses) * SEQUENCE_LENGTH
    spread = torch.tensor(losses, dtype=torch.float64).std().item() / math.sqrt(len(losses))
    assert entry["loss_stderr"] == pytest.approx(spread, rel=1e-4)
    assert result["provenance"]["data_fingerprint"] == Manifest.read(data_of(trained)).fingerprint
    assert last["file"] == str(trained / "ours.json") and result["scores"] == []


def data_of(trained: Path) -> Path:
    [data] = (trained / "data").glob("corpus-*/")
    return data


def test_a_run_is_exported_where_needed_and_its_data_found(
    trained: Path, capsys: pytest.CaptureFixture
) -> None:
    (trained / "outputs/tiny/checkpoints/step-0000004/COMPLETE").touch()  # newer than any export
    assert main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"model       {trained}/outputs/tiny/export, exported first" in out
    assert f"perplexity  {data_of(trained)}" in out and f"result      {trained}/outputs/tiny/eval.json" in out
    before = (trained / "outputs/tiny/eval.json").read_text() if result_exists(trained) else None
    result, _, _ = evaluate(capsys, "model=tiny", "sequences=5", "device=cpu")
    assert result["model"]["dtype"] == ("bfloat16" if cpu_has_bf16() else "float32")
    entry = result["perplexity"]
    assert (entry["num_sequences"], entry["sequence_length"]) == (5, SEQUENCE_LENGTH)
    assert (trained / "outputs/tiny/eval.json").read_text() != before


def test_an_exported_run_is_evaluated_without_its_data_folder(
    trained: Path, tasks: Path, capsys: pytest.CaptureFixture
) -> None:
    export(trained / "outputs/tiny", dtype="float32")
    (trained / "data").rename(trained / "elsewhere")
    try:
        result, _, _ = evaluate(
            capsys, "model=tiny", f"tasks=[{tasks / 'complete.yaml'}]", "device=cpu", "output=alone.json",
        )  # fmt: skip
    finally:
        (trained / "elsewhere").rename(trained / "data")
    assert scores(result)["complete"]["value"] == 6 / 8
    assert "holds no usable prepared data" in result["perplexity"]["left_out"]


def result_exists(trained: Path) -> bool:
    return (trained / "outputs/tiny/eval.json").is_file()


def no_such_model(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return ["model=tinny"], "model: 'tinny' is neither a Hugging Face directory"


def nothing_to_do(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return [
        "model=hf"
    ], "tasks: none are named, and there is no perplexity to measure: the model is not a run"


def damaged_weights(trained: Path, tasks: Path) -> tuple[list[str], str]:
    for file in (trained / "hf").iterdir():
        (tasks.parent / "damaged").mkdir(exist_ok=True)
        (tasks.parent / "damaged" / file.name).write_bytes(file.read_bytes()[:5000])
    keys = ["model=damaged", f"tasks=[{tasks / 'choose.yaml'}]"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tasks.parent / "damaged" / name).write_bytes((trained / "hf" / name).read_bytes())
    return keys, "damaged/model.safetensors: not a readable safetensors file"


def missing_tokenizer(trained: Path, tasks: Path) -> tuple[list[str], str]:
    (trained / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (trained / "bare" / name).write_bytes((trained / "hf" / name).read_bytes())
    return ["model=bare", f"data={data_of(trained)}"], "bare/tokenizer.json is missing"


def damaged_tokenizer(trained: Path, tasks: Path) -> tuple[list[str], str]:
    shutil.copytree(trained / "hf", trained / "cut")
    (trained / "cut/tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    return ["model=cut", f"tasks=[{tasks / 'choose.yaml'}]"], "cut cannot be loaded ("


def diverged_weights(trained: Path, tasks: Path) -> tuple[list[str], str]:
    """Finite, but no float holds the perplexity."""
    shutil.copytree(trained / "hf", trained / "wild")
    weights = load_file(trained / "hf/model.safetensors")
    wild = {name: 1e4 * weight if "norm" in name else weight for name, weight in weights.items()}
    save_file(wild, trained / "wild/model.safetensors", {"format": "pt"})
    return ["model=wild", f"data={data_of(trained)}"], "the weights are damaged, or of a run that diverged"


def another_tokenizer(trained: Path, tasks: Path) -> tuple[list[str], str]:
    shutil.copytree(trained / "hf", trained / "other")
    (trained / "other/tokenizer.json").write_text((trained / "hf/tokenizer.json").read_text() + "\n")
    return ["model=other", f"data={data_of(trained)}"], "was prepared with another tokenizer (SHA-256 "


def no_data(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return ["model=hf", "data=nowhere"], "nowhere/manifest.json: missing, so this is no prepared folder"


def malformed_task(trained: Path, tasks: Path) -> tuple[list[str], str]:
    (trained / "broken.yaml").write_text("task: [unclosed\n")
    return ["tasks=[broken.yaml]"], "broken.yaml is no usable task YAML (ParserError: "


def missing_task_file(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return ["tasks=[gone.yaml]"], "gone.yaml is no usable task YAML (FileNotFoundError: "


def no_task_in_file(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return [f"tasks=[{tasks / '_shared.yaml'}]"], "_shared.yaml has neither the key task nor group"


def no_task_in_folder(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return ["tasks=[data]"], "data holds no task YAML"


def missing_task_data(trained: Path, tasks: Path) -> tuple[list[str], str]:
    file = write_task(trained / "odd", "dataless", [{"question": "a"}], doc_to_target="a")
    (trained / "odd/dataless.jsonl").unlink()
    return [f"tasks=[{file}]"], "dataless.yaml cannot be loaded (FileNotFoundError: "


def field_that_the_data_lack(trained: Path, tasks: Path) -> tuple[list[str], str]:
    file = write_task(
        trained / "odd", "fieldless", [{"question": "a"}], doc_to_text="{{answer}}", doc_to_target="{{b}}",
        output_type="generate_until", metric_list=[metric("exact_match")],
    )  # fmt: skip
    return [f"tasks=[{file}]"], "fieldless"


def unknown_key(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return ["task=[choose]"], "unknown key 'task'"


def silent_endpoint(trained: Path, tasks: Path) -> tuple[list[str], str]:
    [port] = free_ports(1)
    keys = [f"tasks=[{tasks / 'complete.yaml'}]", f"endpoint=http://127.0.0.1:{port}"]
    return (
        keys,
        f"endpoint: http://127.0.0.1:{port}/v1/models does not answer ([Errno 111] Connection refused)",
    )


def output_is_a_folder(trained: Path, tasks: Path) -> tuple[list[str], str]:
    return ["model=tiny", "output=data"], "output: "


@pytest.mark.parametrize(
    "arrange",
    [
        no_such_model,
        nothing_to_do,
        damaged_weights,
        missing_tokenizer,
        damaged_tokenizer,
        diverged_weights,
        another_tokenizer,
        no_data,
        malformed_task,
        missing_task_file,
        no_task_in_file,
        no_task_in_folder,
        missing_task_data,
        field_that_the_data_lack,
        unknown_key,
        silent_endpoint,
        output_is_a_folder,
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    trained: Path, tasks: Path, capsys: pytest.CaptureFixture,
    arrange: Callable[[Path, Path], tuple[list[str], str]],
) -> None:  # fmt: skip
    keys, message = arrange(trained, tasks)
    assert message in refusal(capsys, [*keys, *(["device=cpu"] if "device" not in str(keys) else [])])


def test_an_unknown_task_is_named_with_its_neighbours(
    trained: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lm_eval.tasks import manager

    # A small stand-in for its own 14,000 tasks, which take half a minute to look through.
    write_task(tmp_path / "its", "hellaswag", [{"question": "a"}])
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "its/manager.py"))
    error = refusal(capsys, ["model=tiny", "tasks=[helaswag]"])
    assert "tasks: 'helaswag' is no file, no folder, and no task of lm_eval's; is it hellaswag?" in error


def test_without_lm_eval_the_message_says_how_to_install_it(
    tasks: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    error = refusal(capsys, [f"tasks=[{tasks}]"])
    assert 'pip install -c constraints.txt -e ".[eval]"' in error and "lm_eval" in error


CODE_IN_A_TASK = {
    "a function": ({}, "process_docs: !function code.run\n"),
    "by another spelling of the tag": ({}, "process_docs: !<%21function> code.run\n"),
    "of the standard library": ({}, "process_docs: !function os.system\n"),
    "as its class": ({}, "class: !function code.Task\n"),
    "in a file that it includes": ({"include": "part.yaml"}, ""),
    "as a metric that is a script": ({"metric_list": [metric("code.py") | {"hf_evaluate": True}]}, ""),
    "as a metric that lm_eval does not have": ({"metric_list": [metric("code.py")]}, ""),
}


def task_with_code(folder: Path, keys: dict[str, Any], text: str) -> Path:
    """A task beside code that leaves a mark when it runs."""
    file = write_task(
        folder, "task", [{"question": "a"}], output_type="generate_until", doc_to_target="a",
        **{"metric_list": [metric("exact_match")], **keys},
    )  # fmt: skip
    file.write_text(file.read_text() + text)
    (folder / "part.yaml").write_text("process_docs: !function code.run\n")
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\ndef run(docs): return docs\n"
    )
    return file


@pytest.mark.parametrize("place", ["the file", "its folder"])
@pytest.mark.parametrize("how", CODE_IN_A_TASK)
def test_a_task_file_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, place: str
) -> None:
    folder = tmp_path / "tasks"
    file = task_with_code(folder, *CODE_IN_A_TASK[how])
    monkeypatch.chdir(folder)
    sources = harness.sort_out([str(file if place == "the file" else folder)])
    message = r"cannot be loaded \(UserError: .* runs Python code; if you trust it, set task_code=true\)"
    with harness.confined(sources, code=False), pytest.raises(UserError, match=message):
        harness.load(sources, num_fewshot=None)
    assert not (folder / "ran").exists()


def test_a_task_file_that_is_trusted_runs_its_code(tmp_path: Path) -> None:
    file = task_with_code(tmp_path / "tasks", *CODE_IN_A_TASK["a function"])
    sources = harness.sort_out([str(file)])
    with harness.confined(sources, code=True):
        assert list(harness.load(sources, num_fewshot=None).requests) == ["task"]
    assert (tmp_path / "tasks/ran").exists()


@pytest.mark.parametrize("code", [False, True])
def test_a_template_reaches_no_python(tmp_path: Path, code: bool) -> None:
    mark = tmp_path / "ran"
    text = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    sources = harness.sort_out([str(task_with_code(tmp_path / "tasks", {"doc_to_text": text}, ""))])
    with harness.confined(sources, code=code), pytest.raises(UserError, match="SecurityError"):
        harness.load(sources, num_fewshot=None)
    assert not mark.exists()
