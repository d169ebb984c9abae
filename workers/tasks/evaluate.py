"""Score an assembled chain from its raw inputs: the ordinary forward pass of the ordinary model."""

from __future__ import annotations

import time

import torch

from cache_store.records.nodes import Attempt, Commit
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.models.chain import ModulePath
from workers.specs.orders import Parents
from workers.specs.results import EvaluateResult
from workers.specs.tasks import EvaluateTask
from workers.training.batches import RawInputs, in_order
from workers.training.scoring import score
from workers.weights import Weights


def evaluate(
    task: EvaluateTask,
    parents: Parents,
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> Commit:
    """The domain's metrics over the split: at least mean cross-entropy (`loss`) and `accuracy` (0..1)."""
    started = time.monotonic()
    device = environment.device
    domain = domain_of(task.experiment)
    source = domain.source(parents["data"], environment.snapshots, task.split)
    weights = Weights(environment.nodes, parents, domain, device)
    parts = {name: weights.build(name) for name in task.path}
    if task.tied:
        domain.tie(parts, None)
    path = ModulePath(parts, trained=())
    if task.channels_last:
        path.to(memory_format=torch.channels_last)
    inputs = RawInputs(domain, source, device, task.precision, channels_last=task.channels_last)
    loaded = in_order(inputs, batch_size=task.batch_size, device=device)
    metrics = score(path, loaded, domain.scorer(source, device), task.precision, device)
    result = EvaluateResult(
        metrics=metrics, rows=source.rows, seconds=time.monotonic() - started, where=environment.where()
    )
    return attempt.commit(result.to_json())
