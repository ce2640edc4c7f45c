"""`make serve`: the model behind an OpenAI-compatible endpoint, until Ctrl-C.

python -m serving.app [--config FILE] [--dry-run] [key=value ...]
"""

import sys
import threading
from collections.abc import Sequence

from cluster import cli
from cluster import config as layered
from cluster.display import show
from serving import config as serving_config
from serving.config import ServeConfig
from serving.deployment import describe, serving


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    parser = cli.make_parser("serving.app", description=__doc__.splitlines()[0], keys=ServeConfig())
    options = parser.parse_args(arguments)

    def body() -> None:
        config = serving_config.load(file=options.config, dotlist=options.overrides)
        if options.dry_run:
            show(layered.to_yaml(config), describe(config))
            return
        with serving(config, report=print) as url:
            print(f"serving at {url}/v1 until Ctrl-C", flush=True)
            threading.Event().wait()

    return cli.run(body)


if __name__ == "__main__":
    sys.exit(main())
