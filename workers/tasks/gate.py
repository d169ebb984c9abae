"""The run-wide exit: whether the network is good enough already, and what a stage that is then left out commits."""

from __future__ import annotations

import time

import torch

from cache_store.records.nodes import Attempt, Commit
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.models.chain import write_part
from workers.specs.orders import Parents
from workers.specs.results import EvaluateResult, StageResult
from workers.specs.tasks import GateSpec, StageTask
from workers.weights import ADAPTER, AUX, Weights

#: The `exit` of a stage that was left out.
RUN_TARGET = "run target"


def reached(gate: GateSpec | None, parents: Parents) -> bool:
    """Whether the evaluation in the role `gate` meets all that is asked of it. No gate: never."""
    if gate is None:
        return False
    metrics = parents["gate"].read(EvaluateResult).metrics
    accurate = gate.accuracy is None or metrics["accuracy"] >= gate.accuracy
    return accurate and (gate.loss is None or metrics["loss"] <= gate.loss)


def carry_over(
    task: StageTask,
    parents: Parents,
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> Commit:
    """Commit the parts of a stage as they are: no epoch, the same bytes under its own name."""
    started = time.monotonic()
    weights = Weights(environment.nodes, parents, domain_of(task.experiment), torch.device("cpu"))
    parts = {part: write_part(attempt, part, weights.state(part)) for part in task.trained}
    result = StageResult(
        stage=task.name,
        parts=parts,
        epochs=(),
        best_epoch=None,
        committed_epoch=None,
        exit=RUN_TARGET,
        steps=0,
        path_is_auxiliary=ADAPTER in task.path or AUX in task.path,
        input_seconds=0.0,
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())
