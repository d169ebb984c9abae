"""Write down what happens in a run, for machines: one JSON object a line in `<run_dir>/log.jsonl`.

Everything goes through the standard library's logging, under the logger `segprop`: handlers of one's own get the same
records, with the same fields as attributes. Fields of every line:

    time      when, ISO 8601 in UTC, by the driver's clock
    run       the run's name
    level     info, warning, error
    event     submitted, started, committed, warned, failed, retried, released, stopped; or `message` for anything else
    message   the same in words

and of events about a task `node`, `stage` (its label), `kind`, `attempt` (from 1), `machine` (once known), with
`seconds`, `resumed`, `hits`, `misses` (committed), `warning` (warned), `error` (failed, retried), `after_s` (retried),
`bytes` (released).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cache_store.storage.durable import open_appending
from orchestrator.plan.graph import Node
from workers.specs.results import NodeFigures

FILE = "log.jsonl"
ROOT = "segprop"
#: Fields of a line beyond `time`, `level` and `message`, in this order.
FIELDS = (
    "run",
    "event",
    "node",
    "stage",
    "kind",
    "attempt",
    "machine",
    "seconds",
    "resumed",
    "hits",
    "misses",
    "bytes",
    "warning",
    "error",
    "after_s",
)

_log = logging.getLogger(f"{ROOT}.driver")


def event(name: str, node: Node, *, level: int = logging.INFO, **fields: Any) -> None:
    """Say that something happened to a task. Fields that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    extra = {"event": name, "node": node.id, "stage": node.label, "kind": node.kind, **known}
    _log.log(level, "%s: %s", node.label, name, extra=extra)


def committed_fields(figures: NodeFigures) -> dict[str, Any]:
    """What a line about a commit has of its result."""
    counters = figures.snapshot
    return {
        "seconds": figures.seconds,
        "resumed": figures.resumed,
        "hits": None if counters is None else counters.hits,
        "misses": None if counters is None else counters.misses,
        "machine": None if figures.where is None else figures.where.host,
    }


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; `run` for records that do not name theirs."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {"time": f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}Z"}
        line["level"] = record.levelname.lower()
        values = {"run": self._run, "event": "message", **vars(record)}
        line |= {key: values[key] for key in FIELDS if values.get(key) is not None}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.FileHandler):
    """Says once that a log cannot be written (the disk is full), which never ends a run."""

    _said = False

    def _open(self) -> TextIOWrapper:
        return open_appending(Path(self.baseFilename))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # from opening; those of writing are handled there
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's own name
        if not self._said:
            self._said = True
            print(f"segprop: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


class _ToPeople(logging.Handler):
    """Writes warnings to standard error; those about tasks have been shown with the run's progress already."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "event"):
            print(f"segprop: {record.getMessage()}", file=sys.stderr)


@contextmanager
def journal(run_dir: Path, run: str) -> Iterator[None]:
    """Append what happens meanwhile to the run directory's log."""
    logger = logging.getLogger(ROOT)
    handler = _Handler(run_dir / FILE, delay=True)
    handler.setFormatter(JsonLines(run))
    before = logger.level, logger.propagate
    people = _ToPeople()
    logger.addHandler(handler)
    logger.addHandler(people)
    logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
    # Lines are for the file, and for whoever has set up logging.
    logger.propagate = logging.getLogger().hasHandlers()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.removeHandler(people)
        handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]
