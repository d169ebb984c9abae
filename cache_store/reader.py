"""Rows by sample index from a set, as torch tensors. The only module here that imports torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cache_store.ahead import ShardsAhead
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


#: Runs of at least this many bytes are copied one by one, which costs about 0.3 µs of Python each. Shorter ones go
#: through numpy: twice, by way of a copy in the order of the shard, or once where they lie together in the output.
_RUN_BYTES = 8 << 10
_RUN_BYTES_TOGETHER = 64 << 10
#: Least bytes of a copy that is worth another thread.
_SHARE_BYTES = 1 << 20


class RowReader:
    """Rows by sample index from one set; missing and damaged shards are made by `compute`.

    `compute(i)` returns the arrays of shard `i` as `SnapshotSet.put` wants them; they are put and then served
    from the store, so hit and miss give the same bytes. Thread-safe; one thread computes at a time. `threads`: how
    many copy the rows of one gather, the caller's among them.
    """

    def __init__(
        self,
        snapshots: SnapshotSet,
        compute: Callable[[int], Sequence[Array]] | None = None,
        *,
        threads: int = 1,
    ) -> None:
        self.snapshots = snapshots
        self._compute = compute
        self._computing = threading.Lock()
        self._ahead: ShardsAhead | None = None
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="gather") if threads > 1 else None

    def expect(self, shards: Array, depth: int | None = None) -> None:
        """Say in which order shards will be wanted: they are read and checked in a background thread, at most `depth`
        further than the last one gathered from (None: all of them, at once). `shards`: int64, repeats allowed, of
        which the first counts. What was expected before is forgotten."""
        self.forget()
        wanted, first = np.unique(shards, return_index=True)
        order = wanted[np.argsort(first)].tolist()
        self._ahead = ShardsAhead(order, self.snapshots.touch, depth)

    def forget(self) -> None:
        """Stop reading ahead, and wait for the shard being read."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

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
        targets = [_bits(t).reshape(-1).view(np.uint8) for t in tensors]
        plan = _Plan.of(*spec.locate(index))
        pending: deque[Future[None]] = deque()
        hits = 0
        try:
            for i, first, last in plan.shards:
                arrays, hit = self._shard(i)
                hits += hit
                self._copy(plan, first, last, arrays, targets, pending)
                while len(pending) > 2 * self._threads:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        finally:
            # After an error the caller may reuse `out`: nobody may still be writing to it.
            wait(pending)
        self.snapshots.count(hits=hits, bytes_read=len(index) * spec.row_bytes)
        return tensors

    def _copy(
        self,
        plan: _Plan,
        first: int,
        last: int,
        arrays: tuple[Array, ...],
        targets: Sequence[Array],
        pending: deque[Future[None]],
    ) -> None:
        """Rows `first` to `last` of the plan, all of one shard, into the targets; perhaps by other threads."""
        for target, array, field in zip(targets, arrays, self.snapshots.spec.fields, strict=True):
            source = array.reshape(-1).view(np.uint8)
            shares = 1
            if self._pool is not None:
                shares = max(1, min(self._threads, last - first, (last - first) * field.bytes // _SHARE_BYTES))
            cuts = [first + (last - first) * share // shares for share in range(shares + 1)]
            for begin, end in pairwise(cuts[1:]):
                assert self._pool is not None
                pending.append(self._pool.submit(plan.copy, begin, end, source, target, field.bytes))
            plan.copy(cuts[0], cuts[1], source, target, field.bytes)

    def empty(self, count: int, *, pinned: bool = False) -> tuple[torch.Tensor, ...]:
        """Uninitialised CPU tensors for `count` rows, (count, *shape) a field: for `gather(out=)`. `pinned`: in memory
        that a CUDA device reads by itself."""
        fields = self.snapshots.spec.fields
        return tuple(torch.empty((count, *f.shape), dtype=_TORCH[f.dtype], pin_memory=pinned) for f in fields)

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

    def _shard(self, i: int) -> tuple[tuple[Array, ...], bool]:
        """(the arrays of shard `i`, whether they were there)."""
        try:
            arrays = self.snapshots.touch(i)
        except (MissingShard, CorruptShard):
            self.snapshots.count(misses=1)
            if self._compute is None:
                raise
        else:
            if self._ahead is not None:
                self._ahead.used(i)
            return arrays, True
        with self._computing:
            # Another thread, or process, may have made it by now.
            for last in (False, True):
                try:
                    return self.snapshots.touch(i), False
                except (MissingShard, CorruptShard):
                    self.snapshots.put(i, self._compute(i))
                    if last:
                        break
        return self.snapshots.touch(i), False


def _bits(tensor: torch.Tensor) -> Array:
    # numpy has neither bfloat16 nor float8; for moving rows about any type of their size will do.
    stand_in = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(tensor.dtype)
    array: Array = (tensor if stand_in is None else tensor.view(stand_in)).numpy()
    return array


@dataclass(frozen=True)
class _Plan:
    """Where the rows of a gather lie, sorted by shard: `places` in the output, `local` rows inside their shard; row
    `k` continues a run where `joins[k - 1]` (it follows row k - 1 in the output and in the shard)."""

    places: Array
    local: Array
    joins: Array
    #: (shard, first, last): the rows of each shard, half-open.
    shards: list[tuple[int, int, int]]

    @classmethod
    def of(cls, shards: Array, within: Array) -> _Plan:
        order = np.argsort(shards, kind="stable")
        shard, local = shards[order], within[order]
        same = shard[1:] == shard[:-1]
        cuts = [0, *(np.flatnonzero(~same) + 1).tolist(), len(order)]
        joins = same & (order[1:] == order[:-1] + 1) & (local[1:] == local[:-1] + 1)
        return cls(order, local, joins, [(int(shard[a]), a, b) for a, b in pairwise(cuts)])

    def copy(self, first: int, last: int, source: Array, target: Array, row_bytes: int) -> None:
        """Rows `first` to `last`, all of one shard, from the bytes of a column to those of the output."""
        breaks = np.flatnonzero(~self.joins[first : last - 1]) + first + 1
        places, local = self.places[first:last], self.local[first:last]
        together = int(places[-1]) - int(places[0]) + 1 == len(places)
        run_bytes = _RUN_BYTES_TOGETHER if together else _RUN_BYTES
        if (last - first) * row_bytes >= run_bytes * (len(breaks) + 1):
            begins = np.concatenate(([first], breaks))
            ends = np.concatenate((breaks, [last]))
            to = self.places[begins] * row_bytes
            since = self.local[begins] * row_bytes
            sizes = (ends - begins) * row_bytes
            for a, b, size in zip(to.tolist(), since.tolist(), sizes.tolist(), strict=True):
                target[a : a + size] = source[b : b + size]
            return
        rows, out = _rows(source, row_bytes), _rows(target, row_bytes)
        if together:
            # "clip" makes numpy write straight into the output; the bounds were checked before.
            np.take(rows, local, out=out[places[0] : places[-1] + 1], mode="clip")
        else:
            out[places] = rows[local]


def _rows(column: Array, row_bytes: int) -> Array:
    """Rows as opaque items: numpy then moves each with one memcpy, whatever its shape. Shares memory."""
    whole = len(column) // row_bytes * row_bytes
    return column[:whole].view(np.dtype((np.void, row_bytes)))
