"""Do a node's work and return its commit: the one entry through which every runner works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cache_store.errors import OutOfDeviceMemory
from cache_store.records.nodes import Attempt, Commit
from cache_store.storage.open import running_storage
from workers.control import Control
from workers.distributed.gang import ALONE, Gang
from workers.environment import WorkerEnvironment, prepare_process
from workers.specs import as_json
from workers.specs.orders import WorkOrder
from workers.specs.task_kinds import TASKS
from workers.tasks.average import average
from workers.tasks.boundaries import measure_boundaries
from workers.tasks.data import _prepare_data
from workers.tasks.evaluate import evaluate
from workers.tasks.judge import judge, keep_questions
from workers.tasks.materialize import materialize
from workers.tasks.measure import measure
from workers.tasks.model import _initial_model
from workers.tasks.train import train


def execute(order: WorkOrder, control: Control) -> Commit | None:
    """Do the work, commit it, and return the commit that counts (somebody else's if they were first). None: a helper,
    which commits nothing.

    A node that is committed already is not run again. An order with a strategy is for every rank of a gang: all run it,
    all return the commit, the first rank alone writes. Raises SegpropError subclasses only for what a user or
    the driver can act on; anything else is a defect and travels as it is.
    """
    try:
        return _execute(order, control)
    except torch.OutOfMemoryError as error:
        raise too_small(order, str(error)) from None


def too_small(order: WorkOrder, said: str) -> OutOfDeviceMemory:
    """Say what ran out of memory and what helps. `said`: torch's message, whose first sentences tell how much was
    asked for and how much there is."""
    what = order.task.get("name", order.kind)
    asked = ". ".join(said.split(". ")[1:3])
    return OutOfDeviceMemory(
        f"{what}: out of memory on {order.device}: {asked}. Take fewer samples at a time (training.accumulate, "
        "training.micro_batch), turn training.activation_checkpointing on, train less at once (split.base, "
        "split.segment_size), or use training.precision bf16; `segprop plan` predicts what each stage needs"
    )


def _execute(order: WorkOrder, control: Control) -> Commit | None:
    started = time.time()
    storage = running_storage(order.store)
    device = torch.device(order.device)
    gang = ALONE if order.strategy is None else Gang.joined(order.strategy, order.zero3)
    environment = WorkerEnvironment(
        storage,
        device,
        order.threads,
        control,
        started,
        gang,
        snapshot_memory=order.snapshot_memory,
        interruptions_every_s=order.interruptions_every_s,
        checkpoint_memory=order.checkpoint_memory,
    )
    commit = gang.agree(environment.nodes.commit_of(order.node_id))
    kind = TASKS[order.kind]
    # A node that makes a set may have been committed and its set released since; it then runs to refill the set.
    if commit is not None and not kind.makes_set:
        return commit
    task = as_json.from_json(kind.spec, order.task)
    prepare_process(device, order.threads, deterministic=kind.deterministic(task))
    attempt = environment.nodes.attempt(order.node_id, order.identity)
    return HANDLERS[order.kind](Work(task, order, environment, attempt))


@dataclass(frozen=True)
class Work:
    """A task on a worker, and what its handler may need. `task`: of the class that the kind's row names."""

    task: Any
    order: WorkOrder
    environment: WorkerEnvironment
    attempt: Attempt


#: Kind of task -> what does it and returns the commit that counts. The kinds are those of `workers.specs.task_kinds`.
HANDLERS: dict[str, Callable[[Work], Commit | None]] = {
    "data": lambda work: _prepare_data(work.task, work.environment, work.attempt),
    "model": lambda work: _initial_model(work.task, work.environment, work.attempt),
    "measure": lambda work: measure(work.task, work.order.parents, work.environment, work.attempt),
    "materialize": lambda work: materialize(
        work.task, work.order.parents, work.environment, work.attempt, work.order.production
    ),
    "train": lambda work: train(work.task, work.order, work.environment, work.attempt),
    "evaluate": lambda work: evaluate(work.task, work.order.parents, work.environment, work.attempt),
    "average": lambda work: average(work.task, work.order.parents, work.environment, work.attempt),
    "questions": lambda work: keep_questions(work.task, work.order.parents, work.environment, work.attempt),
    "boundaries": lambda work: measure_boundaries(work.task, work.order.parents, work.environment, work.attempt),
    "judge": lambda work: judge(work.task, work.order.parents, work.environment, work.attempt),
}
