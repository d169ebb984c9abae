"""The run-wide exit: whether the network is good enough already, and what a stage that is then left out commits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save as save_bytes

from cache_store.records.nodes import Attempt
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.models.chain import state_digest
from workers.specs.tasks import GateSpec, StageTask
from workers.weights import ADAPTER, AUX, Weights

#: The `exit` of a stage that was left out.
RUN_TARGET = "run target"


def reached(gate: GateSpec | None, parents: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the evaluation in the role `gate` meets all that is asked of it. No gate: never."""
    if gate is None:
        return False
    metrics = parents["gate"]["result"]["metrics"]
    accurate = gate.accuracy is None or metrics["accuracy"] >= gate.accuracy
    return accurate and (gate.loss is None or metrics["loss"] <= gate.loss)


def carry_over(
    task: StageTask,
    parents: Mapping[str, Mapping[str, Any]],
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> dict[str, Any]:
    """Commit the parts of a stage as they are: no epoch, the same bytes under its own name."""
    started = time.monotonic()
    weights = Weights(environment.nodes, parents, domain_of(task.experiment), torch.device("cpu"))
    parts: dict[str, Any] = {}
    for part in task.trained:
        state, file = weights.state(part), f"{part}.safetensors"
        record = attempt.write(file, save_bytes(state))
        parts[part] = {"file": file, "digest": state_digest(state), "bytes": record["bytes"]}
    return attempt.commit(
        {
            "stage": task.name,
            "parts": parts,
            "epochs": [],
            "best_epoch": None,
            "committed_epoch": None,
            "exit": RUN_TARGET,
            "steps": 0,
            "path_is_auxiliary": ADAPTER in task.path or AUX in task.path,
            "snapshot": {"hits": 0, "misses": 0, "bytes_read": 0, "bytes_written": 0},
            "forwards": {},
            "input_seconds": 0.0,
            "seconds": time.monotonic() - started,
            "resumed": 0,
            "where": environment.where(),
        }
    )
