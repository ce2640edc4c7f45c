"""One endpoint for a file's tests."""

from collections.abc import Iterator

import pytest

from tests.fake_engine import counting_engine
from tests.serving.endpoint.server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server(counting_engine())
    yield made
    made.close()
