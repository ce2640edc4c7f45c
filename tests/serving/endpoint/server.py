"""The endpoint behind a real uvicorn, with an engine that counts."""

import json
import socket
import threading
from typing import Any

import httpx
import uvicorn

from serving.endpoint.service import make_endpoint
from serving.endpoint.text import numbered_tokenizer
from serving.engine.torch_engine import TorchEngine
from tests.fake_engine import VOCABULARY
from tests.waiting import PATIENCE_SECONDS, wait_until


class Server:
    """A uvicorn in a thread."""

    def __init__(self, engine: TorchEngine, **options: Any) -> None:
        self.engine = engine
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = make_endpoint(engine, numbered_tokenizer(VOCABULARY), **options)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self) -> None:
        self.engine.close()
        self._server.should_exit = True
        self._thread.join()

    def post(self, **fields: Any) -> httpx.Response:
        body = {"model": "counting", "prompt": [97], "max_tokens": 3} | fields
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_SECONDS)

    def events(self, **fields: Any) -> list[Any]:
        """The events of a stream; [DONE] as it is."""
        text = self.post(stream=True, **fields).text
        assert text.endswith("\n\n")
        lines = [event.removeprefix("data: ") for event in text[:-2].split("\n\n")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def head(*lines: str) -> bytes:
    usual = ("POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json")
    return "\r\n".join([*usual, *lines, "", ""]).encode()
