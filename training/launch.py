"""`make train`: configuration -> plan -> data -> workers -> summary.

    python -m training.launch [--config FILE] [--dry-run] [--cluster CLUSTER.yaml] [key=value ...]
    torchrun --nproc-per-node=2 -m training.launch launcher=torch [key=value ...]

Running the same command again resumes the run from its newest complete checkpoint.
"""

import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from cluster import cli, files
from cluster import config as layered
from cluster.cli import RunError, Stopped, told_to_stop
from cluster.display import show
from cluster.laptop import inventory, remote
from cluster.progress import Progress
from training import config as training_config
from training.config import TrainConfig, WorkersConfig
from training.plan import Plan, make_plan
from training.run import workers
from training.run.spent import Spent, Startup

STOPPING = "stopping, with a checkpoint, after the next step; a second signal breaks off at once"

if TYPE_CHECKING:
    from training.run.start import Start
    from training.run.state.health import HealthWatch


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("training.launch", description=__doc__.splitlines()[0], keys=TrainConfig())
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="CLUSTER.yaml",
        help="train there: submit, and follow (cluster/README.md)",
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
            show(layered.to_yaml(config), *plan.outlook())
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
    from training.run.checkpoint import step_of
    from training.run.start import STOP, open_run
    from training.run.state.gauges import Gauges
    from training.run.state.health import HealthWatch
    from training.run.state.waiting import WaitWatch
    from training.run.watch import Follower, NodeWatch, RunWatch, report_failure

    spent, startup = Spent(), Startup()
    startup.end("command")
    # Workers have another working directory, where a relative path would be another place.
    config = replace(config, run=replace(config.run, directory=str(config.run_directory.parent)))
    if config.load_directory:
        config = replace(config, load=f"hf:{config.load_directory}")
    show(plan.table())
    with Progress(plan.num_steps) as progress, ExitStack() as owned:
        with spent.part("data"):
            start = owned.enter_context(open_run(config, plan, report=progress.note))
        startup.end("data")
        if start is None:
            return
        with report_failure(config), ExitStack() as stack:
            with spent.part("Ray"):
                stack.enter_context(workers.session(config))
            startup.end("Ray")
            first_step = step_of(start.checkpoint) if start.checkpoint else 0
            stack.enter_context(RunWatch(config, observer="the launcher", note=progress.note))
            stack.enter_context(Follower(config, progress, first_step=first_step))
            stack.enter_context(NodeWatch(config))
            stack.enter_context(Gauges(config))
            stack.enter_context(health := HealthWatch(config))
            stack.enter_context(line := WaitWatch(config))

            def ask() -> None:
                if line.waits:  # there is no step after which to stop
                    raise KeyboardInterrupt
                (config.run_directory / STOP).touch()

            with told_to_stop(STOPPING, ask) as received:  # Ray has set handlers of its own
                line.wait_for_turn()
                finished = _fit(start, startup, health, received)
    _require_finished(config, finished, received)
    finish_run(config, spent, rest="workers")


def _require_finished(config: TrainConfig, finished: bool, received: list[int]) -> None:
    """Raise `Stopped` if the run stopped before its last step."""
    if not finished:
        signal = received[0] if received else SIGTERM  # to another rank
        raise Stopped(f"{config.run_directory}; the same command resumes it", signal=signal)


def _fit(start: "Start", startup: Startup, health: "HealthWatch", received: list[int]) -> bool:
    """Ray Train runs, one more after each bad GPU. Returns whether the last step was taken."""
    from training.run.state.health import on_sound_gpus
    from training.run.watch import report_failure

    directory = start.config.run_directory
    arguments = {"start": start, "command": sys.argv, "startup": startup}

    def fit(config: WorkersConfig) -> bool:
        return workers.run(_ray_worker, arguments, workers=config, directory=directory)

    try:
        with report_failure(start.config):
            return on_sound_gpus(start.config, fit, health=health, asked_to_stop=lambda: bool(received))
    except RunError as error:
        raise RunError(
            f"training failed: {error}\nthe whole traceback is in {directory / 'failure.log'}; "
            "run the same command again to resume from the newest checkpoint"
        ) from error


