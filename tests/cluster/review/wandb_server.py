"""A W&B server on loopback, for tests: real HTTP, and as much of W&B's protocol as its client needs.

    with WandbServer() as server:
        ...                                  # start a process with env={**os.environ, **server.environment}
        run = server.runs["1f00ba12"]        # by W&B run id
        run.rows, run.summary, run.config    # what a reader of the run would see
        run.uploaded["media/table/a.json"]   # files, by their path in the run
        server.artifacts, server.alerts      # what was committed; what was sent
        server.requests                      # a text for each request: "UpsertBucket", "file_stream 1f00ba12"

These work: `wandb.init(mode="online")`, `run.log`, tables, files, alerts, artifacts, `wandb sync`, and
`wandb.Api()` for a run and its history. An operation that the server does not know is answered 400, and the
client's error names it; to teach the server one, add a method `_Name` to `wandb_graphql.State`. Give
the client a HOME of its own, or it reads the user's netrc and settings.

Faults:
    server.stop(); server.start()            # it is gone, open connections too; it is back, with its state
    server.stop_after = 3                    # it is gone after it took in three more requests with rows
    server.lose_answers = True               # ... and the client does not get the third one's answer
    server.refuse = lambda name: ...         # True: this request is answered 400
    server.wait_seconds = lambda name: 30.0  # before a request is answered

History lines are kept by their offset, as W&B keeps them. `run.num_received` counts every line that was sent.
"""

import base64
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

from tests.cluster.review.wandb_graphql import ENTITY, State

API_KEY = "local" + "0" * 40
KEY_IN_HEADER = base64.b64encode(f"api:{API_KEY}".encode()).decode()


class WandbServer(State):
    """The server, and everything that was sent to it. Use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.stop_after: int | None = None
        self.lose_answers = False
        self.refuse: Callable[[str], bool] = lambda name: False
        self.wait_seconds: Callable[[str], float] = lambda name: 0.0
        self.lock = threading.RLock()
        self._http: ThreadingHTTPServer | None = None
        self._connections: set[socket.socket] = set()
        self._port = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which W&B's client finds this server and may write to it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_ENTITY": ENTITY}

    def start(self) -> None:
        """Listen; on the same port as before."""
        server = self

        class Handler(_Handler):
            state = server

        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection, as a killed server does."""
        http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.server_close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: WandbServer

    def setup(self) -> None:
        super().setup()
        self.state._connections.add(self.connection)

    def finish(self) -> None:
        self.state._connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, ValueError):  # the client left, or the server was stopped
            self.close_connection = True

    def do_POST(self) -> None:
        body = self._body()
        server, path = self.state, self.path.split("/")
        if self.headers["Authorization"] != f"Basic {KEY_IN_HEADER}":
            return self._send(401, {"errors": [{"message": "this is not the key"}]})
        if self.path == "/graphql":
            name = re.search(r"(?:query|mutation) (\w+)", body["query"])[1]  # type: ignore[index]
            self._answer(name, lambda: {"data": server.graphql(name, body.get("variables") or {})})
        elif path[1] == "files" and path[-1] == "file_stream":
            run_id = unquote(path[4])
            self._answer(f"file_stream {run_id}", lambda: server.file_stream(run_id, body))
        else:
            self._send(404, {"error": f"this server has no {self.path}"})
        return None

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        kind, owner, name = map(unquote, self.path.split("/", 4)[2:])
        self._answer(f"upload {name}", lambda: self.state.upload(kind, owner, name, content) or {})

    def _body(self) -> dict[str, Any]:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content or b"{}")

    def _answer(self, name: str, act: Callable[[], Any]) -> None:
        server = self.state
        time.sleep(server.wait_seconds(name))
        with server.lock:
            server.requests.append(name)
            if server.refuse(name):
                return self._send(400, {"errors": [{"message": f"{name} is refused"}]})
            before = sum(run.num_received for run in server.runs.values())
            try:
                answer = act()
            except LookupError as error:
                return self._send(400, {"errors": [{"message": str(error)}]})
            if (
                server.stop_after is not None
                and sum(run.num_received for run in server.runs.values()) > before
            ):
                server.stop_after -= 1
                if server.stop_after == 0:
                    server.stop_after = None
                    if not server.lose_answers:
                        self._send(200, answer)
                    return server.stop()
        return self._send(200, answer)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *about: object) -> None:
        pass
