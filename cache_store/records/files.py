"""Files that a record publishes: written with their checksums, verified against them when read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import xxhash

from cache_store.errors import CorruptShard, StoreError
from cache_store.formats.codec import ALIGNMENT, Array
from cache_store.keys import Digests
from cache_store.records.file_record import FileRecord
from cache_store.records.local_cache import LocalCache
from cache_store.storage.base import Storage, Stream, length_of, pieces_of
from cache_store.storage.local import LocalStorage
from cache_store.storage.os_errors import typed_error

if TYPE_CHECKING:
    from cache_store.storage.base import Content

T = TypeVar("T")

#: A file of fewer bytes is hashed sooner than a thread starts.
_BESIDE_BYTES = 1 << 20
#: Pieces that are written and not hashed yet: each is held until it is.
_MOST_BEHIND = 2


def write_file(storage: Storage, path: str, *contents: Content) -> FileRecord:
    """Write a file private to an attempt, and compute both checksums meanwhile, of the very bytes that are written.
    StoreErrors as `Storage.write`, and for a stream of another length than it says."""
    hashed = _Hashed(contents)
    storage.write(path, hashed)
    digests = hashed.digests
    if digests.bytes != hashed.nbytes:
        raise StoreError(f"{path}: {digests.bytes} bytes were made of {hashed.nbytes}", path=path)
    return FileRecord(path, digests.bytes, digests.xxh3, digests.sha256)


class _Hashed(Stream):
    """Some contents, hashed while they are written. `digests`: of the last pass over them."""

    def __init__(self, contents: tuple[Content, ...]) -> None:
        self.nbytes = length_of(contents)
        self.digests = Digests()
        self._contents = contents

    def pieces(self) -> Iterator[memoryview]:
        digests = self.digests = Digests()
        if self.nbytes < _BESIDE_BYTES:
            for piece in pieces_of(self._contents):
                digests.update(piece)
                yield piece
            return
        # SHA-256 takes about as long as a disk: neither waits for the other.
        with ThreadPoolExecutor(1, thread_name_prefix="digests") as pool:
            behind: deque[Future[None]] = deque()
            for piece in pieces_of(self._contents):
                behind.append(pool.submit(digests.update, piece))
                yield piece
                if len(behind) > _MOST_BEHIND:
                    behind.popleft().result()
            for hashing in behind:
                hashing.result()


def _mismatch(storage: Storage, record: FileRecord, why: str) -> CorruptShard:
    return CorruptShard(f"{storage.uri}: {record.path} {why}", path=record.path)


def verify(storage: Storage, record: FileRecord) -> None:
    """Check a file's length and xxh3_128, reading it once in pieces. CorruptShard when it differs or is
    gone."""
    try:
        size = storage.size(record.path)
        if size != record.bytes:
            raise _mismatch(storage, record, f"has {size} bytes, its record says {record.bytes}")
        hasher = xxhash.xxh3_128()
        for piece in storage.chunks(record.path, size):
            hasher.update(piece)
    except FileNotFoundError as error:
        raise _mismatch(storage, record, "is missing, though a record lists it") from error
    if hasher.hexdigest() != record.xxh3:
        raise _mismatch(storage, record, "does not match its checksum")


# (path, expected xxh3, size, mtime_ns, inode) of local files this process has checked.
_verified: set[tuple[Path, str, int, int, int]] = set()
_verified_lock = threading.Lock()
# A file changed twice within one tick of the clock keeps its mtime: younger ones are checked every time.
_SETTLED_NS = 2_000_000_000


def verify_once(storage: Storage, record: FileRecord) -> Path | None:
    """As `verify`, but a local file this process has checked, unchanged in size and mtime since, is not read
    again. Its local path, for mapping.

    On remote storage that is the path of this machine's copy, checked in the same way; None (and nothing checked)
    where no copy can be kept, and on storage that is neither. A copy may be evicted: treat one that is gone as None.
    """
    path = storage.local_path(record.path)
    if path is None:
        return _verified_copy(storage, record) if storage.remote else None
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise _mismatch(storage, record, "is missing, though a record lists it") from error
    except OSError as error:
        raise typed_error(error, "look up", str(path)) from error
    key = (path, record.xxh3, status.st_size, status.st_mtime_ns, status.st_ino)
    with _verified_lock:
        known = key in _verified
    if not known or status.st_size != record.bytes:
        settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        verify(storage, record)
        if settled:
            with _verified_lock:
                _verified.add(key)
    return path


def _verified_copy(storage: Storage, record: FileRecord) -> Path | None:
    copies = LocalCache.from_environment()
    if copies is None:
        return None
    as_folder = LocalStorage(str(copies.folder))
    for _ in range(2):
        if copies.fetch(storage, record) is None:
            return None
        try:
            return verify_once(as_folder, replace(record, path=copies.name_of(record)))
        except CorruptShard:
            # The disk of this machine is at fault, or the copy was evicted just now: not the store.
            copies.discard(record)
        except StoreError:
            return None
    return None


def read_file(storage: Storage, record: FileRecord) -> bytes:
    """Read and verify the bytes of a file. CorruptShard when they differ from the record or the file is gone."""

    def read() -> bytes | None:
        # One byte more than recorded shows a longer file without reading all of it.
        data = storage.read(record.path, limit=record.bytes + 1)
        return data if len(data) == record.bytes and xxhash.xxh3_128_hexdigest(data) == record.xxh3 else None

    return _read_verified(storage, record, read)


def read_aligned(storage: Storage, record: FileRecord) -> Array:
    """As `read_file`, for shards, of one byte at least: (bytes,) uint8 in memory that begins at a multiple of 64 bytes,
    which makes copies out of it up to twice as fast; put together and checked piece by piece while the rest arrives."""

    def read() -> Array | None:
        array: Array | None = None
        place = 0
        hasher = xxhash.xxh3_128()
        for piece in storage.chunks(record.path, record.bytes):
            if array is None:  # now the store has said that there are so many bytes: a record alone could ask for any
                array = _aligned(record.bytes)
            target = array[place : place + piece.nbytes]
            if len(target) < piece.nbytes:
                return None  # it grew while it was read
            target[:] = np.frombuffer(piece, np.uint8)
            # Of the copy: it is in the processor's cache, and it is what will be used.
            hasher.update(target.data)
            place += piece.nbytes
        return array if array is not None and place == len(array) and hasher.hexdigest() == record.xxh3 else None

    return _read_verified(storage, record, read)


def _read_verified(storage: Storage, record: FileRecord, read: Callable[[], T | None]) -> T:
    # Bytes that came over a network may have been damaged on their way: those are asked for once more.
    for _ in range(2 if storage.remote else 1):
        try:
            found = read()
        except FileNotFoundError as error:
            raise _mismatch(storage, record, "is missing, though a record lists it") from error
        if found is not None:
            return found
    raise _mismatch(storage, record, "does not match its checksum")


def _aligned(size: int) -> Array:
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size]
