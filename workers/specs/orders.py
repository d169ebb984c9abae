"""Define what travels from the driver to a worker; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cache_store.records.nodes import Commit

#: The commits of a node's parents, by role (see the tasks for the roles).
Parents = Mapping[str, Commit]
#: Seconds between two interruptions of a slot, where nobody says: a day.
INTERRUPTIONS_EVERY_S = 86400.0
#: Bytes that a checkpoint may copy, where nobody says. With the pieces under way it takes less than 64 MB beside the
#: state.
CHECKPOINT_MEMORY = 16 << 20
#: How the ranks of a gang share a stage: each holds all parameters (`ddp`), or a part of each, by torch (`fsdp2`) or by
#: DeepSpeed (`zero3`).
Strategy = Literal["ddp", "fsdp2", "zero3"]


@dataclass(frozen=True)
class Zero3Spec:
    """Say where the ranks of a `zero3` gang keep their parts. Nothing here changes a result."""

    parameters: Literal["device", "host", "disk"] = "device"
    #: With the float32 weights that updates change, and the gradients on their way there.
    optimizer: Literal["device", "host", "disk"] = "device"
    #: Folder for the files of what is on disk, on every machine.
    disk: str | None = None

    @property
    def files(self) -> bool:
        """Whether anything is in files."""
        return "disk" in (self.parameters, self.optimizer)


#: Where nobody says.
ON_DEVICE = Zero3Spec()


@dataclass(frozen=True)
class Ranks:
    """Say how many devices hold a stage together, and how. `size` 1: one device, no gang."""

    size: int = 1
    strategy: Strategy = "ddp"
    zero3: Zero3Spec = ON_DEVICE

    @property
    def parts(self) -> int:
        """Into how many parts weights, gradients and states are split."""
        return self.size if self.strategy != "ddp" else 1

    @property
    def splits(self) -> bool:
        """Whether each rank holds a part of them only."""
        return self.parts > 1

    @property
    def replicates(self) -> bool:
        """Whether each rank holds all of them, beside others that do."""
        return self.size > 1 and not self.splits

    @property
    def weights_on_host(self) -> bool:
        """Whether a rank's part of the weights lies beside the device."""
        return self.splits and self.strategy == "zero3" and self.zero3.parameters != "device"

    @property
    def updates_on_host(self) -> bool:
        """Whether a rank's part of states and gradients does."""
        return self.splits and self.strategy == "zero3" and self.zero3.optimizer != "device"

    def share(self, whole: int) -> int:
        """Give a rank's part of so many bytes or numbers."""
        return -(-whole // self.parts)


#: Elements that travel together in `zero3`: gradients on their way to their sums, and parameters that are fetched ahead
#: of use. 64 MB of float32, held by every rank. DeepSpeed's own 500 million would be 2 GB.
ZERO3_BUCKET = 1 << 24
#: Elements that are gathered at one time and used again soon: DeepSpeed's own number.
ZERO3_LIVE = 10**9
#: A stage on one device.
ONE_DEVICE = Ranks()


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
