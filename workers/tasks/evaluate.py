"""Score an assembled chain from its raw inputs: the ordinary forward pass of the ordinary model."""

from __future__ import annotations

import time

from cache_store.records.nodes import Attempt, Commit
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.specs.orders import Parents
from workers.specs.results import EvaluateResult
from workers.specs.tasks import EvaluateTask
from workers.training.batches import RawInputs, in_order
from workers.training.scoring import score
from workers.weights import Weights, frozen_path


def evaluate(
    task: EvaluateTask,
    parents: Parents,
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> Commit:
    """The domain's metrics over the split, the mean `loss` among them; and how single classes fared."""
    started = time.monotonic()
    device = environment.device
    domain = domain_of(task.experiment)
    source = domain.source(parents["data"], environment.snapshots, task.split)
    weights = Weights(environment.nodes, parents, domain, device)
    path = frozen_path(
        weights,
        task.path,
        device,
        tier=task.frozen or "device",
        channels_last=task.channels_last,
        tie=(lambda parts: domain.tie(parts, None)) if task.tied else None,
    )
    inputs = RawInputs(domain, source, device, task.precision, channels_last=task.channels_last)
    loaded = in_order(inputs, batch_size=task.batch_size, device=device)
    scorer = domain.scorer(source, device, by_class=True)
    metrics = score(path, loaded, scorer, task.precision, device)
    result = EvaluateResult(
        metrics=metrics,
        by_class=scorer.by_class(),
        rows=source.rows,
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())
