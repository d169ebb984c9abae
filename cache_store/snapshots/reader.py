"""Rows by sample index from a set, as torch tensors. The only module here that imports torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cache_store.errors import CorruptShard, MissingShard
from cache_store.formats.codec import Array, Field
from cache_store.formats.torch_dtypes import BITS, TORCH
from cache_store.snapshots.gather import Copier, Copies, Runs
from cache_store.snapshots.mapped import ATTEMPTS, ShardArrays
from cache_store.snapshots.read_ahead import ReadAhead
from cache_store.snapshots.store import SnapshotSet

#: The bytes of each field of a shard, and the last byte of its file (see `mapped`).
_Columns = tuple[tuple[Array, ...], memoryview | bytes]


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
        self._ahead: ReadAhead | None = None
        # Where every shard stays in reach, the bytes of those read before: asking the set again for each of a batch's
        # hundreds of shards took longer than small copies out of them.
        self._holds = snapshots.holds_all
        self._held: dict[int, _Columns] = {}
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="gather") if threads > 1 else None

    def expect(self, shards: Array, depth: int | None = None) -> None:
        """Say in which order shards will be wanted: they are read and checked in the background, at most `depth`
        further than the last one gathered from (None: all of them, at once). `shards`: int64, repeats allowed, of
        which the first counts. What was expected before is forgotten."""
        self.forget()
        wanted, first = np.unique(shards, return_index=True)
        order = [i for i in wanted[np.argsort(first)].tolist() if i not in self._held]
        # Over a network, what one shard waits for is time for another.
        threads = 2 if self.snapshots.storage.remote else 1
        self._ahead = ReadAhead(order, self.snapshots.touch, depth, threads=threads)

    def forget(self) -> None:
        """Stop reading ahead, and wait for the shard being read."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def gather(self, rows: Any, out: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """Read the given rows, one CPU tensor (len(rows), *shape) a field, in the fields' own dtypes.

        `rows`: 1-d integers (numpy, or anything numpy takes), in any order, repeats allowed. `out`: tensors
        to fill and reuse, contiguous (len(rows) or more, *shape); views of their first len(rows) rows are
        returned. The result never shares memory with the store.
        IndexError: a row outside the set. ValueError: `rows` or `out` of another kind. MissingShard and
        CorruptShard only without `compute`; other StoreErrors pass through.
        """
        spec = self.snapshots.spec
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise ValueError(f"rows: expected 1-d integers, got {index.dtype} {index.shape}")
        index = index.astype(np.int64, copy=False)
        tensors = self._outputs(len(index), out)
        if not index.size:
            return tensors
        targets = [_bits(t).reshape(-1).view(np.uint8) for t in tensors]
        runs = Runs.of(index, spec.locate, spec.rows, None if self._pool is None else -(-len(index) // self._threads))
        copiers = [Copier(runs, field.bytes) for field in spec.fields]
        for _ in range(ATTEMPTS):
            hits, torn = self._copy(runs, copiers, targets)
            if not torn:
                break
            # Reading the file again finds the damage, and `compute` mends it.
            for i in torn:
                self._held.pop(i, None)
                self.snapshots.let_go(i)
        else:
            raise self.snapshots.torn(torn[0])
        self.snapshots.count(hits=hits, bytes_read=len(index) * spec.row_bytes)
        return tensors

    def _copy(self, runs: Runs, copiers: Sequence[Copier], targets: Sequence[Array]) -> tuple[int, list[int]]:
        """Copy all runs; (shards that were there, those whose files were truncated before all was copied)."""
        hits = 0
        # Of shards that are not mapped this holds no more than a byte.
        tails: list[memoryview | bytes] = []
        with Copies(self._pool, self._threads, copiers, targets) as copies:
            for i, first, last in runs.shards:
                held = self._held.get(i)
                hit = True
                if held is None:
                    held, hit = self._bytes(i)
                sources, tail = held
                hits += hit
                copies.add(first, last, sources)
                tails.append(tail)
        # After the last copy: whatever was truncated before it shows. Joined, since looking at one after the other
        # waits for the memory of each.
        ends = b"".join(tails)
        torn = [runs.shards[place][0] for place, end in enumerate(ends) if end == 0] if 0 in ends else []
        return hits, torn

    def empty(self, count: int, *, pinned: bool = False) -> tuple[torch.Tensor, ...]:
        """Make uninitialised CPU tensors for `count` rows, (count, *shape) a field: for `gather(out=)`. `pinned`: in
        memory that a CUDA device reads by itself."""
        fields = self.snapshots.spec.fields
        return tuple(torch.empty((count, *f.shape), dtype=TORCH[f.dtype], pin_memory=pinned) for f in fields)

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
            tensor.dtype != TORCH[field.dtype]
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

    def _bytes(self, i: int) -> tuple[_Columns, bool]:
        """(the bytes of each field of shard `i` and the last one of its file, whether they were there)."""
        arrays, hit = self._shard(i)
        found = tuple(array.reshape(-1).view(np.uint8) for array in arrays), arrays.tail
        if self._holds:
            self._held[i] = found
        return found, hit

    def _shard(self, i: int) -> tuple[ShardArrays, bool]:
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
    array: Array = tensor.view(BITS.get(tensor.dtype, tensor.dtype)).numpy()
    return array
