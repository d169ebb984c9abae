"""Rows by sample index from a set, as torch tensors. The only module here that imports torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cache_store.codec import Array, Field
from cache_store.errors import CorruptShard, MissingShard
from cache_store.snapshots import SnapshotSet

_TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}


class RowReader:
    """Rows by sample index from one set; missing and damaged shards are made by `compute`.

    `compute(i)` returns the arrays of shard `i` as `SnapshotSet.put` wants them; they are put and then served
    from the store, so hit and miss give the same bytes. Thread-safe; one thread computes at a time.
    """

    def __init__(self, snapshots: SnapshotSet, compute: Callable[[int], Sequence[Array]] | None = None) -> None:
        self.snapshots = snapshots
        self._compute = compute
        self._computing = threading.Lock()

    def gather(self, rows: Any, out: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """The given rows, one CPU tensor (len(rows), *shape) a field, in the fields' own dtypes.

        `rows`: 1-d integers (numpy, or anything numpy takes), in any order, repeats allowed. `out`: tensors
        to fill and reuse, contiguous (len(rows) or more, *shape); views of their first len(rows) rows are
        returned. The result never shares memory with the store.
        IndexError: a row outside the set. ValueError: `rows` or `out` of another kind. MissingShard and
        CorruptShard only without `compute`; other StoreErrors pass through.
        """
        spec = self.snapshots.spec
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError(f"rows: expected 1-d integers, got {index.dtype} {index.shape}")
        index = index.astype(np.int64, copy=False)
        if index.size and (index.min() < 0 or index.max() >= spec.rows):
            raise IndexError(f"rows {index.min()} to {index.max()} of a set of {spec.rows} rows")
        tensors = self._outputs(len(index), out)
        if not index.size:
            return tensors
        targets = [_raw(_bits(t), f.bytes) for t, f in zip(tensors, spec.fields, strict=True)]
        shards, within = spec.locate(index)
        order = np.argsort(shards, kind="stable")
        bounds = np.flatnonzero(np.diff(shards[order])) + 1
        for places in np.split(order, bounds):
            i = int(shards[places[0]])
            arrays = self._shard(i)
            local = within[places]
            # Rows in a run of the output need no intermediate copy.
            run = int(places[-1]) - int(places[0]) + 1 == len(places)
            for target, array, field in zip(targets, arrays, spec.fields, strict=True):
                source = _raw(array, field.bytes)
                if run:
                    # "clip" makes numpy write straight into `out`; the bounds were checked above.
                    np.take(source, local, out=target[places[0] : places[-1] + 1], mode="clip")
                else:
                    target[places] = source[local]
        self.snapshots.count(bytes_read=len(index) * spec.row_bytes)
        return tensors

    def empty(self, count: int) -> tuple[torch.Tensor, ...]:
        """Uninitialised CPU tensors for `count` rows, (count, *shape) a field: for `gather(out=)`."""
        fields = self.snapshots.spec.fields
        return tuple(torch.empty((count, *f.shape), dtype=_TORCH[f.dtype]) for f in fields)

    def _outputs(self, count: int, out: Sequence[torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
        fields = self.snapshots.spec.fields
        if out is None:
            return self.empty(count)
        if len(out) != len(fields):
            raise ValueError(f"out: {len(out)} tensors for {len(fields)} fields")
        return tuple(self._output(count, tensor, field) for tensor, field in zip(out, fields, strict=True))

    @staticmethod
    def _output(count: int, tensor: torch.Tensor, field: Field) -> torch.Tensor:
        if (
            tensor.dtype != _TORCH[field.dtype]
            or tuple(tensor.shape[1:]) != field.shape
            or tensor.ndim != 1 + len(field.shape)
            or len(tensor) < count
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"out for field {field.name}: expected a contiguous CPU {field.dtype} ({count} or more, "
                f"{', '.join(map(str, field.shape))}), "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
        return tensor[:count]

    def _shard(self, i: int) -> tuple[Array, ...]:
        try:
            arrays = self.snapshots.touch(i)
        except (MissingShard, CorruptShard):
            self.snapshots.count(misses=1)
            if self._compute is None:
                raise
        else:
            self.snapshots.count(hits=1)
            return arrays
        with self._computing:
            # Another thread, or process, may have made it by now.
            for last in (False, True):
                try:
                    return self.snapshots.touch(i)
                except (MissingShard, CorruptShard):
                    self.snapshots.put(i, self._compute(i))
                    if last:
                        break
        return self.snapshots.touch(i)


def _bits(tensor: torch.Tensor) -> Array:
    # numpy has neither bfloat16 nor float8; for moving rows about any type of their size will do.
    stand_in = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(tensor.dtype)
    array: Array = (tensor if stand_in is None else tensor.view(stand_in)).numpy()
    return array


def _raw(array: Array, row_bytes: int) -> Array:
    """Rows as opaque items: numpy then moves each with one memcpy, whatever its shape. Shares memory."""
    return array.reshape(-1).view(np.dtype((np.void, row_bytes)))
