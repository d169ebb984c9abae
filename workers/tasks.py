"""The one entry through which every runner does work: a node of the plan in, its commit out."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import save as save_bytes

from cache_store.records import Attempt
from cache_store.storage import Storage
from workers import models, specs
from workers.chain import state_digest
from workers.control import Control
from workers.data.prepare import prepare
from workers.environment import WorkerEnvironment, prepare_process
from workers.evaluate import evaluate
from workers.materialize import materialize
from workers.orders import WorkOrder
from workers.train_stage import Stage


def execute(order: WorkOrder, control: Control) -> dict[str, Any]:
    """Do the work, commit it, and return the commit that counts (somebody else's if they were first).

    A node that is committed already is not run again. Raises SegpropError subclasses only for what a user or
    the driver can act on; anything else is a defect and travels as it is.
    """
    started = time.time()
    storage = Storage.open(order.store)
    device = torch.device(order.device)
    environment = WorkerEnvironment(storage, device, order.threads, control, started)
    commit = environment.nodes.commit_of(order.node_id)
    # A materialize node may have been committed and its set released since; it then runs to refill the set.
    if commit is not None and order.kind != "materialize":
        return commit
    task: Any = specs.from_json(specs.TASKS[order.kind], order.task)
    deterministic = task.train.deterministic if isinstance(task, specs.StageTask) else True
    prepare_process(device, order.threads, deterministic=deterministic)
    attempt = environment.nodes.attempt(order.node_id)
    match task:
        case specs.DataTask():
            return _prepare_data(task, environment, attempt)
        case specs.ModelTask():
            return _initial_model(task, environment, attempt)
        case specs.MaterializeTask():
            return materialize(task, order.parents, environment, attempt)
        case specs.StageTask():
            return Stage(task, order.parents, environment, attempt).run()
        case specs.EvaluateTask():
            return evaluate(task, order.parents, environment, attempt)
    raise AssertionError(f"no worker for {order.kind}")


def _prepare_data(task: specs.DataTask, environment: WorkerEnvironment, attempt: Attempt) -> dict[str, Any]:
    started = time.monotonic()
    result = prepare(task.data, environment.snapshots, environment.control.progress, fingerprint=task.fingerprint)
    return attempt.commit({**result, "seconds": time.monotonic() - started, "where": environment.where()})


def _initial_model(task: specs.ModelTask, environment: WorkerEnvironment, attempt: Attempt) -> dict[str, Any]:
    started = time.monotonic()
    state = models.initial_state(task.model, task.classes, task.seed)
    attempt.write("state.safetensors", save_bytes(state))
    return attempt.commit(
        {
            "digest": state_digest(state),
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )
