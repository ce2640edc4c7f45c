"""EleutherAI's lm-evaluation-harness on our checkpoints. Imports it when called; it is in the extra `eval`.

https://github.com/EleutherAI/lm-evaluation-harness. We call its `evaluate` and not `simple_evaluate`, which
asks the hub about the model and lists everything that is installed.
"""

import difflib
import gc
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.cli import UserError
from cluster.session import environment

INSTALL = 'pip install -c constraints.txt -e ".[eval]"'
NEEDED = ("lm_eval", "transformers", "accelerate", "datasets", "requests", "tenacity")
PACKAGES = NEEDED[:4]  # of the provenance
UNCOUNTED = {  # read by `datasets` and `evaluate` when they are imported
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
MOST_CHARACTERS = 400  # of another library's message in ours
MOST_NOTES = 20
_RUNS_CODE = "runs Python code; if you trust it, set task_code=true"


@dataclass(frozen=True)
class Tasks:
    """Tasks that are loaded, data and all.

    Attributes:
        loaded: name of a task or group -> what lm_eval's `TaskManager.load` returns for it.
        requests: task -> the kinds of its requests, such as "loglikelihood" and "generate_until".
        options: task -> the options of its generation, if it has any.
    """

    loaded: dict[str, dict[str, Any]]
    requests: dict[str, set[str]]
    options: dict[str, dict[str, Any]]

    def need_prompt_logprobs(self) -> list[str]:
        """Tasks that need the probability of given text, not only generated text."""
        return [name for name, kinds in self.requests.items() if kinds != {"generate_until"}]


@dataclass(frozen=True)
class Sources:
    """What the items of the key `tasks` are.

    Attributes:
        names: of tasks and groups, lm_eval's own or in the folders.
        files: task YAMLs.
        folders: folder -> its tasks, and the file of each.
        beside_groups: folders of group YAMLs. `names` contains the groups; their tasks may stand there too.
    """

    names: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    folders: dict[Path, dict[str, Path]] = field(default_factory=dict)
    beside_groups: list[Path] = field(default_factory=list)

    def describe(self) -> str:
        """One line for people."""
        inside = [f"{name} ({file})" for tasks in self.folders.values() for name, file in tasks.items()]
        return ", ".join([*self.names, *map(str, self.files), *inside])


@contextmanager
def confined(sources: Sources, *, code: bool) -> Iterator[None]:
    """In a `with` block, task files run no code; lm_eval's own tasks run theirs.

    lm_eval imports what a file's `!function` names, and Hugging Face's `evaluate` runs a metric's script;
    both are a `UserError` here. A Jinja template can reach Python's internals; here it cannot.

    Args:
        code: the user trusts the files (the key `task_code`): only the templates are confined.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.api import metrics as _  # noqa: F401  (fills the registry)
    from lm_eval.api import registry, task
    from lm_eval.tasks import _yaml_loader

    plain, load_function, get_metric = utils.env, _yaml_loader._import_func_in_yml, task.get_metric
    own = Path(_yaml_loader.__file__).resolve().parent

    def own_function(name: str, folder: Path) -> Any:
        if not folder.is_relative_to(own):
            raise UserError(f"!function {name} in {folder} {_RUNS_CODE}")
        return load_function(name, folder)

    def registered_metric(name: str, hf_evaluate_metric: bool = False) -> Any:
        if hf_evaluate_metric or name not in registry.metric_registry:
            raise UserError(f"metric {name}, which is not one of lm_eval's, {_RUNS_CODE}")
        return get_metric(name)

    utils.env = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    utils.env.filters = plain.filters
    try:
        if not code:
            _yaml_loader._import_func_in_yml = own_function
            if sources.files or sources.folders or sources.beside_groups:
                task.get_metric = registered_metric
        yield
    finally:
        utils.env, _yaml_loader._import_func_in_yml, task.get_metric = plain, load_function, get_metric


def require_installed() -> None:
    """Raise a `UserError` unless lm_eval is here, with what it needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"tasks: {', '.join(missing)} not installed; {INSTALL}")


def sort_out(items: Sequence[str]) -> Sources:
    """What each item of the key `tasks` is; files and folders are read, names are not looked up.

    Raises:
        UserError: a file is missing or no task YAML, or a folder holds none.
    """
    sources = Sources()
    for item in dict.fromkeys(items):
        path = Path(item).expanduser().absolute()
        if path.is_dir():
            sources.folders[path] = _tasks_in(path)
        elif path.suffix in (".yaml", ".yml"):
            content = _read(path)
            if isinstance(content.get("group"), str):
                sources.names.append(content["group"])  # lm_eval loads a group by its name alone
                sources.beside_groups.append(path.parent)
            elif "task" in content:
                sources.files.append(path)
            else:
                raise UserError(f"tasks: {path} has neither the key task nor group; is it a task file?")
        else:
            sources.names.append(item)
    return sources


