"""Execute a model task: initial weights, or the import of a checkpoint."""

from __future__ import annotations

import time
from typing import Any

from cache_store.records.nodes import Attempt
from workers.environment import WorkerEnvironment
from workers.models.base import Start
from workers.models.registry import family_of
from workers.specs import tasks


def _initial_model(task: tasks.ModelTask, environment: WorkerEnvironment, attempt: Attempt) -> dict[str, Any]:
    started = time.monotonic()
    start = Start(task.model, task.classes, task.seed, task.sample)
    written = family_of(task.model).write_start(start, attempt, environment.control)
    return attempt.commit({**written, "seconds": time.monotonic() - started, "where": environment.where()})
