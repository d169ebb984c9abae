"""Labelled texts of one split as batches for a classifier, read from the prepared sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.data.text.labelled.prepare import prepare_labelled
from workers.data.text.samples.ragged import flat_rows
from workers.data.text.source import TextSource
from workers.specs.data_results import TextDataResult
from workers.specs.language import CausalLMSpec, LabelledTextSpec
from workers.specs.model import expect


@dataclass
class LabelledBatch:
    """Host tensors of some samples, padded on the right to the longest of them.

    inputs: int64 (B, T) by name, as transformers calls them: `input_ids`, `attention_mask` (0 at padding),
    `token_type_ids`. `tokens` bool (B, T), False at padding; None when there is none.
    """

    inputs: dict[str, Tensor]
    tokens: Tensor | None


class LabelledSource(TextSource):
    """One split of a prepared labelled data set; see `TextSource`. `labels` int64 (rows,): the classes."""

    spec = LabelledTextSpec
    kind = "labelled"

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.targets)

    def padded(self, rows: np.ndarray) -> LabelledBatch:
        """Read the samples `rows` int64 (B,), B >= 1, of this split. IndexError when one is not in it."""
        starts, lengths = self._ranges(rows)
        flat = flat_rows(starts, lengths)
        token, kind = self._restoring(lambda: self._reader.gather(flat))
        shape = (len(lengths), int(lengths.max()))
        mask = torch.arange(shape[1]) < torch.from_numpy(lengths)[:, None]
        inputs = {
            "input_ids": torch.full(shape, self._pad).masked_scatter_(mask, token.long()),
            "attention_mask": mask.long(),
            "token_type_ids": torch.zeros(shape, dtype=torch.int64).masked_scatter_(mask, kind.long()),
        }
        return LabelledBatch(inputs, None if len(flat) == mask.numel() else mask)

    def _prepare_again(self) -> TextDataResult:
        return prepare_labelled(self._data, expect(CausalLMSpec, self._model), self._seed, self._snapshots)
