"""A dry run and a typo answer at once: importing torch would take seconds."""

import subprocess
import sys

import pytest

from optim import precision
from tests.commands import ROOT

COMMANDS = """
import importlib, sys

for line, code in (
    ("training.launch --dry-run", 0),
    ("training.launch batch.tokns=3", 2),
    ("training.launch model.num_layers=1000000000", 2),
    ("training.export no-such-run", 2),
    ("training.bench.command --dry-run", 0),
    ("training.bench.command batch.tokns=3", 2),
):
    module, *arguments = line.split()
    assert importlib.import_module(module).main(arguments) == code, line
    assert "torch" not in sys.modules, line
"""


HELP = """
import runpy, sys

heavy = {"torch", "ray", "deepspeed", "transformers", "wandb", "pandas", "scipy", "matplotlib", "lm_eval"}
for name in sys.argv[1:]:
    for argument, expected in (("--help", 0), ("no.such.key=3", 2)):
        sys.argv = [name, argument]
        try:
            code = runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        assert code == expected, (name, argument, code)
        assert not heavy & sys.modules.keys(), (name, argument, heavy & sys.modules.keys())
"""
# Every command, but for those that only a launcher or a test starts.
EVERY = (
    *("cluster.laptop.fleet", "cluster.laptop.remote", "cluster.measure.probe", "cluster.parity"),
    *("cluster.preflight", "cluster.record.lineage", "cluster.review.compare", "cluster.review.dashboard"),
    *("cluster.review.page", "cluster.review.status", "cluster.review.sync", "optim.bench", "serving.app"),
    *("serving.bench", "training.baseline", "training.bench", "training.data.prepare", "training.evaluate"),
    *("training.export", "training.launch", "training.plan", "training.projection", "training.study"),
)


def test_help_and_a_typo_import_no_library_that_takes_seconds():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HELP, *EVERY], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(precision._cpu_flags() is None, reason="only torch knows what this CPU multiplies in")
def test_a_dry_run_and_a_typo_do_not_import_torch():
    done = subprocess.run([sys.executable, "-c", COMMANDS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(precision._cpu_flags() is None, reason="only torch knows what this CPU multiplies in")
def test_the_kernel_says_the_same_of_bf16_as_torch_and_onednn_can_be_held_below(monkeypatch):
    found = precision.cpu_has_bf16.__wrapped__
    by_kernel = found()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert not found()
    monkeypatch.undo()
    monkeypatch.setattr(precision, "_cpu_flags", lambda: None)
    assert found() == by_kernel
