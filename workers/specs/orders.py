"""Define what travels from the driver to a worker; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_store.records.nodes import Commit
from workers.specs.ranks import ON_DEVICE, Strategy, Zero3Spec

#: The commits of a node's parents, by role (see the tasks for the roles).
Parents = Mapping[str, Commit]
#: Seconds between two interruptions of a slot, where nobody says: a day.
INTERRUPTIONS_EVERY_S = 86400.0
#: Bytes that a checkpoint may copy, where nobody says. With the pieces under way it takes less than 64 MB beside the
#: state.
CHECKPOINT_MEMORY = 16 << 20


@dataclass(frozen=True)
class FirstAsked:
    """Which order of shards a set is first read in: that of this epoch of this stage."""

    stage: str
    epoch: int


@dataclass(frozen=True)
class Production:
    """How the shards of snapshot sets are shared among those who make them. Nothing here changes a result."""

    #: Others may be at work on the same sets: shards are taken one by one, by leases.
    shared: bool = False
    #: Of a materialize node: 0 finishes and commits it, others take shards as long as there are free ones and leave.
    helper: int = 0
    #: Of a materialize node: the stage and the epoch in whose order of shards the set will first be asked for; None: in
    #: no order.
    first_asked: FirstAsked | None = None
    #: Of a stage: role -> materialize node of the sets it reads that are not finished. It makes what it finds missing
    #: itself, unless somebody is at it, and commits the nodes of those that are whole in the end.
    unfinished: Mapping[str, str] = field(default_factory=dict)
    #: Those nodes -> what their ids are made of, for their commits.
    identities: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


#: Nobody else is at work on any set, and all that is read are finished.
ALONE = Production()


@dataclass(frozen=True)
class WorkOrder:
    """One node for a worker: its task as JSON values, and the commits of its parents by role."""

    node_id: str
    kind: str
    task: Mapping[str, Any]
    parents: Parents
    store: str
    device: str
    threads: int
    #: Set where all ranks of a gang work on the order together.
    strategy: Strategy | None = None
    zero3: Zero3Spec = ON_DEVICE
    #: Most bytes of snapshot shards held at a time; None: what `cache_store.snapshots.shard_cache` says.
    snapshot_memory: int | None = None
    #: Seconds between two interruptions of a slot, on average.
    interruptions_every_s: float = INTERRUPTIONS_EVERY_S
    #: Most bytes of tensors that are copied for an update that comes before they are written to a checkpoint.
    checkpoint_memory: int = CHECKPOINT_MEMORY
    production: Production = ALONE
    #: What the node's id is made of, as JSON values: its commit records it, the work does not look at it.
    identity: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Tells this order from others at work at the same time: the node, and which helper at it."""
        return order_key(self.node_id, self.production.helper)


def order_key(node_id: str, helper: int) -> str:
    return f"{node_id}#{helper}" if helper else node_id


def node_of(key: str) -> str:
    """Name the node that an order's key belongs to."""
    return key.partition("#")[0]
