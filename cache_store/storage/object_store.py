"""An object store (S3 and what speaks it, Google Cloud Storage, Azure) as a store, through obstore.

Every request ends by itself (`RetryPolicy.request_s`); what can be repeated is, a bounded number of times. Creation is
a conditional PUT; when its reply is lost the object is read back, and equal bytes mean it was ours (records carry
the attempt's id). Large files move in parts of 8 MiB, several at a time; what arrives is checked for its length.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from cache_store.crashpoints import reach
from cache_store.errors import StorageDenied, StorageUnavailable, StoreError
from cache_store.storage.addresses import Address
from cache_store.storage.base import FileInfo, Storage, pieces_of, views_of
from cache_store.storage.object_client import endpoint_of, load_obstore, make_client
from cache_store.storage.object_errors import Fault, Kind, fault_of
from cache_store.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from cache_store.storage.base import Buffer, Names

T = TypeVar("T")

#: Files up to this size move in one request, larger ones in parts of it. With `request_s` it is the slowest link
#: that still works: 8 MiB a minute.
PART_BYTES = 8 << 20
#: Parts of one file under way at a time, and of all files of this process.
_PARTS_AHEAD = 4
_THREADS = 16
_BATCH = 1000

# Stores this process has probed, by address and endpoint.
_probed: set[tuple[str, ...]] = set()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="store-range")


class _NoRanges(Exception):  # noqa: N818  never leaves this module
    """The server does not answer ranges as it must."""


class _WrongLength(Exception):  # noqa: N818  never leaves this module
    """What arrived, or was stored, has another length than it must have."""


class _OtherObject(Exception):  # noqa: N818  never leaves this module
    """The object is not as long as the caller said."""


class ObjectStorage(Storage):
    """A prefix in a bucket of an object store."""

    remote = True

    def __init__(self, address: Address, patience: RetryPolicy | None = None) -> None:
        self.uri = address.uri
        self._patience = patience or RetryPolicy.from_environment()
        self._variables = address.variables
        self._ranges_work = False
        self._endpoint = (address.uri, *endpoint_of(address))
        self._obs = load_obstore()
        self._faults = (self._obs.exceptions.BaseError, OSError, ValueError)
        self._client = make_client(address, self._patience)
        self._uploads = make_client(address, self._patience, retry_parts=True)

    def probe(self) -> None:
        readable = self.is_store()
        # The marker does not say which server answered when it was left: a copied store has one too.
        if self._endpoint not in _probed:
            try:
                self._probe_create()
            except StorageDenied:
                if readable:
                    # A finished store that may only be read can be read.
                    return
                raise
            _probed.add(self._endpoint)
        if not readable:
            self._leave_marker()

    def _make_root(self) -> None:
        """Nothing to do: a prefix exists with its first object, and buckets are not ours to make."""

    def _call(self, doing: str, path: str, call: Callable[[], T]) -> T:
        """`call()`, an idempotent request, repeated while it fails in passing."""
        ends = time.monotonic() + self._patience.total_s
        tries = 0
        waits = self._patience.waits()
        while True:
            tries += 1
            try:
                return call()
            except _WrongLength as error:
                fault = Fault(Kind.PASSING, 0, "", str(error))
            except self._faults as error:
                fault = fault_of(error)
            wait = next(waits, None)
            if fault.kind is not Kind.PASSING or wait is None or time.monotonic() + wait > ends:
                raise self._error(fault, doing, path, tries)
            time.sleep(wait)

    def _error(self, fault: Fault, doing: str, path: str, tries: int = 1) -> Exception:
        if fault.kind is Kind.NO_RANGES:
            return _NoRanges()
        if fault.kind is Kind.ABSENT:
            return FileNotFoundError(errno.ENOENT, "not in the store", path)
        return fault.error(doing, self._name(path), self._variables, tries)

    def _get(self, path: str, start: int, end: int, total: int | None) -> memoryview:
        """Bytes `start` to `end` of an object, exactly; _OtherObject when it has not `total` bytes (None: whatever it
        has)."""
        result = self._obs.get(self._client, path, options={"range": (start, end)})
        if total is not None and result.meta["size"] != total:
            raise _OtherObject
        data = memoryview(result.bytes())
        if data.nbytes != end - start:
            raise _WrongLength(f"{data.nbytes} bytes arrived instead of {end - start}")
        return data

    def _get_small(self, path: str, most: int) -> tuple[bytes, int]:
        """(the bytes, the object's size); no bytes when it is larger than `most`."""
        result = self._obs.get(self._client, path)
        size = int(result.meta["size"])
        if size > most:
            return b"", size
        data = bytes(result.bytes())
        if len(data) != size:
            raise _WrongLength(f"{len(data)} bytes arrived instead of {size}")
        return data, size

    def _read(self, path: str, limit: int | None) -> bytes:
        data, size = self._small_or_size(path, large=limit is not None and limit > PART_BYTES)
        wanted = size if limit is None else min(limit, size)
        return b"".join(self._parts(path, wanted)) if data is None else data[:wanted]

    def _chunks(self, path: str, size: int | None) -> Iterator[memoryview]:
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

    def _chunks_of(self, path: str, size: int) -> Iterator[memoryview]:
        """The object in parts, without asking for its size first."""
        try:
            yield from self._parts(path, size, size)
        except _OtherObject:
            return
        except StoreError:
            # Ranges beyond the end of a shorter object are refused, with an error of each server's own.
            if self._size(path) == size:
                raise

    def _small_or_size(self, path: str, *, large: bool) -> tuple[bytes | None, int]:
        """(the bytes of an object of at most one part, or None; its size). `large`: whether it is likely to have more:
        then its size is asked for alone, since an answer that is not read to its end costs a connection."""
        if large:
            size = self._size(path)
            if size > PART_BYTES:
                return None, size
        data, size = self._call("read", path, lambda: self._get_small(path, PART_BYTES))
        return (data if len(data) == size else None), size

    def _parts(self, path: str, size: int, total: int | None = None) -> Iterator[memoryview]:
        """The first `size` bytes in order, in parts. `total`: as for `_get`."""
        start = 0
        if not self._ranges_work:
            try:
                # The first is asked for alone: it shows whether this server answers ranges.
                yield self._part(path, 0, min(PART_BYTES, size), total)
            except _NoRanges:
                yield from self._stream(path, size, total)
                return
            self._ranges_work = True
            start = PART_BYTES
        yield from self._parts_ahead(path, start, size, total)

    def _stream(self, path: str, size: int, total: int | None) -> Iterator[memoryview]:
        """As `_parts`, in one request, which is not repeated."""
        left = size
        try:
            result = self._obs.get(self._client, path)
            if total is not None and result.meta["size"] != total:
                raise _OtherObject
            for piece in result.stream(PART_BYTES):
                yield memoryview(piece)[:left]
                left -= min(left, len(piece))
                if not left:
                    return
        except self._faults as error:
            raise self._error(fault_of(error), "read", path) from None
        raise StorageUnavailable(f"cannot read {self._name(path)}: {left} bytes less than its length arrived")

    def _parts_ahead(self, path: str, start: int, size: int, total: int | None) -> Iterator[memoryview]:
        """The bytes from `start` in parts, a few requested ahead."""
        starts = iter(range(start, size, PART_BYTES))
        waiting: collections.deque[Future[memoryview]] = collections.deque()

        def ask() -> None:
            start = next(starts, None)
            if start is not None:
                waiting.append(_pool().submit(self._part, path, start, min(start + PART_BYTES, size), total))

        try:
            for _ in range(_PARTS_AHEAD):
                ask()
            while waiting:
                part = waiting.popleft().result()
                ask()
                yield part
        finally:
            for future in waiting:
                future.cancel()

    def _part(self, path: str, start: int, end: int, total: int | None = None) -> memoryview:
        return self._call("read", path, lambda: self._get(path, start, end, total))

    def _open(self, path: str) -> io.BufferedIOBase:
        data, size = self._small_or_size(path, large=False)
        if data is not None:
            return io.BytesIO(data)
        return io.BufferedReader(_PartsFile(self, path, size), PART_BYTES)

    def _write(self, path: str, buffers: tuple[Buffer, ...]) -> int:
        total = sum(view.nbytes for view in views_of(buffers))
        reach("storage.before-rename")
        # Multipart uploads become visible when they are completed, so in either way whole or not at all.
        data = b"".join(views_of(buffers)) if total <= PART_BYTES else None

        def put() -> None:
            if data is not None:
                self._obs.put(self._client, path, data, use_multipart=False)
            else:
                self._obs.put(
                    self._uploads,
                    path,
                    pieces_of(buffers),
                    use_multipart=True,
                    chunk_size=PART_BYTES,
                    max_concurrency=_PARTS_AHEAD,
                )
            stored = int(self._obs.head(self._client, path)["size"])
            if stored != total:
                raise _WrongLength(f"{stored} bytes were stored instead of {total}")

        self._call("write", path, put)
        return total

    def _create(self, path: str, data: bytes) -> bool:
        reach("storage.before-link")
        first = self._put_new(path, data)
        if first:
            reach("storage.after-link")
        return first

    def _put_new(self, path: str, data: bytes) -> bool:
        ends = time.monotonic() + self._patience.total_s
        unclear = False
        tries = 0
        waits = self._patience.waits()
        while True:
            tries += 1
            try:
                self._obs.put(self._client, path, data, mode="create", use_multipart=False)
                return True
            except self._faults as error:
                fault = fault_of(error)
            if fault.kind is Kind.EXISTS and not unclear:
                return False
            if fault.kind not in (Kind.EXISTS, Kind.PASSING):
                raise self._error(fault, "create", path, tries)
            # An earlier try, or this one, may have been carried out without our hearing of it.
            unclear = True
            found = self._found(path)
            if found is not None:
                return found == data
            wait = next(waits, None)
            if wait is None or time.monotonic() + wait > ends:
                raise self._error(fault, "create", path, tries)
            time.sleep(wait)

    def _found(self, path: str) -> bytes | None:
        try:
            return self._read(path, None)
        except FileNotFoundError:
            return None

    def _head(self, doing: str, path: str) -> Any:
        return self._call(doing, path, lambda: self._obs.head(self._client, path))

    def _exists(self, path: str) -> bool:
        try:
            self._head("look up", path)
        except FileNotFoundError:
            return False
        return True

    def _size(self, path: str) -> int:
        return int(self._head("look up", path)["size"])

    def _list(self, prefix: str) -> Names:
        def look() -> Names:
            found = self._obs.list_with_delimiter(self._client, prefix or None)
            return [*found["common_prefixes"], *(item["path"] for item in found["objects"])]

        # Servers over a file system may list an empty folder as something inside itself.
        paths = [path for path in self._call("list", prefix, look) if path != prefix]
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        def look() -> list[FileInfo]:
            return [
                FileInfo(item["path"], int(item["size"]), item["last_modified"].timestamp())
                for batch in self._obs.list(self._client, prefix or None, chunk_size=_BATCH)
                for item in batch
                if item["path"] != prefix
            ]

        yield from self._call("list", prefix, look)

    def _move(self, source: str, target: str) -> None:
        before = self._head("move", source)
        self._call("move", source, lambda: self._obs.copy(self._client, source, target))
        if self._size(target) != before["size"]:
            raise StorageUnavailable(f"cannot move {self._name(source)}: the copy has another length", path=source)
        # There is no rename. Whoever replaced the source since keeps what they wrote; between this look and the
        # deletion a replacement can still be lost, which costs its writer the work, and no reader anything.
        after = self._head("move", source)
        if after["e_tag"] != before["e_tag"]:
            self._delete(target)
            raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", source)
        self._delete(source)

    def _delete(self, path: str) -> None:
        # Some object stores report an absent object, others do not.
        with contextlib.suppress(FileNotFoundError):
            self._call("delete", path, lambda: self._obs.delete(self._client, path))

    def _delete_all(self, prefix: str, paths: Names) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("delete", prefix, lambda: self._obs.delete(self._client, paths))

    def _delete_tree(self, prefix: str) -> None:
        for _ in range(3):
            paths = [info.path for info in self._walk(prefix)]
            for start in range(0, len(paths), _BATCH):
                self._delete_all(prefix, paths[start : start + _BATCH])
            # Somebody may write below it meanwhile: what came in before this call began is gone all the same.
            if not paths:
                return
            # Servers over a file system keep folders, and list them, when nothing is left in them.
            self._delete_all(prefix, [*_folders(prefix, paths), prefix])


def _folders(prefix: str, paths: Names) -> Names:
    """The folders of `paths` below `prefix`, the deepest first."""
    found = {path[:place] for path in paths for place in range(len(prefix) + 1, len(path)) if path[place] == "/"}
    return sorted(found, key=lambda folder: (-folder.count("/"), folder))


class _PartsFile(io.RawIOBase):
    """A large object as a file that is read from its beginning to its end."""

    def __init__(self, storage: ObjectStorage, path: str, size: int) -> None:
        self._parts = storage._parts(path, size)
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
