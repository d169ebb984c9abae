"""Work out how many slots a cluster has, and how wide: pure arithmetic over what its machines offer.

A slot is one actor on one machine, so what counts is what fits into each machine, never the sum alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.config.resources import GPU_THREADS


@dataclass(frozen=True)
class Machine:
    """What one node offers to tasks."""

    cpus: float
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    #: Kinds of accelerators, as Ray names them: H100.
    accelerators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slots:
    """`count` tasks at one time, each with `threads` CPU threads on `device` (`cpu` or `cuda`)."""

    count: int
    threads: int
    device: str


def room(machines: Iterable[Machine], cpus: float, gpus: float = 0) -> int:
    """Count the slots of this size that fit side by side."""
    return sum(int(min(machine.cpus // cpus, machine.gpus // gpus if gpus else float("inf"))) for machine in machines)


def matching(machines: Iterable[Machine], labels: Mapping[str, str], accelerator: str | None) -> list[Machine]:
    """Return those with all of these labels, and this kind of accelerator where one is asked for."""
    return [
        machine
        for machine in machines
        if labels.items() <= machine.labels.items() and (accelerator is None or accelerator in machine.accelerators)
    ]


def unmatched(machines: Sequence[Machine], labels: Mapping[str, str], accelerator: str | None) -> str:
    """Say why no machine matches: what is asked for, and what there is."""
    problems = []
    # Ray gives every node labels of its own, such as its id: nobody means those by accident.
    own = "ray.io/"
    for key, value in labels.items():
        values = sorted({machine.labels[key] for machine in machines if key in machine.labels})
        if value in values:
            continue
        keys = sorted({name for machine in machines for name in machine.labels if not name.startswith(own)})
        there = f"there is {key}: {', '.join(values)}" if values else f"labels there are: {', '.join(keys) or 'none'}"
        problems.append(f"resources.labels: no machine of the cluster has {key}: {value}; {there}")
    kinds = sorted({kind for machine in machines for kind in machine.accelerators})
    if accelerator is not None and accelerator not in kinds:
        there = ", ".join(kinds) or "none"
        problems.append(f"resources.accelerator: no machine of the cluster has {accelerator}; there is: {there}")
    if not problems:
        asked = [f"{key}: {value}" for key, value in labels.items()] + ([accelerator] if accelerator else [])
        problems.append(f"resources: no machine of the cluster has {' and '.join(asked)} at once")
    return "\n".join(problems)


def settle(machines: Iterable[Machine], *, slots: int | str, threads: int | str, device: str, chains: int) -> Slots:
    """Settle what `auto` means on a running cluster. `chains`: stages that can run at one time.

    One slot a GPU where there are any, with a share of the cores. On CPUs as many slots as regimes can use, then as
    wide as the machines allow: never so wide that they would not fit. What is given is kept, also when it cannot fit:
    the runner then says so.
    """
    machines = list(machines)
    if device == "auto":
        device = "cuda" if any(machine.gpus >= 1 for machine in machines) else "cpu"
    if device == "cuda":
        width = beside_gpus(machines) if threads == "auto" else int(threads)
        return Slots(max(1, room(machines, width, 1)) if slots == "auto" else int(slots), width, device)
    if threads != "auto":
        return Slots(max(1, room(machines, int(threads))) if slots == "auto" else int(slots), int(threads), device)
    count = max(1, min(room(machines, 1), chains)) if slots == "auto" else int(slots)
    widest = int(max((machine.cpus for machine in machines), default=1))
    width = next((width for width in range(widest, 1, -1) if room(machines, width) >= count), 1)
    return Slots(count, width, device)


def beside_gpus(machines: Iterable[Machine]) -> int:
    """Return the CPU threads for each GPU: as many, up to GPU_THREADS, as leave no GPU without its own, and on every
    machine a core for what runs beside the slots."""
    left = [replace(machine, cpus=max(0, machine.cpus - 1)) for machine in machines]
    gpus = room(left, 1, 1)
    return next((width for width in range(GPU_THREADS, 1, -1) if gpus and room(left, width, 1) == gpus), 1)
