"""Token sequences and their next tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cache_store.records.nodes import Commit
from cache_store.snapshots.store import SnapshotStore
from workers.data.text.prepare import prepare_text
from workers.data.text.source import TextBatch, TextSource
from workers.data.text.trained import trained_questions
from workers.device import to_device
from workers.domains.base import Batch, FamilyParts, Rows, Source, StandIn
from workers.domains.ragged import flat_rows_of, padded_rows
from workers.models.base import TokenParts
from workers.models.causal_lm.network import readout
from workers.models.chain import Boundary
from workers.models.counting import Shape
from workers.models.registry import family_of
from workers.overlap import TrainedQuestions
from workers.specs.data_results import TextDataResult
from workers.specs.experiment import Experiment, Precision, TrainSpec
from workers.specs.language import CausalLMSpec, TextSpec
from workers.specs.model import expect
from workers.specs.tasks import DataTask


def prepare_tokens(task: DataTask, snapshots: SnapshotStore, progress: Callable[..., None]) -> TextDataResult:
    """Tokenize the text of a data task into the store."""
    data, model = expect(TextSpec, task.data), expect(CausalLMSpec, task.model)
    return prepare_text(
        data, model, task.seed, snapshots, progress, fingerprint=task.fingerprint, tokenizer=task.tokenizer
    )


def questions_of(task: DataTask) -> TrainedQuestions | None:
    """Take the digests of the questions that a data task's runs train on."""
    return trained_questions(expect(TextSpec, task.data), task.seed)


class TextDomain(FamilyParts):
    """See `workers.domains.base.Domain`."""

    monitor = "loss"
    unit = "samples"
    row_unit = "tokens"

    def __init__(self, experiment: Experiment) -> None:
        model = experiment.model
        # What a sample's shape is does not change the parts of a chain over tokens.
        parts = family_of(model).parts(model, (), experiment.classes)
        if not isinstance(parts, TokenParts):
            raise TypeError(f"models of the family {model.family!r} do not work on tokens: they take no context")
        super().__init__(parts, experiment)
        self._experiment = experiment
        self._tokens = parts
        self._longest = expect(TextSpec, experiment.data).sequence_length
        self._contexts: dict[torch.device, Callable[..., Any]] = {}

    # -- rows ---------------------------------------------------------------------------------------------

    def source(self, data: Commit, snapshots: SnapshotStore, split: str) -> Source:
        return TextSource(self._experiment, data.read(TextDataResult), snapshots, split)

    def views(self, source: Source) -> int:
        return 1

    def rows(self, source: Source, index: np.ndarray) -> Rows:
        batch = cast("TextSource", source).batch(index)
        return Rows(index, batch.targets, batch)

    def target_counts(self, source: Source, index: np.ndarray) -> np.ndarray:
        counts: np.ndarray = cast("TextSource", source).targets[index]
        return counts

    def load(self, source: Source, rows: Rows, view: int | None) -> Boundary:
        return (cast("TextBatch", rows.text).ids,)

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
        text = cast("TextBatch", rows.text)
        (value,) = (to_device(tensor, device) for tensor in boundary)
        if stored:
            (value,) = self.as_input((value,), precision)
            value = padded_rows(value, text.ids.shape, text.attention_mask)
        context = self._context(device)(value, text.position_ids, text.attention_mask, text.where)
        return Batch((value,), to_device(rows.targets, device), context, rows)

    def stand_in(self, samples: int, sample: Shape) -> StandIn:
        (length,) = sample
        ids = torch.zeros((samples, length), dtype=torch.int64)
        positions = torch.arange(length).expand(samples, length)
        # Every token but the first of a sample is predicted.
        where = torch.arange(samples * length).view(samples, length)[:, :-1].flatten()
        text = TextBatch(ids, positions, None, where, ids[:, 1:].flatten())
        return StandIn(Rows(np.arange(samples), text.targets, text), (ids,), samples * length)

    def as_input(self, boundary: Boundary, precision: Precision) -> Boundary:
        # The residual stream keeps the type of the weights; autocast computes what it adds in its own.
        return tuple(tensor.to(self._tokens.stream_dtype()) for tensor in boundary)

    def _context(self, device: torch.device) -> Callable[..., Any]:
        if device not in self._contexts:
            self._contexts[device] = self._tokens.context(device, self._longest)
        return self._contexts[device]

    # -- snapshots ----------------------------------------------------------------------------------------

    def offsets(self, source: Source) -> np.ndarray | None:
        return cast("TextSource", source).offsets

    def set_rows(self, source: Source, index: np.ndarray) -> np.ndarray:
        return cast("TextSource", source).token_rows(index)

    def to_rows(self, boundary: Boundary, batch: Batch) -> Boundary:
        (hidden,) = boundary
        return (flat_rows_of(hidden, cast("TextBatch", batch.rows.text).attention_mask),)

    def view_identity(self, view: int | None) -> Any:
        return None

    # -- objective ----------------------------------------------------------------------------------------

    def loss(self, output: Any, targets: Tensor, train: TrainSpec) -> tuple[Tensor, Tensor | None]:
        loss = readout.loss(output, targets, train.label_smoothing)
        return readout.with_balance(output, loss), None

    def scorer(self, source: Source, device: torch.device, *, by_class: bool = False) -> TextScorer:
        return TextScorer(cast("TextSource", source), device)


class TextScorer:
    """Mean negative log-likelihood over targets, perplexity, share of targets predicted right; of questions (splits
    with all candidates) the loss of the right answers, and how often the right one is the likeliest (`accuracy`)."""

    def __init__(self, source: TextSource, device: torch.device) -> None:
        self._source = source
        #: By sample: summed negative log-likelihood, targets predicted right.
        self.sums = torch.zeros((2, source.rows), dtype=torch.float64, device=device)

    def add(self, output: Any, batch: Batch) -> None:
        nll, correct = readout.token_scores(output, batch.targets)
        text = cast("TextBatch", batch.rows.text)
        rows = torch.from_numpy(batch.rows.index)[text.where // text.ids.shape[1]].to(nll.device)
        self.sums.index_add_(1, rows, torch.stack((nll, correct.float())).double())

    def by_class(self) -> None:
        """There are none."""

    def metrics(self) -> dict[str, float]:
        nll, correct = self.sums.cpu().numpy()
        targets = self._source.targets
        if self._source.groups is None:
            return _figures(nll.sum(), correct.sum(), targets.sum())
        group, right = self._source.groups
        figures = _figures(nll[right].sum(), correct[right].sum(), targets[right].sum())
        return {**figures, "token_accuracy": figures["accuracy"], "accuracy": _answered(nll, group, right)}


def _figures(nll: float, correct: float, targets: float) -> dict[str, float]:
    loss = float(nll / max(targets, 1))
    return {"loss": loss, "accuracy": float(correct / max(targets, 1)), "perplexity": float(np.exp(min(loss, 700.0)))}


def _answered(nll: np.ndarray, group: np.ndarray, right: np.ndarray) -> float:
    """Share of groups whose least summed negative log-likelihood is the right candidate's (the first of equals)."""
    order = np.lexsort((np.arange(len(nll)), nll, group))
    first = np.r_[True, np.diff(group[order]) != 0]
    return float(right[order][first].mean())
