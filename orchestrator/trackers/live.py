"""Tell trackers what stages do while they train: an experiment a regime, its points by optimizer steps over all stages.

Every point is a line of `<run_dir>/points.jsonl`, whose first line names the run, so that a run that goes on does so in
the same experiment of every tracker and repeats nothing. TensorBoard's files grow in this process. Every other service
is filled by a process of its own behind a queue: what it does not take in time is left out, and when it fails, that is
said once and training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from cache_store.storage.durable import open_appending, read_regular
from orchestrator.reports.records import Summary
from orchestrator.trackers.base import SCORES, judged
from orchestrator.trackers.services import Opening
from orchestrator.trackers.tensorboard import LiveEvents
from workers.control import Update

#: Where our packages are.
_ROOT = str(Path(__file__).resolve().parents[2])
_log = logging.getLogger("segprop.trackers")

FILE = "points.jsonl"
#: Lines that wait for a service; more are left out.
_WAITING = 10_000
#: Bytes of points that are read: about ten million lines.
_MAX_BYTES = 1 << 31
#: Seconds that a service has for what is left when the run ends.
CLOSING_S = 60.0

#: Field of an update -> name of the figure.
LIVE_FIGURES = {
    "recent_loss": "train/loss",
    "recent_accuracy": "train/accuracy",
    "lr": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "rate": "train/samples_per_second",
    "tokens_rate": "train/tokens_per_second",
    "device_bytes": "memory/device_bytes",
    "hits": "snapshots/hits",
    "misses": "snapshots/misses",
}
#: Metric of the assembled or final network -> name of the figure, behind `assembled/` or `test/`.
_METRICS = (*SCORES, "perplexity")


@dataclass(frozen=True)
class TrackedStage:
    """A train node of a regime. `before`: optimizer steps of the stages before it; `epoch_steps`: of one of its
    epochs."""

    regime: str
    name: str
    before: int
    epoch_steps: int


@dataclass(frozen=True)
class Tracked:
    """A run as trackers see it. `stages`: by train node; `config`: resolved settings by dotted key."""

    run: str
    run_dir: Path
    project: str
    services: tuple[str, ...]
    stages: Mapping[str, TrackedStage]
    config: Mapping[str, Any] = field(default_factory=dict)


class LiveTracking:
    """The trackers of one run while it is driven. Called from one thread; nothing here raises or waits."""

    def __init__(self, tracked: Tracked) -> None:
        self._tracked = tracked
        self._told: dict[tuple[str, str], int] = {}
        self._services: dict[tuple[str, str], _Process] = {}
        self._events = LiveEvents(tracked.run_dir)
        self._file: TextIOWrapper | None = None
        self._token = ""

    def _begin(self) -> None:
        """Take in what was told before, and open the file; the run directory is this driver's by now."""
        if self._token:
            return
        known = self._read()
        self._token = known or secrets.token_hex(8)
        try:
            self._file = open_appending(self._tracked.run_dir / FILE)
        except OSError as error:
            _log.warning("points of trackers cannot be written: %s", error)
        if not known:
            self._write({"token": self._token})

    def tell(self, updates: Mapping[str, Update]) -> None:
        """Take what running stages (train node -> update) told last."""
        for node, update in updates.items():
            stage = self._tracked.stages.get(node)
            if stage is None or update.global_step is None:
                continue
            if update.validated:
                figures = {
                    "validation/loss": update.validation_loss,
                    "validation/accuracy": update.validation_accuracy,
                    **({} if update.score is None else {f"validation/{update.score}": update.validation_score}),
                }
                self._point(stage, "validation", stage.before + update.validated * stage.epoch_steps, figures)
            figures = {name: getattr(update, key) for key, name in LIVE_FIGURES.items()}
            self._point(stage, "train", stage.before + update.global_step, figures)

    def finish(self, summary: Summary) -> None:
        """Tell what came of the stages that was not told while they ran."""
        for name, regime in summary.regimes.items():
            stages = {stage.name: stage for stage in self._tracked.stages.values() if stage.regime == name}
            last = 0
            for found in regime.stages:
                stage = stages.get(found.name)
                if stage is None:
                    continue
                for count, epoch in enumerate(found.curve, 1):
                    last = stage.before + count * stage.epoch_steps
                    figures = {f"validation/{key}": epoch.figure(f"validation_{key}") for key in SCORES}
                    self._point(stage, "validation", last, figures)
                whole = {f"assembled/{key}": found.assembled.get(key) for key in _METRICS} | judged(found)
                self._point(stage, "assembled", last, whole)
            if stages and regime.done:
                final = {f"test/{key}": regime.final.metrics.get(key) for key in _METRICS}
                self._point(next(reversed(stages.values())), "test", last, final)

    def close(self) -> None:
        """End all trackers, waiting for services at most `CLOSING_S`."""
        deadline = time.monotonic() + CLOSING_S
        for service in self._services.values():
            service.end()
        for service in self._services.values():
            service.wait(deadline)
        self._events.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _point(self, stage: TrackedStage, kind: str, step: int, figures: Mapping[str, float | None]) -> None:
        known = {name: float(value) for name, value in figures.items() if value is not None}
        self._begin()
        key = (f"{stage.regime}/{stage.name}", kind)
        if not known or step <= self._told.get(key, -1):
            return
        self._told[key] = step
        when = time.time()
        self._write(
            {"regime": stage.regime, "stage": stage.name, "kind": kind, "step": step, "when": when, "figures": known}
        )
        self._events.log(stage.regime, step, when, known)
        for service in self._tracked.services:
            self._process(service, stage.regime).put([step, when, known])

    def _process(self, service: str, regime: str) -> _Process:
        if (service, regime) not in self._services:
            tracked = self._tracked
            folder = tracked.run_dir / "trackers"
            opening = Opening(
                project=tracked.project,
                group=tracked.run,
                name=f"{tracked.run}/{regime}",
                id=_id(self._token, regime),
                folder=str(folder.absolute()),
                config=tracked.config,
            )
            self._services[service, regime] = _Process(service, opening)
        return self._services[service, regime]

    def _read(self) -> str:
        """Take in what earlier invocations told, and return the run's token; "" without one."""
        token = ""
        for line in read_points(self._tracked.run_dir):
            token = token or str(line.get("token", ""))
            if "step" in line:
                key = (f"{line['regime']}/{line['stage']}", str(line["kind"]))
                self._told[key] = max(int(line["step"]), self._told.get(key, -1))
        return token

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            _log.warning("points of trackers cannot be written: %s", error)
            self._file = None


