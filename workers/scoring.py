"""Loss and accuracy, summed on the device so that the step loop never waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.chain import Path
from workers.gang import ALONE, Gang
from workers.optim import autocast
from workers.specs import Precision

if TYPE_CHECKING:
    from workers.domains.base import Batch, Scorer


class Sums:
    """Running sums over targets, on the device: loss * n, correct, n. Reading them is the only synchronization.

    There is no accuracy from the first batch on whose right predictions nobody counted. In a gang `own` are this rank's
    sums, and what is read those of all ranks.
    """

    def __init__(self, device: torch.device, start: Iterable[float] = (0.0, 0.0, 0.0), *, gang: Gang = ALONE) -> None:
        self.own = torch.tensor(list(start), dtype=torch.float64, device=device)
        if not gang.leads:
            self.own.zero_()
        self._gang = gang
        self._counted = True

    def add(self, loss: Tensor, correct: Tensor | None, count: int) -> None:
        """`loss` is the mean over `count` targets, of which `correct` were predicted right (None: not counted)."""
        known = loss.detach().double()
        self._counted = self._counted and correct is not None
        right = known.new_zeros(()) if correct is None else correct.double()
        self.own += torch.stack((known * count, right, known.new_full((), count)))

    def read(self) -> list[float]:
        values: list[float] = self._gang.total(self.own).tolist()
        return values

    def mean(self) -> tuple[float, float | None]:
        """(mean loss, accuracy 0..1 or None where it was not counted)."""
        loss, correct, count = self.read()
        return loss / max(count, 1.0), correct / max(count, 1.0) if self._counted else None


@torch.no_grad()
def score(
    path: Path,
    batches: Iterable[Batch],
    scorer: Scorer,
    precision: Precision,
    device: torch.device,
    gang: Gang = ALONE,
) -> dict[str, float]:
    """The scorer's metrics of the path in eval mode; the mode is put back. `batches`: this rank's part of the split."""
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
