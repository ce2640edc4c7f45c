"""`make study`: optimizers compared at equal tuning effort, as Ray tasks, resumable.

    python -m training.study [--config FILE] [--dry-run] [key=value ...]

Without --config the study is training/configs/study.yaml. Every run is `python -m training.launch` in a
process of its own, with its run directory under `<directory>/<name>/runs`. The same command again runs what
is left and rewrites report.md, results.csv, results.json and figures/.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import RunError
from cluster.display import Table, show
from cluster.process import Child
from cluster.progress import Progress
from cluster.record import provenance
from cluster.record.provenance import commit_environment
from cluster.session import ROOT, ray_session, worker_environment
from training.data.dataset import Manifest
from training.data.prepare import prepare
from training.study.config import DEFAULT_FILE, StudyConfig, load
from training.study.plan import StudyPlan, describe_plan
from training.study.plots import plot_study
from training.study.publish import publish_study
from training.study.report import About, describe_study
from training.study.results import Result, RunFailure, StudyResults, read_result, write_tables
from training.study.runs import StudyRun, is_finished
from training.study.synthetic import report as synthetic_report
from training.study.synthetic.trials import run_synthetic

POLL_SECONDS = 1.0
LAST_LINES = 8  # of a failed run's log, in the report
LOST_RUN_RETRIES = 2  # by Ray, of a run whose node or worker died; a resumed run continues from a checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.study", description=__doc__.splitlines()[0], keys=StudyConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = load(file=options.config or DEFAULT_FILE, dotlist=options.overrides)
        plan = StudyPlan(config)
        plan.check()
        if options.dry_run:
            show(layered.to_yaml(config), _describe(plan))
            return
        run_study(plan, command=command_line(options))

    return cli.run(body)


def command_line(options: Any) -> str:
    """The command that repeats this study, for the report."""
    given = ["--config", str(options.config)] if options.config else []
    return " ".join(["python -m training.study", *given, *options.overrides])


def _describe(plan: StudyPlan) -> Table:
    return describe_plan(plan, measured_seconds(plan), parallel=parallel_runs(plan.config))


def measured_seconds(plan: StudyPlan) -> dict[str, float]:
    """Width -> mean seconds of its finished tuning runs, where there are any."""
    seconds = defaultdict(list)
    for run in plan.tuning_runs():
        result = read_result(plan, run)
        if result.seconds is not None:
            seconds[run.width].append(result.seconds)
    return {width: statistics.mean(values) for width, values in seconds.items()}


def parallel_runs(config: StudyConfig) -> int:
    """Runs at once on an embedded Ray: as configured, or as many as this process has CPUs for."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.parallel_runs or max(1, int(cpus / config.cpus_per_run))


def run_study(plan: StudyPlan, *, command: str) -> None:
    """Run what is left, write tables, figures and the report, and print where it is.

    Raises:
        RunError: a rule has no finished report run. Other failed runs are only reported.
    """
    directory = plan.config.study_directory
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / "study.yaml", layered.to_yaml(plan.config))
    data = prepare(plan.data_config, report=lambda line: print(line, file=sys.stderr))
    show(_describe(plan), file=sys.stderr)
    study = StudyResults(plan, execute(plan))
    fingerprint = Manifest.read(data).fingerprint
    about = About(
        command=command,
        data_fingerprint=fingerprint,
        provenance=provenance.collect(command=sys.argv, data_fingerprint=fingerprint),
    )
    report = describe_study(study, about=about, synthetic=run_synthetic_problem(plan.config))
    source = {"study": layered.to_dict(plan.config), **dataclasses.asdict(about)}
    write_tables(study, directory, about=source)
    plot_study(study, directory / "figures")
    files.write_text(directory / "report.md", report)
    for result in study.failed():
        print(f"{result.status}: {result.name}: {result.error}", file=sys.stderr)
    print(f"W&B: {publish_study(study, about=about, data=data)}")
    print(f"report: {directory / 'report.md'}")
    if missing := study.rules_without_a_result():
        raise RunError(
            f"no report run of {', '.join(missing)} finished; {directory / 'report.md'} says how each "
            "failed, and the same command again runs what is left"
        )


def run_synthetic_problem(config: StudyConfig) -> str | None:
    """The report's section on the synthetic problem, with a figure; None if it is not enabled."""
    if not config.synthetic.enabled:
        return None
    print("the synthetic problem", file=sys.stderr)
    result = run_synthetic(config.synthetic, report=lambda line: print(line, file=sys.stderr))
    figures = config.study_directory / "figures"
    figures.mkdir(exist_ok=True)
    synthetic_report.plot(result, figures / "synthetic.png")
    return synthetic_report.describe(result)


def execute(plan: StudyPlan) -> dict[StudyRun, Result]:
    """Read the finished runs, and run the others to their end as Ray tasks."""
    results: dict[StudyRun, Result] = {}
    if not _read_finished(plan, results):
        return results
    config = plan.config
    cpus = parallel_runs(config) * config.cpus_per_run
    environment = worker_environment(gpu=bool(config.gpus_per_run), threads=max(1, int(config.cpus_per_run)))
    resources = {"CPU": cpus if config.session.address == "local" else config.cpus_per_run}
    if config.gpus_per_run:
        resources["GPU"] = config.gpus_per_run
    worker_env = environment | commit_environment()
    with ray_session(config.session, resources=resources, worker_env=worker_env):
        _Scheduler(plan, results).run()
    return results


