"""Loss and accuracy, summed on the device so that the step loop never waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from workers.device import autocast
from workers.distributed.gang import ALONE, Gang
from workers.models.chain import ModulePath
from workers.specs.experiment import Precision

if TYPE_CHECKING:
    from workers.domains.base import Batch, Scorer


@torch.no_grad()
def score(
    path: ModulePath,
    batches: Iterable[Batch],
    scorer: Scorer,
    precision: Precision,
    device: torch.device,
    gang: Gang = ALONE,
) -> dict[str, float]:
    """Score the path in eval mode; the mode is put back. `batches`: this rank's part of the split."""
    was_training = path.training
    path.train(False)
    for batch in batches:
        with autocast(precision, device):
            output = path(batch.boundary, batch.context)
        if batch.counts:
            scorer.add(output, batch)
    path.train(was_training)
    scorer.sums.copy_(gang.total(scorer.sums))
    return scorer.metrics()
