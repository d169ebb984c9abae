"""Read from a store what its finished nodes are made of, as far as their commits record it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cache_store.errors import CorruptRecord, UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import existing_storage
from orchestrator.execution.commits import READERS, mapped
from orchestrator.plan.differences import Known
from orchestrator.plan.graph import Plan
from orchestrator.plan.identity import Identity

#: Commits of nodes outside the plan that are read at most, so that a look at a store of 10^5 nodes takes seconds.
MOST_READ = 4096


@dataclass(frozen=True)
class Finished:
    """What a store knows of a plan's nodes, and of others that are finished."""

    store: str
    #: Nodes of the plan with a commit.
    committed: frozenset[str] = frozenset()
    #: Other finished nodes, and what they are made of.
    identities: Known = field(default_factory=dict)
    #: Other finished nodes whose commits do not record it.
    unrecorded: int = 0
    #: Other nodes that were not looked at, beyond `MOST_READ`.
    unread: int = 0


def read_finished(store: str, plan: Plan, *, most: int = MOST_READ) -> Finished:
    """Look which nodes of a plan are finished and what the others in its store are made of; nothing without a store.
    StoreError when the store cannot be read."""
    try:
        storage = existing_storage(store)
    except UserError:
        return Finished(store)
    present = storage.list("nodes")
    others = [node_id for node_id in present if node_id not in plan]
    nodes = NodeStore(storage)

    def look(node_id: str) -> tuple[str, Identity | None, bool]:
        try:
            record = nodes.identity_of(node_id)
        except CorruptRecord:
            return node_id, None, False  # for the run, or `segprop cache verify`, to say
        return node_id, Identity.from_json(record or {}), record is not None

    threads = READERS if storage.remote else 1
    committed = frozenset(
        node_id for node_id, _, there in mapped(look, [name for name in present if name in plan], threads) if there
    )
    if len(committed) == len(plan.nodes):
        return Finished(store, committed)
    looked_at = list(mapped(look, others[:most], threads))
    return Finished(
        store,
        committed,
        {node_id: identity for node_id, identity, _ in looked_at if identity is not None},
        unrecorded=sum(there and identity is None for _, identity, there in looked_at),
        unread=max(0, len(others) - most),
    )
