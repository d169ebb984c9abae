"""Read and check shards before they are wanted, in background threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from cache_store.errors import StoreError
from cache_store.formats.codec import Array

#: Bytes of one page; touching one byte of each has the system map all of it.
_PAGE = 4096


class ReadAhead:
    """Calls `load(i)` for the shards of `order`, begun in turn, at most `depth` further than the last one `used`.

    `depth` None: as fast as they come. `threads`: how many are loaded at a time. Shards that cannot be read are left to
    whoever wants them: they meet the same error where it can be dealt with. Close it: the threads end after the shards
    they are reading.
    """

    def __init__(
        self,
        order: Sequence[int],
        load: Callable[[int], tuple[Array, ...]],
        depth: int | None = None,
        *,
        threads: int = 1,
    ) -> None:
        self._order = order
        self._place = {shard: place for place, shard in enumerate(order)}
        self._load = load
        self._depth = depth
        self._begun = 0
        self._used = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"shards-ahead-{k}", daemon=True) for k in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def used(self, shard: int) -> None:
        """Say that a shard is in use: those after it may be read."""
        place = self._place.get(shard, -1) + 1
        if place > self._used:
            with self._changed:
                self._used = max(self._used, place)
                self._changed.notify_all()

    def close(self) -> None:
        """Stop, and wait for the shard being read. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                _map_pages(self._load(shard))
            except (StoreError, FileNotFoundError):
                continue

    def _next(self) -> int | None:
        """The next shard to load, once it is due; None when there are no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._due())
            # What is in use already has been read by whoever uses it.
            place = max(self._begun, self._used)
            if self._closed or place >= len(self._order):
                return None
            self._begun = place + 1
            return self._order[place]

    def _due(self) -> bool:
        place = max(self._begun, self._used)
        return self._depth is None or place >= len(self._order) or place < self._used + self._depth


def _map_pages(arrays: tuple[Array, ...]) -> None:
    """Have the pages of mapped arrays mapped here and now, instead of one fault after the other in a gather."""
    for array in arrays:
        array.reshape(-1).view("u1")[::_PAGE].max()
