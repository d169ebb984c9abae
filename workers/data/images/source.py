"""Images of one split as batches for a model, read from the prepared sets."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import CorruptShard, DataError, MissingShard
from cache_store.keys import digest_json
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data import splits
from workers.data.images.augment.augment import Augment
from workers.data.images.formats.table import IMAGE_FORMATS
from workers.data.images.inspect import resize_of
from workers.data.images.prepare import prepare
from workers.seeds import derive_seed
from workers.specs.as_json import from_json
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import Experiment, ImageSpec
from workers.specs.model import expect
from workers.specs.tasks import DataTask

#: Which prepared set holds a split; without a test set, train's holds them all.
SET_OF = {"train": "train", "validation": "train", "test": "test"}


class ImageSource:
    """One split of a prepared data set.

    `rows` samples; `labels` int64 (rows,), of targets that are no classes (rows, …) of their type; `classes`. `batch`
    gives images under a view. A set of at most `cache_bytes` is held in memory, once in a process; a larger one stays
    mapped from the store. Shards that are missing or damaged are decoded again from the data set's files. Not for use
    by two threads at once.
    """

    def __init__(
        self,
        experiment: Experiment,
        prepared: ImageDataResult,
        snapshots: SnapshotStore,
        split: str,
        cache_bytes: int = 2 << 30,
    ) -> None:
        """DataError when the set can neither be read nor restored."""
        data = expect(ImageSpec, experiment.data)
        counts = prepared.rows
        chosen = splits.rows(data, experiment.seed, counts["train"], counts["test"], counts.get("held_out", 0))
        self._samples = chosen[split]
        name = SET_OF[split] if counts["test"] else "train"
        self._set = _PreparedSet(experiment, prepared, snapshots, name, cache_bytes)
        kind = IMAGE_FORMATS[data.name]
        facts = kind.facts
        self._augment: Callable[[Tensor, np.ndarray, int | None], Tensor]
        self._augment = (
            as_they_are
            if kind.as_they_are
            else Augment(
                augment=data.augment,
                native=self._set.side,
                resize=resize_of(data),
                size=data.image_size,
                flip=data.flip,
                mean=facts.mean,
                std=facts.std,
                seed=derive_seed(experiment.seed, "views"),
            )
        )
        self.classes = experiment.classes
        self.rows = len(self._samples)
        #: Which images in which order: digest of the prepared set and of the split's rows.
        self.identity = digest_json([prepared.digest, name, hashlib.sha256(self._samples.tobytes()).hexdigest()])
        self.labels: Tensor = torch.from_numpy(self._set.labels[self._samples])

    def batch(self, rows: Tensor | np.ndarray, view: int | None) -> Tensor:
        """Return samples float32 and contiguous, images (B, 3, S, S) normalised, for `rows` int64 (B,) of this split.

        `view` None: the evaluation transform. IndexError when a row is not in the split.
        """
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < self.rows:
            raise IndexError(f"rows {index.min()} to {index.max()} of a split of {self.rows}")
        samples = self._samples[index]
        return self._augment(self._set.gather(samples), samples, view)


def as_they_are(samples: Tensor, index: np.ndarray, view: int | None) -> Tensor:
    """Give samples as floats: uint8 of 0 to 255 as 0..1, floats unchanged. All views are the same."""
    return samples.to(torch.float32).div_(255) if samples.dtype == torch.uint8 else samples


_cache: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
_cache_lock = threading.Lock()


class _PreparedSet:
    """Rows of one prepared set: from memory when the set is small, else from the mapped shards."""

    def __init__(
        self,
        experiment: Experiment,
        prepared: ImageDataResult,
        snapshots: SnapshotStore,
        name: str,
        cache_bytes: int,
    ) -> None:
        self._data = expect(ImageSpec, experiment.data)
        self._prepared = prepared
        self._ids = {"train": prepared.train, "test": prepared.test}
        self._name = name
        self._snapshots = snapshots
        self._set = self._open()
        spec = self._set.spec
        self._shape, self._dtype = spec.fields[0].shape, np.dtype(spec.fields[0].dtype)
        self.side = self._shape[-1]
        self._memory: Tensor | None = None
        self._cache_bytes = cache_bytes
        self._held = spec.rows * int(np.prod(self._shape)) * self._dtype.itemsize <= cache_bytes
        label = spec.fields[1]
        self.labels = np.empty((spec.rows, *label.shape), dtype=label.dtype)
        for shard in range(spec.shards):
            rows = spec.shard_range(shard)
            self.labels[rows.start : rows.stop] = self._read(shard, 1)
        self._set.close()

    def gather(self, samples: np.ndarray) -> Tensor:
        """Return rows of the set, of images uint8 (B, 3, H, W). A small set is read into memory here, not before: a
        stage that is fed from snapshots asks for labels alone."""
        if self._held and self._memory is None:
            self._memory = self._cached(self._cache_bytes)
            self._set.close()
        if self._memory is not None:
            return self._memory[torch.from_numpy(samples)]
        out = np.empty((len(samples), *self._shape), dtype=self._dtype)
        owner, local = np.divmod(samples, self._set.spec.shard_rows)
        for shard in np.unique(owner).tolist():
            members = np.flatnonzero(owner == shard)
            out[members] = self._read(shard, 0, local[members])
        return torch.from_numpy(out)

    def _cached(self, cache_bytes: int) -> Tensor:
        spec = self._set.spec
        key = (self._snapshots.storage.uri, spec.id)
        with _cache_lock:
            images = _cache.get(key)
            if images is None:
                filled = np.empty((spec.rows, *self._shape), dtype=self._dtype)
                for shard in range(spec.shards):
                    rows = spec.shard_range(shard)
                    filled[rows.start : rows.stop] = self._read(shard, 0)
                images = _cache[key] = torch.from_numpy(filled)
            _cache.move_to_end(key)
            while len(_cache) > 1 and sum(held.nbytes for held in _cache.values()) > cache_bytes:
                _cache.popitem(last=False)
            return images

    def _open(self) -> SnapshotSet:
        try:
            return self._snapshots.load(self._ids[self._name])
        except MissingShard as error:
            self._restore(error)
            return self._snapshots.load(self._ids[self._name])

    def _read(self, shard: int, field: int, rows: np.ndarray | None = None) -> np.ndarray:
        """A copy of one field of a shard: of these rows, or whole."""

        def copy(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return arrays[field].copy() if rows is None else arrays[field][rows]

        try:
            return self._set.read(shard, copy)
        except (MissingShard, CorruptShard) as error:
            self._restore(error)
            return self._set.read(shard, copy)

    def _restore(self, error: Exception) -> None:
        """Decode what is missing from the data set's own files, which must still be those of the plan."""
        origin = self._prepared.origin
        # The task that made it knows where files and code lie, which a stage's does not.
        data = self._data if origin is None else expect(ImageSpec, from_json(DataTask, origin).data)
        again = prepare(data, self._snapshots)
        if {"train": again.train, "test": again.test} != self._ids:
            raise DataError(
                f"data.path: prepared images are missing or damaged ({error}) and the files at "
                f"{self._data.path} have changed since they were decoded; run again to plan anew"
            ) from error
