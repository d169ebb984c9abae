"""The mean of a part over replicas that several stages trained apart, element by element."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from cache_store.records.nodes import Attempt, Commit
from workers.control import Update
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.models.chain import State, write_part
from workers.specs.orders import Parents
from workers.specs.results import AverageResult, PartRecord
from workers.specs.tasks import AverageTask
from workers.weights import Weights

#: Numbers that are averaged at one time.
_AT_ONCE = 1 << 20


def average(
    task: AverageTask,
    parents: Parents,
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> Commit:
    """Average on the host, one part after the other, and commit the parts as a stage would."""
    started = time.monotonic()
    domain = domain_of(task.experiment)
    replicas = [
        Weights(
            environment.nodes,
            {f"weights/{part}": parents[f"replica/{number}"] for part in task.parts},
            domain,
            torch.device("cpu"),
        )
        for number in range(len(parents))
    ]
    parts: dict[str, PartRecord] = {}
    for part in task.parts:
        parts[part] = write_part(attempt, part, mean([replica.state(part) for replica in replicas]))
        environment.control.progress(Update(phase="average", done=len(parts), total=len(task.parts), unit="parts"))
    result = AverageResult(
        parts=parts, replicas=len(replicas), seconds=time.monotonic() - started, where=environment.where()
    )
    return attempt.commit(result.to_json())


def mean(states: Sequence[State]) -> State:
    """The mean of states with the same tensors, in their types. Counts (BatchNorm's of batches) are no weights: the
    largest one stands for all."""
    return {name: _mean([state[name] for state in states]) for name in states[0]}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return torch.stack(list(tensors)).amax(0)
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    flat, replicas = result.view(-1), [tensor.reshape(-1) for tensor in tensors]
    # In float64, so that a mean of float32 is rounded once; some at a time, so that the sums take little.
    for start in range(0, flat.numel(), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        total = torch.zeros_like(flat[some], dtype=torch.float64)
        for replica in replicas:
            total += replica[some]
        flat[some] = total / len(tensors)
    return result
