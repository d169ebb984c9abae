"""Square images and their classes: the ResNets' domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_store.formats.codec import Field
from cache_store.snapshots.store import SnapshotStore
from workers.data.images.augment.augment import view_identity
from workers.data.images.source import ImageSource
from workers.device import as_input, to_device
from workers.domains.base import Batch, Rows, Source
from workers.domains.sums import Sums
from workers.models import registry
from workers.models.chain import Boundary, State, cpu_state
from workers.specs.experiment import Experiment, ImageSpec, Precision, ResNetSpec, TrainSpec


class ImageDomain:
    monitor: Literal["accuracy", "loss"] = "accuracy"
    unit = "images"
    row_unit = "images"

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.model, ResNetSpec)
        assert isinstance(experiment.data, ImageSpec)
        self._experiment = experiment
        self._model, self._data = experiment.model, experiment.data
        self._chain = (self._model, self._data.image_size, experiment.classes)

    def part_names(self) -> list[str]:
        return registry.part_names(*self._chain)

    def part_state_names(self, part: str) -> list[str]:
        return registry.part_state_names(*self._chain, part)

    def build_part(self, part: str, device: torch.device) -> nn.Module:
        return registry.build_part(*self._chain, part, device)

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        return registry.build_adapter(*self._chain, source, target, seed, device)

    def build_aux(self, source: int, seed: int, device: torch.device, head: State | None) -> nn.Module:
        return registry.build_aux(*self._chain, source, seed, device)

    def prepare_training(self, part: str, module: nn.Module, train: TrainSpec, seed: int) -> None:
        pass

    def prepare_frozen(self, part: str, module: nn.Module, train: TrainSpec) -> None:
        pass

    def final_state(self, module: nn.Module) -> State:
        return cpu_state(module)

    def source(self, data_result: Mapping[str, Any], snapshots: SnapshotStore, split: str) -> Source:
        return ImageSource(self._experiment, data_result, snapshots, split)

    def views(self, source: Source) -> int:
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

    def as_input(self, boundary: Boundary, precision: Precision) -> Boundary:
        return as_input(boundary, precision)

    def fields(self, blocks: int, dtype: str) -> tuple[Field, ...]:
        outputs = registry.outline(*self._chain).boundaries[blocks]
        names = ("x",) if len(outputs) == 1 else ("identity", "path")
        return tuple(Field(name, dtype, shape) for name, shape in zip(names, outputs, strict=True))

    def offsets(self, source: Source) -> np.ndarray | None:
        return None

    def set_rows(self, source: Source, index: np.ndarray) -> np.ndarray:
        return index

    def to_rows(self, boundary: Boundary, batch: Batch) -> Boundary:
        return boundary

    def view_identity(self, view: int | None) -> Any:
        return view_identity(self._data, self._experiment.seed, view)

    def model_identity(self) -> Any:
        return self._model.name

    def loss(self, output: Any, targets: Tensor, train: TrainSpec) -> tuple[Tensor, Tensor | None]:
        loss = F.cross_entropy(output.float(), targets, label_smoothing=train.label_smoothing)
        return loss, (output.detach().argmax(dim=1) == targets).sum()

    def scorer(self, source: Source, device: torch.device) -> ImageScorer:
        return ImageScorer(device)


class ImageScorer:
    """Mean cross-entropy and accuracy."""

    def __init__(self, device: torch.device) -> None:
        self._sums = Sums(device)
        self.sums = self._sums.own

    def add(self, output: Any, batch: Batch) -> None:
        loss = F.cross_entropy(output.float(), batch.targets)
        self._sums.add(loss, (output.argmax(dim=1) == batch.targets).sum(), len(batch.targets))

    def metrics(self) -> dict[str, float]:
        loss, accuracy = self._sums.mean()
        assert accuracy is not None
        return {"loss": loss, "accuracy": accuracy}
