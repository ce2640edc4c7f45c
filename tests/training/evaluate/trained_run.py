"""A run that was never trained (random weights, large enough that answers differ), tasks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from cluster.config import to_yaml
from tests.commands import tiny, write_corpus
from training import config as training_config
from training.data.dataset import Manifest
from training.data.prepare import prepare
from training.evaluate.command import main
from training.model.llama import Llama, generate, initialize, load_hf
from training.plan import resolve_shape
from training.run.export import export
from training.run.state import writer

QUESTIONS = [f"Document {i}: the quick brown fox number {i % 7} jumps over" for i in range(24)]
CHOICES = ["lazy dogs", "the hills", "it then", "rests for hours"]
SEQUENCE_LENGTH = 32


class Alone:
    """One rank without a process group, for `writer.save`."""

    rank, world_size, is_main = 0, 1, True

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier test of this process may have been a rank: DeepSpeed leaves that in the environment."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/`, `outputs/tiny` as a run leaves it, and a float32 copy of its model."""
    import datasets

    folder = tmp_path_factory.mktemp("evaluate")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    write_corpus(folder)
    config = training_config.load(dotlist=tiny(folder, run__name="tiny", run__seed=5))
    data = prepare(config.data, report=lambda _: None)
    model = Llama(dataclasses.replace(resolve_shape(config), max_positions=256))
    initialize(model, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.ndim == 2 else 1  # else every token is about as likely as another
        # Bytes that are no character are written as one by a tokenizer, and held back by an endpoint.
        texts = Tokenizer.from_file(str(data / "tokenizer.json")).decode_batch([[i] for i in range(320)])
        model.model.embed_tokens.weight *= torch.tensor([[float(text.isascii())] for text in texts])
    run = config.run_directory
    identity = {
        "model": dataclasses.asdict(model.shape),
        "data fingerprint": Manifest.read(data).fingerprint,
    }
    writer.save(
        run / "checkpoints/step-0000004",
        shards=((name, 0, {"master": p.flatten()}) for name, p in model.named_parameters()),
        state={"step": 4, "identity": identity},
        context=Alone(),  # type: ignore[arg-type]
    )
    (run / "config.yaml").write_text(to_yaml(config))
    export(run, output=folder / "hf", dtype="float32")
    return folder


@pytest.fixture(scope="package")
def model(trained: Path) -> Llama:
    return load_hf(trained / "hf", dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def tokenizer(trained: Path) -> Tokenizer:
    return Tokenizer.from_file(str(trained / "hf/tokenizer.json"))


@pytest.fixture
def working_directory(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


@torch.no_grad()
def log_likelihood(model: Llama, context: list[int], continuation: list[int]) -> float:
    tokens = torch.tensor([context + continuation])
    chances = model(tokens[:, :-1])[0].log_softmax(-1)
    picked = chances[len(context) - 1 :].gather(1, tokens[0, len(context) :, None])
    return picked.sum().item()


def continuation_of(tokenizer: Tokenizer, context: str, text: str) -> tuple[list[int], list[int]]:
    whole, start = tokenizer.encode(f"{context} {text}").ids, tokenizer.encode(context).ids
    return whole[: len(start)], whole[len(start) :]


def greedy(model: Llama, tokenizer: Tokenizer, prompt: str, *, tokens: int) -> str:
    ids = tokenizer.encode(prompt).ids
    made = generate(model, torch.tensor(ids), num_tokens=tokens, temperature=0)
    return tokenizer.decode(made[len(ids) :].tolist())


def write_task(folder: Path, name: str, rows: list[dict], **keys: Any) -> Path:
    """A task whose data lie beside it."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.5},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task | keys))
    return file


def metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


@pytest.fixture(scope="package")
def tasks(trained: Path, model: Llama, tokenizer: Tokenizer) -> Path:
    """A folder of three tasks: `choose`, `continue` (log-likelihoods) and `complete` (generation)."""
    folder = trained / "tasks"
    rows = [{"question": q, "choices": CHOICES, "answer": i % 4} for i, q in enumerate(QUESTIONS)]
    write_task(
        folder, "choose", rows, output_type="multiple_choice", doc_to_choice="{{choices}}",
        doc_to_target="answer", metric_list=[metric("acc")],
    )  # fmt: skip
    rows = [{"question": q, "text": CHOICES[i % 4]} for i, q in enumerate(QUESTIONS)]
    write_task(
        folder, "continue", rows, output_type="loglikelihood", doc_to_target="{{' ' + text}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    )  # fmt: skip
    rows = []
    for i, question in enumerate(QUESTIONS[:8]):
        written = greedy(model, tokenizer, question, tokens=6)
        rows.append({"question": question, "text": written if i % 4 else f"not {written}"})
    write_task(
        folder, "complete", rows, output_type="generate_until", doc_to_target="{{text}}",
        generation_kwargs={"until": ["never written"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[metric("exact_match")],
    )  # fmt: skip
    group = {"group": "both", "task": ["choose", "copy"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    (folder / "_shared.yaml").write_text("description: a part that others may include\n")
    return folder


def evaluate(capsys: pytest.CaptureFixture, *keys: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(eval.json, the last line, all of stdout) of a command that succeeds."""
    code = main(list(keys))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    last = json.loads(captured.out.splitlines()[-1])
    return json.loads(Path(last["file"]).read_text()), last, captured.out


def scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {score["task"]: score for score in result["scores"]}


def refusal(capsys: pytest.CaptureFixture, keys: list[str]) -> str:
    """The one message of a command that is refused."""
    assert main(keys) == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line
