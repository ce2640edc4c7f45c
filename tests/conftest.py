"""What every test starts with, and how `make test` divides the suite between its two workers."""

import os
import signal
import sys
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, settings

from cluster.record.wandb_mirror import Mirror
from cluster.session import DRIVER_ENVIRONMENT, set_defaults
from tests.tiers import tier
from tests.waiting import PATIENCE_SECONDS

__all__ = ["tier"]  # a fixture of every test

set_defaults(DRIVER_ENVIRONMENT)  # Ray reads it when it is imported: some test files do that
os.environ["WANDB_MODE"] = "disabled"  # for every command that is not told otherwise: a W&B run takes 2 s
# A machine that stands still for seconds has no part in whether a property holds.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
Mirror.CLOSE_SECONDS = PATIENCE_SECONDS
for part in ("connect", "read", "write", "pool"):  # httpx gives up after 5 s, unless told otherwise
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, part, PATIENCE_SECONDS)

# They start Ray or several commands at once, so one worker runs all of them: together they need more cores.
# They come first, so that the other worker has everything else to choose from.
ONE_AFTER_ANOTHER = (
    "tests/training/study/test_command.py",
    "tests/serving/test_deployment.py",
    "tests/training/baseline/test_steps.py",
    "tests/cluster/test_killed_parents.py",
    "tests/training/test_train.py",
)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """A suite that a shell started in the background ignores SIGINT, and so would every command it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def no_token_of_another_ray() -> None:
    """Ray reads its token once for a process, in which several files may start a Ray of their own."""
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader

        AuthenticationTokenLoader.instance().reset_cache()


def pytest_runtest_setup() -> None:
    """One thread for small tensors: two that wait for each other on busy cores can be 100 times slower."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come before the others, so that both workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("stack")}
    items.sort(key=lambda item: (not item.nodeid.startswith(ONE_AFTER_ANOTHER), item.path not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run on one worker. xdist 3.8's own `--dist loadgroup` does nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return ONE_AFTER_ANOTHER[0] if file in ONE_AFTER_ANOTHER else file

    return ByFile(config, log)
