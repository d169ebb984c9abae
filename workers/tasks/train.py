"""Train a stage; where the device runs out of memory in spite of the plan, once more with smaller micro-batches."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import torch

from cache_store.records.nodes import Attempt, Commit
from workers.environment import WorkerEnvironment
from workers.models.registry import family_of
from workers.specs.orders import WorkOrder
from workers.specs.tasks import StageTask
from workers.tasks.gate import carry_over, reached
from workers.training.trainer import StageTrainer

_log = logging.getLogger("segprop.worker")


def train(task: StageTask, order: WorkOrder, environment: WorkerEnvironment, attempt: Attempt) -> Commit | None:
    """Train a stage, or carry its parts over where the gate says that the network is good enough already.

    Raises torch.OutOfMemoryError where the device is too small for half of a micro-batch, too, or where a micro-batch
    may not be divided: in gangs, and where the family's batch normalization learns from what it is made of.
    """
    if reached(task.gate, order.parents):
        return carry_over(task, order.parents, environment, attempt)
    try:
        return StageTrainer(task, order.parents, environment, attempt, order.production).run()
    except torch.OutOfMemoryError:
        micro = halved(task, environment)
        if micro is None:
            raise
    # Behind the handler, whose error holds every tensor of the step that failed.
    gc.collect()
    if environment.device.type == "cuda":
        torch.cuda.empty_cache()
    warning = (
        f"out of memory on {environment.device} with {task.train.micro} samples at a time, in spite of the plan: "
        f"trained with {micro}, the batch is the same (training.micro_batch)"
    )
    _log.warning("%s: %s", task.name, warning)
    smaller = replace(task, train=replace(task.train, micro_batch=micro, accumulate=1))
    # An attempt of its own, so that what the first one made of snapshots counts as another's.
    again = environment.nodes.attempt(order.node_id, order.identity)
    return StageTrainer(smaller, order.parents, environment, again, order.production, warnings=(warning,)).run()


def halved(task: StageTask, environment: WorkerEnvironment) -> int | None:
    """Return half of a stage's micro-batch; None where it may not be divided."""
    divisible = family_of(task.experiment.model).traits.can.auto_micro is None
    if not divisible or environment.gang.size > 1 or task.train.micro == 1:
        return None
    return -(-task.train.micro // 2)
