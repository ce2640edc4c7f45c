"""The baseline of one kind of GPU, in a cluster that has several: measured on a node of that kind."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import config as layered
from cluster import process
from cluster.cli import RunError
from cluster.session import KIND, ray_session
from training.baseline.plan import BaselineConfig


def measure_elsewhere(config: BaselineConfig) -> None:
    """Run the baseline on a node with GPUs of the kind `config.accelerator`, and print what it prints.

    Raises:
        ConfigError: no node of the cluster has them.
        RunError: it failed there.
    """
    kind = {f"{KIND}{config.accelerator}": 0.001}
    with ray_session(config.session, resources=kind, worker_env={}, smaller="accelerator"):
        import ray

        address = ray.get_runtime_context().gcs_address
        there: Any = ray.remote(_lines).options(num_cpus=0, resources=kind, max_retries=0)
        line = ""
        for reference in there.remote(layered.to_yaml(config), address):
            line = ray.get(reference)
            print(line, end="", flush=True)
    if line:
        raise RunError(f"the baseline of {config.accelerator} failed on its node; its messages are above")


def _lines(config: str, address: str) -> Iterator[str]:
    """What the baseline prints on this node; an empty line last if it succeeded."""
    # Ray hides the GPUs from a task that asks for none; it asks for none so that the cells can have them.
    environment = {**os.environ, "RAY_ADDRESS": address}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "baseline.yaml"
        file.write_text(config)
        command = [sys.executable, "-m", "training.baseline", "--here", "--config", str(file)]
        with process.Child(
            command, env=environment, text=True, bufsize=1,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            yield from (line for line in child.stdout)  # Ray uses `send`, which a file does not have
            code = child.wait()
    yield "" if code == 0 else f"exit code {code}\n"
