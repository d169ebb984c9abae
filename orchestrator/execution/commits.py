"""Read which nodes of a plan are committed and which snapshot sets are released. Stateless: the store is the only
source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from cache_store.records.nodes import Commit, NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import Storage
from orchestrator.plan.graph import Node, Plan
from workers.specs.results import LeftSets, MaterializeResult

#: Requests at one time to a store over a network, where each takes tens of milliseconds.
READERS = 16
K = TypeVar("K")
T = TypeVar("T")


@dataclass
class CommitLog:
    storage: Storage
    #: Node id -> commit.
    commits: dict[str, Commit] = field(default_factory=dict)
    #: Committed materialize nodes whose set is not in the store (any more).
    released: set[str] = field(default_factory=set)
    #: Materialize node without a commit -> its set, of which a stage that overlapped has left a part in the store.
    partial: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, storage: Storage, plan: Plan) -> CommitLog:
        ledger = cls(storage)
        ledger.look_up(plan.nodes)
        return ledger

    def look_up(self, nodes: Sequence[Node]) -> None:
        """Read what the store knows of these nodes. Commits never change: those known are not read again."""
        store, snapshots = NodeStore(self.storage), SnapshotStore(self.storage)

        def look(node: Node) -> tuple[str, Commit | None, bool]:
            commit = self.commits.get(node.id) or store.commit_of(node.id)
            if commit is None or not node.makes_set:
                return node.id, commit, False
            return node.id, commit, snapshots.find(commit.read(MaterializeResult).set) is None

        for node_id, commit, gone in mapped(look, nodes, threads=READERS if self.storage.remote else 1):
            if commit is None:
                continue
            self.commits[node_id] = commit
            if gone:
                self.released.add(node_id)
            else:
                self.released.discard(node_id)
        for node in nodes:
            self.note_partial(node)

    def add(self, node_id: str, commit: Commit) -> None:
        self.commits[node_id] = commit
        self.released.discard(node_id)
        self.partial.pop(node_id, None)

    def note_partial(self, stage: Node) -> dict[str, str]:
        """Take in what a committed stage has left of sets that it made along but not whole; node -> set."""
        commit = self.commits.get(stage.id)
        left: dict[str, str] = {}
        for role, made in (commit.read(LeftSets).partial if commit is not None else {}).items():
            parent, set_id = stage.parents[role], made.set
            if parent not in self.commits and SnapshotStore(self.storage).find(set_id) is not None:
                left[parent] = set_id
        self.partial |= left
        return left

    def look(self, node_id: str) -> bool:
        """Look whether a node has a commit by now, which somebody else than its own order may have made."""
        commit = NodeStore(self.storage).commit_of(node_id)
        if commit is not None:
            self.add(node_id, commit)
        return commit is not None

    def release(self, node_id: str) -> None:
        """Drop the node's snapshot set, or what there is of it, from the store; its commit stays."""
        left = self.partial.get(node_id)
        SnapshotStore(self.storage).drop(left or self.commits[node_id].read(MaterializeResult).set)
        if self.partial.pop(node_id, None) is None:
            self.released.add(node_id)


def mapped(look: Callable[[K], T], items: Iterable[K], threads: int) -> Iterator[T]:
    """Yield `look` of each item, in order; with several threads, so many at a time."""
    if threads == 1:
        yield from map(look, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="segprop-ledger") as pool:
        yield from pool.map(look, items)
