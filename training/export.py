"""A run's checkpoint as a Hugging Face LLaMA directory: `python -m training.export RUN`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import cli, runs

DTYPES = ("bfloat16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code (`cluster.cli`)."""
    options = _parser().parse_args(arguments)

    def body() -> None:
        run = runs.directory_of(options.run)
        from training.run.export import export  # torch, which a wrong name need not wait for

        chosen = {name: getattr(options, name) for name in ("output", "step", "dtype", "averaged")}
        print(export(run, **chosen).describe())

    return cli.run(body)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=(
            "Write a checkpoint of a run as a Hugging Face LLaMA directory (config.json, model.safetensors,\n"
            "tokenizer), which transformers, vLLM and training.model.llama load. The directory appears\n"
            "whole or not at all, and replaces an earlier export."
        ),
        epilog="examples:\n  python -m training.export first-light\n"
        "  python -m training.export outputs/first-light --step 200 --dtype float32 --output /tmp/model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", metavar="RUN", help=f"a run directory, or the name of one under {runs.OUTPUTS}/"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: <run>/export")
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint to take; default: the newest complete one"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="bfloat16 (default): the master weights rounded, which is exactly what bf16 training computed "
        "with; float32: the master weights themselves",
    )
    parser.add_argument(
        "--averaged", action="store_true", help="the averaged weights, of a run with optim.average_decay"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
