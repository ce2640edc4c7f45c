"""The compiled code in every tier that this machine can run."""

import pytest
import torch

from cluster.machine import compiled
from optim.kernels import native


@pytest.fixture(params=compiled.TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with the compiled code of each tier; skips one that cannot run, with the reason."""
    if reason := compiled.lacks(request.param):
        pytest.skip(reason)
    monkeypatch.setattr(compiled, "choose_tier", lambda: (request.param, None))
    if reason := native.unsupported(torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    return request.param
