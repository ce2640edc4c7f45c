"""The process group of Ray's workers: what happens if one dies before it is there."""

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from cluster.cli import RunError
from training.config import WorkersConfig
from training.run.process_group import GroupConfig


class Dying:
    """Workers of which one dies."""

    def execute_single(self, *_: Any) -> None:
        raise RayActorError


def test_workers_that_die_before_there_is_a_group_are_started_again_as_often_as_others() -> None:
    config = GroupConfig(backend="gloo", directory=Path("run"), workers=WorkersConfig(max_failures=1))
    group = config.backend_cls()
    with pytest.raises(RayActorError):
        group.on_start(Dying(), config)
    with pytest.raises(RunError, match="a worker ended while the process group was formed"):
        group.on_start(Dying(), config)
