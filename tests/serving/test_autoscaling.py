"""Engines are added by queue depth. Serve waits for half a minute before it does: `make test-cluster`."""

import threading

import httpx
import pytest

from serving.config import load
from serving.deployment import serving
from tests import fake_engine
from tests.serving.test_deployment import NAME, engines
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.cluster


def test_a_second_engine_comes_when_the_first_is_full_and_others_wait():
    config = load(
        dotlist=[
            *("model.weights=random", "model.shape=llama-5m", "deployment.port=0", "deployment.cpus=1"),
            *("deployment.max_replicas=2", "deployment.target_waiting=1"),
            *("engine.slots=2", "engine.waiting=20"),
        ]
    )
    codes: list[int] = []
    over = threading.Event()

    def ask(url: str) -> None:
        body = {"model": NAME, "prompt": [1], "max_tokens": 50}
        while not over.is_set():
            codes.append(httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_SECONDS).status_code)

    with serving(config, report=print, factory=fake_engine.make) as url:
        assert len(engines()) == 1
        clients = [threading.Thread(target=ask, args=(url,)) for _ in range(10)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: len(engines()) == 2)
        finally:
            over.set()
            for client in clients:
                client.join()
    assert set(codes) == {200}
