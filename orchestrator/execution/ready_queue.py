"""Keep what to do next up to date as things happen, instead of computing it anew: `schedule` for plans of any size.

`schedule` says what is wanted, ready and releasable as functions of everything known, which costs a walk over the
plan. A `ReadyQueue` is told each change (started, finished, released, …) and touches only the neighbours of the node
it is about, so a driver's step costs the same in a plan of ten nodes and of a hundred thousand. It means exactly what
`schedule` means: a property test compares the two after every change.

No clock, no store: the driver tells it what happened.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from orchestrator.execution import schedule
from orchestrator.plan.graph import Node, Plan

#: Where a node comes in the queue: first what has followers, then the order of the plan.
Place = tuple[int, int]


class ReadyQueue:
    """The state of a plan under way. Each change costs about the number of the node's parents and readers. Nodes that
    are not in the plan, such as those of a plan before it that still run, do not concern it."""

    def __init__(
        self,
        plan: Plan,
        *,
        committed: AbstractSet[str],
        released: AbstractSet[str] = schedule.NONE,
        running: AbstractSet[str] = schedule.NONE,
        failed: AbstractSet[str] = schedule.NONE,
        partial: AbstractSet[str] = schedule.NONE,
        overlapping: AbstractSet[str] | None = None,
        targets: AbstractSet[str] | None = None,
    ) -> None:
        """`overlapping`: stages that do not wait for their sets, those of the plan unless given. For releasing, a set
        is needed by such a stage as by any other: ask an agenda in which none overlaps. `targets`: what is to be
        finished, those of the plan unless given."""
        self._plan = plan
        self._partial = set(partial)
        self._committed = set(committed)
        self._released = set(released)
        self._running: set[str] = set()
        self._failed = set(failed)
        self._targets = frozenset(plan.targets if targets is None else targets)
        self._place: dict[str, Place] = {
            # Nothing but the final table waits for an evaluation; stages and snapshots have followers. What is judged
            # or measured takes longest, and no stage asks for it.
            node.id: (node.scores + node.late, position)
            for position, node in enumerate(plan.nodes)
        }
        overlapping = plan.overlapping if overlapping is None else overlapping
        self._parents = {node.id: schedule.awaited(plan, node, overlapping) for node in plan.nodes}
        self._readers: dict[str, list[str]] = {}
        for node_id, parents in self._parents.items():
            for parent in parents:
                self._readers.setdefault(parent, []).append(node_id)
        self._wanted: set[str] = set()
        #: Wanted readers of a node; wanted parents of a wanted node; readers of a set that are wanted or running.
        self._demand: dict[str, int] = dict.fromkeys(self._place, 0)
        self._unmet: dict[str, int] = dict.fromkeys(self._place, 0)
        self._busy_readers: dict[str, int] = dict.fromkeys(self._place, 0)
        #: Heap of nodes that were ready when they were entered; looked at again when they come up.
        self._queue: list[tuple[Place, str]] = []
        #: Nodes with an entry in the heap, so that none has two.
        self._queued: set[str] = set()
        #: Ready nodes, for counting.
        self._ready: set[str] = set()
        #: Sets to look at: something about them has changed.
        self._maybe: dict[str, None] = {}
        for node_id in schedule.wanted(
            plan,
            committed=self._committed,
            released=self._released,
            overlapping=overlapping,
            targets=self._targets,
        ):
            self._enter(node_id)
        self._maybe |= dict.fromkeys(node.id for node in plan.sets)
        for node_id in running:
            self.start(node_id)

    # -- asking -------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Count the nodes that are ready: the length of `schedule.ready`."""
        return len(self._ready)

    def ready(self) -> list[str]:
        """List all ready nodes in the order of the queue. Costs a sort; `take` does not."""
        return sorted(self._ready, key=self._place.__getitem__)

    def take(self, may_start: Callable[[str], bool]) -> Node | None:
        """Return the first ready node that may start now, None when there is none. It stays ready until `start`."""
        put_off: list[tuple[Place, str]] = []
        found: Node | None = None
        while self._queue:
            _, node_id = self._queue[0]
            if node_id not in self._ready:
                heapq.heappop(self._queue)
                self._queued.discard(node_id)
                continue
            if may_start(node_id):
                found = self._plan.node(node_id)
                break
            put_off.append(heapq.heappop(self._queue))
        for entry in put_off:
            heapq.heappush(self._queue, entry)
        return found

    def releasable(self) -> list[str]:
        """List sets nobody will read any more, in plan order: those of `schedule.releasable`. Looks only at sets about
        which something has changed since the last call; what is returned and not released comes up again."""
        if not self._maybe:
            return []
        found = [node_id for node_id in self._maybe if self._is_releasable(node_id)]
        self._maybe = dict.fromkeys(found)
        return sorted(found, key=lambda node_id: self._place[node_id][1])

    def _is_releasable(self, node_id: str) -> bool:
        return (
            (node_id in self._committed or node_id in self._partial)
            and node_id not in self._released
            and node_id not in self._plan.kept
            and not self._busy(node_id)
            and self._busy_readers[node_id] == 0
        )

    def wants(self, node_id: str) -> bool:
        """Tell whether a target depends on the node."""
        return node_id in self._wanted

    # -- telling ------------------------------------------------------------------------------------------

    def start(self, node_id: str) -> None:
        """Note that the node runs from now on."""
        if node_id not in self._place:
            return
        was_busy = self._busy(node_id)
        self._running.add(node_id)
        self._settle(node_id, was_busy)

    def stop(self, node_id: str) -> None:
        """Note that the node does not run any more; it is ready again unless `commit` or `fail` follows."""
        if node_id not in self._place:
            return
        was_busy = self._busy(node_id)
        self._running.discard(node_id)
        self._settle(node_id, was_busy)

    def commit(self, node_id: str) -> None:
        """Note that the node is committed, and its set is there."""
        if node_id not in self._place:
            return
        self._committed.add(node_id)
        self._released.discard(node_id)
        self._partial.discard(node_id)
        self._look(node_id)
        self._notice(node_id)

    def leave(self, node_id: str) -> None:
        """Note that a part of the node's set is in the store, and the stage that made it has ended."""
        if node_id in self._place:
            self._partial.add(node_id)
            self._notice(node_id)

    def release(self, node_id: str) -> None:
        """Note that the node's set, or the part of it there was, is not in the store any more."""
        if node_id not in self._place:
            return
        if node_id in self._partial:
            self._partial.discard(node_id)
            return
        self._released.add(node_id)
        self._look(node_id)

    def fail(self, node_id: str) -> None:
        """Note that the node will not be tried again."""
        if node_id not in self._place:
            return
        self._failed.add(node_id)
        self._requeue(node_id)

    def ask(self, targets: AbstractSet[str]) -> None:
        """Note that these are the targets from now on."""
        changed = self._targets ^ targets
        self._targets = frozenset(targets)
        for node_id in changed:
            self._look(node_id)

    # -- keeping up ---------------------------------------------------------------------------------------

    def _look(self, node_id: str) -> None:
        """Put the node where it belongs, and whatever that changes, upwards."""
        stack = [node_id]
        while stack:
            current = stack.pop()
            should = self._should_be_wanted(current)
            if should == (current in self._wanted):
                continue
            if should:
                self._enter(current)
            else:
                self._leave(current)
            # Only the parents' demand has changed; what they are themselves may follow.
            stack += self._parents[current]

    def _should_be_wanted(self, node_id: str) -> bool:
        if node_id not in self._committed and node_id in self._targets:
            return True
        return self._demand[node_id] > 0 and (node_id not in self._committed or node_id in self._released)

    def _enter(self, node_id: str) -> None:
        was_busy = self._busy(node_id)
        self._wanted.add(node_id)
        for parent in self._parents[node_id]:
            self._demand[parent] += 1
        for reader in self._readers.get(node_id, ()):
            self._unmet[reader] += 1
            self._requeue(reader)
        self._settle(node_id, was_busy)

    def _leave(self, node_id: str) -> None:
        was_busy = self._busy(node_id)
        self._wanted.discard(node_id)
        for parent in self._parents[node_id]:
            self._demand[parent] -= 1
        for reader in self._readers.get(node_id, ()):
            self._unmet[reader] -= 1
            self._requeue(reader)
        self._settle(node_id, was_busy)

    def _busy(self, node_id: str) -> bool:
        return node_id in self._wanted or node_id in self._running

    def _settle(self, node_id: str, was_busy: bool) -> None:
        """Follow a change of wanted or running."""
        busy = self._busy(node_id)
        if busy != was_busy:
            for parent in self._parents[node_id]:
                self._busy_readers[parent] += 1 if busy else -1
                self._notice(parent)
            self._notice(node_id)
        self._requeue(node_id)

    def _notice(self, node_id: str) -> None:
        if self._plan.node(node_id).makes_set:
            self._maybe[node_id] = None

    def _requeue(self, node_id: str) -> None:
        is_ready = (
            node_id in self._wanted
            and self._unmet[node_id] == 0
            and node_id not in self._running
            and node_id not in self._failed
        )
        if not is_ready:
            self._ready.discard(node_id)
            return
        self._ready.add(node_id)
        if node_id not in self._queued:
            self._queued.add(node_id)
            heapq.heappush(self._queue, (self._place[node_id], node_id))
