"""Make the runner that a configuration asks for, with slots and threads settled.

`orchestrator.config.resources.RUNNERS` names a function for each `resources.runner`; those here import Ray and torch
when they are called.
"""

from __future__ import annotations

import dataclasses
import os
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from cache_store.errors import UserError
from orchestrator.config.resources import RUNNERS, ResourceConfig
from orchestrator.runners.base import Runner, RunnerRequest
from orchestrator.runners.gang_size import gang_nodes, settle_gang
from orchestrator.runners.machines import Machine, settle

if TYPE_CHECKING:
    from orchestrator.runners.ray import RaySettings


def make_runner(request: RunnerRequest) -> Runner:
    """Make the runner that `resources.runner` names. It is not started."""
    make: Callable[[RunnerRequest], Runner] = pkgutil.resolve_name(RUNNERS[request.resources.runner].factory)
    return make(request)


def local_runner(request: RunnerRequest) -> Runner:
    """Run one task at a time in this process."""
    from orchestrator.runners.local import LocalRunner

    resources = request.resources
    slots, threads, device = settle_here(request)
    # One task at a time: on a CPU it has the cores of all slots.
    alone = resources.threads == "auto" and device == "cpu"
    return LocalRunner(threads=slots * threads if alone else threads, device=device)


def ray_runner(request: RunnerRequest) -> Runner:
    """Run on Ray: on a running cluster, else on one of our own on this machine; with a gang where a stage wants one."""
    from orchestrator.runners.ray import RayRunner, RaySettings

    resources = request.resources
    wanted = RaySettings(
        slots=resources.slots,
        threads=resources.threads,
        device=resources.device,
        address=resources.address or os.environ.get("RAY_ADDRESS"),
        chains=request.plan.width,
        store=request.store,
        labels=resources.labels,
        accelerator=resources.accelerator,
        deadline_s=resources.worker_deadline_s,
    )
    if resources.gang.size is not None and gang_nodes(request.plan, resources.gang):
        return _gang_runner(resources, resources.gang.size, wanted)
    # What is here says nothing of a cluster: the runner looks at its machines once it is connected.
    if not wanted.address:
        slots, threads, device = settle_here(request)
        wanted = dataclasses.replace(wanted, slots=slots, threads=threads, device=device, store=None)
    return RayRunner(wanted)


def _gang_runner(resources: ResourceConfig, size: int | str, wanted: RaySettings) -> Runner:
    from orchestrator.runners.gang import GangRunner, GangSettings

    if not wanted.address:  # else the runner looks at the cluster's machines once it is connected
        device = _device(resources.device)
        count = _device_count(device)
        here = Machine(cpus=os.cpu_count() or 1, gpus=count) if device == "cuda" else Machine(cpus=count)
        settled, size = settle_gang([here], size=size, slots=wanted.slots, threads=wanted.threads, device=device)
        wanted = dataclasses.replace(wanted, slots=settled.count, threads=settled.threads, device=device)
    return GangRunner(wanted, GangSettings(size=size, timeout_s=resources.gang.timeout_s))


def settle_here(request: RunnerRequest) -> tuple[int, int, Literal["cpu", "cuda"]]:
    """Return (slots, threads of each, device) of this machine."""
    resources = request.resources
    device = _device(resources.device)
    slots, threads = settle_slots(
        resources.slots,
        resources.threads,
        device=device,
        devices=_device_count(device),
        chains=request.plan.width,
    )
    return slots, threads, device


def settle_slots(slots: int | str, threads: int | str, *, device: str, devices: int, chains: int) -> tuple[int, int]:
    """Return (slots, threads of each). `devices`: GPUs or CPU cores there are; `chains`: stages that can run at once,
    one of every regime where they run one after the other.

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
