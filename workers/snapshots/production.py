"""Shards made by several workers at once: each takes one by its lease, makes it, publishes it.

The same for a worker that does nothing else and for a stage that finds a shard missing: the stage makes it itself
unless somebody is at it, and then waits. So nobody depends on anybody: a producer that is killed or hangs loses its
lease, and whoever needs the shard makes it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cache_store.errors import Interrupted
from cache_store.records.leases import Leases
from cache_store.records.nodes import Attempt, NodeStore
from workers.control import Control, Update
from workers.snapshots.boundary import StoredBoundary, snapshot_counters
from workers.specs.as_json import read_record, write_record
from workers.specs.orders import Production
from workers.specs.results import MaterializeResult, PartialSet, SnapshotCounters, Where

#: Between two looks at a shard that somebody else makes; the second after a while.
POLL_S, POLL_MAX_S = 0.02, 0.25
#: Waits shorter than this are not worth a word.
SILENT_S = 1.0
NOTE = "made.json"


@dataclass(frozen=True)
class MadeFigures:
    """What making shards took. `forwards`: samples through each frozen block."""

    forwards: Mapping[str, int]
    snapshot: SnapshotCounters
    seconds: float

    def __add__(self, other: MadeFigures) -> MadeFigures:
        forwards = dict(Counter(self.forwards) + Counter(other.forwards))
        return MadeFigures(forwards, self.snapshot + other.snapshot, self.seconds + other.seconds)


class Made:
    """What this attempt has made so far, noted in the store after every shard: so that nothing that was done goes
    uncounted, whoever commits the node in the end and whatever becomes of this attempt."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._boundaries: list[StoredBoundary] = []
        self.seconds = 0.0

    def watch(self, boundary: StoredBoundary) -> None:
        """Count what this boundary does."""
        self._boundaries.append(boundary)

    def note(self) -> None:
        """Write what this attempt has made so far beside its files."""
        self._attempt.note(NOTE, {"attempt": self._attempt.id, **write_record(self._own())})

    def _own(self) -> MadeFigures:
        forwards: Counter[str] = Counter()
        for boundary in self._boundaries:
            forwards += boundary.total_forwards()
        return MadeFigures(dict(forwards), snapshot_counters(self._boundaries), self.seconds)

    def total(self, nodes: NodeStore) -> MadeFigures:
        """Sum up all attempts at the node: the others' as they noted them."""
        total = self._own()
        for note in nodes.notes(self._attempt.node_id, NOTE):
            if note.get("attempt") != self._attempt.id:
                total += read_record(MadeFigures, note)
        return total


class SharedSet:
    """One set that others may be at work on too."""

    def __init__(self, boundary: StoredBoundary, control: Control, made: Made, *, alone: bool = False) -> None:
        """`alone`: nobody else is at work on the set, so leases would be of no use."""
        self._boundary = boundary
        self._control = control
        self._made = made
        self._leases = None if alone else Leases(boundary.snapshots.storage, boundary.snapshots.leases)
        #: Seconds spent waiting for others.
        self.waited = 0.0

    def make(self, indices: Iterable[int]) -> Iterable[int]:
        """Make those of these shards that nobody else has or is at; yields what was made."""
        for index in indices:
            if self._take_and_make(index) is not None:
                yield index

    def obtain(self, index: int) -> tuple[np.ndarray, ...] | list[np.ndarray]:
        """The arrays of a shard that was found missing: made here, or by whoever has it in hand.

        Raises Interrupted when asked to stop while waiting.
        """
        waited, pause = 0.0, POLL_S
        while True:
            if self._boundary.snapshots.has(index):
                return self._boundary.snapshots.touch(index)
            arrays = self._take_and_make(index)
            if arrays is not None:
                return arrays
            if waited > SILENT_S:
                self._control.progress(Update(phase="waiting for snapshots"))
            self._wait(pause)
            waited, pause = waited + pause, min(POLL_MAX_S, pause * 1.5)

    def settle(self) -> None:
        """Wait until nobody is at a shard of the set any more: then all that was done is noted. Interrupted as
        `obtain`."""
        for name in self._leases.names() if self._leases is not None else ():
            while not self._take(name):
                self._wait(POLL_MAX_S)
            self._release(name)

    def pause(self) -> None:
        """Let others get on with what they have in hand. Interrupted as `obtain`."""
        self._wait(POLL_MAX_S)

    def _wait(self, seconds: float) -> None:
        if self._control.should_stop():
            raise Interrupted("stopped while waiting for snapshots: run the same command to go on", waiting=True)
        time.sleep(seconds)
        self.waited += seconds

    def _take_and_make(self, index: int) -> list[np.ndarray] | None:
        name = f"{index:06d}"
        snapshots = self._boundary.snapshots
        if not self._take(name):
            return None
        try:
            if snapshots.has(index):
                return None
            started = time.monotonic()
            arrays = self._boundary.compute_shard(index, on_group=lambda: self._renew(name))
            snapshots.put(index, arrays)
            self._made.seconds += time.monotonic() - started
            # Before the lease goes: whoever finds no lease any more counts what was done under it.
            self._made.note()
            return arrays
        finally:
            self._release(name)

    def _take(self, name: str) -> bool:
        return self._leases is None or self._leases.take(name)

    def _renew(self, name: str) -> None:
        if self._leases is not None:
            self._leases.renew(name)

    def _release(self, name: str) -> None:
        if self._leases is not None:
            self._leases.release(name)


def whole_set(boundary: StoredBoundary, made: MadeFigures, where: Where) -> MaterializeResult:
    """What the node of a set that is complete commits. `made`: what making it took, all attempts together."""
    return MaterializeResult(
        set=boundary.spec.id,
        rows=boundary.samples,
        bytes=boundary.snapshots.stored_bytes() if boundary.encoding.packs else boundary.spec.bytes,
        forwards=made.forwards,
        snapshot=made.snapshot,
        seconds=made.seconds,
        where=where,
    )


def samples_there(boundary: StoredBoundary) -> int:
    """Samples whose shards are committed."""
    missing = set(boundary.snapshots.missing())
    groups = (
        group
        for shard in range(boundary.spec.shards)
        if shard not in missing
        for group in boundary.geometry.groups_of_shard(shard)
    )
    return sum(len(boundary.geometry.samples_of_group(group)) for group in groups)


def commit_made_along(
    nodes: NodeStore, production: Production, boundaries: Mapping[str, StoredBoundary], where: Where
) -> dict[str, PartialSet]:
    """Commit the nodes of the sets that are whole by now; returns role -> set and samples of those that are not.

    What the stage made is part of its own figures; these nodes get what others have noted for them.
    """
    partial: dict[str, PartialSet] = {}
    for role, node_id in production.unfinished.items():
        boundary = boundaries[role]
        if boundary.snapshots.missing():
            partial[role] = PartialSet(set=boundary.spec.id, rows=samples_there(boundary))
        elif nodes.commit_of(node_id) is None:
            attempt = nodes.attempt(node_id, production.identities.get(node_id))
            attempt.commit(whole_set(boundary, Made(attempt).total(nodes), where).to_json())
    return partial