def _read_finished(
    plan: StudyPlan, results: dict[StudyRun, Result], *, running: Collection[StudyRun] = ()
) -> list[StudyRun]:
    """Add finished runs to `results`, and the runs that these make possible. Returns the runs to start."""
    left: list[StudyRun] = []
    while fresh := [run for run in StudyResults(plan, results).next_runs() if run not in {*left, *running}]:
        for run in fresh:
            if is_finished(plan.configs.directory(run)):
                results[run] = read_result(plan, run)
                _drop_checkpoints(plan, run)
            else:
                left.append(run)
    return left


def _drop_checkpoints(plan: StudyPlan, run: StudyRun) -> None:
    """A finished run needs no checkpoints, unless `keep_checkpoints` is set."""
    if not plan.config.keep_checkpoints:
        shutil.rmtree(plan.configs.directory(run) / "checkpoints", ignore_errors=True)


class _Scheduler:
    """Hands runs to Ray as soon as they can start, and follows them."""

    def __init__(self, plan: StudyPlan, results: dict[StudyRun, Result]) -> None:
        import ray

        self._ray = ray
        self._plan = plan
        self._results = results
        self._pending: dict[Any, StudyRun] = {}  # Ray's reference -> run
        config = plan.config
        self._task = ray.remote(
            num_cpus=config.cpus_per_run, num_gpus=config.gpus_per_run, max_retries=LOST_RUN_RETRIES
        )(train_in_process)

    def run(self) -> None:
        """Run until no run is left. If the study is interrupted, every run can be resumed."""
        total = sum(self._plan.plan_of(run).num_steps for run in self._plan.typical_runs())
        with Progress(total) as progress:
            steps = _Steps(self._plan, self._results)
            self._submit()
            while self._pending:
                ready, _ = self._ray.wait(list(self._pending), timeout=POLL_SECONDS)
                for reference in ready:
                    self._end(reference, progress)
                if ready:
                    self._submit()
                progress.update(steps.row(self._pending.values()))

    def _submit(self) -> None:
        for run in _read_finished(self._plan, self._results, running=set(self._pending.values())):
            log = self._plan.configs.directory(run) / "run.log"
            self._pending[self._task.remote(self._plan.configs.arguments(run), str(log))] = run

    def _end(self, reference: Any, progress: Progress) -> None:
        run = self._pending.pop(reference)
        result = read_result(self._plan, run, self._failure(reference))
        self._results[run] = result
        if result.ok:
            _drop_checkpoints(self._plan, run)
        num_runs = len(self._plan.typical_runs())
        loss = "-" if result.validation_loss is None else f"{result.validation_loss:.4f}"
        ending = f"validation loss {loss}" if result.ok else f"{result.status}: {result.error}"
        progress.note(f"{len(self._results)}/{num_runs} {result.name}: {ending}")

    def _failure(self, reference: Any) -> RunFailure | None:
        """How the run failed, or None."""
        from ray.exceptions import RayError

        try:
            exit_code, last_lines = self._ray.get(reference)
        except RayError as error:  # its node died, or its worker, more often than it is retried
            return RunFailure(None, str(error).splitlines()[0])
        return RunFailure(exit_code, last_lines) if exit_code else RunFailure(0, f"no summary; {last_lines}")


def train_in_process(arguments: Sequence[str], log: str) -> tuple[int, str]:
    """In a Ray task: one run in a process of its own, which ends with the task, even a cancelled one.

    Returns its exit code and the last lines of its log.
    """
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "training.launch", *arguments]
    with path.open("ab") as stream:
        stream.write(f"--- {json.dumps(launch)}\n".encode())
        stream.flush()
        with Child(launch, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream) as process:
            exit_code = process.wait()
    return exit_code, last_lines(path)


def last_lines(log: Path) -> str:
    """The end of a run's log in one line: its error, if there is one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return " | ".join(lines[errors[-1] :][:LAST_LINES] if errors else lines[-LAST_LINES:])


class _Steps:
    """Steps of all runs so far and their rate, for the progress line."""

    def __init__(self, plan: StudyPlan, results: dict[StudyRun, Result]) -> None:
        self._plan = plan
        self._results = results
        self._began: tuple[float, int] | None = None  # when the first row was asked for, and its steps

    def row(self, running: Iterable[StudyRun]) -> dict[str, Any]:
        """Steps of all runs together; since the first row also tokens per second and seconds per step."""
        ended = sum(self._plan.plan_of(run).num_steps for run in self._results)
        steps = ended + sum(last_step(self._plan.configs.directory(run) / "metrics.jsonl") for run in running)
        self._began = self._began or (time.monotonic(), steps)
        seconds, done = time.monotonic() - self._began[0], steps - self._began[1]
        if done <= 0:
            return {"step": steps}
        tokens_per_step = self._plan.plan_of(self._plan.tuning_runs()[0]).tokens_per_step
        rate = done / seconds
        return {"step": steps, "tokens_per_second": rate * tokens_per_step, "step_seconds": 1 / rate}


def last_step(metrics: Path, *, tail_bytes: int = 8192) -> int:
    """The step of the last whole row of a metrics.jsonl; 0 where there is none yet."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - tail_bytes))
        lines = stream.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0
