"""The Ray actor that executes one task at a time."""

from __future__ import annotations

import socket
from typing import Any

from cache_store.records.nodes import Commit
from orchestrator.runners import shared_storage
from orchestrator.runners.ray_api import actor_class, in_group, remote_function
from orchestrator.runners.versions import versions
from workers.control import NOTHING, ThreadControl, Update
from workers.specs.orders import WorkOrder


class Worker:
    """One slot. Work runs in the default group's single thread, control calls beside it."""

    def __init__(self) -> None:
        self._control = ThreadControl()
        import workers.tasks.execute  # noqa: F401 - torch is imported here, once

    def run(self, order: WorkOrder) -> Commit | None:
        from workers.tasks.execute import execute

        # A stop is for good: one that comes between two orders holds for the order on its way.
        self._control.progress(NOTHING)
        return execute(order, self._control)

    def ready(self) -> dict[str, Any]:
        """Say where this is and what it runs."""
        return {"machine": socket.gethostname(), "versions": versions()}

    @in_group("control")
    def poll(self) -> Update:
        return self._control.latest()

    @in_group("control")
    def stop(self) -> None:
        self._control.stop()


def _answer(question: shared_storage.Question, name: str, machine: str) -> shared_storage.Answer:
    return shared_storage.answer(question, name, machine)


#: A worker that dies comes back, and its task is not run again by Ray.
worker_class = actor_class(Worker, max_restarts=-1, max_task_retries=0, concurrency_groups={"control": 1})
answer = remote_function(_answer, num_cpus=0, max_retries=0)
