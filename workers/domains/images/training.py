"""Square images, or samples of a user's own, and their targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import UserError
from cache_store.records.nodes import Commit
from cache_store.snapshots.store import SnapshotStore
from workers.data.images.augment.augment import view_identity
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.data.images.targets import TARGETS
from workers.device import as_input, to_device
from workers.domains.base import Batch, FamilyParts, Rows, Scorer, Source, StandIn
from workers.domains.images.losses import loss_of
from workers.domains.images.planning import sample_shape
from workers.domains.images.scorers import MOST_CLASSES, SCORERS, ClassScorer
from workers.models.chain import Boundary
from workers.models.counting import Shape
from workers.models.registry import family_of
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import Experiment, ImageSpec, Precision, TrainSpec
from workers.specs.model import expect
from workers.specs.tasks import DataTask


def prepare_images(task: DataTask, snapshots: SnapshotStore, progress: Callable[..., None]) -> ImageDataResult:
    """Decode the images of a data task into the store."""
    return prepare(expect(ImageSpec, task.data), snapshots, progress, fingerprint=task.fingerprint)


class ImageDomain(FamilyParts):
    """See `workers.domains.base.Domain`."""

    unit = "images"
    row_unit = "images"

    def __init__(self, experiment: Experiment) -> None:
        model, data = experiment.model, expect(ImageSpec, experiment.data)
        super().__init__(family_of(model).parts(model, sample_shape(data), experiment.classes), experiment)
        self._experiment = experiment
        self._data = data
        kind = data.targets or "classes"
        self._targets = TARGETS[kind]
        #: None: targets are classes.
        self._scorer = SCORERS.get(kind)
        self.monitor = self._targets.metrics[0]
        self._loss = loss_of(experiment.loss)
        #: Label smoothing is cross-entropy's, which is what an experiment has that names no loss.
        self._smooths = experiment.loss is None

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
        if self._scorer is not None and not self._targets.sized:
            raise UserError("targets that are taken as they are cannot be made up: no --trace")
        of_one = (self._experiment.classes,) if self._targets.sized else ()
        labels = torch.zeros((samples, *of_one), dtype=torch.float32 if of_one else torch.int64)
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
        smoothing = {"label_smoothing": train.label_smoothing} if self._smooths else {}
        loss = self._loss(output.float(), targets, **smoothing)
        correct = (output.detach().argmax(dim=1) == targets).sum() if self._scorer is None else None
        return loss, correct

    def scorer(self, source: Source, device: torch.device, *, by_class: bool = False) -> Scorer:
        if self._scorer is None:
            classes = self._experiment.classes
            return ClassScorer(device, classes if by_class and classes <= MOST_CLASSES else 0, self._loss)
        return self._scorer(cast("ImageSource", source), device, self._loss)
