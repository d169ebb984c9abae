"""Execute a model task: initial weights, or the import of a checkpoint."""

from __future__ import annotations

import time

from cache_store.records.nodes import Attempt, Commit
from workers.environment import WorkerEnvironment
from workers.models.base import Start
from workers.models.registry import family_of
from workers.specs import tasks
from workers.specs.results import ModelResult


def _initial_model(task: tasks.ModelTask, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    started = time.monotonic()
    start = Start(task.model, task.classes, task.seed, task.sample)
    written = family_of(task.model).write_start(start, attempt, environment.control)
    result = ModelResult(
        digest=written.digest,
        parts=written.parts,
        companions=written.companions,
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())
