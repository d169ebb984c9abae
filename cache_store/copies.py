"""The rows of one gather into its output, by several threads where that pays."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from cache_store.codec import Array
from cache_store.runs import Copier

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
        """Runs `first` to `last`, all of one shard, those that follow the ones added before."""
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
