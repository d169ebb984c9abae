"""Loss and accuracy, summed on the device so that the step loop never waits for it; and the test split after an epoch,
as the publication scores it: for curves, nothing is chosen by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workers.device import autocast
from workers.distributed.gang import ALONE, Gang
from workers.environment import WorkerEnvironment
from workers.models.chain import ModulePath, Within, at_once
from workers.specs.experiment import Precision
from workers.specs.orders import Parents
from workers.specs.tasks import EpochTestSpec, StageTask
from workers.training.batches import RawInputs, in_order
from workers.training.stage_path import StagePath
from workers.weights import Weights

if TYPE_CHECKING:
    from workers.domains.base import Batch, Domain, Scorer


@torch.no_grad()
def score(
    path: ModulePath,
    batches: Iterable[Batch],
    scorer: Scorer,
    precision: Precision,
    device: torch.device,
    gang: Gang = ALONE,
    within: Within = at_once,
) -> dict[str, float]:
    """Score the path in eval mode; the mode is put back. `batches`: this rank's part of the split. `within`: what keeps
    weights there until its output was scored."""
    was_training = path.training
    path.train(False)
    for batch in batches:
        within(partial(_run, path, batch, precision, device), partial(_add, scorer, batch))
    path.train(was_training)
    scorer.sums.copy_(gang.total(scorer.sums))
    return scorer.metrics()


def _run(path: ModulePath, batch: Batch, precision: Precision, device: torch.device) -> Any:
    with autocast(precision, device):
        return path(batch.boundary, batch.context)


def _add(scorer: Scorer, batch: Batch, output: Any) -> None:
    if batch.counts:
        scorer.add(output, batch)


@dataclass(frozen=True)
class EpochTest:
    """Metrics of the test split after an epoch. `auxiliary`: of the stage's own path, None where that is the network
    itself."""

    real: Mapping[str, float]
    auxiliary: Mapping[str, float] | None
    seconds: float


class EpochTests:
    """Score the whole network as it stands, and the stage's own path, on the test split.

    The parts that the stage does not have are read for every epoch and dropped again, so that the memory of its steps
    stays what it is without. Nothing draws random numbers."""

    def __init__(
        self,
        task: StageTask,
        spec: EpochTestSpec,
        parents: Parents,
        environment: WorkerEnvironment,
        domain: Domain,
        weights: Weights,
        *,
        through: Callable[[ModulePath], Callable[[Batch], Batch]],
    ) -> None:
        """`weights` has every part of `spec.path`; `through` makes frozen blocks a step of loading."""
        self._task, self._spec, self._domain, self._weights = task, spec, domain, weights
        self._device, self._gang = environment.device, environment.gang
        self._source = domain.source(parents["data"], environment.snapshots, "test")
        self._through = through
        before = () if task.boundary is None else tuple(block for hop in task.boundary.hops for block in hop)
        self._before = before
        self._auxiliary = (*before, *task.path) != spec.path

    def score(self, path: StagePath) -> EpochTest:
        """Score what the stage's path and its trained parts are now. Every rank of a gang must take part."""
        started = time.monotonic()
        real = self._score(self._network(path), None)
        auxiliary = None
        if self._auxiliary:
            frozen = self._frozen(self._before) if self._before else None
            auxiliary = self._score(path.module, frozen)
        if self._device.type == "cuda":
            # What the scores took would count as reserved in the next epoch.
            torch.cuda.empty_cache()
        return EpochTest(real, auxiliary, time.monotonic() - started)

    def _score(self, path: ModulePath, before: ModulePath | None) -> dict[str, float]:
        train = self._task.train
        inputs = RawInputs(
            self._domain,
            self._source,
            self._device,
            train.precision,
            channels_last=train.channels_last,
            prefix=None if before is None else self._through(before),
        )
        loaded = in_order(inputs, batch_size=self._spec.batch_size, device=self._device, gang=self._gang)
        scorer = self._domain.scorer(self._source, self._device)
        return self._gang.agree(score(path, loaded, scorer, train.precision, self._device, self._gang))

    def _network(self, path: StagePath) -> ModulePath:
        """Put the network together: trained parts as they would be committed now, all others as they were given."""
        parts: dict[str, nn.Module] = {}
        for name in self._spec.path:
            if name in self._task.trained:
                parts[name] = self._domain.build_part(name, self._device)
                parts[name].load_state_dict(path.final(name), strict=True)
            else:
                parts[name] = self._weights.build(name)
        return self._laid_out(parts)

    def _frozen(self, names: tuple[str, ...]) -> ModulePath:
        return self._laid_out({name: self._weights.build(name) for name in names})

    def _laid_out(self, parts: Mapping[str, nn.Module]) -> ModulePath:
        network = ModulePath(parts, trained=())
        if self._task.train.channels_last:
            network.to(memory_format=torch.channels_last)
        return network
