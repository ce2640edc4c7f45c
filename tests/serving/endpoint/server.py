"""The endpoint behind a real uvicorn, with an engine that counts."""

import json
import socket
import threading
from typing import Any

import httpx
import uvicorn

from serving.endpoint.service import EndpointOptions, make_endpoint
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
        told = {name: options.pop(name, None) for name in ("template", "origin")}
        allows = EndpointOptions(**options)
        app = make_endpoint(engine, numbered_tokenizer(VOCABULARY), options=allows, **told)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self) -> None:
        self.engine.close()
        self._server.should_exit = True
        self._thread.join()

    def post(self, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        chats = path.endswith("chat/completions")
        prompt = {"messages": [{"role": "user", "content": "a"}]} if chats else {"prompt": [97]}
        body = {"model": "counting", "max_tokens": 3} | prompt | fields
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE_SECONDS)

    def events(self, path: str = "/v1/completions", **fields: Any) -> list[Any]:
        """The events of a stream; [DONE] as it is."""
        text = self.post(path, stream=True, **fields).text
        assert text.endswith("\n\n")
        lines = [event.removeprefix("data: ") for event in text[:-2].split("\n\n")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def head(*lines: str) -> bytes:
    usual = ("POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json")
    return "\r\n".join([*usual, *lines, "", ""]).encode()
