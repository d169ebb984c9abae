"""Execute a data task: prepare images or text once."""

from __future__ import annotations

import time
from typing import Any

from cache_store.records.nodes import Attempt, Commit
from workers.control import Update
from workers.data.images.prepare import prepare
from workers.environment import WorkerEnvironment
from workers.specs import as_json, tasks
from workers.specs.language import TextSpec


def _prepare_data(task: tasks.DataTask, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    started = time.monotonic()

    def progress(**update: Any) -> None:
        environment.control.progress(Update(**update))

    if isinstance(task.data, TextSpec):
        from workers.data.text.prepare import prepare_text

        assert task.model is not None
        result = prepare_text(
            task.data, task.model, task.seed, environment.snapshots, progress, fingerprint=task.fingerprint
        )
    else:
        result = prepare(task.data, environment.snapshots, progress, fingerprint=task.fingerprint)
    # Where it all came from, so that a stage can make again what is lost; its own task does not say.
    origin = as_json.to_json(task)
    return attempt.commit(
        {**result, "origin": origin, "seconds": time.monotonic() - started, "where": environment.where().to_json()}
    )
