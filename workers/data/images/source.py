"""Images of one split as batches for a model, read from the prepared sets."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

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
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import Experiment, ImageSpec
from workers.specs.model import expect

#: Which prepared set holds a split; without a test set, train's holds them all.
SET_OF = {"train": "train", "validation": "train", "test": "test"}


class ImageSource:
    """One split of a prepared data set.

    `rows` samples; `labels` int64 (rows,); `classes`. `batch` gives images under a view. A set of at most
    `cache_bytes` is held in memory, once in a process; a larger one stays mapped from the store. Shards that
    are missing or damaged are decoded again from the data set's files. Not for use by two threads at once.
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
        facts = IMAGE_FORMATS[data.name].facts
        self._augment = Augment(
            augment=data.augment,
            native=self._set.side,
            resize=resize_of(data),
            size=data.image_size,
            flip=data.flip,
            mean=facts.mean,
            std=facts.std,
            seed=derive_seed(experiment.seed, "views"),
        )
        self.classes = experiment.classes
        self.rows = len(self._samples)
        #: Which images in which order: digest of the prepared set and of the split's rows.
        self.identity = digest_json([prepared.digest, name, hashlib.sha256(self._samples.tobytes()).hexdigest()])
        self.labels: Tensor = torch.from_numpy(self._set.labels[self._samples])

    def batch(self, rows: Tensor | np.ndarray, view: int | None) -> Tensor:
        """Return images float32 (B, 3, S, S), normalised and contiguous, for `rows` int64 (B,) of this split.

        `view` None: the evaluation transform. IndexError when a row is not in the split.
        """
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < self.rows:
            raise IndexError(f"rows {index.min()} to {index.max()} of a split of {self.rows}")
        samples = self._samples[index]
        return self._augment(self._set.gather(samples), samples, view)


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
        self._ids = {"train": prepared.train, "test": prepared.test}
        self._name = name
        self._snapshots = snapshots
        self._set = self._open()
        spec = self._set.spec
        self._shape = spec.fields[0].shape
        self.side = self._shape[-1]
        self._memory: Tensor | None = None
        self._cache_bytes = cache_bytes
        self._held = spec.rows * int(np.prod(self._shape)) <= cache_bytes
        self.labels = np.empty(spec.rows, dtype=np.int64)
        for shard in range(spec.shards):
            rows = spec.shard_range(shard)
            self.labels[rows.start : rows.stop] = self._read(shard, 1)
        self._set.close()

    def gather(self, samples: np.ndarray) -> Tensor:
        """Return uint8 (B, 3, H, W), rows of the set. A small set is read into memory here, not before: a stage that is
        fed from snapshots asks for labels alone."""
        if self._held and self._memory is None:
            self._memory = self._cached(self._cache_bytes)
            self._set.close()
        if self._memory is not None:
            return self._memory[torch.from_numpy(samples)]
        out = np.empty((len(samples), *self._shape), dtype=np.uint8)
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
                filled = np.empty((spec.rows, *self._shape), dtype=np.uint8)
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
        again = prepare(self._data, self._snapshots)
        if {"train": again.train, "test": again.test} != self._ids:
            raise DataError(
                f"data.path: prepared images are missing or damaged ({error}) and the files at "
                f"{self._data.path} have changed since they were decoded; run again to plan anew"
            ) from error
