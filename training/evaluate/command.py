"""`make eval`: standard benchmarks of a checkpoint, and its perplexity on held-out text.

    python -m training.evaluate [--config FILE] [--dry-run] [key=value ...]

The benchmarks are lm-evaluation-harness's, on the checkpoint here or through an endpoint that serves it; the
perplexity is of the validation split of the data that the run was trained on.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.masking import masked
from cluster.runs import NEWEST, ModelDirectory
from training.config import RunConfig
from training.evaluate import checkpoint as subject
from training.evaluate import config as evaluate_config
from training.evaluate import endpoint as completions
from training.evaluate import harness
from training.evaluate import report as evaluate_report
from training.evaluate.config import EvaluateConfig
from training.evaluate.endpoint import Endpoint
from training.evaluate.harness import Score, Sources, Tasks
from training.evaluate.report import Measured, last_line, table

if TYPE_CHECKING:
    import torch

    from training.evaluate.perplexity import HeldOut
    from training.model.llama import Llama

RESULT_FILE = "eval.json"
SEQUENCE_LENGTH = 1024  # where no run says another


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.evaluate", description=__doc__.splitlines()[0], keys=EvaluateConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = evaluate_config.load(file=options.config, dotlist=options.overrides)
        work = plan(config)
        if options.dry_run:
            print(f"{layered.to_yaml(config)}\n{work.describe()}")
            return
        result = run(config, work, report=lambda note: print(note, flush=True))
        print(table(result))
        print(json.dumps(last_line(result, work.output)))

    return cli.run(body)


@dataclasses.dataclass(frozen=True)
class Work:
    """What an evaluation consists of.

    Attributes:
        subject: the checkpoint; None for an endpoint whose model is not known here.
        endpoint: where to ask; None evaluates here.
        data: the prepared folder of the perplexity, or why there is none.
        output: the file of the result.
    """

    subject: ModelDirectory | None
    endpoint: Endpoint | None
    sources: Sources
    data: Path | str
    output: Path

    @property
    def name(self) -> str:
        """The model's, for people."""
        if self.subject is not None:
            return self.subject.name
        assert self.endpoint is not None
        return self.endpoint.model

    def describe(self) -> str:
        """What would be done, in lines."""
        where = f"{self.endpoint.model} at {self.endpoint.url}" if self.endpoint else "here"
        left_out = f"left out: {self.data}"
        return "\n".join(
            [
                f"model       {self.subject.describe() if self.subject else self.name}",
                f"evaluated   {where}",
                f"tasks       {self.sources.describe() or 'none'}",
                f"perplexity  {self.data if isinstance(self.data, Path) else left_out}",
                f"result      {self.output}",
            ]
        )


def plan(config: EvaluateConfig) -> Work:
    """Find everything that the keys name; an endpoint is asked what it serves. Changes nothing.

    Raises:
        UserError: something is not there, or nothing would be measured.
    """
    if config.tasks:
        harness.require_installed()
    endpoint = None
    if config.endpoint is not None:
        endpoint = completions.find(config.endpoint, model=config.endpoint_model)
    if endpoint is not None and config.model == NEWEST:
        found = subject.named(endpoint.model)
    else:
        found = subject.find(config.model)
    sources = harness.sort_out(config.tasks)
    data = _find_data(config, found)
    if not config.tasks and isinstance(data, str):
        raise UserError(f"tasks: none are named, and there is no perplexity to measure: {data}")
    return Work(found, endpoint, sources, data, _output(config, found, endpoint))


def _find_data(config: EvaluateConfig, found: ModelDirectory | None) -> Path | str:
    """The prepared folder for the perplexity, or why it is left out. Raises `UserError`: `data` is none."""
    if config.endpoint is not None:
        return "an endpoint is asked for tasks alone; evaluate the checkpoint here"
    if config.data is not None:
        from training.data.dataset import Manifest

        Manifest.read(Path(config.data).expanduser().absolute())
        return Path(config.data).expanduser().absolute()
    assert found is not None
    if found.run is None:
        return "the model is no run that says which data it was trained on; name prepared data with data=DIR"
    from training import config as training_config
    from training.model.export import CONFIG_FILE, find_data
    from training.run import checkpoint

    newest = checkpoint.newest_complete(found.run / "checkpoints", report=lambda _: None)
    if newest is None or not (found.run / CONFIG_FILE).is_file():
        return f"{found.run} has no config.yaml and checkpoint that say which data it used; name data=DIR"
    fingerprint = checkpoint.Checkpoint(newest).state["identity"]["data fingerprint"]
    try:
        run_config = training_config.load(file=found.run / CONFIG_FILE)
        return find_data(run_config, fingerprint=fingerprint, run=found.run)[0]
    except UserError as error:
        return str(error)


def _output(config: EvaluateConfig, found: ModelDirectory | None, endpoint: Endpoint | None) -> Path:
    if config.output is not None:
        return Path(config.output).expanduser().absolute()
    if found is not None and found.run is not None:
        return found.run / RESULT_FILE
    name = found.name if found is not None else endpoint.model if endpoint is not None else ""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
    return Path(RunConfig().directory).absolute() / f"eval-{plain}" / RESULT_FILE


