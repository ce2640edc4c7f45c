"""Scores tasks by lm-evaluation-harness, which it imports when called: a checkpoint here, or an endpoint."""

import copy
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from cluster.cli import RunError, UserError
from cluster.endpoint_client import KEY_VARIABLE, Endpoint
from cluster.runs import ModelDirectory
from cluster.session import environment
from training.evaluate import bars
from training.evaluate.harness import Tasks, short


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group.

    Attributes:
        filter: how answers were processed before scoring; "none": not at all.
        value, stderr: None if the harness has no finite one.
        samples: evaluated questions, of `of_samples`.
    """

    task: str
    version: str | None
    num_fewshot: int | None
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    samples: int | None
    of_samples: int | None
    group: bool


def local_model(model: ModelDirectory, *, device: str, dtype: str, batch_size: int) -> Any:
    """lm_eval's own Hugging Face model. Raises `UserError`: transformers cannot load the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    with _loading(model):
        return HFLM(pretrained=str(model.directory), device=device, dtype=dtype, batch_size=batch_size)


@contextmanager
def _loading(model: ModelDirectory) -> Iterator[None]:
    """Turns what transformers raises into a `UserError`: of a damaged tokenizer that is a plain Exception."""
    try:
        yield
    except Exception as error:
        raise UserError(f"model: {model.directory} cannot be loaded ({short(error)})") from error


def endpoint_model(
    endpoint: Endpoint, model: ModelDirectory | None, *, context_tokens: int, concurrency: int,
    chat: bool = False, batch_size: int = 1,
) -> Any:  # fmt: skip
    """lm_eval's client of an endpoint. Prompts are token ids if there is a tokenizer, else text.

    Args:
        model: what is served there, if known.
        context_tokens: most tokens of prompt and continuation; longer prompts lose their beginning.
        chat: send messages instead; the endpoint's template frames them.
        batch_size: prompts in one request.

    Raises:
        UserError: transformers cannot load the tokenizer.
    """
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    keys: dict[str, Any] = {"tokenizer_backend": "none", "tokenized_requests": False}
    if model is not None and not chat:
        from transformers import AutoTokenizer

        with _loading(model):
            tokenizer = AutoTokenizer.from_pretrained(model.directory)
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]  # what the local model does too
        keys = {
            "tokenizer_backend": "huggingface",
            "tokenizer": str(model.directory),
            "add_bos_token": begins,
        }
    client = LocalChatCompletion if chat else LocalCompletionsAPI
    return client(
        base_url=f"{endpoint.url}/{'chat/' * chat}completions",
        model=endpoint.model,
        num_concurrent=concurrency,
        max_length=context_tokens,
        batch_size=batch_size,
        **keys,
    )


def sent_options(client: Any, tasks: Tasks) -> Iterator[tuple[list[str], dict[str, Any], int]]:
    """(Tasks, the request that `client` would send for them, their stop strings) for each set of options."""
    by_options: dict[str, list[str]] = {}
    for name, options in tasks.options.items():
        by_options.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(name)
    for names in by_options.values():
        options = copy.deepcopy(tasks.options[names[0]])  # the client takes them apart
        stops = options.get("until") or []
        num_stops = 1 if isinstance(stops, str) else len(stops)
        yield names, client._create_payload([], generate=True, gen_kwargs=options), num_stops


def run_each(
    model: Any, tasks: Tasks, *, limit: int | None, bootstrap_iters: int, notes: Sequence[str],
    keep: Callable[[list[TaskScore], dict[str, str]], None],
) -> tuple[list[TaskScore], dict[str, str]]:  # fmt: skip
    """`run` of each task or group by itself: the scores, and the failures of those that have none.

    Args:
        notes: of `collected_notes`: the endpoint's words about a failed request.
        keep: told of all scores and failures so far after each but the last.

    Raises:
        UserError, RunError: of the first failure, if nothing has a score.
    """
    scores: dict[tuple[str, str, str], TaskScore] = {}
    failed: dict[str, str] = {}
    first: UserError | RunError | None = None
    for number, (spec, loaded) in enumerate(tasks.loaded.items(), start=1):
        try:
            found = run(model, loaded, limit=limit, bootstrap_iters=bootstrap_iters)
            scores |= {(one.task, one.metric, one.filter): one for one in found}
        except (UserError, RunError) as error:
            failed[spec] = f"{error}{_last_answer(notes)}"
            first = first or type(error)(failed[spec])
        if number < len(tasks.loaded):
            keep(list(scores.values()), failed)
    if first is not None and not scores:
        raise first
    return list(scores.values()), failed


def _last_answer(notes: Sequence[str]) -> str:
    """The endpoint's answer to a failed request. lm_eval logs it and does not raise it."""
    answers = [note for note in notes if note.startswith("API request failed")]
    return f": {answers[-1]}" if answers else ""


def run(model: Any, loaded: Mapping[str, Any], *, limit: int | None, bootstrap_iters: int) -> list[TaskScore]:
    """Every metric of every task, and of groups with metrics of their own.

    Args:
        limit: evaluate only the first questions of each task.
        bootstrap_iters: resamples for the standard error of a metric that is not a mean, such as perplexity.

    Raises:
        UserError: the endpoint refuses a request.
        RunError: the endpoint fails otherwise.
    """
    import aiohttp
    import numpy as np
    import requests
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    # It would resample in forks of this process, whose threads they lack; and it prints as it does so.
    alone = environment({"DISABLE_MULTIPROC": "1"})
    try:
        with alone, redirect_stdout(sys.stderr), bars.as_ours():
            results = evaluate(
                model, loaded, limit=limit, log_samples=False, bootstrap_iters=bootstrap_iters,
                apply_chat_template=isinstance(model, LocalChatCompletion),
            )  # fmt: skip
    except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
        raise _endpoint_failure(error) from error
    assert results is not None  # of another rank
    return list(_scores(results))


def _endpoint_failure(error: Any) -> UserError | RunError:
    response = getattr(error, "response", None)  # requests'; aiohttp's has the status itself
    status = int(getattr(error, "status", None) or getattr(response, "status_code", None) or 0)
    if 400 <= status < 500 and status != 429:
        hint = f"; the key is taken from {KEY_VARIABLE}" if status in (401, 403) else ""
        return UserError(f"endpoint: it refuses a request of these tasks ({short(error)}){hint}")
    return RunError(f"endpoint: it failed during the evaluation ({short(error)}); run the same again")


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for kind in ("results", "groups"):
        for task, entry in results.get(kind, {}).items():
            if kind == "results" and task in results.get("groups", {}):
                continue
            counts = results["n-samples"].get(task, {})
            version = results["versions"].get(task)
            for name, value in entry.items():
                metric, comma, chosen = name.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                yield TaskScore(
                    task=task,
                    version=None if version is None else str(version),
                    num_fewshot=results["n-shot"].get(task),
                    metric=metric,
                    filter=chosen,
                    value=_finite(value),
                    stderr=_finite(entry.get(f"{metric}_stderr,{chosen}")),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                    samples=counts.get("effective"),
                    of_samples=counts.get("original"),
                    group=kind == "groups",
                )


def _finite(value: Any) -> float | None:
    """The harness has "N/A" for a missing standard error."""
    number = None if isinstance(value, str) or value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