def _tasks_in(folder: Path) -> dict[str, Path]:
    """Task -> its file. Groups are left out, because they would run their tasks once more."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        name = _read(file).get("task")  # a group's is a list; a part that others include has none
        if not isinstance(name, str):
            continue
        if name in found:
            raise UserError(f"tasks: {file} and {found[name]} both say task: {name}; rename one")
        found[name] = file
    if not found:
        raise UserError(f"tasks: {folder} holds no task YAML (*.yaml with the key task)")
    return found


def _read(file: Path) -> dict[str, Any]:
    """The content of a task file, with what it includes."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from yaml import YAMLError

    try:
        return load_yaml(file, resolve_func=False)
    except (OSError, ValueError, TypeError, YAMLError) as error:
        raise UserError(f"tasks: {file} is no usable task YAML ({short(error)}); mend the file") from error


def load(sources: Sources, *, num_fewshot: int | None) -> Tasks:
    """Load tasks and their data, and build the first request of each as a check.

    Args:
        num_fewshot: replaces the tasks' own number of examples, except a task's explicit 0.

    Raises:
        UserError: an unknown name, an unusable task file, data that cannot be loaded, or a task that runs
            code of the model. Names the task.
    """
    manager = _manager(sources)
    loaded: dict[str, dict[str, Any]] = {}
    for spec in _specs(sources, manager):
        try:
            loaded[spec] = manager.load([spec])
        except Exception as error:  # of YAML, Jinja, datasets, the network: all that a task file can say
            raise UserError(
                f"tasks: {spec} cannot be loaded ({short(error)}); mend its YAML or its data. The data of "
                "lm_eval's own tasks come from the Hugging Face hub: without a network, name task files "
                "whose data are local"
            ) from error
    loaded = _once_each(loaded)
    every = {name: task for found in loaded.values() for name, task in found["tasks"].items()}
    requests = {name: _prepare(name, task, num_fewshot) for name, task in every.items()}
    options: dict[str, dict[str, Any]] = {
        name: instance.args[1]
        for name, task in every.items()
        for instance in task.instances[:1]
        if instance.request_type == "generate_until"
    }
    return Tasks(loaded, requests, options)


def _once_each(loaded: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Without tasks that a group has, or an earlier one, already."""
    kept: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for spec in sorted(loaded, key=lambda spec: not loaded[spec].get("groups")):  # groups need all of theirs
        found = loaded[spec]
        tasks = {
            name: task for name, task in found["tasks"].items() if found.get("groups") or name not in seen
        }
        seen |= set(tasks)
        if tasks:
            kept[spec] = {**found, "tasks": tasks}
    return {spec: kept[spec] for spec in loaded if spec in kept}


def _manager(sources: Sources) -> Any:
    from lm_eval.tasks import TaskManager

    local = set().union(*sources.folders.values())
    # The index of its own tasks, of thousands of files, can take half a minute.
    own = not set(sources.names) <= local
    return TaskManager(include_path=[*sources.folders, *sources.beside_groups], include_defaults=own)


def _specs(sources: Sources, manager: Any) -> list[str]:
    """What lm_eval is to load: names (patterns expanded) and files."""
    specs = []
    for name in sources.names:
        known = manager.match_tasks([name])
        if not known:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            guess = f"; is it {' or '.join(close)}?" if close else ""
            raise UserError(
                f"tasks: {name!r} is no file, no folder, and no task of lm_eval's{guess} "
                "`.venv/bin/lm_eval ls tasks` lists those"
            )
        specs += known
    inside = [name for tasks in sources.folders.values() for name in tasks]
    return list(dict.fromkeys([*specs, *map(str, sources.files), *inside]))


def _prepare(name: str, task: Any, num_fewshot: int | None) -> set[str]:
    """Set a task's number of examples; returns the kinds of its requests."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"tasks: {name} runs the code that a model writes, which this command does not do")
    own = task.get_config("num_fewshot")
    shots = own if num_fewshot is None or own == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar of one step
            task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # a field that the data lack, a template that fails, too few examples
        raise UserError(f"tasks: {name} makes no request of its data ({short(error)}); mend it") from error
    if not task.instances:
        raise UserError(f"tasks: {name} has no questions; check its split and its data")
    return {instance.request_type for instance in task.instances}


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Collect lm_eval's warnings in a `with` block, each once, instead of printing them.

    Also stops `datasets` from reporting each load, even of local files, to a server.
    """
    import datasets

    notes: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note = short(record.getMessage())
            if note not in notes and len(notes) < MOST_NOTES:
                notes.append(note)

    logger, keep = logging.getLogger("lm_eval"), Keep(logging.WARNING)
    propagated = logger.propagate
    logger.addHandler(keep)
    logger.propagate = False
    bars, counts = datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    unasked, quiet = logging.getLogger("asyncio"), _one_of_many
    unasked.addFilter(quiet)
    try:
        with environment(UNCOUNTED):
            yield notes
    finally:
        gc.collect()  # such failures are reported when their tasks are collected
        unasked.removeFilter(quiet)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        logger.removeHandler(keep)
        logger.propagate = propagated
        if not bars:
            datasets.enable_progress_bars()


def _one_of_many(record: logging.LogRecord) -> bool:
    """Leaves out further failures of requests that lm_eval sent at once: it raises the first alone."""
    return "exception was never retrieved" not in record.getMessage()


def short(error: object) -> str:
    """Another library's message in one line, with the exception's name before it."""
    text = " ".join(str(error).split())
    name = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return f"{name}{text}"[:MOST_CHARACTERS]
