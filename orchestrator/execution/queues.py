"""Know which nodes may start and which sets may go; both are told of every change at once."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from orchestrator.execution import schedule
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.plan.graph import Plan


class Queues:
    """`starting` says what may start, `releasing` which sets may go. They differ where stages overlap: such a stage
    does not wait for its sets, but they stay until it has ended; and where more may be asked for later."""

    def __init__(
        self,
        plan: Plan,
        ledger: CommitLog,
        *,
        running: AbstractSet[str] = schedule.NONE,
        failed: AbstractSet[str] = schedule.NONE,
        steered: bool = False,
    ) -> None:
        """`steered`: the plan's targets change (`ask`)."""

        def queue(overlapping: AbstractSet[str] | None, coming: Iterable[str] = ()) -> ReadyQueue:
            return ReadyQueue(
                plan,
                committed=ledger.commits.keys(),
                released=ledger.released,
                partial=ledger.partial.keys(),
                running=running,
                failed=failed,
                overlapping=overlapping,
                targets={*plan.targets, *coming},
            )

        self.starting = queue(None)
        apart = steered or bool(plan.overlapping or plan.coming)
        self.releasing = queue(schedule.NONE, plan.coming) if apart else self.starting
        self._all = (self.starting, self.releasing) if apart else (self.starting,)

    def ask(self, plan: Plan) -> None:
        """Take the targets of a plan of the same nodes."""
        self.starting.ask(set(plan.targets))
        self.releasing.ask({*plan.targets, *plan.coming})

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
