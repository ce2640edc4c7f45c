"""The import rules of the design, read from the source: which room may know which, and which library."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ONE_AFTER_ANOTHER

ROOT = Path(__file__).parents[1]
MOST_FILES = 16
ROOMS = ("cluster", "optim", "training", "serving")

MAY_IMPORT = {  # room -> modules or whole rooms of ours, besides itself
    "cluster": (),
    "optim": (),
    "training": ("cluster", "optim"),
    "serving": ("cluster", "training.model"),
}
BESIDES = {  # module -> what it alone of its room may import too: a bench and a compiler are no mathematics
    "cluster.measure.probe": (
        "optim.precision",
    ),  # what a device multiplies in is decided there and nowhere else
    "serving.checkpoints": ("training.run.export",),  # a run is exported before it is served
    "serving.engine.memory": ("optim.precision",),
    "serving.engine.torch_engine": ("optim.precision",),
    "serving.peers.races": ("optim.precision",),
    "optim.kernels.native": ("cluster.machine.compiled",),
    "optim.kernels.accumulate": ("cluster.machine.triton_calls",),
    "optim.kernels.gpu": ("cluster.machine.triton_calls",),
    "optim.kernels.product": ("cluster.machine.triton_calls",),
    "optim.bench": (
        "cluster.measure.benchmark",
        "cluster.cli",
        "cluster.config",
        "cluster.measure.usage",
        "cluster.measure.hardware",
        "cluster.measure.intervals",
        "cluster.measure.turns",
        "cluster.display",
        "cluster.progress",
        "cluster.session",
    ),
}
NOT_IMPORTED = ("command", "launch", "app")  # entry points: only `python -m` runs them

HOMES = {  # library or call -> the only modules that may use it
    "omegaconf": ("cluster.config",),
    "wandb": (
        "cluster.record.wandb_mirror",
        "cluster.record.wandb_artifacts",
        "cluster.record.wandb_log",
        "cluster.review.dashboard",
        "cluster.review.sync.uploads",
    ),
    "wandb_workspaces": ("cluster.review.dashboard", "cluster.review.views", "cluster.review.wandb_reports"),
    "ray.init": ("cluster.session",),
    # Whoever starts a process that may outlive a call does it with cluster.process, which ends it with its
    # parent. The keeper must outlive its parent; race_zero's ranks are torch's, which ends them itself.
    "subprocess.Popen": ("cluster.process", "cluster.head.keeper", "cluster.head.shell"),
    "os.fork": ("cluster.process",),
    "multiprocessing.Process": (),
    "torch.multiprocessing": ("optim.bench.zero_race",),
    "deepspeed": (
        "optim.bench.contenders",
        "optim.step.gradients",
        "optim.step.layout",
        "optim.step.zero",
        "training.bench.contenders",
        "training.run.context",
        "training.run.engine",
        "training.model.llama",
    ),
    "deepspeed.initialize": ("optim.bench.contenders", "training.bench.contenders", "training.run.engine"),
    "torch.distributed": (
        "optim.bench.traffic",
        "optim.bench.zero_race",
        "cluster.measure.probe",
        "cluster.machine.rendezvous",
        "optim.bench.contenders",
        "optim.step.exchange",
        "optim.step.fragments",
        "optim.step.gradients",
        "optim.step.health",
        "training.bench.contenders",
        "training.run.engine",
        "training.run.context",
        "training.model.llama",
    ),
}

TORCH_FREE = (
    "cluster.endpoint_client",
    "cluster.measure.benchmark",
    "cluster.measure.hardware",
    "cluster.measure.probe",
    "cluster.progress",
    "cluster.record.record",
    "cluster.review.dashboard",
    "cluster.review.run_reader",
    "optim.bench",
    "optim.cost",
    "optim.bench.share",
    "optim.step.ownership",
    "optim.schedule",
    "training.baseline",
    "training.baseline.command",
    "training.baseline.figures",
    "training.baseline.measure",
    "training.baseline.plan",
    "training.baseline.ceilings",
    "training.evaluate.endpoint",
    "training.data.dataset",
    "training.evaluate",
    "training.evaluate.report",
    *("training.run.process_group", "training.run.start", "training.run.watch", "training.run.workers"),
    *("training.evaluate.harness", "training.evaluate.scoring"),
    "training.bench.command",
    "training.bench.launchers",
    "training.bench.race",
    "training.export",
    "training.launch",
    "training.plan",
    "training.planner.memory",
    "training.planner.proposal",
    "training.planner.seconds",
    "training.data.prepare",
    "training.projection",
    "training.model.shapes",
    "training.projection.step_model",
    "training.baseline.steps",
    "training.study",
    "training.study.config",
    "training.study.plan",
    "training.study.plots",
    "training.study.report",
    "training.study.results",
    "training.study.synthetic.config",
    "training.study.synthetic.report",
    "training.study.synthetic.trials",
    "training.evaluate.checkpoint",
    "training.projection.traffic",
    "serving.app",
    "serving.bench",
    "serving.endpoint.bodies",
    "serving.checkpoints",
    "cluster.parity.parity",
    "serving.deployment",
    "serving.endpoint.service",
    "serving.engine.protocol",
    "serving.engine.process",
    "serving.endpoint.haproxy",
    "serving.endpoint.hosts",
    "serving.bench.latency",
    "serving.bench.compare",
    *("serving.bench.first_request", "serving.bench.inputs", "serving.bench.loadgen", "serving.bench.steady"),
    "serving.endpoint.schema",
    "serving.peers.overhead",
    "serving.peers.command",
    "cluster.parity",
    "cluster.parity.plots",
    "serving.endpoint.prompts",
    "serving.peers.contender_process",
    "serving.peers.races",
    "serving.bench.report",
    "serving.engine.scheduler",
    "serving.bench.steps",
    "serving.endpoint.text",
    "serving.bench.workload",
)


# What runs on a node before there is an environment.
STANDARD_ONLY = (
    "cluster.files",
    "cluster.masking",
    "cluster.record.events",
    "cluster.record.heartbeat",
    "cluster.private",
    *(
        f"cluster.head.{name}"
        for name in ("answers", "keeper", "addresses", "install", "shell", "reap", "ray_rest")
    ),
)
# What these import too: it begins without packages, and imports some in functions that are not called there.
BEGINS_WITHOUT_PACKAGES = ("cluster.heart.drained", "cluster.review.status")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module in the rooms."""
    files = (file for room in ROOMS for file in sorted((root / room).rglob("*.py")))
    return {module_name(file, root): file for file in files}


