"""What of a plan is done already: commits and released snapshot sets, read from the store. Keeps nothing itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cache_store.records import NodeStore
from cache_store.snapshots import SnapshotStore
from cache_store.storage import Storage
from orchestrator.plan import Node, Plan


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
        """Read what the store knows of these nodes."""
        store, snapshots = NodeStore(self.storage), SnapshotStore(self.storage)
        for node in nodes:
            commit = store.commit_of(node.id)
            if commit is None:
                continue
            self.commits[node.id] = commit
            if node.kind == "materialize" and snapshots.find(commit["result"]["set"]) is None:
                self.released.add(node.id)

    def add(self, node_id: str, commit: dict[str, Any]) -> None:
        self.commits[node_id] = commit
        self.released.discard(node_id)

    def release(self, node_id: str) -> None:
        """Drop the node's snapshot set from the store; its commit stays."""
        SnapshotStore(self.storage).drop(self.commits[node_id]["result"]["set"])
        self.released.add(node_id)
