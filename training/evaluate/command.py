"""`make eval`: standard benchmarks of a checkpoint, and its perplexity on held-out text.

    python -m training.evaluate [--config FILE] [--dry-run] [key=value ...]

The benchmarks are lm-evaluation-harness's, on the checkpoint here or through an endpoint that serves it; the
perplexity is of the validation split of the data that the run was trained on.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import cli, endpoint_client, files
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.display import Table, pairs, show
from cluster.endpoint_client import KEY_VARIABLE, Endpoint
from cluster.masking import masked
from cluster.record import origins
from cluster.record.origins import Origin
from cluster.record.result import record_result
from cluster.runs import CONFIG_FILE, NEWEST, ModelDirectory
from training import config as training_config
from training.config import RunConfig
from training.evaluate import checkpoint, harness, scoring
from training.evaluate.config import EvaluateConfig
from training.evaluate.endpoint import echo_problem, option_problem
from training.evaluate.harness import Sources, Tasks
from training.evaluate.report import Measured, last_line, table, to_json
from training.evaluate.scoring import TaskScore

if TYPE_CHECKING:
    import torch

    from training.evaluate.perplexity import HeldOut
    from training.model.llama import Llama

RESULT_FILE = "eval.json"
# `scoring.run_each` of the tasks; the model and `keep` are to be given.
Score = Callable[..., tuple[list[TaskScore], dict[str, str]]]
SEQUENCE_LENGTH = 1024  # where there is no run that sets one


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.evaluate", description=__doc__.splitlines()[0], keys=EvaluateConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = layered.load(EvaluateConfig, file=options.config, dotlist=options.overrides)
        evaluation = plan(config)
        if options.dry_run:
            show(layered.to_yaml(config), evaluation.describe())
            return
        result = run(config, evaluation, report=show)
        show(*table(result), f"W&B: {record(config, evaluation, result)}")
        print(json.dumps(last_line(result, evaluation.output)))
        if result["failed"]:
            failed = "; ".join(f"{task}: {why}" for task, why in result["failed"].items())
            raise RunError(f"tasks failed: {failed}. The results of the others are in {evaluation.output}")

    return cli.run(body)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation consists of.

    Attributes:
        model: None for an endpoint whose model is not known here.
        endpoint: where to send requests; None evaluates here.
        data: the prepared folder for the perplexity, or why there is none.
        output: the file of the result.
        served: what the endpoint says of its model's lineage.
    """

    model: ModelDirectory | None
    endpoint: Endpoint | None
    sources: Sources
    data: Path | str
    output: Path
    served: Any = None

    @property
    def name(self) -> str:
        """The model's, for people."""
        if self.model is not None:
            return self.model.name
        assert self.endpoint is not None
        return self.endpoint.model

    def describe(self) -> Table:
        """The plan for people."""
        where = f"{self.endpoint.model} at {self.endpoint.url}" if self.endpoint else "here"
        return pairs(
            [
                ("model", self.model.describe() if self.model else self.name),
                ("evaluated", where),
                ("tasks", self.sources.describe() or "none"),
                ("perplexity", self.data if isinstance(self.data, Path) else f"left out: {self.data}"),
                ("result", self.output),
            ]
        )


def plan(config: EvaluateConfig) -> Evaluation:
    """Find everything that the keys name; ask an endpoint what it serves. Changes nothing.

    Raises:
        UserError: something is missing, or there is nothing to measure.
    """
    if config.tasks:
        harness.require_installed()
    endpoint: Endpoint | None = None
    listed: Mapping[str, Any] = {}
    if config.endpoint is not None:
        endpoint, listed = endpoint_client.find(
            config.endpoint, model=config.endpoint_model, context_tokens=config.endpoint_context_tokens
        )
    if endpoint is not None and config.model == NEWEST:
        model = checkpoint.named(endpoint.model)
    else:
        model = checkpoint.find(config.model)
    sources = harness.sort_out(config.tasks)
    data = _find_data(config, model)
    if not config.tasks and isinstance(data, str):
        raise UserError(f"tasks: none are named, and there is no perplexity to measure: {data}")
    output = _output(config, model, endpoint)
    return Evaluation(model, endpoint, sources, data, output, served=listed.get("lineage"))


def _find_data(config: EvaluateConfig, model: ModelDirectory | None) -> Path | str:
    """The prepared folder for the perplexity, or why there is none. Raises `UserError`: `data` is not one."""
    if config.endpoint is not None:
        return "an endpoint is evaluated by tasks alone; evaluate the checkpoint here"
    if config.data is not None:
        from training.data.dataset import Manifest

        folder = Path(config.data).expanduser().absolute()
        Manifest.read(folder)
        return folder
    assert model is not None
    if model.run is None:
        return "the model is not a run, so its training data are unknown; name prepared data with data=DIR"
    from training.run.checkpoint import Checkpoint, newest_complete
    from training.run.export import find_data

    newest = newest_complete(model.run / "checkpoints", report=lambda _: None)
    if newest is None or not (model.run / CONFIG_FILE).is_file():
        return f"{model.run} has no {CONFIG_FILE} or checkpoint that says which data it used; name data=DIR"
    fingerprint = Checkpoint(newest).state["identity"]["data fingerprint"]
    try:
        run_config = training_config.load(file=model.run / CONFIG_FILE)
        return find_data(run_config, fingerprint=fingerprint, run=model.run)[0]
    except UserError as error:
        return str(error)


