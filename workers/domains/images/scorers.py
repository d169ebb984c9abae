"""Scores of a split by the kind of its targets; what is summed stays on the device until it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.data.images.source import ImageSource
from workers.domains.base import Batch
from workers.domains.images.losses import Loss
from workers.domains.sums import Sums
from workers.specs.experiment import TargetKind
from workers.specs.results import ByClass

#: Classes of which it is counted which are taken for which, and pairs that are kept.
MOST_CLASSES, MOST_CONFUSED = 1024, 100


class ClassScorer:
    """Mean loss and accuracy; and, of so many classes, which were taken for which."""

    def __init__(self, device: torch.device, classes: int = 0, loss: Loss = F.cross_entropy) -> None:
        """`classes`: 0 counts none."""
        self._sums = Sums(device)
        self.sums = self._sums.own
        self._classes, self._loss = classes, loss
        self._taken = torch.zeros(classes * classes, dtype=torch.int64, device=device)

    def add(self, output: Any, batch: Batch) -> None:
        loss = self._loss(output.float(), batch.targets)
        said = output.argmax(dim=1)
        self._sums.add(loss, (said == batch.targets).sum(), len(batch.targets))
        if self._classes:
            self._taken.index_add_(0, batch.targets * self._classes + said, torch.ones_like(said))

    def by_class(self) -> ByClass | None:
        if not self._classes:
            return None
        taken = self._taken.view(self._classes, self._classes).cpu().numpy()
        wrong = taken * (1 - np.eye(self._classes, dtype=np.int64))
        # The first ones of those that are wrong equally often: a stable sort.
        worst = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]
        pairs = ((int(place) // self._classes, int(place) % self._classes) for place in worst)
        return ByClass(
            samples=tuple(taken.sum(axis=1).tolist()),
            right=tuple(taken.diagonal().tolist()),
            said=tuple(taken.sum(axis=0).tolist()),
            confused=tuple((true, said, int(wrong[true, said])) for true, said in pairs if wrong[true, said]),
        )

    def metrics(self) -> dict[str, float]:
        loss, accuracy = self._sums.mean()
        if accuracy is None:
            raise RuntimeError("the predictions of this split were not counted")
        return {"loss": loss, "accuracy": accuracy}


class LossScorer:
    """The mean loss, and sums over the samples by output that kinds of targets add to it."""

    #: Sums by output.
    rows = 0

    def __init__(self, source: ImageSource, device: torch.device, loss: Loss) -> None:
        self._source, self._loss = source, loss
        #: Loss * n, n; then `rows` sums of every output.
        self.sums = torch.zeros(2 + self.rows * source.classes, dtype=torch.float64, device=device)

    def add(self, output: Any, batch: Batch) -> None:
        given, count = output.float(), len(batch.targets)
        loss = self._loss(given, batch.targets).detach().double()
        self.sums[:2] += torch.stack((loss * count, loss.new_full((), count)))
        if self.rows:
            self.sums[2:] += torch.cat([each.double().sum(dim=0) for each in self._by_output(given, batch.targets)])

    def _by_output(self, output: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """`rows` tensors (B, outputs), to be summed over the samples."""
        return ()

    def metrics(self) -> dict[str, float]:
        loss, count, *sums = self.sums.tolist()
        found = self._scores(np.asarray(sums).reshape(self.rows, -1) if self.rows else np.empty(0), max(count, 1.0))
        return {**found, "loss": loss / max(count, 1.0)}

    def _scores(self, sums: np.ndarray, count: float) -> dict[str, float]:
        """Metrics beside the loss, of sums (rows, outputs) over `count` samples."""
        return {}

    def by_class(self) -> None:
        """No target is one class."""


class LabelScorer(LossScorer):
    """F1 over all pairs of sample and label (micro), and the mean of the labels' own (macro). A label is said where its
    output is at least 0, a probability of 0.5, and true from 0.5 on. Of a label that is neither, F1 is 0."""

    rows = 3

    def _by_output(self, output: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        said, true = output >= 0, targets >= 0.5
        return said & true, said, true

    def _scores(self, sums: np.ndarray, count: float) -> dict[str, float]:
        right, said, true = sums
        asked = said + true
        macro = np.divide(2 * right, asked, out=np.zeros_like(right), where=asked > 0)
        micro = 2 * right.sum() / asked.sum() if asked.any() else 0.0
        return {"f1_micro": float(micro), "f1_macro": float(macro.mean())}


class NumberScorer(LossScorer):
    """R², root of the mean squared error and mean absolute error, each the mean over outputs. R² of an output whose
    targets are all the same is 1 where all are met, else 0."""

    rows = 2

    def _by_output(self, output: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        # In double: the square of a small error beside a large target is not lost.
        error = output.double() - targets.double()
        return error.square(), error.abs()

    def _scores(self, sums: np.ndarray, count: float) -> dict[str, float]:
        squared, absolute = sums
        labels = self._source.labels.double().numpy()
        spread = np.square(labels - labels.mean(axis=0)).sum(axis=0)
        same = spread == 0
        r2 = np.where(same, (squared == 0).astype(np.float64), 1 - squared / np.where(same, 1.0, spread))
        return {
            "r2": float(r2.mean()),
            "rmse": float(np.sqrt(squared / count).mean()),
            "mae": float((absolute / count).mean()),
        }


#: Kind of targets -> what scores a split of them, where they are no classes.
SCORERS: Mapping[TargetKind, Callable[[ImageSource, torch.device, Loss], LossScorer]] = {
    "labels": LabelScorer,
    "numbers": NumberScorer,
    "given": LossScorer,
}
