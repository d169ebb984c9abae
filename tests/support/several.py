"""Several slots without Ray: each order runs in a thread of this process. For runs in which one stage trains at a time,
since torch's random state belongs to the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from running import Lab

from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Driver, DriverSettings, Outcome
from orchestrator.execution.retry import NodeRetries
from orchestrator.progress import Progress
from orchestrator.runners.base import Event, Failed, Succeeded
from workers.control import ThreadControl, Update
from workers.specs.orders import WorkOrder
from workers.tasks.execute import execute


class ThreadRunner:
    """`control_of` makes the control of an order; one that raises when it is looked at is a crash."""

    threads, device = 1, "cpu"

    def __init__(
        self, slots: int, control_of: Callable[[WorkOrder], ThreadControl] = lambda _: ThreadControl()
    ) -> None:
        self.slots = slots
        self.submitted: list[WorkOrder] = []
        self._control_of = control_of
        self._running: dict[str, ThreadControl] = {}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def start(self) -> None:
        pass

    def free(self) -> int:
        return self.slots - len(self._running)

    def submit(self, order: WorkOrder) -> None:
        assert order.key not in self._running, "submitted twice"
        assert self.free() > 0
        self.submitted.append(order)
        control = self._running[order.key] = self._control_of(order)
        threading.Thread(target=self._work, args=(order, control), daemon=True).start()

    def _work(self, order: WorkOrder, control: ThreadControl) -> None:
        try:
            self._events.put(Succeeded(order.key, execute(order, control)))
        except BaseException as error:  # noqa: BLE001 - whatever it was, the driver decides what it means
            self._events.put(Failed(order.key, error, lost=isinstance(error, LostError)))

    def wait(self, timeout_s: float) -> list[Event]:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        del self._running[event.key]
        return [event]

    def progress(self) -> dict[str, Update]:
        return {key: control.latest() for key, control in self._running.items()}

    def waiting(self, tasks: int) -> None:
        pass

    def machine(self, node_id: str) -> str | None:
        return None

    def stop(self) -> None:
        for control in self._running.values():
            control.stop()

    def close(self) -> None:
        assert not self._running


class LostError(Exception):
    """Stands for a worker that vanished."""


def drive(lab: Lab, runner: ThreadRunner, *, max_attempts: int = 3, **options: Any) -> tuple[Outcome, CommitLog]:
    """Run the lab's plan as a session does."""
    ledger = CommitLog.read(lab.storage, lab.prepared.plan)
    with Progress(len(lab.prepared.plan.nodes), quiet=True) as progress:
        settings = DriverSettings(lab.store, NodeRetries(max_attempts))
        driver = Driver(lab.prepared.plan, ledger, runner, progress, settings, **options)
        return driver.run(), ledger
