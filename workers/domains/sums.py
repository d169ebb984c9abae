"""Sums of a score over batches, combined over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from workers.distributed.gang import ALONE, Gang


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
        return self.mean_of(self.read())

    def mean_of(self, values: Sequence[float]) -> tuple[float, float | None]:
        """As `mean`, of sums that were read before, or of the difference of two."""
        loss, correct, count = values
        return loss / max(count, 1.0), correct / max(count, 1.0) if self._counted else None
