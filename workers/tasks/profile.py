"""Run the first steps of one stage for whoever wants to know where their time goes. Nothing is committed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from cache_store.records.nodes import Commit
from cache_store.storage.base import Storage
from workers.control import ThreadControl
from workers.environment import WorkerEnvironment, prepare_process
from workers.specs import as_json
from workers.specs.orders import WorkOrder
from workers.specs.results import Record, TimeSpent
from workers.specs.task_kinds import TASKS
from workers.specs.tasks import StageTask
from workers.tasks.execute import HANDLERS, Work, too_small
from workers.training.batches import micro_batches
from workers.training.timing.profiled import PREFIX, ProfiledTimes
from workers.training.trainer import StageTrainer

#: Operators that are listed.
MOST_OPERATORS = 15
WEIGHTS, SNAPSHOT = "weights/", "snapshot/"


@dataclass(frozen=True, kw_only=True)
class ProfileOrder:
    """A stage to look at. `order`: of its node, without parents. `parents`: role -> node. `makers`: node -> order, of
    the nodes that are run where the store has no commit of theirs: data and initial weights. `initial`: the node whose
    weights stand in for parts of stages that are not trained yet."""

    order: WorkOrder
    parents: Mapping[str, str]
    makers: Mapping[str, WorkOrder]
    initial: str
    steps: int
    #: Where the trace goes, a file.
    trace: Path


@dataclass(frozen=True, kw_only=True)
class OperatorFigures(Record):
    """One kind of operator in the steps that were recorded: how often it ran, and its own seconds, without those of
    what it calls, on a thread of the host and on the device."""

    name: str
    calls: int
    host_seconds: float
    device_seconds: float


@dataclass(frozen=True, kw_only=True)
class StageProfile(Record):
    """What the first steps of a stage took. `times`: of `times.steps` steps; `operators`: of `traced_steps` others."""

    stage: str
    device: str
    threads: int
    batch_size: int
    micro_batch: int
    source: str
    times: TimeSpent
    operators: tuple[OperatorFigures, ...]
    #: Seconds of all operators in the steps that were recorded, by the host's threads and by the device.
    operators_host_seconds: float
    operators_device_seconds: float
    traced_steps: int
    #: What a reader has to know of how it was run, in sentences.
    notes: tuple[str, ...] = field(default=())


def profile_stage(asked: ProfileOrder, storage: Storage) -> StageProfile:
    """Run the first steps of a stage, write a Chrome trace of the last of them, and say where the time went.

    `storage`: where commits are looked for and whatever is missing is put. Errors as those of the stage itself, and
    OutOfDeviceMemory.
    """
    try:
        return _profile(asked, storage)
    except torch.OutOfMemoryError as error:
        raise too_small(asked.order, str(error)) from None


def _profile(asked: ProfileOrder, storage: Storage) -> StageProfile:
    order = asked.order
    device = torch.device(order.device)
    environment = WorkerEnvironment(
        storage,
        device,
        order.threads,
        ThreadControl(),
        snapshot_memory=order.snapshot_memory,
        checkpoint_memory=order.checkpoint_memory,
    )
    task: StageTask = as_json.from_json(StageTask, order.task)
    prepare_process(device, order.threads, deterministic=True)
    parents, notes = _parents(asked, environment)
    prepare_process(device, order.threads, deterministic=TASKS[order.kind].deterministic(task))
    times = ProfiledTimes(device, asked.steps)
    trainer = StageTrainer(task, parents, environment, environment.nodes.attempt(order.node_id), times=times)
    if any(role.startswith(SNAPSHOT) and role not in parents for role in asked.parents):
        notes.append(_make_snapshots(trainer, times.total))
    trainer.first_steps(times.total)
    if times.counted is None:
        raise RuntimeError("the steps ended before they were counted")
    times.profiler.export_chrome_trace(str(asked.trace))
    operators = _operators(times.profiler)
    return StageProfile(
        stage=task.name,
        device=_device_words(device),
        threads=order.threads,
        batch_size=task.train.batch_size,
        micro_batch=trainer.step.micro,
        source=task.source,
        times=times.counted,
        operators=tuple(operators[:MOST_OPERATORS]),
        operators_host_seconds=sum(each.host_seconds for each in operators),
        operators_device_seconds=sum(each.device_seconds for each in operators),
        traced_steps=times.traced,
        notes=tuple(notes),
    )


def _parents(asked: ProfileOrder, environment: WorkerEnvironment) -> tuple[dict[str, Commit], list[str]]:
    """Find the commits that a stage builds on, or what stands in for them."""
    found: dict[str, Commit] = {}
    untrained: list[str] = []
    for role, node in asked.parents.items():
        commit = environment.nodes.commit_of(node)
        if commit is None and node in asked.makers:
            commit = _made(asked.makers[node], environment)
        if commit is None and role.startswith(WEIGHTS):
            untrained.append(role.removeprefix(WEIGHTS))
            commit = environment.nodes.commit_of(asked.initial) or _made(asked.makers[asked.initial], environment)
        # Without a gate, or an optimizer that is carried, steps take as long.
        if commit is not None:
            found[role] = commit
    words = f"initial weights stand in for {', '.join(untrained)}: the store has no commit of what trains them"
    return found, [words] if untrained else []


def _made(order: WorkOrder, environment: WorkerEnvironment) -> Commit:
    task = as_json.from_json(TASKS[order.kind].spec, order.task)
    attempt = environment.nodes.attempt(order.node_id, order.identity)
    commit = HANDLERS[order.kind](Work(task, order, environment, attempt))
    if commit is None:
        raise RuntimeError(f"{order.key}: made nothing")
    return commit


def _make_snapshots(trainer: StageTrainer, steps: int) -> str:
    """Make the shards that the steps will read, and let them read no others."""
    inputs, train = trainer.inputs, trainer.train
    inputs.only_first(steps * train.batch_size)
    loaded = micro_batches(
        inputs.by_split["train"],
        inputs.order(0),
        batch_size=train.batch_size,
        micro=trainer.step.micro,
        view=0,
        steps=range(inputs.per_epoch),
        device=trainer.device,
    )
    count = sum(1 for micro in loaded if micro.last)
    inputs.let_go()
    return (
        f"the snapshots of the first {count} batches were made before the steps, and read again: the store does not "
        "have the whole sets"
    )


def _operators(profiler: profile) -> list[OperatorFigures]:
    """List what torch recorded, the most expensive first. Ranges of ours are no operators."""
    found: list[OperatorFigures] = []
    events: Any = profiler.key_averages()
    for event in events:
        if not event.key.startswith(PREFIX) and not event.is_user_annotation:
            found.append(
                OperatorFigures(
                    name=event.key,
                    calls=event.count,
                    host_seconds=event.self_cpu_time_total / 1e6,
                    device_seconds=event.self_device_time_total / 1e6,
                )
            )
    return sorted(found, key=lambda each: (-each.device_seconds, -each.host_seconds, each.name))


def _device_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
