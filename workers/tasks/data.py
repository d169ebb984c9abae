"""Execute a data task: prepare images or text once."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from cache_store.records.nodes import Attempt, Commit
from workers.control import Update
from workers.domains.registry import prepare_data, trained_questions
from workers.environment import WorkerEnvironment
from workers.specs import as_json, tasks
from workers.specs.export_files import TRAINED_QUESTIONS


def _prepare_data(task: tasks.DataTask, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    started = time.monotonic()

    def progress(**update: Any) -> None:
        environment.control.progress(Update(**update))

    result = prepare_data(task, environment.snapshots, progress)
    # What a judge has to know, beside the sets: those may be dropped.
    questions = trained_questions(task)
    if questions is not None:
        attempt.write(TRAINED_QUESTIONS, questions.to_bytes())
    # Where it all came from, so that a stage can make again what is lost; its own task does not say.
    result = replace(
        result, origin=as_json.to_json(task), seconds=time.monotonic() - started, where=environment.where()
    )
    return attempt.commit(result.to_json())
