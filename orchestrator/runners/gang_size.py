"""Decide which stages a gang runs and how large it is: pure functions of configuration and plan."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.config.resources import GangConfig
from orchestrator.plan.graph import Node, Plan
from orchestrator.runners.machines import Machine, Slots, beside_gpus, room


def runs_together(node: Node, gang: GangConfig) -> bool:
    """Tell whether all ranks of the gang run this node together."""
    return gang.size is not None and node.trains and node.estimate.trainable >= gang.min_parameters


def gang_nodes(plan: Plan, gang: GangConfig) -> frozenset[str]:
    """Return ids of the train nodes that all ranks of the gang run together."""
    return frozenset(node.id for node in plan.nodes if runs_together(node, gang))


def settle_gang(
    machines: Iterable[Machine], *, size: int | str, slots: int | str, threads: int | str, device: str
) -> tuple[Slots, int]:
    """Return (slots beside the gang, ranks). Slot and rank are of one size: a device with a share of
    the cores, or `threads` CPU cores of one machine.

    What is given is kept, also when it cannot fit: the runner then says so. An `auto` size takes every device that
    slots leave; `auto` slots are what an explicit size leaves, perhaps none: the ranks then do the other work as well.
    """
    machines = list(machines)
    if device == "auto":
        device = "cuda" if any(machine.gpus >= 1 for machine in machines) else "cpu"
    gpus = 1 if device == "cuda" else 0
    beside = int(slots) if slots != "auto" else 0
    if threads != "auto":
        width = int(threads)
    elif gpus:
        width = beside_gpus(machines)
    elif size == "auto":
        width = 1
    else:
        widest = int(max((machine.cpus for machine in machines), default=1))
        width = next((width for width in range(widest, 1, -1) if room(machines, width) >= int(size) + beside), 1)
    fit = room(machines, width, gpus)
    if size == "auto":
        return Slots(beside, width, device), max(1, fit - beside)
    return Slots(beside if slots != "auto" else max(0, fit - int(size)), width, device), int(size)
