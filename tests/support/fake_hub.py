"""A small stand-in for the Hugging Face Hub: what its client asks to make a repository and to commit small files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What was asked and stored. `repositories`: name -> whether it is private; `files`: name -> path -> content."""

    endpoint: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    #: Status that every request is answered with; 0: as the hub would.
    fails: int = 0


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/")
        self.hub.asked.append(path)
        if self.hub.fails:
            self._send(self.hub.fails, {"error": "as the test asks"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        elif path == "repos/create":
            self._create(json.loads(body))
        elif path == "validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            self._send(200, {"errors": [], "warnings": []})
        elif path.startswith("models/"):
            self._of_model(path.removeprefix("models/"), body)
        else:
            self._send(404, {"error": path})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repositories
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories.setdefault(name, bool(private))
        self._send(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}", "error": "it is there already"})

    def _of_model(self, path: str, body: bytes) -> None:
        owner, repository, *rest = path.split("/")
        name = f"{owner}/{repository}"
        if not rest or rest[0] == "revision":
            self._send(200, {"id": name, "modelId": name, "private": self.hub.repositories[name], "siblings": []})
        elif rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._send(200, {"files": modes})
        elif rest[0] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            self.hub.files[name] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self._send(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/1", "commitOid": "1"})
        else:
            self._send(404, {"error": path})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
