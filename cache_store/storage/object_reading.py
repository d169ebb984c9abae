"""Read objects: small ones in one request, large ones in parts, several at a time; every length is checked."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from cache_store.errors import StorageUnavailable, StoreError
from cache_store.storage.object_errors import fault_of
from cache_store.storage.object_requests import NoRanges, ObjectRequests, WrongLength

#: Files up to this size move in one request, larger ones in parts of it. With `request_s` it is the slowest link
#: that still works: 8 MiB a minute.
PART_BYTES = 8 << 20
#: Parts of one file under way at a time, and of all files of this process.
PARTS_AHEAD = 4
_THREADS = 16


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="store-range")


class _OtherObject(Exception):  # noqa: N818  never leaves this module
    """The object is not as long as the caller said."""


class ObjectReader:
    """Reads the objects of one address. Safe to use from several threads."""

    def __init__(self, requests: ObjectRequests) -> None:
        self._requests = requests
        self._ranges_work = False

    def read(self, path: str, limit: int | None) -> bytes:
        """Read the bytes of an object, or the first `limit`."""
        data, size = self._small_or_size(path, large=limit is not None and limit > PART_BYTES)
        wanted = size if limit is None else min(limit, size)
        return b"".join(self._parts(path, wanted)) if data is None else data[:wanted]

    def chunks(self, path: str, size: int | None) -> Iterator[memoryview]:
        """Yield the bytes of an object in parts; none when it is not as long as `size`, where that is given."""
        if size is not None and size > PART_BYTES:
            yield from self._chunks_of(path, size)
            return
        data, found = self._small_or_size(path, large=size is None)
        if size is not None and size != found:
            return
        if data is None:
            yield from self._parts(path, found)
        elif data:
            yield memoryview(data)

    def open(self, path: str) -> io.BufferedIOBase:
        """Open a file over an object."""
        data, size = self._small_or_size(path, large=False)
        if data is not None:
            return io.BytesIO(data)
        return io.BufferedReader(_PartsFile(self._parts(path, size)), PART_BYTES)

    def _chunks_of(self, path: str, size: int) -> Iterator[memoryview]:
        """The object in parts, without asking for its size first."""
        try:
            yield from self._parts(path, size, size)
        except _OtherObject:
            return
        except StoreError:
            # Ranges beyond the end of a shorter object are refused, with an error of each server's own.
            if self._requests.size(path) == size:
                raise

    def _small_or_size(self, path: str, *, large: bool) -> tuple[bytes | None, int]:
        """(the bytes of an object of at most one part, or None; its size). `large`: whether it is likely to have more:
        then its size is asked for alone, since an answer that is not read to its end costs a connection."""
        if large:
            size = self._requests.size(path)
            if size > PART_BYTES:
                return None, size
        data, size = self._requests.call("read", path, lambda: self._get_small(path, PART_BYTES))
        return (data if len(data) == size else None), size

    def _get(self, path: str, start: int, end: int, total: int | None) -> memoryview:
        """Bytes `start` to `end` of an object, exactly; _OtherObject when it has not `total` bytes (None: whatever it
        has)."""
        result = self._requests.api.get(self._requests.client, path, options={"range": (start, end)})
        if total is not None and result.meta["size"] != total:
            raise _OtherObject
        data = memoryview(result.bytes())
        if data.nbytes != end - start:
            raise WrongLength(f"{data.nbytes} bytes arrived instead of {end - start}")
        return data

    def _get_small(self, path: str, most: int) -> tuple[bytes, int]:
        """(the bytes, the object's size); no bytes when it is larger than `most`."""
        result = self._requests.api.get(self._requests.client, path)
        size = int(result.meta["size"])
        if size > most:
            return b"", size
        data = bytes(result.bytes())
        if len(data) != size:
            raise WrongLength(f"{len(data)} bytes arrived instead of {size}")
        return data, size

    def _parts(self, path: str, size: int, total: int | None = None) -> Iterator[memoryview]:
        """The first `size` bytes in order, in parts. `total`: as for `_get`."""
        start = 0
        if not self._ranges_work:
            try:
                # The first is asked for alone: it shows whether this server answers ranges.
                yield self._part(path, 0, min(PART_BYTES, size), total)
            except NoRanges:
                yield from self._stream(path, size, total)
                return
            self._ranges_work = True
            start = PART_BYTES
        yield from self._parts_ahead(path, start, size, total)

    def _stream(self, path: str, size: int, total: int | None) -> Iterator[memoryview]:
        """As `_parts`, in one request, which is not repeated."""
        left = size
        try:
            result = self._requests.api.get(self._requests.client, path)
            if total is not None and result.meta["size"] != total:
                raise _OtherObject
            for piece in result.stream(PART_BYTES):
                yield memoryview(piece)[:left]
                left -= min(left, len(piece))
                if not left:
                    return
        except self._requests.faults as error:
            raise self._requests.error(fault_of(error), "read", path) from None
        raise StorageUnavailable(f"cannot read {self._requests.name(path)}: {left} bytes less than its length arrived")

    def _parts_ahead(self, path: str, start: int, size: int, total: int | None) -> Iterator[memoryview]:
        """The bytes from `start` in parts, a few requested ahead."""
        starts = iter(range(start, size, PART_BYTES))
        waiting: collections.deque[Future[memoryview]] = collections.deque()

        def ask() -> None:
            start = next(starts, None)
            if start is not None:
                waiting.append(_pool().submit(self._part, path, start, min(start + PART_BYTES, size), total))

        try:
            for _ in range(PARTS_AHEAD):
                ask()
            while waiting:
                part = waiting.popleft().result()
                ask()
                yield part
        finally:
            for future in waiting:
                future.cancel()

    def _part(self, path: str, start: int, end: int, total: int | None = None) -> memoryview:
        return self._requests.call("read", path, lambda: self._get(path, start, end, total))


class _PartsFile(io.RawIOBase):
    """A large object as a file that is read from its beginning to its end."""

    def __init__(self, parts: Iterator[memoryview]) -> None:
        self._parts = parts
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left.nbytes:
            self._left = next(self._parts, memoryview(b""))
        target = memoryview(buffer).cast("B")
        count = min(target.nbytes, self._left.nbytes)
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