MODULES = modules_of(ROOT)


def used(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names that the source imports or reaches through an import, at any depth of nesting.

    `from a import b` gives "a" and "a.b"; `import a.b as c; c.d()` gives "a.b" and "a.b.d".
    """
    names: set[str] = set()
    bound: dict[str, str] = {}  # local name -> dotted name
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names.add(alias.name)
                root = alias.name.partition(".")[0]
                bound[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                package = package[: len(package) - (node.level - 1)]
                origin = ".".join([*package, *filter(None, [origin])])
            names.add(origin)
            for alias in node.names:
                names.add(f"{origin}.{alias.name}")
                bound[alias.asname or alias.name] = f"{origin}.{alias.name}"
    for node in ast.walk(tree):
        chain = []
        while isinstance(node, ast.Attribute):
            chain.append(node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in bound:
            names.add(".".join([bound[node.id], *reversed(chain)]))
    return names


def within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def imports_of_ours(names: set[str], modules: set[str]) -> set[str]:
    """The modules of ours among dotted names: the longest that is a module, for each."""
    found = set()
    for name in names:
        if name.partition(".")[0] in ROOMS:
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]
            found.add(name)
    # `from training import launch` names the package on the way; that is the room itself only if alone.
    return {name for name in found if not any(within(other, name) for other in found - {name})}


def besides(module: str) -> Iterator[str]:
    for name, others in BESIDES.items():
        if within(module, name):
            yield from others


def violations(modules: dict[str, Path]) -> Iterator[str]:
    """Every breach of MAY_IMPORT (but for BESIDES), NOT_IMPORTED and HOMES, as text."""
    for module, file in modules.items():
        room = module.partition(".")[0]
        names = used(file.read_text(), module, is_package=file.name == "__init__.py")
        for other in sorted(imports_of_ours(names, set(modules))):
            if not any(within(other, own) for own in (room, *MAY_IMPORT[room], *besides(module))):
                yield f"{module} imports {other}"
            if other.rpartition(".")[2] in NOT_IMPORTED and file.name != "__main__.py" and other != module:
                yield f"{module} imports the entry point {other}"
        for library, homes in HOMES.items():
            if module not in homes and any(within(name, library) for name in names):
                yield f"{module} uses {library}, which is at home in {', '.join(homes)}"


def test_every_room_is_there():
    assert {name.partition(".")[0] for name in MODULES} == set(ROOMS)
    assert len(MODULES) > 30


def test_the_rules_hold():
    assert list(violations(MODULES)) == []


def test_what_serving_imports_of_training_brings_no_more_of_it():
    model = {name: file for name, file in MODULES.items() if within(name, "training.model")}
    names = {
        name: imports_of_ours(used(file.read_text(), name), set(MODULES)) for name, file in model.items()
    }
    assert {
        f"{name} imports {other}"
        for name, others in names.items()
        for other in others
        if within(other, "training") and not within(other, "training.model")
    } == set()


MOST_LINES = {"file": 450, "class": 200, "function": 60}


def test_no_file_class_or_function_is_too_long_to_be_read_in_one_go():
    """The tests too. What is longer holds two things."""
    long = []
    for file in (*MODULES.values(), *(ROOT / "tests").rglob("*.py")):
        text = file.read_text()
        sizes = [("file", "", text.count("\n"))]
        for node in ast.walk(ast.parse(text)):
            kind = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
            if type(node) in kind:
                sizes.append((kind[type(node)], node.name, node.end_lineno - node.lineno + 1))
        long += [(str(file.relative_to(ROOT)), *size) for size in sizes if size[2] > MOST_LINES[size[0]]]
    assert long == []


@pytest.mark.parametrize(
    ("module", "source", "breach"),
    [
        ("cluster.a", "import optim.step.zero", "cluster.a imports optim.step.zero"),
        (
            "cluster.a",
            "def f():\n    from training.model import shapes",
            "cluster.a imports training.model.shapes",
        ),
        ("optim.a", "from cluster.config import key", "optim.a imports cluster.config"),
        ("optim.a", "from ..cluster import config", "optim.a imports cluster.config"),
        (
            "optim.step.a",
            "from cluster import config",
            "optim.step.a imports cluster.config",
        ),
        ("optim.bench", "from cluster.record import record", "optim.bench imports cluster.record.record"),
        ("optim.bench", "from training.model import shapes", "optim.bench imports training.model.shapes"),
        ("training.a", "import serving", "training.a imports serving"),
        ("serving.a", "from training.run.loop import train", "serving.a imports training.run.loop"),
        ("serving.a", "import training", "serving.a imports training"),
        ("serving.a", "from optim import polar", "serving.a imports optim.polar"),
        ("training.a", "from training import launch", "training.a imports the entry point training.launch"),
        ("training.a", "from . import launch", "training.a imports the entry point training.launch"),
        ("training.a", "if True:\n    from omegaconf import OmegaConf", "training.a uses omegaconf"),
        ("cluster.a", "from wandb.sdk import x", "cluster.a uses wandb"),
        ("training.a", "import ray as r\nr.init()", "training.a uses ray.init"),
        ("training.a", "from ray import init", "training.a uses ray.init"),
        (
            "training.model.llama",
            "import deepspeed\ndeepspeed.initialize()",
            "training.model.llama uses deepspeed.init",
        ),
        ("training.a", "import torch\ntorch.distributed.barrier()", "training.a uses torch.distributed"),
        ("optim.a", "from torch import distributed", "optim.a uses torch.distributed"),
        ("serving.a", "from subprocess import PIPE, Popen", "serving.a uses subprocess.Popen"),
        ("optim.a", "class A:\n  def f(self):\n    import torch.distributed as d", "optim.a uses torch.dist"),
    ],
)
def test_a_breach_of_any_rule_is_seen(module, source, breach, tmp_path):
    for name in (*ROOMS, "cluster.config", "cluster.record.record", "optim.step.zero", "optim.polar",
    "training.model.shapes",
                 "training.run.loop", "training.launch", module):  # fmt: skip
        folder = tmp_path.joinpath(*name.split("."))
        file = folder / "__init__.py" if name in ROOMS else folder.with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(source if name == module else "")
    found = list(violations(modules_of(tmp_path)))
    assert len(found) == 1 and found[0].startswith(breach)


def test_what_is_allowed_is_not_reported():
    names = used("from training.model import shapes\nfrom training.model.llama import Llama", "serving.a")
    assert imports_of_ours(names, set(MODULES)) == {"training.model.shapes", "training.model.llama"}
    assert not any(within(name, "ray.init") for name in used("import ray\nray.init_hook", "training.a"))


def dependencies() -> set[str]:
    """Import names of the declared dependencies, the optional ones too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = sum(project.get("optional-dependencies", {}).values(), project["dependencies"])
    return {re.match(r"[A-Za-z0-9_-]+", line).group().lower().replace("-", "_") for line in declared}


def test_no_module_is_named_like_a_standard_module_or_a_dependency():
    assert {"torch", "deepspeed", "ray", "wandb", "omegaconf", "pytest"} <= dependencies()
    taken = sys.stdlib_module_names | dependencies() | {"triton", "vllm"}
    assert [name for name in MODULES if name.rpartition(".")[2] in taken] == []


def test_no_folder_of_code_holds_more_files_than_one_can_read_through():
    folders = [file.parent for file in MODULES.values()]
    assert {folder for folder in folders if folders.count(folder) > MOST_FILES} == set()


def test_every_module_says_what_it_is_for():
    silent = [
        name
        for name, file in MODULES.items()
        if file.name != "__init__.py" and not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert silent == []


def test_init_files_are_empty_and_every_folder_of_code_has_one():
    folders = {file.parent for file in MODULES.values()}
    folders |= {file.parent for file in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert [folder for folder in folders if (folder / "__init__.py").read_bytes()] == []


IMPORT_WITHOUT_TORCH = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def test_what_runs_on_a_node_before_its_environment_needs_the_standard_library_alone():
    for module in STANDARD_ONLY:
        roots = {name.partition(".")[0] for name in used(MODULES[module].read_text(), module)}
        assert roots - {"cluster"} <= sys.stdlib_module_names, module
        ours = {name for name in used(MODULES[module].read_text(), module) if name in MODULES}
        assert ours - {"cluster"} <= {*STANDARD_ONLY, *BEGINS_WITHOUT_PACKAGES}, module
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(STANDARD_ONLY)}"
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert bare.returncode == 0, bare.stderr


def test_some_modules_run_without_torch():
    """In one process in which torch, DeepSpeed and Triton cannot be imported."""
    named = [name for name in MODULES if name in TORCH_FREE or name.endswith(".config")]
    assert {"cluster.config", "training.config", "training.plan", "optim.step.ownership"} <= set(named)
    missing = [name for name in TORCH_FREE if name not in MODULES]
    assert missing == []  # a renamed module must be renamed here
    command = [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *named, "optim.polar"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["optim.polar: torch is blocked"]  # the last one shows that the block works


def test_the_files_that_one_worker_runs_are_there():
    assert [file for file in ONE_AFTER_ANOTHER if not (ROOT / file).is_file()] == []
