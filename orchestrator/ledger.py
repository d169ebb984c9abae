"""What of a plan is done already: commits and released snapshot sets, read from the store. Keeps nothing itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cache_store.records import NodeStore
from cache_store.snapshots import SnapshotStore
from cache_store.storage import Storage
from orchestrator.plan import Plan


@dataclass
class Ledger:
    storage: Storage
    plan: Plan
    #: Node id -> commit.
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Committed materialize nodes whose set is not in the store (any more).
    released: set[str] = field(default_factory=set)
    #: Materialize node without a commit -> its set, of which a stage that overlapped has left a part in the store.
    partial: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, storage: Storage, plan: Plan) -> Ledger:
        ledger = cls(storage, plan)
        nodes, snapshots = NodeStore(storage), SnapshotStore(storage)
        for node in plan.nodes:
            commit = nodes.commit_of(node.id)
            if commit is None:
                continue
            ledger.add(node.id, commit)
            if node.kind == "materialize" and snapshots.find(commit["result"]["set"]) is None:
                ledger.released.add(node.id)
        for node_id, set_id in list(ledger.partial.items()):
            if snapshots.find(set_id) is None:
                del ledger.partial[node_id]
        return ledger

    def add(self, node_id: str, commit: dict[str, Any]) -> None:
        self.commits[node_id] = commit
        self.released.discard(node_id)
        self.partial.pop(node_id, None)
        for role, made in commit["result"].get("partial", {}).items():
            parent = self.plan.node(node_id).parents[role]
            if parent not in self.commits:
                self.partial[parent] = made["set"]

    def look(self, node_id: str) -> bool:
        """Whether a node has a commit by now, which somebody else than its own order may have made."""
        commit = NodeStore(self.storage).commit_of(node_id)
        if commit is not None:
            self.add(node_id, commit)
        return commit is not None

    def release(self, node_id: str) -> None:
        """Drop the node's snapshot set from the store; its commit stays."""
        commit = self.commits.get(node_id)
        SnapshotStore(self.storage).drop(self.partial[node_id] if commit is None else commit["result"]["set"])
        if self.partial.pop(node_id, None) is None:
            self.released.add(node_id)