def _ray_worker(arguments: dict[str, Any]) -> bool:
    startup: Startup = arguments["startup"]
    startup.end("workers")
    from training.run.context import RayContext
    from training.run.start import STOP

    start: Start = arguments["start"]
    config = start.config
    context = RayContext.create(gpu=config.workers.gpu)
    stop = config.run_directory / STOP
    with workers.heartbeat(
        config.run_directory, config.workers, launcher="ray",
        rank=context.rank, world_size=context.world_size, start=context.start,
    ) as heart:  # fmt: skip
        from training.run.loop import train

        startup.end("imports")
        return train(
            start.on_ranks(context), command=arguments["command"], context=context, heart=heart,
            observe=lambda row: None,  # the driver shows the rows, which it reads from metrics.jsonl
            asked_to_stop=lambda: context.is_main and stop.exists(), startup=startup,
        )  # fmt: skip


def run_torch(config: TrainConfig, plan: Plan) -> None:
    """Train in this process, as one rank of torchrun or alone."""
    spent, startup = Spent(), Startup()
    startup.end("command")
    ranks = workers.torch_ranks(config.workers)
    from cluster.record.heartbeat import FORMING
    from training.run.context import start_of, torch_context
    from training.run.loop import train
    from training.run.start import open_run
    from training.run.state.health import HealthWatch
    from training.run.watch import RunWatch, ShowRows, report_failure

    startup.end("imports")
    with Progress(plan.num_steps) as progress, ExitStack() as owned:
        if ranks.rank == 0:
            progress.note(plan.table())

        def prepare() -> "Start | None":  # by rank 0
            return owned.enter_context(open_run(config, plan, report=progress.note))

        with spent.part("data"):
            start = ranks.on_main(prepare)
        startup.end("data")
        if start is None:
            return
        failures = report_failure(config, rank=ranks.rank, where=lambda: f"the {FORMING}'s forming")
        with failures, ExitStack() as stack:
            heart = workers.heartbeat(
                config.run_directory, config.workers, launcher="torch",
                rank=ranks.rank, world_size=ranks.world_size, start=start_of(ranks.store),
            )  # fmt: skip
            stack.enter_context(heart).mark(FORMING)
            context = stack.enter_context(torch_context(ranks, gpu=config.workers.gpu))
            if ranks.rank < 2:  # the second one sees a first that stands still
                note = None if ranks.rank else progress.note
                stack.enter_context(RunWatch(config, observer=f"rank {ranks.rank}", note=note))
            if context.gather(host := platform.node()).index(host) == context.rank:  # its node's first
                stack.enter_context(HealthWatch(config, context=context))
            received = stack.enter_context(told_to_stop(STOPPING))
            finished = train(
                start, command=sys.argv, context=context, heart=heart, startup=startup,
                observe=ShowRows(config, progress), asked_to_stop=lambda: bool(received),
            )  # fmt: skip
    _require_finished(config, finished, received)
    if ranks.rank == 0:
        finish_run(config, spent, rest="other")


def finish_run(config: TrainConfig, spent: Spent, *, rest: str) -> None:
    """Print the run's result and where the time went. `rest`: see `Spent.describe`."""
    directory = config.run_directory
    summary = files.read_json(directory / "summary.json")
    print(f"validation loss {summary['validation_loss']:.4f} after {summary['tokens']:,} tokens")
    for prompt, text in summary["samples"].items():
        print(f"sample {prompt!r}: {text!r}")
    print(f"W&B: {summary['wandb_status']}")
    print(spent.describe(summary, rest=rest))
    print(f"run directory: {directory}")


if __name__ == "__main__":
    sys.exit(main())
