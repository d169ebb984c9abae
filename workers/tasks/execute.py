"""The one entry through which every runner does work: a node of the plan in, its commit out."""

from __future__ import annotations

import time
from typing import Any

import torch

from cache_store.errors import OutOfDeviceMemory
from cache_store.storage.open import open_storage
from workers.control import Control
from workers.distributed.gang import ALONE, Gang
from workers.environment import WorkerEnvironment, prepare_process
from workers.specs import as_json, tasks
from workers.specs.orders import WorkOrder
from workers.tasks.average import average
from workers.tasks.data import _prepare_data
from workers.tasks.evaluate import evaluate
from workers.tasks.gate import carry_over, reached
from workers.tasks.materialize import materialize
from workers.tasks.measure import measure
from workers.tasks.model import _initial_model
from workers.training.trainer import StageTrainer


def execute(order: WorkOrder, control: Control) -> dict[str, Any]:
    """Do the work, commit it, and return the commit that counts (somebody else's if they were first).

    A node that is committed already is not run again. An order with a strategy is for every rank of a gang: all run it,
    all return the commit, the first rank alone writes. Raises SegpropError subclasses only for what a user or
    the driver can act on; anything else is a defect and travels as it is.
    """
    try:
        return _execute(order, control)
    except torch.OutOfMemoryError as error:
        raise _too_small(order, str(error)) from None


def _too_small(order: WorkOrder, said: str) -> OutOfDeviceMemory:
    """`said`: torch's message, whose first sentences tell what was asked for and how much there is."""
    what = order.task.get("name", order.kind)
    asked = ". ".join(said.split(". ")[1:3])
    return OutOfDeviceMemory(
        f"{what}: out of memory on {order.device}: {asked}. Take fewer samples at a time (training.accumulate, "
        "training.micro_batch), turn training.activation_checkpointing on, train less at once (split.base, "
        "split.segment_size), or use training.precision bf16; `segprop plan` predicts what each stage needs"
    )


def _execute(order: WorkOrder, control: Control) -> dict[str, Any]:
    started = time.time()
    storage = open_storage(order.store)
    device = torch.device(order.device)
    gang = ALONE if order.strategy is None else Gang.joined(order.strategy)
    environment = WorkerEnvironment(
        storage, device, order.threads, control, started, gang, snapshot_memory=order.snapshot_memory
    )
    commit = gang.agree(environment.nodes.commit_of(order.node_id))
    # A materialize node may have been committed and its set released since; it then runs to refill the set.
    if commit is not None and order.kind != "materialize":
        return commit
    task: Any = as_json.from_json(tasks.TASKS[order.kind], order.task)
    deterministic = task.train.deterministic if isinstance(task, tasks.StageTask) else True
    prepare_process(device, order.threads, deterministic=deterministic)
    attempt = environment.nodes.attempt(order.node_id)
    match task:
        case tasks.DataTask():
            return _prepare_data(task, environment, attempt)
        case tasks.ModelTask():
            return _initial_model(task, environment, attempt)
        case tasks.MeasureTask():
            return measure(task, order.parents, environment, attempt)
        case tasks.MaterializeTask():
            return materialize(task, order.parents, environment, attempt, order.production)
        case tasks.StageTask() if reached(task.gate, order.parents):
            return carry_over(task, order.parents, environment, attempt)
        case tasks.StageTask():
            return StageTrainer(task, order.parents, environment, attempt, order.production).run()
        case tasks.EvaluateTask():
            return evaluate(task, order.parents, environment, attempt)
        case tasks.AverageTask():
            return average(task, order.parents, environment, attempt)
    raise AssertionError(f"no worker for {order.kind}")
