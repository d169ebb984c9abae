"""Loss and accuracy, summed on the device so that the step loop never waits for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.chain import Boundary, Path
from workers.optim import autocast
from workers.specs import Precision


class Sums:
    """Running sums over samples, on the device: loss * n, correct, n. Reading them is the only synchronization."""

    def __init__(self, device: torch.device, start: Iterable[float] = (0.0, 0.0, 0.0)) -> None:
        self._sums = torch.tensor(list(start), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss` is the mean over the batch; logits (B, classes); labels (B,) int64."""
        count = len(labels)
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        self._sums += torch.stack(
            (loss.detach().double() * count, correct.double(), correct.new_full((), count).double())
        )

    def read(self) -> list[float]:
        values: list[float] = self._sums.tolist()
        return values

    def mean(self) -> tuple[float, float]:
        """(mean loss, accuracy 0..1)."""
        loss, correct, count = self.read()
        return loss / max(count, 1.0), correct / max(count, 1.0)


@torch.no_grad()
def score(
    path: Path, batches: Iterable[tuple[int, Boundary, Tensor]], precision: Precision, device: torch.device
) -> tuple[float, float, int]:
    """(mean cross-entropy, accuracy 0..1, samples) of the path in eval mode; the mode is put back."""
    was_training = path.training
    path.train(False)
    sums = Sums(device)
    for _, boundary, labels in batches:
        with autocast(precision, device):
            logits = path(boundary)
        sums.add(F.cross_entropy(logits.float(), labels), logits, labels)
    path.train(was_training)
    loss, accuracy = sums.mean()
    return loss, accuracy, int(sums.read()[2])
