"""Lease work: say who is at work on what, so that several workers do not do the same work twice.

Nothing depends on a lease being right. Two holders of one only work twice, and what they make is published
exclusively elsewhere; a lease that its holder left behind ends by itself. Its age goes by the store's clock, and
nobody waits longer than that age by his own, should the store's stand still.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from cache_store.errors import StoreError
from cache_store.records.record_io import check_name, new_attempt_id
from cache_store.storage.base import Storage

#: A lease that was not renewed for this long has lost its holder.
LEASE_S = 15.0


class Leases:
    """The leases of one holder in one folder of the store. Thread-safe."""

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.holder = new_attempt_id()
        self._storage = storage
        self._folder = folder
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        #: Own leases: name -> when it was last written.
        self._held: dict[str, float] = {}
        #: Other holders': name -> (last change by the store's clock, since when it is known so by ours).
        self._seen: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> bool:
        """Take `name` if it is free, or if its holder has not renewed it for too long; whether it is ours now.
        StoreErrors pass."""
        path = self._path(name)
        if not self._storage.create(path, self._content()) and not self._take_over(path, name):
            return False
        with self._lock:
            self._held[name] = self._clock()
            self._seen.pop(name, None)
        return True

    def renew(self, name: str) -> None:
        """Say that we are still at work on `name`. Cheap: written only now and then. A failure costs nothing but the
        lease."""
        with self._lock:
            written = self._held.get(name)
            now = self._clock()
            if written is None or now - written < self._lease_s / 4:
                return
            self._held[name] = now
        with contextlib.suppress(StoreError):
            self._storage.write(self._path(name), self._content())

    def release(self, name: str) -> None:
        """Give `name` back. One that cannot be deleted ends by itself."""
        with self._lock:
            held = self._held.pop(name, None)
        if held is not None:
            with contextlib.suppress(StoreError):
                self._storage.delete(self._path(name))

    def names(self) -> list[str]:
        """List what is leased, by anybody, ended leases included."""
        return self._storage.list(self._folder)

    def _take_over(self, path: str, name: str) -> bool:
        changed = next((info.modified for info in self._storage.files(self._folder) if info.path == path), None)
        if changed is None:  # given back just now
            return self._storage.create(path, self._content())
        with self._lock:
            known, since = self._seen.get(name, (changed, self._clock()))
            if known != changed:
                known, since = changed, self._clock()
            first = name not in self._seen
            self._seen[name] = (known, since)
            lost = self._clock() - since >= self._lease_s
        # The store's clock costs requests: asked on first sight, for leases left long ago.
        lost = lost or (first and self._storage.now() - changed >= self._lease_s)
        if lost:
            self._storage.write(path, self._content())
        return lost

    def _path(self, name: str) -> str:
        return f"{self._folder}/{check_name(name)}"

    def _content(self) -> bytes:
        return self.holder.encode()
