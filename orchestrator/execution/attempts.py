"""Keep count of a driver's attempts: which nodes run, since when, and which wait before they are tried again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from orchestrator.execution.beat import Beat, RunningTask
from workers.control import NOTHING, Update


class Attempts:
    """What one driver knows of its own attempts. Times: unix seconds for people, monotonic ones for waiting."""

    def __init__(self) -> None:
        #: Running node -> when it was submitted (unix seconds).
        self.running: dict[str, float] = {}
        #: Running nodes that have shown a sign of life.
        self._begun: set[str] = set()
        #: Nodes that took more than one attempt.
        self._retried: set[str] = set()
        self._count: Counter[str] = Counter()
        #: Node id -> monotonic time before which it is not tried again.
        self._not_before: dict[str, float] = {}

    def count(self, node_id: str) -> int:
        """Return the attempts made so far, the running one included."""
        return self._count[node_id]

    def submit(self, node_id: str) -> None:
        """Count one more attempt, which is about to be submitted."""
        self._count[node_id] += 1

    def forgive(self, node_id: str) -> None:
        """Take an attempt that ended through no fault of the node out of the count."""
        self._count[node_id] -= 1

    def submitted(self, node_id: str) -> None:
        self.running[node_id] = time.time()

    def begin(self, node_id: str) -> bool:
        """Note a sign of life; return whether it is a running node's first."""
        if node_id not in self.running or node_id in self._begun:
            return False
        self._begun.add(node_id)
        return True

    def end(self, node_id: str) -> bool:
        """Note that the node does not run any more; return whether it had shown a sign of life."""
        self.running.pop(node_id, None)
        begun = node_id in self._begun
        self._begun.discard(node_id)
        return begun

    def put_off(self, node_id: str, seconds: float) -> None:
        """Try the node again, `seconds` from now at the earliest."""
        self._not_before[node_id] = time.monotonic() + seconds
        self._retried.add(node_id)

    def settle(self, node_id: str) -> None:
        """Forget the wait of a node that is committed or has failed for good."""
        self._not_before.pop(node_id, None)

    def may_start(self, node_id: str, now: float) -> bool:
        return self._not_before.get(node_id, 0.0) <= now

    def waiting(self, now: float) -> set[str]:
        """Return the nodes that are not to be tried yet."""
        return {node_id for node_id, moment in self._not_before.items() if moment > now}

    def beat(
        self, latest: Mapping[str, Update], machine: Callable[[str], str | None], failed: Mapping[str, str]
    ) -> Beat:
        """Return what the driver is doing: `latest` is what its workers told last, `failed` why nodes failed for
        good."""
        running = {
            node_id: RunningTask(self._count[node_id], machine(node_id), since, latest.get(node_id, NOTHING))
            for node_id, since in self.running.items()
        }
        return Beat(running, dict(failed), {node_id: self._count[node_id] for node_id in self._retried})
