"""Say what the driver needs of whatever runs nodes: slots, submission, events. Loads no torch and no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cache_store.records.nodes import Commit
from orchestrator.config.resources import ResourceConfig
from orchestrator.plan.graph import Plan
from workers.control import Update
from workers.specs.orders import WorkOrder


@dataclass(frozen=True)
class RunnerRequest:
    """What a runner is made for: the resources a configuration gives it, the whole plan, and the store's address."""

    resources: ResourceConfig
    plan: Plan
    store: str


@dataclass(frozen=True)
class Succeeded:
    #: Of the order (`WorkOrder.key`).
    key: str
    #: None: the order was a helper's.
    commit: Commit | None

    @property
    def committed(self) -> Commit:
        """The commit of an order that was no helper's. ValueError of a helper's."""
        if self.commit is None:
            raise ValueError(f"{self.key}: a helper commits nothing")
        return self.commit


@dataclass(frozen=True)
class Failed:
    """`lost` is true when the worker vanished (killed, machine gone): the node itself may be fine."""

    key: str
    error: BaseException
    lost: bool = False


Event = Succeeded | Failed


class Runner(Protocol):
    """Runs nodes on slots. Called from the driver's one thread."""

    #: Threads of one slot and its device, as they go into every work order.
    threads: int
    device: str

    @property
    def slots(self) -> int:
        """Count them, busy ones too; known once started."""

    def start(self) -> None:
        """Get the workers ready. Raises UserError when what is asked for can never be had."""

    def free(self, *, together: bool = False) -> int:
        """Count the slots that would take an order now. `together`: gangs that would take one for all their ranks."""

    def submit(self, order: WorkOrder) -> None:
        """Start an order on a free slot, or, where it has a strategy, on the ranks of a free gang."""

    def wait(self, timeout_s: float) -> list[Event]:
        """Return the events since the last call; early, with the first."""

    def progress(self) -> dict[str, Update]:
        """Return the latest progress of running orders, by key."""

    def waiting(self, tasks: int) -> None:
        """Be told how many tasks could run if there were more slots: a figure for whoever watches the runner."""

    def machine(self, node_id: str) -> str | None:
        """Name the machine on which a running node runs, where it is known."""

    def stop(self) -> None:
        """Ask running nodes to checkpoint and stop; their `Interrupted` failures arrive through `wait`."""

    def close(self) -> None:
        """Give everything back. Leaves no process behind."""
