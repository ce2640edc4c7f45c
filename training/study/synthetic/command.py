"""Tables 1 and 7 of arXiv 2609.39114, made again: Muon against NorMuon where rows differ in length.

python -m training.study.synthetic [--config FILE] [--dry-run] [key=value ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import cli
from cluster import config as layered
from cluster.display import show
from cluster.machine.host import describe_host
from cluster.measure.benchmark import prepare_output, publish
from training.study.synthetic import published, transport
from training.study.synthetic.config import RowNormsConfig
from training.study.synthetic.row_norms import run_row_norms


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser(
        "training.study.synthetic", description=__doc__.splitlines()[0], keys=RowNormsConfig()
    )
    options = parser.parse_args(arguments)

    def body() -> None:
        config = layered.load(RowNormsConfig, file=options.config, dotlist=options.overrides)
        if options.dry_run:
            show(layered.to_yaml(config))
            return
        what, room = ("transport", transport) if config.transport else ("row_norms", published)
        output = prepare_output(Path(config.output) if config.output else None, what)
        run = transport.run_transport if config.transport else run_row_norms
        result = run(config, report=lambda line: print(line, file=sys.stderr))
        result |= {"cpu": describe_host()["cpu"]}
        show(room.describe(result))
        print(f"figure: {room.plot(result, output.with_suffix('.png'))}")
        publish(
            result,
            output,
            job_type="study",
            wandb_mode=config.wandb,
            data_fingerprint=None,
            config=layered.to_dict(config),
        )

    return cli.run(body)