def run(config: EvaluateConfig, work: Work, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Do the work and write its result, which is returned too.

    Raises:
        UserError, RunError: as the parts do; nothing is written.
    """
    _make_room(work.output)
    report(work.describe())
    measured = _with_tasks(config, work) if config.tasks else _here(config, work, tasks=None)
    found = work.subject
    result = evaluate_report.to_json(
        measured,
        model={
            "name": work.name,
            "directory": str(found.directory) if found else None,
            "run": str(found.run) if found and found.run else None,
        },
        endpoint=dataclasses.asdict(work.endpoint) if work.endpoint else None,
        left_out=work.data if isinstance(work.data, str) else None,
        config=layered.to_dict(config),
    )
    result = masked(result)  # the notes are lm_eval's and an endpoint's own words
    try:
        files.write_json(work.output, result)
    except OSError as error:
        raise UserError(
            f"output: {work.output} cannot be written ({error.strerror}); name another"
        ) from error
    return result


def _with_tasks(config: EvaluateConfig, work: Work) -> Measured:
    confined = harness.confined(work.sources, code=config.task_code)
    with harness.collected_notes() as notes, confined:
        tasks = harness.load(work.sources, num_fewshot=config.num_fewshot)
        try:
            measured = _asked(config, work, tasks) if work.endpoint else _here(config, work, tasks=tasks)
        except (UserError, RunError) as error:
            raise type(error)(f"{error}{_answer(notes)}") from error
    return dataclasses.replace(measured, notes=notes)


def _answer(notes: Sequence[str]) -> str:
    """What an endpoint answered to a request that failed, which lm_eval logs and does not raise."""
    told = [note for note in notes if note.startswith("API request failed")]
    return f": {told[-1]}" if told else ""


def _make_room(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"output: {output} is a folder; name a file, such as {output / RESULT_FILE}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output.parent} cannot be made ({error.strerror}); name another") from error


def _asked(config: EvaluateConfig, work: Work, tasks: Tasks) -> Measured:
    """The tasks through the endpoint. Raises `UserError`: they need what it cannot do."""
    assert work.endpoint is not None
    found, endpoint = work.subject, work.endpoint
    if needy := tasks.need_prompt_logprobs():
        names = ", ".join(needy)
        if problem := completions.echo_problem(endpoint):
            raise UserError(
                f"tasks: {names}: these need the log-probabilities of given text, which the endpoint does "
                f"not tell ({problem}); leave out endpoint to evaluate the checkpoint here, or name an "
                "endpoint with echo, such as that of `make serve`"
            )
        if found is None:
            raise UserError(
                f"model: {names}: these count the tokens of given text, so name the run or directory with "
                f"the tokenizer of {endpoint.model}"
            )
    context = endpoint.context_tokens
    if found is not None:
        subject.update(found)
        context = context or subject.check(found).max_positions
    model = harness.endpoint_model(endpoint, found, context_tokens=context, concurrency=config.concurrency)
    return Measured(_scores(config, model, tasks))


def _here(config: EvaluateConfig, work: Work, *, tasks: Tasks | None) -> Measured:
    """Perplexity and tasks of the checkpoint, on this machine."""
    import torch

    from training.model.attention import for_changing_lengths

    assert work.subject is not None
    device = _device(config.device)
    subject.update(work.subject)
    shape = subject.check(work.subject)
    dtype = _dtype(config.dtype, work.subject.directory, device)
    # transformers would fill what is missing in a damaged checkpoint with random numbers, and go on.
    model = _load(work.subject, dtype=getattr(torch, dtype))
    held_out = None
    if isinstance(work.data, Path):
        held_out = _perplexity(config, work, model.to(device), device=device)
    del model
    scores: list[Score] = []
    if tasks is not None:
        theirs = harness.local_model(
            work.subject, device=str(device), dtype=dtype, batch_size=config.batch_size
        )
        with for_changing_lengths():  # of requests, one prompt after another
            scores = _scores(config, theirs, tasks)
    setting = {"parameters": shape.num_parameters, "dtype": dtype, "device": str(device)}
    return Measured(scores, held_out, setting)


def _scores(config: EvaluateConfig, model: Any, tasks: Tasks) -> list[Score]:
    return harness.run(model, tasks, limit=config.limit, bootstrap_iters=config.bootstrap_iters)


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


def _perplexity(config: EvaluateConfig, work: Work, model: "Llama", *, device: "torch.device") -> "HeldOut":
    from training.evaluate import perplexity

    assert work.subject is not None and isinstance(work.data, Path)
    perplexity.check_tokenizer(work.data, checkpoint=work.subject.directory)
    return perplexity.measure(
        model,
        work.data,
        sequences=config.sequences,
        sequence_length=config.sequence_length or _sequence_length(work.subject, model),
        batch_size=config.batch_size,
        device=device,
    )


def _sequence_length(found: ModelDirectory, model: "Llama") -> int:
    from training import config as training_config
    from training.model.export import CONFIG_FILE

    if found.run is not None and (found.run / CONFIG_FILE).is_file():
        return training_config.load(file=found.run / CONFIG_FILE).batch.sequence_length
    return min(SEQUENCE_LENGTH, model.shape.max_positions)


if __name__ == "__main__":
    sys.exit(main())
