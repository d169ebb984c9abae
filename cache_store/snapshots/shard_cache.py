"""Shards that stay in reach: mapped or in memory, the least recently used let go beyond a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from cache_store.snapshots.mapped import ShardArrays

#: Without a limit of one's own: how much is kept of what is not simply a mapped file of a folder.
UNMAPPED_BYTES = 1 << 30


@dataclass(frozen=True)
class _Held:
    arrays: ShardArrays
    bytes: int


class ShardCache:
    """Shards by key, for one set or several that share a limit. Thread-safe.

    `limit`: most bytes of values held, the one shard used last aside; None: mapped files of a local folder are all
    held, since the system takes their memory back when it needs it, and of others `UNMAPPED_BYTES`. Arrays handed
    out stay valid after they are let go.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}: it must be at least 1 byte")
        self.limit = limit
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes that count against the limit now."""
        return self._bytes

    def get(self, key: Hashable) -> ShardArrays | None:
        """Return the arrays kept under `key`, which counts as a use; None when there are none."""
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return None
            self._held.move_to_end(key)
            return held.arrays

    def add(self, key: Hashable, arrays: ShardArrays, *, mapped_folder: bool) -> ShardArrays:
        """Keep these arrays; those kept under `key` already win, and are returned. `mapped_folder`: they lie in a
        mapped file of a local folder."""
        with self._lock:
            held = self._held.get(key)
            if held is None:
                free = mapped_folder and self.limit is None
                held = _Held(arrays, 0 if free else sum(array.nbytes for array in arrays))
                self._held[key] = held
                self._bytes += held.bytes
            self._held.move_to_end(key)
            self._shrink()
            return held.arrays

    def drop(self, key: Hashable) -> None:
        """Let go of one shard, if it is held."""
        with self._lock:
            held = self._held.pop(key, None)
            self._bytes -= held.bytes if held is not None else 0

    def keys(self) -> list[Hashable]:
        """List what is held, the least recently used first."""
        with self._lock:
            return list(self._held)

    def _shrink(self) -> None:
        limit = UNMAPPED_BYTES if self.limit is None else self.limit
        for key in list(self._held)[:-1] if self._bytes > limit else []:
            if self._held[key].bytes:
                self._bytes -= self._held.pop(key).bytes
            if self._bytes <= limit:
                break
