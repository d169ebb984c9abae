"""Know which nodes may start and which sets may go; both are told of every change at once."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from orchestrator.execution import schedule
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.plan.graph import Plan


class Queues:
    """`starting` says what may start, `releasing` which sets may go. They differ where stages overlap: such a stage
    does not wait for its sets, but they stay until it has ended."""

    def __init__(
        self,
        plan: Plan,
        ledger: CommitLog,
        *,
        running: AbstractSet[str] = schedule.NONE,
        failed: AbstractSet[str] = schedule.NONE,
    ) -> None:
        def queue(overlapping: AbstractSet[str] | None) -> ReadyQueue:
            return ReadyQueue(
                plan,
                committed=ledger.commits.keys(),
                released=ledger.released,
                partial=ledger.partial.keys(),
                running=running,
                failed=failed,
                overlapping=overlapping,
            )

        self.starting = queue(None)
        self.releasing = queue(schedule.NONE) if plan.overlapping else self.starting
        self._all = (self.starting, self.releasing) if plan.overlapping else (self.starting,)

    def start(self, node_id: str) -> None:
        for queue in self._all:
            queue.start(node_id)

    def stop(self, node_id: str) -> None:
        for queue in self._all:
            queue.stop(node_id)

    def commit(self, node_id: str) -> None:
        for queue in self._all:
            queue.commit(node_id)

    def fail(self, node_id: str) -> None:
        for queue in self._all:
            queue.fail(node_id)

    def release(self, node_id: str) -> None:
        for queue in self._all:
            queue.release(node_id)
