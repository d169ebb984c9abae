"""Read and check shards before they are wanted, in one background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from cache_store.codec import Array
from cache_store.errors import StoreError

#: Bytes of one page; touching one byte of each has the system map all of it.
_PAGE = 4096


class ShardsAhead:
    """Calls `load(i)` for the shards of `order` in turn, at most `depth` further than the last one `used`.

    `depth` None: as fast as they come. Shards that cannot be read are left to whoever wants them: they meet the
    same error where it can be dealt with. Close it: the thread ends after the shard it is reading.
    """

    def __init__(
        self, order: Sequence[int], load: Callable[[int], tuple[Array, ...]], depth: int | None = None
    ) -> None:
        self._order = order
        self._place = {shard: place for place, shard in enumerate(order)}
        self._load = load
        self._depth = depth
        self._used = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="shards-ahead", daemon=True)
        self._thread.start()

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
        self._thread.join()

    def _run(self) -> None:
        for place, shard in enumerate(self._order):
            with self._changed:
                self._changed.wait_for(lambda place=place: self._closed or self._due(place))  # type: ignore[misc]
                if self._closed:
                    return
                if place < self._used:
                    # In use already: whoever uses it has read it.
                    continue
            try:
                _map_pages(self._load(shard))
            except (StoreError, FileNotFoundError):
                continue

    def _due(self, place: int) -> bool:
        return self._depth is None or place < self._used + self._depth


def _map_pages(arrays: tuple[Array, ...]) -> None:
    """Have the pages of mapped arrays mapped here and now, instead of one fault after the other in a gather."""
    for array in arrays:
        array.reshape(-1).view("u1")[::_PAGE].max()
