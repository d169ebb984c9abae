"""Token sequences of one split as batches for a model, read from the prepared sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import CorruptShard, DataError, MissingShard
from cache_store.keys import digest_json
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data.text.prepare import prepare_text
from workers.data.text.samples.ragged import flat_rows, offsets_of
from workers.specs.as_json import from_json
from workers.specs.data_results import TextDataResult
from workers.specs.experiment import Experiment
from workers.specs.language import CausalLMSpec, TextSpec
from workers.specs.model import ModelSpec, expect
from workers.specs.tasks import DataTask

T = TypeVar("T")


@dataclass
class TextBatch:
    """Host tensors of some samples, padded on the right to the longest of them.

    `ids` and `position_ids` int64 (B, T): padding holds the tokenizer's pad token and position 0. `attention_mask`
    bool (B, T), False at padding; None when there is none. `where` int64 (N,): flat positions in B·T whose *next*
    token counts, ascending; `targets` int64 (N,): those next tokens.
    """

    ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    where: Tensor
    targets: Tensor


class TextSource:
    """One split of a prepared text data set.

    `rows` samples of `tokens` tokens in all; sample i is tokens `offsets[i]` up to `offsets[i + 1]` of the split
    (`offsets` int64 (rows + 1,)), `targets` int64 (rows,) of which count. `restarts`: positions restart inside
    samples, where documents do; attention should not cross. `groups`: None, or for splits that hold all candidates
    of each question (group int64 (rows,), correct bool (rows,)), candidates side by side and groups from 0: a question
    is answered right when its correct candidate has the group's greatest summed log-probability of targets.
    `identity`: digest of tokens, order, targets and positions. Shards that are missing or damaged are made again from
    the data set's files. Not for use by two threads at once.
    """

    #: The spec class of its data, and what its identity begins with.
    spec: ClassVar[type[Any]] = TextSpec
    kind: ClassVar[str] = "text"

    def __init__(self, experiment: Experiment, prepared: TextDataResult, snapshots: SnapshotStore, split: str) -> None:
        """DataError when the sets can neither be read nor restored."""
        self._data, self._seed = expect(self.spec, experiment.data), experiment.seed
        #: Whose tokenizer made the tokens.
        self._model: ModelSpec | None = experiment.model
        if prepared.origin is not None:
            # An experiment names no files: a stage needs them only to make again what was lost.
            task = from_json(DataTask, prepared.origin)
            self._data, self._model = expect(self.spec, task.data), task.model
        self._prepared = prepared.split(split)
        self._split = split
        self._snapshots = snapshots
        self._pad = prepared.pad
        self.restarts = prepared.restarts
        self.identity = digest_json([self.kind, self._prepared.digest])
        columns = self._read_samples()
        self.rows = len(columns[0])
        self.offsets = offsets_of(columns[1])
        self.tokens = int(self.offsets[-1])
        self.targets = columns[2]
        self.groups: tuple[np.ndarray, np.ndarray] | None = None
        if len(columns) > 3:
            self.groups = columns[3], columns[4].astype(bool)
        self._reader = RowReader(self._restoring(lambda: self._load("tokens")))

    def token_rows(self, rows: Tensor | np.ndarray) -> np.ndarray:
        """Return the flat token numbers (int64) of these samples, in order. IndexError when a sample is not in the
        split."""
        starts, lengths = self._ranges(rows)
        return flat_rows(starts, lengths)

    def batch(self, rows: Tensor | np.ndarray) -> TextBatch:
        """Read the samples `rows` int64 (B,), B >= 1, of this split. IndexError when one is not in it."""
        starts, lengths = self._ranges(rows)
        flat = flat_rows(starts, lengths)
        token, target, position = self._restoring(lambda: self._reader.gather(flat))
        shape = (len(lengths), int(lengths.max()))
        if len(flat) == shape[0] * shape[1]:
            mask = None
            ids, position_ids, counts = (column.view(shape) for column in (token, position, target))
            ids, position_ids = ids.long(), position_ids.long()
        else:
            mask = torch.arange(shape[1]) < torch.from_numpy(lengths)[:, None]
            ids = torch.full(shape, self._pad).masked_scatter_(mask, token.long())
            position_ids = torch.zeros(shape, dtype=torch.int64).masked_scatter_(mask, position.long())
            counts = torch.zeros(shape, dtype=torch.uint8).masked_scatter_(mask, target)
        # The first token of a sample never counts, so the position before one that does is in the same sample.
        counted = counts.view(-1).nonzero()[:, 0]
        return TextBatch(ids, position_ids, mask, counted - 1, ids.view(-1)[counted])

    def _ranges(self, rows: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < self.rows:
            raise IndexError(f"rows {index.min()} to {index.max()} of a split of {self.rows}")
        starts = self.offsets[index]
        return starts, self.offsets[index + 1] - starts

    def _read_samples(self) -> list[np.ndarray]:
        def read() -> list[np.ndarray]:
            table = self._load("samples")
            shards = [table.read(i, _copies) for i in range(table.spec.shards)]
            return [np.concatenate(column) for column in zip(*shards, strict=True)]

        return self._restoring(read)

    def _load(self, what: str) -> SnapshotSet:
        return self._snapshots.load({"tokens": self._prepared.tokens, "samples": self._prepared.samples}[what])

    def _restoring(self, read: Callable[[], T]) -> T:
        """What `read` returns, after restoring what it does not find."""
        try:
            return read()
        except (MissingShard, CorruptShard) as error:
            self._restore(error)
            return read()

    def _restore(self, error: Exception) -> None:
        """Tokenize what is missing from the data set's own files, which must still be those of the plan."""
        # All that is damaged is found now: each restoring tokenizes the whole split.
        for what in ("samples", "tokens"):
            with suppress(MissingShard):
                found = self._load(what)
                for shard in range(found.spec.shards):
                    with suppress(MissingShard, CorruptShard):
                        found.touch(shard)
        again = self._prepare_again()
        if again.split(self._split) != self._prepared:
            raise DataError(
                f"data.path: prepared text is missing or damaged ({error}) and the files at {self._data.path} or the "
                "tokenizer have changed since it was tokenized; run again to plan anew"
            ) from error

    def _prepare_again(self) -> TextDataResult:
        return prepare_text(self._data, expect(CausalLMSpec, self._model), self._seed, self._snapshots)


def _copies(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [array.copy() for array in arrays]