def _output(config: EvaluateConfig, model: ModelDirectory | None, endpoint: Endpoint | None) -> Path:
    if config.output is not None:
        return Path(config.output).expanduser().absolute()
    if model is not None and model.run is not None:
        return model.run / RESULT_FILE
    name = model.name if model is not None else endpoint.model if endpoint is not None else ""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return Path(RunConfig().directory).absolute() / f"eval-{plain}" / RESULT_FILE


def run(config: EvaluateConfig, evaluation: Evaluation, *, report: Callable[[Table], None]) -> dict[str, Any]:
    """Evaluate, write the result and return it.

    Raises:
        UserError, RunError: as the parts do; nothing is written.
    """
    _make_folder(evaluation.output)
    report(evaluation.describe())

    def keep(measured: Measured) -> dict[str, Any]:
        result = _result(config, evaluation, measured)
        try:
            files.write_json(evaluation.output, result)
        except OSError as error:
            raise UserError(
                f"output: {evaluation.output} cannot be written ({error.strerror}); name another"
            ) from error
        return result

    if not config.tasks:
        return keep(_here(config, evaluation, None, lambda measured: None))
    return keep(_with_tasks(config, evaluation, keep))


def _result(config: EvaluateConfig, evaluation: Evaluation, measured: Measured) -> dict[str, Any]:
    """The content of the file, masked: the notes are lm_eval's and an endpoint's own words."""
    model = evaluation.model
    return masked(
        to_json(
            measured,
            model={
                "name": evaluation.name,
                "directory": str(model.directory) if model else None,
                "run": str(model.run) if model and model.run else None,
            },
            endpoint=dataclasses.asdict(evaluation.endpoint) if evaluation.endpoint else None,
            left_out=evaluation.data if isinstance(evaluation.data, str) else None,
            config=layered.to_dict(config),
            inputs=_origins(evaluation, measured),
        )
    )


def record(config: EvaluateConfig, evaluation: Evaluation, result: dict[str, Any]) -> str:
    """Record an evaluation as a run of its own, beside the file of the result. Returns W&B's status."""
    columns = tuple(field.name for field in dataclasses.fields(TaskScore))
    scores = [[score[column] for column in columns] for score in result["scores"]]
    held_out = {key: value for key, value in result["perplexity"].items() if isinstance(value, int | float)}
    return record_result(
        evaluation.output.with_suffix(""), job_type="evaluation", name=f"eval-{evaluation.name}",
        project=config.project, wandb_mode=config.wandb, config=result["config"],
        provenance=result["provenance"], inputs=result["provenance"].get("inputs", []),
        summary={**held_out, **last_line(result, evaluation.output)},
        tables={"scores_table": (columns, scores)} if scores else {}, attachments=[evaluation.output],
    )  # fmt: skip


def _origins(evaluation: Evaluation, measured: Measured) -> list[Origin]:
    """Of the model, as the endpoint names it where there is one, and of the held-out data."""
    endpoint, model, data = evaluation.endpoint, evaluation.model, evaluation.data
    made = [origins.of_endpoint(endpoint.model, endpoint.url, evaluation.served)] if endpoint else []
    if endpoint is None and model is not None:
        made.append(origins.of_model(model.directory))
    if measured.held_out is not None and isinstance(data, Path):
        made.append(origins.of_dataset(data, measured.held_out.data_fingerprint))
    return made


def _with_tasks(config: EvaluateConfig, evaluation: Evaluation, keep: Callable[[Measured], Any]) -> Measured:
    confined = harness.confined(evaluation.sources, code=config.task_code)
    with harness.collected_notes() as notes, confined:
        tasks = harness.load(evaluation.sources, num_fewshot=config.num_fewshot)
        score = partial(
            scoring.run_each, tasks=tasks, limit=config.limit, bootstrap_iters=config.bootstrap_iters,
            notes=notes,
        )  # fmt: skip
        if evaluation.endpoint:
            measured = _through_endpoint(config, evaluation, tasks, score, keep)
        else:
            measured = _here(config, evaluation, score, keep)
    return dataclasses.replace(measured, notes=notes)


def _make_folder(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"output: {output} is a folder; name a file, such as {output / RESULT_FILE}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output.parent} cannot be made ({error.strerror}); name another") from error


