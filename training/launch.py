"""`make train`: configuration -> plan -> data -> workers -> summary.

    python -m training.launch [--config FILE] [--dry-run] [--cluster CLUSTER.yaml] [key=value ...]
    torchrun --nproc-per-node=2 -m training.launch launcher=torch [key=value ...]

Running the same command again resumes the run from its newest complete checkpoint.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import RunError, UserError
from cluster.laptop import inventory, remote
from cluster.progress import Progress
from cluster.record import follow
from cluster.session import set_defaults, worker_environment
from training import config as training_config
from training.config import TrainConfig
from training.plan import Plan, make_plan, run_identity
from training.run import checkpoint, workers
from training.run.plots import plot_losses
from training.run.spent import Spent


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.launch", description=__doc__.splitlines()[0], keys=TrainConfig())
    parser.add_argument(
        "--cluster", type=Path, metavar="CLUSTER.yaml", help="train there: submit, and follow (README)"
    )
    parser.add_argument(
        "--skip-preflight",
        action="store_true",
        help="with --cluster: train on nodes that failed it, or untested",
    )
    options = parser.parse_args(arguments)

    def body() -> None:
        there = _on_cluster(options.cluster) if options.cluster else ()
        given = {"file": options.config, "dotlist": [*there, *options.overrides]}
        config = training_config.load(**given)
        plan = make_plan(config)
        if options.dry_run:
            print(f"{layered.to_yaml(config)}\n{plan.describe()}")
        elif options.cluster:
            remote.start(
                options.cluster,
                run=config.run.name,
                module="training.launch",
                config=layered.to_yaml(training_config.load(**given, settle=False)),
                skip_preflight=options.skip_preflight,
            )
        elif config.launcher == "torch":
            run_torch(config, plan)
        else:
            run_ray(config, plan)

    return cli.run(body)


def _on_cluster(cluster: Path) -> tuple[str, ...]:
    """Keys of every run on this cluster, unless the command line says otherwise."""
    storage = inventory.load(cluster).storage
    places = (f"run.directory={storage}/outputs", f"data.directory={storage}/data")
    return ("session.address=auto", *places, f"record.ceilings={storage}/preflight.json")


def run_ray(config: TrainConfig, plan: Plan) -> None:
    """Train on Ray Train workers; this process prepares, follows and prints."""
    spent = Spent()
    # Workers have another working directory, where a relative path would be another place.
    config = replace(config, run=replace(config.run, directory=str(config.run_directory.parent)))
    print(plan.describe(), flush=True)
    with Progress(plan.num_steps) as progress:
        with spent.part("data"):
            start = prepare_run(config, plan, report=progress.note)
        if start is None:
            return
        with ExitStack() as stack:
            with spent.part("Ray"):
                stack.enter_context(workers.session(config))
            stack.enter_context(_Follower(config, progress, start=start))
            stack.enter_context(_NodeWatch(config, report=progress.note))
            _fit(config, start.data)
    finish_run(config, spent, rest="workers")


def _fit(config: TrainConfig, data: Path) -> None:
    """One Ray Train run, to its end."""
    directory = config.run_directory
    arguments = {"config": config, "data": data, "command": sys.argv}
    try:
        workers.run(_ray_worker, arguments, workers=config.workers, directory=directory)
    except RunError as error:
        raise RunError(
            f"training failed: {error}\nthe whole traceback is in {directory / 'failure.log'}; "
            "run the same command again to resume from the newest checkpoint"
        ) from error


def _ray_worker(arguments: dict[str, Any]) -> None:
    from training.run.context import RayContext
    from training.run.loop import train

    config: TrainConfig = arguments["config"]
    train(
        config,
        data=arguments["data"],
        command=arguments["command"],
        context=RayContext.create(gpu=config.workers.gpu),
        observe=lambda row: None,  # the driver reads metrics.jsonl
    )


def run_torch(config: TrainConfig, plan: Plan) -> None:
    """Train in this process, as one rank of torchrun or alone."""
    spent = Spent()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.workers.count:
        raise UserError(
            f"workers.count: {config.workers.count}, but torchrun started {world_size} processes; "
            f"set workers.count={world_size} or --nproc-per-node={config.workers.count}"
        )
    set_defaults(worker_environment(gpu=config.workers.gpu, threads=max(1, int(config.workers.cpus))))
    import torch

    from training.run.context import Ranks, torch_context
    from training.run.loop import train

    if not config.workers.gpu:
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    ranks = Ranks.meet()
    with Progress(plan.num_steps) as progress:
        if ranks.rank == 0:
            progress.note(plan.describe())
        with spent.part("data"):
            start = ranks.on_main(lambda: prepare_run(config, plan, report=progress.note))
        if start is None:
            return
        with torch_context(ranks, gpu=config.workers.gpu) as context:
            show = _Show(config, progress)
            train(config, data=start.data, command=sys.argv, context=context, observe=show)
    if ranks.rank == 0:
        finish_run(config, spent, rest="other")


@dataclass(frozen=True)
class Start:
    """Where a run begins: its prepared data, and the step of the checkpoint that it continues (or 0)."""

    data: Path
    step: int


def prepare_run(config: TrainConfig, plan: Plan, *, report: Callable[[str], None]) -> Start | None:
    """Everything before the first worker: data, run directory, and whether there is anything left to do.

    Returns None if the run is already complete.
    """
    from training.data.dataset import TokenDataset, require_tuning_sequences
    from training.data.prepare import prepare

    directory = config.run_directory
    newest = checkpoint.newest_complete(directory / "checkpoints", report=report)
    saved = checkpoint.Checkpoint(newest) if newest else None
    if saved and saved.state["step"] >= plan.num_steps and (directory / "summary.json").exists():
        report(f"{directory} is complete at step {saved.state['step']}; to train on, raise schedule.tokens")
        return None
    data = prepare(config.data, report=report).absolute()
    length = config.batch.sequence_length
    manifest = TokenDataset.open(data, split="train", sequence_length=length).manifest
    validation = TokenDataset.open(data, split="validation", sequence_length=length)
    evaluation = config.evaluation
    require_tuning_sequences(
        validation, sequences=evaluation.sequences, tuning_sequences=evaluation.tuning_sequences
    )
    if manifest.vocab_size > plan.shape.vocab_size:
        raise UserError(
            f"model.vocab_size: {plan.shape.vocab_size}, but the tokenizer of {data} has "
            f"{manifest.vocab_size} tokens; set model.vocab_size to at least that"
        )
    if saved:
        saved.check_identity(run_identity(config, plan, fingerprint=manifest.fingerprint))
        report(f"resuming {directory} from step {saved.state['step']}")
    elif (metrics := directory / "metrics.jsonl").exists():
        report(f"{directory} broke off before its first checkpoint: starting again from step 0")
        metrics.unlink()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.write_text(directory / "config.yaml", layered.to_yaml(config))
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); set run.directory") from error
    return Start(data, step=saved.state["step"] if saved else 0)


def finish_run(config: TrainConfig, spent: Spent, *, rest: str) -> None:
    """Plot the run, and print its result and where the time went. `rest`: see `Spent.describe`."""
    directory = config.run_directory
    plot_losses(directory)
    summary = files.read_json(directory / "summary.json")
    print(f"validation loss {summary['validation_loss']:.4f} after {summary['tokens']:,} tokens")
    for prompt, text in summary["samples"].items():
        print(f"sample {prompt!r}: {text!r}")
    print(f"W&B: {summary['wandb_status']}")
    print(spent.describe(summary, rest=rest))
    print(f"run directory: {directory}")


class _Show:
    """Shows rows in the progress line; before the first, how the parameters were divided."""

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._partition = config.run_directory / "partition.txt"
        self._progress = progress
        self._any = False

    def __call__(self, row: dict[str, Any]) -> None:
        if not self._any:
            self._progress.note(self._partition.read_text().rstrip())
            self._any = True
        self._progress.update(row)


class _NodeWatch:
    """Says which nodes are lost or back while a run is going, and what the run does about it."""

    POLL_SECONDS = 2.0

    def __init__(self, config: TrainConfig, *, report: Callable[[str], None]) -> None:
        self._workers = config.workers
        self._report = report
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        before = self._alive()
        while not self._stop.wait(self.POLL_SECONDS):
            now = self._alive()
            for node in sorted(before - now):
                self._report(f"node {node} is lost, {len(now)} left; {self._consequence()}")
            for node in sorted(now - before):
                self._report(f"node {node} has joined, {len(now)} now")
            before = now

    def _consequence(self) -> str:
        if self._workers.max_failures == 0:
            return "if it had workers, the run ends (workers.max_failures=0); the same command resumes it"
        if self._workers.min_count is None:
            return "if it had workers, the run waits until all can run again (workers.min_count is null)"
        return f"the run goes on with the workers that fit, at least {self._workers.min_count}"

    def _alive(self) -> set[str]:
        import ray

        return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class _Follower:
    """Shows the rows of `metrics.jsonl` while the workers write it, from where a resumed run is.

    If Ray restarts the workers, the file is rewound to their checkpoint; it says so, and goes on from there.
    """

    def __init__(self, config: TrainConfig, progress: Progress, *, start: "Start") -> None:
        self._stop = threading.Event()
        self._path = config.run_directory / "metrics.jsonl"
        self._checkpoints = config.run_directory / "checkpoints"
        self._note = progress.note
        self._show = _Show(config, progress)
        self._first_step = start.step
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        last = -1
        for row in follow(self._path, stop=self._stop.is_set):
            if row["step"] <= last:
                newest = checkpoint.newest_complete(self._checkpoints, report=self._note)
                step = checkpoint.Checkpoint(newest).state["step"] if newest else 0
                self._note(f"the workers were restarted, and go on from step {step}")
                self._first_step = step + 1 if newest else 0
            last = row["step"]
            if row["step"] >= self._first_step:
                self._show(row)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
