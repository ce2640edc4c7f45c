"""Every command on a CPU without bf16 arithmetic: no product of low-precision operands is computed there.

Such a CPU is forced (`tests.guard`), and the compiled code, which is no torch operator, is turned off.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, tiny, write_corpus
from tests.guard import FOUND, NO_BF16, Guard, LowPrecisionProduct
from tests.waiting import PATIENCE_SECONDS
from training.model.attention import sdpa
from training.model.llama import Linear

pytestmark = pytest.mark.stack

STEPS = ("training.baseline.steps", "--steps", "1", "--warm-up", "1")
SERVE_BENCH = (
    "serving.bench", "model.weights=random", "model.shape=llama-5m", "deployment.port=0", "deployment.cpus=1",
    "load.concurrency=[1]", "load.requests=2", "load.warm_up=0", "load.prompt_tokens=8",
    "load.output_tokens=4", "load.most_lag_ms=1e6", "load.timeout_seconds=600", "sweep.points=0",
    "bench.wandb=disabled",
)  # fmt: skip
OPTIM_BENCH = ("optim.bench", "--cases", "step_10m", "--rounds", "1")
SERVED = ("serving.bench.steps", "--batches", "1,2", "--prompt-tokens", "8", "--new-tokens", "64")


def test_no_command_multiplies_in_low_precision(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    low = tmp_path / "outputs/low"
    measured = [
        key for key in tiny(tmp_path) if not key.startswith(("run.", "launcher", "schedule", "record"))
    ]
    commands = [
        ("training.launch", *tiny(tmp_path, run__name="low", precision="bf16", schedule__tokens=1024)),
        ("training.launch", *tiny(tmp_path, optim__matrix__rule="normuon", schedule__tokens=1024)),
        ("training.export", low),
        ("training.evaluate", f"model={low}", f"output={tmp_path / 'scores'}"),
        (*STEPS, *measured, "precision=bf16"),
        ("training.baseline.ceilings", "llama-5m:64"),
        ("tests.lab.projection_ranks", *tiny(tmp_path, precision="bf16")),
        (*SERVED, f"model.path={low}", "engine.dtype=bfloat16"),
        (*SERVED, f"model.path={low}"),
        (*OPTIM_BENCH, "--output", tmp_path / "optim.json"),
        (*SERVE_BENCH, f"bench.directory={tmp_path / 'outputs'}"),
    ]
    line = [str(part) for command in commands for part in ("--", *command)]
    environment = {**os.environ, **NO_BF16, "ASUNCION_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    environment[FOUND] = str(tmp_path / "found.txt")
    environment["RAY_TMPDIR"] = f"/tmp/ray-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.guard", *line],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("guarded: ") == len(commands)
    said = done.stdout
    assert '"product_dtype": "float32"' in said and '"product_dtype": "bfloat16"' not in said
    # Ray Serve's engine, in a process of its own, answered under the guard.
    assert '"succeeded": 2' in (tmp_path / "outputs/serve-bench/summary.json").read_text()
    # What a named bf16 keeps is wide already; the default is fp32 throughout.
    assert '"dtype": "bfloat16"' in said and '"dtype": "float32"' in said


def test_the_guard_names_the_operator_and_our_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optim.precision.cpu_has_bf16", lambda: True)
    layer = Linear(8, 8).to(torch.bfloat16)
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    with (
        Guard(),
        pytest.raises(LowPrecisionProduct, match=r"bfloat16 .*model/llama\.py:\d+, forward"),
    ):
        layer(x)
    head = torch.zeros(1, 1, 2, 8, dtype=torch.float16)
    with (
        Guard(),
        pytest.raises(LowPrecisionProduct, match=r"attention.* .*/attention\.py:\d+, sdpa"),
    ):
        sdpa(head, head, head)
    image = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)
    with Guard(), pytest.raises(LowPrecisionProduct, match=r"convolution .*not ours"):
        torch.nn.functional.conv2d(image, image)
    with Guard():
        assert layer.float()(x.float()).dtype == torch.float32
