"""One thread for small tensors, and the compiled code in every tier that this machine can run."""

from collections.abc import Iterator

import pytest
import torch

from cluster import compiled
from optim import native


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """On busy cores, two threads that wait for each other take up to 100 times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=compiled.TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with the compiled code of each tier; skips one that cannot run, with the reason."""
    if reason := compiled.lacks(request.param):
        pytest.skip(reason)
    monkeypatch.setattr(compiled, "choose_tier", lambda: (request.param, None))
    if reason := native.unsupported(torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    return request.param
