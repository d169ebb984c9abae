"""Texts and their classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_store.records.nodes import Commit
from cache_store.snapshots.store import SnapshotStore
from workers.data.text.labelled.prepare import prepare_labelled
from workers.data.text.labelled.source import LabelledBatch, LabelledSource
from workers.device import to_device
from workers.domains.base import Batch, FamilyParts, Rows, Source, StandIn
from workers.domains.images.scorers import MOST_CLASSES, ClassScorer
from workers.domains.ragged import flat_rows_of, padded_rows
from workers.models.base import SequenceParts
from workers.models.chain import Boundary
from workers.models.counting import Shape
from workers.models.registry import family_of
from workers.specs.data_results import TextDataResult
from workers.specs.experiment import Experiment, Precision, TrainSpec
from workers.specs.language import CausalLMSpec, LabelledTextSpec
from workers.specs.model import expect
from workers.specs.tasks import DataTask


def prepare_rows(task: DataTask, snapshots: SnapshotStore, progress: Callable[..., None]) -> TextDataResult:
    """Tokenize the rows of a data task into the store."""
    data, model = expect(LabelledTextSpec, task.data), expect(CausalLMSpec, task.model)
    return prepare_labelled(
        data, model, task.seed, snapshots, progress, fingerprint=task.fingerprint, tokenizer=task.tokenizer
    )


class LabelledDomain(FamilyParts):
    """See `workers.domains.base.Domain`. A row of a snapshot set is a token: padding is not stored, and made again from
    the lengths of the samples."""

    monitor = "accuracy"
    unit = "samples"
    row_unit = "tokens"

    def __init__(self, experiment: Experiment) -> None:
        model = experiment.model
        # What a sample's shape is does not change the parts of a chain over tokens.
        parts = family_of(model).parts(model, (), experiment.classes)
        if not isinstance(parts, SequenceParts):
            raise TypeError(f"models of the family {model.family!r} do not classify token sequences")
        super().__init__(parts, experiment)
        self._experiment, self._sequences = experiment, parts
        self._contexts: dict[torch.device, Callable[[Tensor, Mapping[str, Tensor]], Any]] = {}

    # -- rows ---------------------------------------------------------------------------------------------

    def source(self, data: Commit, snapshots: SnapshotStore, split: str) -> Source:
        return LabelledSource(self._experiment, data.read(TextDataResult), snapshots, split)

    def views(self, source: Source) -> int:
        return 1

    def rows(self, source: Source, index: np.ndarray) -> Rows:
        own = cast("LabelledSource", source)
        return Rows(index, own.labels[torch.from_numpy(index)], own.padded(index))

    def target_counts(self, source: Source, index: np.ndarray) -> np.ndarray:
        return np.ones(len(index), np.int64)

    def load(self, source: Source, rows: Rows, view: int | None) -> Boundary:
        return (cast("LabelledBatch", rows.text).inputs["input_ids"],)

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
        text = cast("LabelledBatch", rows.text)
        (value,) = (to_device(tensor, device) for tensor in boundary)
        if stored:
            (value,) = self.as_input((value,), precision)
            value = padded_rows(value, text.inputs["input_ids"].shape, text.tokens)
        if device not in self._contexts:
            self._contexts[device] = self._sequences.context(device)
        context = self._contexts[device](value, text.inputs)
        return Batch((value,), to_device(rows.targets, device), context, rows)

    def stand_in(self, samples: int, sample: Shape) -> StandIn:
        (length,) = sample
        ids = torch.zeros((samples, length), dtype=torch.int64)
        text = LabelledBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids}, None)
        labels = torch.zeros(samples, dtype=torch.int64)
        return StandIn(Rows(np.arange(samples), labels, text), (ids,), samples * length)

    def as_input(self, boundary: Boundary, precision: Precision) -> Boundary:
        # The residual stream keeps the type of the weights; autocast computes what it adds in its own.
        return tuple(tensor.float() for tensor in boundary)

    # -- snapshots ----------------------------------------------------------------------------------------

    def offsets(self, source: Source) -> np.ndarray | None:
        return cast("LabelledSource", source).offsets

    def set_rows(self, source: Source, index: np.ndarray) -> np.ndarray:
        return cast("LabelledSource", source).token_rows(index)

    def to_rows(self, boundary: Boundary, batch: Batch) -> Boundary:
        (hidden,) = boundary
        return (flat_rows_of(hidden, cast("LabelledBatch", batch.rows.text).tokens),)

    def view_identity(self, view: int | None) -> Any:
        return None

    # -- objective ----------------------------------------------------------------------------------------

    def loss(self, output: Any, targets: Tensor, train: TrainSpec) -> tuple[Tensor, Tensor | None]:
        loss = F.cross_entropy(output.float(), targets, label_smoothing=train.label_smoothing)
        return loss, (output.detach().argmax(dim=1) == targets).sum()

    def scorer(self, source: Source, device: torch.device, *, by_class: bool = False) -> ClassScorer:
        classes = self._experiment.classes
        return ClassScorer(device, classes if by_class and classes <= MOST_CLASSES else 0)
