"""Choose and start the runner that a configuration asks for."""

from __future__ import annotations

import os
from typing import Literal

from cache_store.errors import UserError
from orchestrator.config.resources import ResourceConfig
from orchestrator.runners.base import Runner
from orchestrator.runners.gang_size import gang_nodes, settle_gang
from orchestrator.runners.machines import Machine, settle
from orchestrator.runs.prepare import Prepared


def make_runner(prepared: Prepared) -> Runner:
    """The runner the configuration asks for, with slots and threads settled."""
    resources = prepared.config.resources
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if gang_nodes(prepared.plan, resources.gang):
        return _gang_runner(resources, address, prepared.config.store)
    if resources.runner == "ray" and address:
        from orchestrator.runners.ray import RayRunner

        # What is here says nothing of a cluster: the runner looks at its machines once it is connected.
        return RayRunner(
            slots=resources.slots,
            threads=resources.threads,
            device=resources.device,
            address=address,
            chains=prepared.plan.width,
            store=prepared.config.store,
            labels=resources.labels,
            accelerator=resources.accelerator,
            deadline_s=resources.worker_deadline_s,
        )
    device = _device(resources.device)
    slots, threads = settle_slots(
        resources.slots,
        resources.threads,
        device=device,
        devices=_device_count(device),
        chains=prepared.plan.width,
    )
    if resources.runner == "local":
        from orchestrator.runners.local import LocalRunner

        # One task at a time: on a CPU it has the cores of all slots.
        alone = resources.threads == "auto" and device == "cpu"
        return LocalRunner(threads=slots * threads if alone else threads, device=device)
    from orchestrator.runners.ray import RayRunner

    return RayRunner(
        slots=slots,
        threads=threads,
        device=device,
        labels=resources.labels,
        accelerator=resources.accelerator,
        deadline_s=resources.worker_deadline_s,
    )


def _gang_runner(resources: ResourceConfig, address: str | None, store: str) -> Runner:
    from orchestrator.runners.gang import GangRunner

    gang = resources.gang
    assert gang.size is not None
    slots: int | str = resources.slots
    size: int | str = gang.size
    threads: int | str = resources.threads
    device = resources.device
    if not address:  # else the runner looks at the cluster's machines once it is connected
        device = _device(device)
        count = _device_count(device)
        here = Machine(cpus=os.cpu_count() or 1, gpus=count) if device == "cuda" else Machine(cpus=count)
        settled, size = settle_gang([here], size=size, slots=slots, threads=threads, device=device)
        slots, threads = settled.count, settled.threads
    return GangRunner(
        size=size,
        strategy=gang.strategy,
        timeout_s=gang.timeout_s,
        slots=slots,
        threads=threads,
        device=device,
        address=address,
        store=store,
        labels=resources.labels,
        accelerator=resources.accelerator,
        deadline_s=resources.worker_deadline_s,
    )


def settle_slots(slots: int | str, threads: int | str, *, device: str, devices: int, chains: int) -> tuple[int, int]:
    """(slots, threads of each). `devices`: GPUs or CPU cores there are; `chains`: stages that can run at one time, one
    of every regime where they run one after the other.

    One slot a GPU. On a CPU-only machine a slot is a share of the cores: as many slots as regimes can use, since
    two one-thread workers do more than one two-thread worker.
    """
    if device == "cuda":
        here = Machine(cpus=_device_count("cpu"), gpus=devices)
        settled = settle([here], slots=slots, threads=threads, device=device, chains=chains)
        return settled.count, settled.threads
    if slots == "auto" and threads == "auto":
        count = max(1, min(devices, chains))
        return count, max(1, devices // count)
    if slots == "auto":
        return max(1, devices // int(threads)), int(threads)
    return int(slots), max(1, devices // int(slots)) if threads == "auto" else int(threads)


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    if wanted == "cpu":
        return "cpu"
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("resources.device: cuda, but torch finds no CUDA device here; allowed here: cpu, auto")
    return "cuda" if available else "cpu"


def _device_count(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
