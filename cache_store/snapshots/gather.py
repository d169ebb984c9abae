"""Where the rows of one gather lie, as runs: rows that follow each other in the output and in one shard.

Samples of text are runs of many rows and images are runs of one. Everything here costs by the run and not by the row,
apart from finding the runs: a gather of whole samples has few.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from cache_store.formats.codec import Array

#: int64 rows -> (shard, row inside it), as `SetSpec.locate`.
Locate = Callable[[Array], tuple[Array, Array]]

#: Runs of at least this many bytes are copied one by one, which costs about 0.3 µs of Python each. Shorter ones go
#: through numpy row by row: twice, by way of a copy in the order of the shard, or once where they lie together in the
#: output.
RUN_BYTES = 8 << 10
RUN_BYTES_TOGETHER = 64 << 10
#: With so few runs a shard, on average, they are copied one by one whatever their length: numpy's calls for a shard
#: take as long as some thirty of them.
FEW_RUNS = 16


@dataclass(frozen=True)
class Runs:
    """Runs sorted by shard: where each begins in the output (`places`) and inside its shard (`local`), and its rows."""

    places: Array
    local: Array
    counts: Array
    #: (shard, first run, last run), half-open.
    shards: list[tuple[int, int, int]]

    @classmethod
    def of(cls, rows: Array, locate: Locate, size: int, most: int | None = None) -> Runs:
        """Find the runs of these rows (int64, 1-d, at least one) of a set of `size` rows; `most`: rows of a run, so
        that several threads can share a long one. IndexError: a row outside the set."""
        joins = rows[1:] == rows[:-1] + 1
        if most is not None:
            joins[most - 1 :: most] = False
        starts = _starts(joins)
        shards, local = _located(rows[starts], rows[_ends(starts, len(rows)) - 1], locate, size)
        if shards is None:  # some run goes on in the next shard
            everywhere, _ = locate(rows)
            starts = _starts(joins & (everywhere[1:] == everywhere[:-1]))
            shards, local = locate(rows[starts])
        places, counts = starts, _ends(starts, len(rows)) - starts
        steps = shards[1:] - shards[:-1]
        if (steps < 0).any():
            order = np.argsort(shards, kind="stable")
            shards, local, places, counts = shards[order], local[order], places[order], counts[order]
            steps = shards[1:] - shards[:-1]
        cuts = [0, *(np.flatnonzero(steps) + 1).tolist(), len(shards)]
        return cls(places, local, counts, [(int(shards[a]), a, b) for a, b in pairwise(cuts)])

    def shares(self, first: int, last: int, row_bytes: int, most: int, least_bytes: int) -> list[tuple[int, int]]:
        """Cut runs `first` to `last` into at most `most` parts of about the same size and at least `least_bytes`."""
        if most == 1 or last - first == 1:
            return [(first, last)]
        ends = np.cumsum(self.counts[first:last])
        parts = max(1, min(most, int(ends[-1]) * row_bytes // least_bytes))
        wanted = ends[-1] * np.arange(1, parts) // parts
        cuts = [first, *(np.searchsorted(ends, wanted, side="left") + first + 1).tolist(), last]
        return [(a, b) for a, b in pairwise(cuts) if a < b]


@dataclass(frozen=True)
class Copier:
    """Copies the runs of one column, whose rows have so many bytes; from several threads at once, too."""

    runs: Runs
    row_bytes: int

    @cached_property
    def _one_by_one(self) -> bool:
        """Whether all runs are long, or there are few of them a shard."""
        count = len(self.runs.counts)
        whole = int(self.runs.counts.sum()) * self.row_bytes
        return whole >= RUN_BYTES_TOGETHER * count or count <= FEW_RUNS * len(self.runs.shards)

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        """Of every run the first byte in the output and in its shard, and its bytes. Of all shards at once: one by one
        these conversions took longer than the copies."""
        columns = (self.runs.places, self.runs.local, self.runs.counts)
        return list(zip(*((column * self.row_bytes).tolist() for column in columns), strict=True))

    def copy(self, first: int, last: int, source: Array, target: Array) -> None:
        """Copy runs `first` to `last`, all of one shard, from the bytes of a column to those of the output."""
        if self._one_by_one:
            self._copy_spans(first, last, source, target)
            return
        runs, row_bytes = self.runs, self.row_bytes
        places, local, counts = runs.places[first:last], runs.local[first:last], runs.counts[first:last]
        rows = int(counts.sum())
        together = int(places[-1]) + int(counts[-1]) - int(places[0]) == rows
        if rows * row_bytes >= (RUN_BYTES_TOGETHER if together else RUN_BYTES) * len(counts):
            self._copy_spans(first, last, source, target)
            return
        if rows > len(counts):
            within = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
            places, local = np.repeat(places, counts) + within, np.repeat(local, counts) + within
        column, out = _items(source, row_bytes), _items(target, row_bytes)
        if together:
            # "clip" makes numpy write straight into the output; the bounds were checked before.
            np.take(column, local, out=out[places[0] : places[0] + rows], mode="clip")
        else:
            out[places] = column[local]

    def _copy_spans(self, first: int, last: int, source: Array, target: Array) -> None:
        for place, local, size in self._spans[first:last]:
            target[place : place + size] = source[local : local + size]


def _starts(joins: Array) -> Array:
    return np.concatenate((_ZERO, np.flatnonzero(~joins) + 1))


def _ends(starts: Array, rows: int) -> Array:
    ends = np.empty_like(starts)
    ends[:-1] = starts[1:]
    ends[-1] = rows
    return ends


_ZERO = np.zeros(1, np.int64)


def _located(first: Array, last: Array, locate: Locate, size: int) -> tuple[Array | None, Array]:
    """(shard, row inside it) of every run from `first` to `last`; no shards when one of them lies in several."""
    if first.min() < 0 or last.max() >= size:
        raise IndexError(f"rows {first.min()} to {last.max()} of a set of {size} rows")
    shards, local = locate(first)
    ends, _ = locate(last)
    return (shards if (shards == ends).all() else None), local


def _items(column: Array, row_bytes: int) -> Array:
    """Rows as opaque items: numpy then moves each with one memcpy, whatever its shape. Shares memory."""
    whole = len(column) // row_bytes * row_bytes
    return column[:whole].view(np.dtype((np.void, row_bytes)))


#: Least bytes of a copy that is worth another thread.
SHARE_BYTES = 1 << 20


class Copies:
    """Copies of one gather, by the caller alone or with the threads of a pool. A context that is left when all are
    done, after an error too, since the caller may then reuse the output.

    Threads share what several shards give: of a batch shuffled over a whole set one shard alone gives little.
    """

    def __init__(
        self, pool: ThreadPoolExecutor | None, threads: int, copiers: Sequence[Copier], targets: Sequence[Array]
    ) -> None:
        self._pool, self._threads, self._copiers, self._targets = pool, threads, copiers, targets
        self._row_bytes = sum(copier.row_bytes for copier in copiers)
        #: (first run, last run, bytes of each column) of shards that were not handed out yet.
        self._parts: list[tuple[int, int, Sequence[Array]]] = []
        self._bytes = 0
        self._pending: deque[Future[None]] = deque()

    def add(self, first: int, last: int, sources: Sequence[Array]) -> None:
        """Add runs `first` to `last`, all of one shard, those that follow the ones added before."""
        if self._pool is None:
            for copier, source, target in zip(self._copiers, sources, self._targets, strict=True):
                copier.copy(first, last, source, target)
            return
        self._parts.append((first, last, sources))
        self._bytes += int(self._copiers[0].runs.counts[first:last].sum()) * self._row_bytes
        if self._bytes >= self._threads * SHARE_BYTES:
            self._hand_out(self._pool)

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._pool is not None and self._parts:
                self._hand_out(self._pool)
            while kind is None and self._pending:
                self._pending.popleft().result()
        finally:
            wait(self._pending)

    def _hand_out(self, pool: ThreadPoolExecutor) -> None:
        parts, self._parts, self._bytes = self._parts, [], 0
        runs = self._copiers[0].runs
        own, *others = runs.shares(parts[0][0], parts[-1][1], self._row_bytes, self._threads, SHARE_BYTES)
        for begin, end in others:
            self._pending.append(pool.submit(self._copy, parts, begin, end))
        self._copy(parts, *own)
        # What waits holds on to its shards.
        while len(self._pending) > 2 * self._threads:
            self._pending.popleft().result()

    def _copy(self, parts: Sequence[tuple[int, int, Sequence[Array]]], begin: int, end: int) -> None:
        for first, last, sources in parts:
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                for copier, source, target in zip(self._copiers, sources, self._targets, strict=True):
                    copier.copy(start, stop, source, target)