def _through_endpoint(
    config: EvaluateConfig,
    evaluation: Evaluation,
    tasks: Tasks,
    score: Score,
    keep: Callable[[Measured], Any],
) -> Measured:
    """The tasks through the endpoint. Raises `UserError`: they need what it cannot do."""
    assert evaluation.endpoint is not None
    model, endpoint, chat = evaluation.model, evaluation.endpoint, config.endpoint_api == "chat"
    if needy := tasks.need_prompt_logprobs():
        names = ", ".join(needy)
        if chat:
            raise UserError(
                f"tasks: {names}: these need the log-probabilities of given text, which no chat returns; use "
                "endpoint_api=completions"
            )
        if problem := echo_problem(endpoint):
            raise UserError(
                f"tasks: {names}: these need the log-probabilities of given text, which the endpoint does "
                f"not return ({problem}); leave out endpoint to evaluate the checkpoint here, or name an "
                "endpoint with echo, such as that of `make serve`"
            )
        if model is None:
            raise UserError(
                f"model: {names}: these count the tokens of given text, so name the run or directory with "
                f"the tokenizer of {endpoint.model}"
            )
    context = endpoint.context_tokens
    if model is not None:
        checkpoint.export_if_stale(model)
        context = context or checkpoint.shape_of(model).max_positions
    if context is None:
        raise UserError(
            f"endpoint_context_tokens: {endpoint.url} does not say how many tokens of prompt and answer "
            f"{endpoint.model} holds; give the number, or name the model that is served there"
        )
    client = scoring.endpoint_model(
        endpoint, model, context_tokens=context, concurrency=config.concurrency, chat=chat,
        batch_size=config.endpoint_batch,
    )  # fmt: skip
    problems = [
        f"{', '.join(names)} ({problem})"
        for names, payload, num_stops in scoring.sent_options(client, tasks)
        if (problem := option_problem(endpoint, payload, num_stops=num_stops))
    ]
    if problems:
        raise UserError(
            f"tasks: the endpoint does not take the options of {'; '.join(problems)}; change "
            f"generation_kwargs in their files, or leave the tasks out. A key is taken from {KEY_VARIABLE}"
        )
    return _scored(Measured(), score(client, keep=lambda *so_far: keep(_scored(Measured(), so_far))))


def _scored(measured: Measured, scored: tuple[list[TaskScore], dict[str, str]]) -> Measured:
    return dataclasses.replace(measured, scores=scored[0], failed=scored[1])


def _here(
    config: EvaluateConfig, evaluation: Evaluation, score: Score | None, keep: Callable[[Measured], Any]
) -> Measured:
    """Perplexity and tasks of the checkpoint, on this machine."""
    import torch

    from training.model.attention import for_changing_lengths

    found = evaluation.model
    assert found is not None
    device = _device(config.device)
    checkpoint.export_if_stale(found)
    shape = checkpoint.shape_of(found)
    dtype = _dtype(config.dtype, found.directory, device)
    # transformers would fill the gaps of a damaged checkpoint with random numbers, and go on.
    model = _load(found, dtype=getattr(torch, dtype))
    held_out = None
    if isinstance(evaluation.data, Path):
        held_out = _perplexity(config, found, evaluation.data, model.to(device), device=device)
    del model
    setting = {"parameters": shape.num_parameters, "dtype": dtype, "device": str(device)}
    measured = Measured(held_out=held_out, setting=setting)
    if score is not None:
        theirs = scoring.local_model(found, device=str(device), dtype=dtype, batch_size=config.batch_size)
        with for_changing_lengths():  # of requests, one prompt after another
            scored = score(theirs, keep=lambda *so_far: keep(_scored(measured, so_far)))
        measured = _scored(measured, scored)
    return measured


def _device(name: str) -> "torch.device":
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("device: torch sees no GPU here; set device=cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _dtype(name: str, directory: Path, device: "torch.device") -> str:
    """bfloat16 or float32; 'auto' is what config.json says, with bfloat16 for any half precision.

    A CPU without bf16 arithmetic computes in float32: to widen bf16 weights changes none of them.
    """
    from optim.precision import compute_dtype

    native = str(compute_dtype(device)).removeprefix("torch.")
    if name == "bfloat16" and native != name:
        raise UserError("dtype: bfloat16, but this CPU has no bf16 arithmetic; use dtype=auto or float32")
    if name != "auto":
        return name
    config = files.read_json(directory / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return native if stored in ("bfloat16", "float16") else "float32"


def _load(found: ModelDirectory, *, dtype: "torch.dtype") -> "Llama":
    from training.model.llama import load_hf

    try:
        return load_hf(found.directory, dtype=dtype).eval()
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def _perplexity(
    config: EvaluateConfig, found: ModelDirectory, data: Path, model: "Llama", *, device: "torch.device"
) -> "HeldOut":
    from training.evaluate import perplexity

    perplexity.check_tokenizer(data, checkpoint=found.directory)
    return perplexity.measure(
        model,
        data,
        sequences=config.sequences,
        sequence_length=config.sequence_length or _sequence_length(found, model),
        batch_size=config.batch_size,
        device=device,
    )


def _sequence_length(found: ModelDirectory, model: "Llama") -> int:
    if found.run is not None and (found.run / CONFIG_FILE).is_file():
        return training_config.load(file=found.run / CONFIG_FILE).batch.sequence_length
    return min(SEQUENCE_LENGTH, model.shape.max_positions)
