"""Square images and their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_store.records.nodes import Commit
from cache_store.snapshots.store import SnapshotStore
from workers.data.images.augment.augment import view_identity
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.device import as_input, to_device
from workers.domains.base import Batch, FamilyParts, Rows, Source, StandIn
from workers.domains.images.planning import sample_shape
from workers.domains.sums import Sums
from workers.models.chain import Boundary
from workers.models.counting import Shape
from workers.models.registry import family_of
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import Experiment, ImageSpec, Precision, TrainSpec
from workers.specs.model import expect
from workers.specs.results import ByClass
from workers.specs.tasks import DataTask

#: Classes of which it is counted which are taken for which, and pairs that are kept.
MOST_CLASSES, MOST_CONFUSED = 1024, 100


def prepare_images(task: DataTask, snapshots: SnapshotStore, progress: Callable[..., None]) -> ImageDataResult:
    """Decode the images of a data task into the store."""
    return prepare(expect(ImageSpec, task.data), snapshots, progress, fingerprint=task.fingerprint)


class ImageDomain(FamilyParts):
    """See `workers.domains.base.Domain`."""

    monitor: Literal["accuracy", "loss"] = "accuracy"
    unit = "images"
    row_unit = "images"

    def __init__(self, experiment: Experiment) -> None:
        model, data = experiment.model, expect(ImageSpec, experiment.data)
        super().__init__(family_of(model).parts(model, sample_shape(data), experiment.classes), experiment)
        self._experiment = experiment
        self._data = data

    def source(self, data: Commit, snapshots: SnapshotStore, split: str) -> Source:
        return ImageSource(self._experiment, data.read(ImageDataResult), snapshots, split)

    def views(self, source: Source) -> int:
        if self._data.views == "auto":
            raise ValueError("data.views: auto is for configurations; a plan gives tasks a number")
        return self._data.views

    def rows(self, source: Source, index: np.ndarray) -> Rows:
        return Rows(index, cast("ImageSource", source).labels[torch.from_numpy(index)])

    def target_counts(self, source: Source, index: np.ndarray) -> np.ndarray:
        return np.ones(len(index), np.int64)

    def load(self, source: Source, rows: Rows, view: int | None) -> Boundary:
        return (cast("ImageSource", source).batch(rows.index, view),)

    def batch(
        self,
        rows: Rows,
        boundary: Boundary,
        *,
        stored: bool,
        device: torch.device,
        precision: Precision,
        channels_last: bool = False,
    ) -> Batch:
        layout = torch.channels_last if channels_last else None
        moved = tuple(
            to_device(tensor, device, memory_format=layout if tensor.ndim == 4 else None) for tensor in boundary
        )
        targets = to_device(rows.targets, device)
        return Batch(self.as_input(moved, precision) if stored else moved, targets, None, rows)

    def stand_in(self, samples: int, sample: Shape) -> StandIn:
        labels = torch.zeros(samples, dtype=torch.int64)
        return StandIn(Rows(np.arange(samples), labels), (torch.empty((samples, *sample)),), samples)

    def as_input(self, boundary: Boundary, precision: Precision) -> Boundary:
        return as_input(boundary, precision)

    def offsets(self, source: Source) -> np.ndarray | None:
        return None

    def set_rows(self, source: Source, index: np.ndarray) -> np.ndarray:
        return index

    def to_rows(self, boundary: Boundary, batch: Batch) -> Boundary:
        return boundary

    def view_identity(self, view: int | None) -> Any:
        return view_identity(self._data, self._experiment.seed, view)

    def loss(self, output: Any, targets: Tensor, train: TrainSpec) -> tuple[Tensor, Tensor | None]:
        loss = F.cross_entropy(output.float(), targets, label_smoothing=train.label_smoothing)
        return loss, (output.detach().argmax(dim=1) == targets).sum()

    def scorer(self, source: Source, device: torch.device, *, by_class: bool = False) -> ImageScorer:
        classes = self._experiment.classes
        return ImageScorer(device, classes if by_class and classes <= MOST_CLASSES else 0)


class ImageScorer:
    """Mean cross-entropy and accuracy; and, of so many classes, which were taken for which."""

    def __init__(self, device: torch.device, classes: int = 0) -> None:
        """`classes`: 0 counts none."""
        self._sums = Sums(device)
        self.sums = self._sums.own
        self._classes = classes
        self._taken = torch.zeros(classes * classes, dtype=torch.int64, device=device)

    def add(self, output: Any, batch: Batch) -> None:
        loss = F.cross_entropy(output.float(), batch.targets)
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
