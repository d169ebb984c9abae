"""Run nodes one at a time in a thread of this process: no Ray, no cluster, the same results."""

from __future__ import annotations

import queue
import socket
import threading

from orchestrator.runners.base import Event, Failed, Succeeded
from workers.control import NOTHING, ThreadControl, Update
from workers.specs.orders import WorkOrder


class LocalRunner:
    def __init__(self, *, threads: int, device: str) -> None:
        self.threads = threads
        self.device = device
        self._control = ThreadControl()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        #: The order at work and its thread.
        self._running: tuple[WorkOrder, threading.Thread] | None = None

    @property
    def slots(self) -> int:
        return 1

    def start(self) -> None:
        """Do nothing: torch is imported with the first order."""

    def free(self, *, together: bool = False) -> int:
        return 0 if together or self._running else 1

    def submit(self, order: WorkOrder) -> None:
        if self._running is not None:
            raise RuntimeError(f"a local runner has one slot, and {self._running[0].key} is in it")
        self._control.progress(NOTHING)  # what the last task reported is not this one's
        thread = threading.Thread(target=self._work, args=(order,), name="segprop-worker", daemon=True)
        self._running = (order, thread)
        thread.start()

    def _work(self, order: WorkOrder) -> None:
        try:
            from workers.tasks.execute import execute

            self._events.put(Succeeded(order.key, execute(order, self._control)))
        except BaseException as error:  # noqa: BLE001 - whatever it was, the driver decides what it means
            self._events.put(Failed(order.key, error))

    def wait(self, timeout_s: float) -> list[Event]:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return []
        if self._running is not None:
            self._running[1].join()
        self._running = None
        return [event]

    def progress(self) -> dict[str, Update]:
        return {self._running[0].key: self._control.latest()} if self._running else {}

    def waiting(self, tasks: int) -> None:
        """Do nothing: nobody watches."""

    def machine(self, node_id: str) -> str | None:
        return socket.gethostname()

    def stop(self) -> None:
        self._control.stop()

    def close(self) -> None:
        self._control.stop()
        if self._running is not None:
            self._running[1].join(timeout=60)
