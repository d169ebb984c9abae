"""Things that a test adds to the program by one row of a table: a regime, a diagnosis, a runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from several import ThreadRunner

from orchestrator.costs.formulas import Estimate
from orchestrator.plan.regime_state import RegimeState
from orchestrator.regimes.stages import Cut, Stage
from orchestrator.runners.base import RunnerRequest
from workers.domains.registry import domain_of
from workers.specs.as_json import to_json
from workers.specs.experiment import Experiment
from workers.specs.results import Record, Where
from workers.tasks.execute import Work
from workers.weights import Weights


def head_alone(blocks: tuple[str, ...], cut: Cut) -> tuple[Stage, ...]:
    """Train the head on the backbone as it comes."""
    return (Stage("head", "head", (blocks,), ("head",), ("head",)),)


class CountingThreads(ThreadRunner):
    """Two orders at a time, in threads; `made` are those that were asked for."""

    made: ClassVar[list[CountingThreads]] = []

    def free(self, *, together: bool = False) -> int:
        return 0 if together else super().free()


def threads_runner(request: RunnerRequest) -> CountingThreads:
    """Make a runner with as many slots as the configuration says."""
    runner = CountingThreads(int(request.resources.slots))
    CountingThreads.made.append(runner)
    return runner


@dataclass(frozen=True, kw_only=True)
class NormTask:
    """The Euclidean norm of one part's state, buffers too. Parents: weights/<part>."""

    experiment: Experiment
    part: str


@dataclass(frozen=True, kw_only=True)
class NormResult(Record):
    """The answer."""

    norm: float
    where: Where


def ask_norm(state: RegimeState, stage: Stage) -> str:
    """Add a node that measures the head after a stage."""
    task = to_json(NormTask(experiment=state.experiment, part="head"))
    parents = {"weights/head": state.weights["head"]}
    return state.add("norm", f"norm of head after {stage.name}", task, parents, Estimate(seconds=0.1))


def answer_norm(work: Work) -> Any:
    """Measure it."""
    environment = work.environment
    weights = Weights(environment.nodes, work.order.parents, domain_of(work.task.experiment), environment.device)
    values = [value.double().square().sum() for value in weights.build(work.task.part).state_dict().values()]
    result = NormResult(norm=float(torch.stack(values).sum().sqrt()), where=environment.where())
    return work.attempt.commit(result.to_json())
