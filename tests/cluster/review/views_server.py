"""A stand-in for W&B's table of views, on loopback: what `wandb.Api()` asks, and views and reports.

It answers the questions of wandb 0.31 and wandb-workspaces 0.4.13. It does not show that W&B's own server
does the same.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

API_KEY = "local" + "0" * 40
ENTITY, PROJECT = "team", "asuncion"


class ViewsServer:
    """The views of one project, and every request. Use it as a context manager.

    Attributes:
        views: id -> type, name, displayName, description, spec.
        refuse: what a request for a write is refused with, or None.
    """

    def __init__(self) -> None:
        self.views: dict[str, dict[str, Any]] = {}
        self.num_requests = 0
        self.key = API_KEY
        self.refuse: str | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                code, answer = server.answer(self.path, body, self.headers.get("Authorization", ""))
                content = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which W&B's client finds this server."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self._http.server_address[1]}",
            "WANDB_API_KEY": API_KEY,
        }

    def names(self, kind: str) -> dict[str, str]:
        """Name -> displayName of the views of a type."""
        return {one["name"]: one["displayName"] for one in self.views.values() if one["type"] == kind}

    def answer(self, path: str, body: bytes, authorization: str) -> tuple[int, dict[str, Any]]:
        if path != "/graphql":
            return 200, {}
        self.num_requests += 1
        if base64.b64decode(authorization.removeprefix("Basic ")).decode() != f"api:{self.key}":
            return 401, {"errors": [{"message": "user is not logged in"}]}
        asked = json.loads(body)
        query, given = asked["query"], asked.get("variables") or {}
        if "upsertView" in query:
            if self.refuse:
                return 200, {"errors": [{"message": self.refuse}], "data": {"upsertView": None}}
            return 200, {"data": {"upsertView": self._upsert(given)}}
        about = {"name": PROJECT, "entityName": ENTITY, "createdAt": "", "isBenchmark": False, "user": None}
        found: dict[str, Any] = {
            "viewer": {"id": "1", "username": "ana", "entity": ENTITY, "teams": {"edges": []}},
            "models": {
                "pageInfo": {"endCursor": None, "hasNextPage": False},
                "edges": [{"node": {"id": "p", **about}}],
            },
        }
        if "allViews" in query or "internalId" in query:
            here = (given.get("entity") or given["entityName"], given.get("project") or given["projectName"])
            views = [
                {"id": key, **view}
                for key, view in self.views.items()
                if view["type"] == given.get("type") and given.get("name") in (None, view["name"])
            ]
            project = {"id": "p", "internalId": "cDox", "allViews": {"edges": [{"node": v} for v in views]}}
            found["project"] = project if here == (ENTITY, PROJECT) else None
        return 200, {"data": found}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        key = given.get("id") or f"view{len(self.views)}"
        inserted = key not in self.views
        kept = ("type", "name", "displayName", "description", "spec")
        self.views[key] = {name: given[name] for name in kept}
        project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
        return {"view": {"id": key, **self.views[key], "project": project}, "inserted": inserted}

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