def read_points(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's points; none where there are none. A line that a kill cut short is passed over."""
    try:
        text = read_regular(run_dir / FILE, _MAX_BYTES).decode(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _id(token: str, regime: str) -> str:
    """Name an experiment of a regime: 21 letters and digits, which every service takes."""
    return hashlib.sha256(f"{token}/{regime}".encode()).hexdigest()[:21]


class _Process:
    """A service's own process, and the thread that feeds it."""

    def __init__(self, service: str, opening: Opening) -> None:
        self._service, self._name = service, opening.name
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed with this object
        self._process: subprocess.Popen[str] | None = None
        self._lines.put_nowait(json.dumps(asdict(opening)))
        self._thread = threading.Thread(
            target=self._feed, args=(opening.folder,), name=f"segprop-{service}", daemon=True
        )
        self._thread.start()

    def put(self, line: Sequence[Any]) -> None:
        """Pass a line on; leave it out where too many wait already."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(json.dumps(line))

    def end(self) -> None:
        """Pass nothing on any more."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)

    def wait(self, deadline: float) -> None:
        """Wait until everything is sent, or end the process at the deadline (monotonic seconds)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and self._process is not None:
            _log.warning(
                "%s has not taken all of %s in %.0f s; the rest is left out", self._service, self._name, CLOSING_S
            )
            self._process.kill()

    def _feed(self, folder: str) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
            # -P: a folder of the current directory that is called as a package of ours is none of it.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "orchestrator.trackers.sidecar", self._service],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))},
            )
            self._process = process
            with process:
                while process.stdin is not None and (line := self._lines.get()) is not None:
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
        except OSError:
            pass  # it has ended: why is said below
        if self._process is None or self._process.returncode:
            _log.warning("%s does not take %s: %s; training goes on", self._service, self._name, self._reason())

    def _reason(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its process ended"
