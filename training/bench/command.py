"""Two comparisons of the training loop: its launchers, and with --peers other libraries.

    python -m training.bench [--rounds N] [--config FILE] [--dry-run] [key=value ...]
    python -m training.bench --peers --litgpt PYTHON [--transformers PYTHON] [--only CASE ...] [key=value ...]

Both write a baseline file, and print one JSON object last. `training.bench.launchers` and
`training.bench.race` say what is measured.
"""

import argparse
import sys
from collections.abc import Sequence

from cluster import cli
from cluster.cli import UserError
from cluster.display import show
from cluster.measure import benchmark
from training import config as training_config
from training.bench import launchers, race


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    defaults = training_config.load(dotlist=launchers.run_keys())
    parser = cli.make_parser("training.bench", description=__doc__.splitlines()[0], keys=defaults)
    what = f"{launchers.WHAT}, or {race.WHAT} with --peers"
    benchmark.add_options(parser, what=what, rounds=3, rounds_help="runs per launcher, or turns per peer")
    parser.add_argument("--peers", action="store_true", help="race LitGPT, and transformers with DeepSpeed")
    parser.add_argument("--litgpt", metavar="PYTHON", help="interpreter of an environment that has litgpt")
    parser.add_argument(
        "--transformers", metavar="PYTHON", default=sys.executable,
        help="interpreter with transformers, deepspeed and ninja (default: this one)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help=f"of: {', '.join(race.CASES)}")
    options = parser.parse_args(arguments)

    def body() -> None:
        benchmark.require_rounds(options.rounds)
        (race_peers if options.peers else launchers.compare_launchers)(options)

    return cli.run(body)


def race_peers(options: argparse.Namespace) -> None:
    """The body of --peers."""
    pythons = {"litgpt": options.litgpt or "", "transformers": options.transformers}
    if options.config:
        raise UserError("--config: leave it out with --peers; give keys as key=value")
    race.require(pythons, options.overrides, options.only)
    if options.dry_run:
        for name in options.only or race.CASES:
            case = race.CASES[name]
            print(f"{name}: {', '.join(case.entrants)}; {case.shape}, {case.tokens:,} tokens a step")
        return
    output = benchmark.prepare_output(options.output, race.WHAT)
    result, fingerprint = race.run(
        pythons, options.overrides, num_rounds=options.rounds, only=options.only,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    show(benchmark.table(result))
    benchmark.publish(
        result, output, job_type="race", wandb_mode=options.wandb, data_fingerprint=fingerprint
    )  # fmt: skip
