"""The one entry through which every runner does work: a node of the plan in, its commit out."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import save as save_bytes

from cache_store.errors import Interrupted, OutOfDeviceMemory
from cache_store.records.nodes import Attempt
from cache_store.storage.base import Storage
from workers import models, specs
from workers.average import average
from workers.chain import state_digest
from workers.control import Control
from workers.data.prepare import prepare
from workers.environment import WorkerEnvironment, prepare_process
from workers.evaluate import evaluate
from workers.export_language_model import COMPANION
from workers.gang import ALONE, Gang
from workers.gate import carry_over, reached
from workers.lm_specs import CausalLMSpec, TextSpec
from workers.materialize import materialize
from workers.measure import measure
from workers.orders import WorkOrder
from workers.train_stage import Stage


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
    storage = Storage.open(order.store)
    device = torch.device(order.device)
    gang = ALONE if order.strategy is None else Gang.joined(order.strategy)
    environment = WorkerEnvironment(
        storage, device, order.threads, control, started, gang, snapshot_memory=order.snapshot_memory
    )
    commit = gang.agree(environment.nodes.commit_of(order.node_id))
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
        case specs.MeasureTask():
            return measure(task, order.parents, environment, attempt)
        case specs.MaterializeTask():
            return materialize(task, order.parents, environment, attempt, order.production)
        case specs.StageTask() if reached(task.gate, order.parents):
            return carry_over(task, order.parents, environment, attempt)
        case specs.StageTask():
            return Stage(task, order.parents, environment, attempt, order.production).run()
        case specs.EvaluateTask():
            return evaluate(task, order.parents, environment, attempt)
        case specs.AverageTask():
            return average(task, order.parents, environment, attempt)
    raise AssertionError(f"no worker for {order.kind}")


def _prepare_data(task: specs.DataTask, environment: WorkerEnvironment, attempt: Attempt) -> dict[str, Any]:
    started = time.monotonic()
    progress = environment.control.progress
    if isinstance(task.data, TextSpec):
        from workers.data.text.prepare import prepare_text

        assert task.model is not None
        result = prepare_text(
            task.data, task.model, task.seed, environment.snapshots, progress, fingerprint=task.fingerprint
        )
    else:
        result = prepare(task.data, environment.snapshots, progress, fingerprint=task.fingerprint)
    # Where it all came from, so that a stage can make again what is lost; its own task does not say.
    origin = specs.to_json(task)
    return attempt.commit(
        {**result, "origin": origin, "seconds": time.monotonic() - started, "where": environment.where()}
    )


def _initial_model(task: specs.ModelTask, environment: WorkerEnvironment, attempt: Attempt) -> dict[str, Any]:
    started = time.monotonic()
    if isinstance(task.model, CausalLMSpec):
        return _import_language_model(task, task.model, environment, attempt)
    state = models.initial_state(task.model, task.classes, task.seed)
    attempt.write("state.safetensors", save_bytes(state))
    return attempt.commit(
        {
            "digest": state_digest(state),
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )


def _import_language_model(
    task: specs.ModelTask, model: CausalLMSpec, environment: WorkerEnvironment, attempt: Attempt
) -> dict[str, Any]:
    """One file a part, written as it is read: the model is never held whole."""
    from workers.models.causal_lm.imports import companions, import_parts
    from workers.models.causal_lm.parts import part_names
    from workers.models.causal_lm.verify import verify_chain

    started = time.monotonic()
    # Before hours are spent on it: a small model of this architecture gives the same logits as a chain and by itself.
    verify_chain(model)
    total = len(part_names(model))
    parts: dict[str, Any] = {}
    for name, state in import_parts(model, task.seed):
        file = f"{name}.safetensors"
        record = attempt.write(file, save_bytes(state))
        parts[name] = {"file": file, "digest": state_digest(state), "bytes": record["bytes"]}
        environment.control.progress(phase="import", done=len(parts), total=total, unit="parts")
        if environment.control.should_stop():
            raise Interrupted("the import of the model was stopped; it starts again with the next run")
    beside = companions(model)
    for name, data in beside.items():
        attempt.write(f"{COMPANION}{name}", data)
    return attempt.commit(
        {
            "parts": parts,
            "companions": sorted(beside),
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )
