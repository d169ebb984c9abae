"""What of a plan is done already: commits and released snapshot sets, read from the store. Keeps nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cache_store.records import NodeStore
from cache_store.snapshots import SnapshotStore
from cache_store.storage import Storage
from orchestrator.plan import Node, Plan

#: Requests at one time to a store over a network, where each takes tens of milliseconds.
READERS = 16
T = TypeVar("T")


@dataclass
class Ledger:
    storage: Storage
    #: Node id -> commit.
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Committed materialize nodes whose set is not in the store (any more).
    released: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, storage: Storage, plan: Plan) -> Ledger:
        ledger = cls(storage)
        ledger.look_up(plan.nodes)
        return ledger

    def look_up(self, nodes: Iterable[Node]) -> None:
        """Read what the store knows of these nodes. Commits never change: those known are not read again."""
        store, snapshots = NodeStore(self.storage), SnapshotStore(self.storage)

        def look(node: Node) -> tuple[str, dict[str, Any] | None, bool]:
            commit = self.commits.get(node.id) or store.commit_of(node.id)
            is_set = commit is not None and node.kind == "materialize"
            return node.id, commit, bool(commit and is_set and snapshots.find(commit["result"]["set"]) is None)

        for node_id, commit, gone in _mapped(look, nodes, threads=READERS if self.storage.remote else 1):
            if commit is None:
                continue
            self.commits[node_id] = commit
            if gone:
                self.released.add(node_id)
            else:
                self.released.discard(node_id)

    def add(self, node_id: str, commit: dict[str, Any]) -> None:
        self.commits[node_id] = commit
        self.released.discard(node_id)

    def release(self, node_id: str) -> None:
        """Drop the node's snapshot set from the store; its commit stays."""
        SnapshotStore(self.storage).drop(self.commits[node_id]["result"]["set"])
        self.released.add(node_id)


def _mapped(look: Callable[[Node], T], nodes: Iterable[Node], threads: int) -> Iterator[T]:
    if threads == 1:
        yield from map(look, nodes)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="segprop-ledger") as pool:
        yield from pool.map(look, nodes)
