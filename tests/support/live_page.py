"""Made-up runs in a folder, and a server that shows them, for tests of the live page: real HTTP on a free port."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from fake_run import make_commits, make_plan

from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from orchestrator.execution.run_lease import Claim, LeaseTiming, RunLease
from orchestrator.execution.run_record import RunRecord, write_pointer, write_run
from orchestrator.plan.graph import Plan
from orchestrator.runs.recorded import FILE, Recorded
from orchestrator.ui.server import Listening, Server, open_server

DIGEST = "d" * 32


class PageRun:
    """A run directory in which as much of a made-up run is committed as a test wants. `called`: the run's name;
    `renamed`: regime -> what it is called instead."""

    def __init__(self, run_dir: Path, *, called: str = "fake", renamed: Mapping[str, str] | None = None) -> None:
        run_dir.mkdir(parents=True)
        self.run_dir = run_dir
        scratch = run_dir.parent / f".{run_dir.name}"
        scratch.mkdir()
        self.plan: Plan = make_plan(scratch, regimes="[e2e, segprop]")
        self.commits = make_commits(self.plan)
        self.storage = open_storage(str(run_dir / "store"))
        settings = {"run": called, "run_dir": str(run_dir), "store": str(run_dir / "store"), "seed": 0}
        (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
        (run_dir / FILE).write_bytes(Recorded(called, run_dir, "", self.plan, {}).to_bytes())
        record = RunRecord.of(called, self.plan)
        names = renamed or {}
        record = replace(record, regimes={names.get(name, name): regime for name, regime in record.regimes.items()})
        write_run(self.storage, DIGEST, record)
        write_pointer(run_dir, DIGEST)

    def id(self, label: str) -> str:
        (found,) = [node.id for node in self.plan.nodes if node.label == label]
        return found

    def commit(self, *labels: str, logged: bool = True) -> None:
        """Commit nodes; `logged`: by this run, else as another run's work in the same store."""
        for label in labels:
            node_id = self.id(label)
            result = self.commits[node_id].result
            NodeStore(self.storage).attempt(node_id).commit(result)
            if "set" in result:
                self.storage.write(f"sets/{result['set']}/set.json", b"{}")
            if logged:
                self.log(event="committed", node=node_id, stage=label, message=f"{label}: committed", seconds=2.5)

    def commit_all(self) -> None:
        self.commit(*(node.label for node in self.plan.nodes))

    def lease(self) -> RunLease:
        claim = Claim(DIGEST, "fake", str(self.run_dir))
        return RunLease.acquire(self.storage, claim, LeaseTiming(beat_s=0.05))

    def log(self, **fields: Any) -> None:
        line = {"time": "2026-12-01T10:00:00.000Z", "level": "info", "event": "message", **fields}
        with (self.run_dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def point(self, regime: str, stage: str, step: int, **figures: float) -> None:
        """Append a point; `train_loss` stands for `train/loss`."""
        named = {name.replace("_", "/", 1): value for name, value in figures.items()}
        line = {"regime": regime, "stage": stage, "kind": "train", "step": step, "when": 0.0, "figures": named}
        with (self.run_dir / "points.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    text: str


@dataclass(frozen=True)
class Visitor:
    """Asks a server for things. `cookie` and other headers are the test's to give."""

    server: Server

    @property
    def port(self) -> int:
        return self.server.server_port

    @property
    def word(self) -> str:
        return self.server.site.guard.form_word

    def get(self, path: str, **headers: str) -> Reply:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, form: Mapping[str, str], **headers: str) -> Reply:
        return self._ask("POST", path, urlencode(form), headers)

    def _ask(self, method: str, path: str, body: str | None, headers: Mapping[str, str]) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read().decode())
        finally:
            connection.close()

    @contextmanager
    def events(self, page: str, since: str = "") -> Iterator[Iterator[str]]:
        """Yield the data of server-sent events as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", f"/events?{urlencode({'page': page, 'since': since})}")
        answer = connection.getresponse()
        assert answer.status == 200
        deadline = time.monotonic() + 30

        def data() -> Iterator[str]:
            for line in answer:
                assert time.monotonic() < deadline, "no event came"
                if line.startswith(b"data: "):
                    yield line.decode().removeprefix("data: ").strip()

        try:
            yield data()
        finally:
            connection.close()


@contextmanager
def served(folder: Path, *, host: str = "127.0.0.1", token_file: Path | None = None) -> Iterator[Visitor]:
    """Serve a folder on a free port meanwhile."""
    server = open_server(folder, Listening(host, 0, token_file))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Visitor(server)
    finally:
        server.site.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
