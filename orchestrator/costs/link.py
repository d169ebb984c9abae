"""Bytes that cross the link between host and device, and what they do to a stage's time. Pure."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from orchestrator.config.rates import Rates
from orchestrator.costs.formulas import TASK_SECONDS, Estimate, epochs_to_run, steps_to_run
from workers.specs.experiment import TrainSpec
from workers.specs.memory import MemorySpec


@dataclass(frozen=True)
class LinkBytes:
    """Bytes that cross for every micro-batch, beside its passes, and for every update, behind them."""

    micro_batch: int = 0
    update: int = 0

    def of_step(self, micro_batches: int) -> int:
        """Bytes of one update and its micro-batches."""
        return micro_batches * self.micro_batch + self.update

    def of_stage(self, train: TrainSpec, rows: int) -> int:
        """Bytes of a whole stage on so many samples."""
        return micro_batches(train, rows) * self.micro_batch + steps_to_run(train, rows) * self.update


def link_bytes(memory: MemorySpec, *, away: int, trained: int) -> LinkBytes:
    """Count what a stage sends. `away`: bytes that lie on the host in place of the device, of which weights come for
    both passes, and activations go and come back. `trained`: bytes of the weights that train: with updates on the host
    as many bytes of gradients leave in every micro-batch, and of weights come back behind an update."""
    leaving = trained if memory.updates_on_host else 0
    return LinkBytes(2 * away + leaving, leaving)


def micro_batches(train: TrainSpec, rows: int) -> int:
    """Micro-batches of a whole stage."""
    return epochs_to_run(train, rows) * math.ceil(rows / train.micro)


def with_link(predicted: Estimate, train: TrainSpec, rows: int, crossing: LinkBytes, rates: Rates) -> Estimate:
    """A stage's predictions with what crosses the link: that of micro-batches while the device computes, that of
    updates while it waits. Its time stays as it is where the link's speed is not known."""
    total = crossing.of_stage(train, rows)
    found = dataclasses.replace(predicted, link_bytes=total)
    if rates.link_bytes_per_s is None or not total:
        return found
    behind = steps_to_run(train, rows) * crossing.update
    passing = TASK_SECONDS + (total - behind) / rates.link_bytes_per_s
    return dataclasses.replace(found, seconds=max(predicted.seconds, passing) + behind / rates.link_bytes_per_s)
