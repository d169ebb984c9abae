"""Verified copies of a remote store's files on this machine's disk, shared by all its processes.

A copy is named by its content, so several stores share it. It is written beside its name under a lock, checked
while it arrives, fsynced and renamed; a process killed meanwhile leaves a `.part` that the next one takes over.
Each process checks a copy (length and xxh3_128) before its first use of it. What cannot be copied (no room, no
writable folder) is read from the store each time: the copies save time, correctness never hangs on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from cache_store.errors import CorruptShard, UserError
from cache_store.records.eviction import Copy, default_limit, victims
from cache_store.records.file_record import FileRecord
from cache_store.storage.base import Storage

FOLDER_VARIABLE = "SEGPROP_CACHE_DIR"
BYTES_VARIABLE = "SEGPROP_CACHE_BYTES"
_PART = ".part"
_POLL_S = 0.02
#: Another process may take this long over a download before we read the file ourselves.
_PATIENCE_S = 600.0


class LocalCache:
    """The copies in one folder. `limit`: bytes they may take together; None: half the disk's free space."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def from_environment(cls) -> LocalCache | None:
        """In SEGPROP_CACHE_DIR, by default `segprop` in the user's cache folder, of at most SEGPROP_CACHE_BYTES
        bytes; None when that is 0. UserError when it is not a number of bytes."""
        text = os.environ.get(BYTES_VARIABLE, "")
        if text and not text.isdecimal():
            raise UserError(f"{BYTES_VARIABLE}={text!r}: must be a number of bytes; 0: keep no copies")
        limit = int(text) if text else None
        if limit == 0:
            return None
        try:
            return cls(_default_folder(), limit)
        except RuntimeError:  # this user has no home
            return None

    @staticmethod
    def name_of(record: FileRecord) -> str:
        """The path of a file's copy inside the folder."""
        return f"files/{record.sha256}.{record.bytes}"

    def fetch(self, storage: Storage, record: FileRecord) -> Path | None:
        """The path of a copy of a file, downloaded unless it is there, its last use noted. None when it cannot be
        kept here.

        Its content was checked when it arrived, perhaps by another process, perhaps long ago: check it again.
        CorruptShard when the store's file differs from the record or is gone; storage errors as `Storage.read`.
        """
        path = self.folder / self.name_of(record)
        try:
            return self._fetch(storage, record, path)
        except OSError:
            # A full disk, or a folder that cannot be written: reading the store itself still works.
            return None

    def _fetch(self, storage: Storage, record: FileRecord, path: Path) -> Path | None:
        if _touch(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing(path, record.bytes) as part:
            if part is None:
                return path if _touch(path) else None
            # Twice: bytes may be damaged on their way as well as in the store.
            if not _download(storage, record, part) and not _download(storage, record, part):
                raise CorruptShard(f"{storage.uri}: {record.path} does not match its checksum", path=record.path)
            os.fsync(part)
            os.rename(path.with_name(path.name + _PART), path)
        return path

    def discard(self, record: FileRecord) -> None:
        """Delete a copy that turned out to be damaged."""
        with contextlib.suppress(OSError):
            os.unlink(self.folder / self.name_of(record))

    @contextlib.contextmanager
    def _writing(self, path: Path, size: int) -> Iterator[int | None]:
        """The descriptor of a part file of `size` bytes that only we write; None when somebody else has finished
        the copy meanwhile, or there is no room."""
        part = path.with_name(path.name + _PART)
        descriptor = self._lock_part(part, path)
        if descriptor is None:
            yield None
            return
        keep = False
        try:
            if path.exists() or not self._make_room(part, descriptor, size):
                yield None
            else:
                yield descriptor
                keep = True
        finally:
            if not keep:
                with contextlib.suppress(OSError):
                    os.unlink(part)
            os.close(descriptor)

    def _lock_part(self, part: Path, path: Path) -> int | None:
        ends = time.monotonic() + _PATIENCE_S
        while time.monotonic() < ends:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _try_lock(descriptor):
                # It may have been renamed or deleted between opening and locking.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(part)):
                        return descriptor
            os.close(descriptor)
            if path.exists():
                return None
            time.sleep(_POLL_S)
        return None

    def _make_room(self, part: Path, descriptor: int, size: int) -> bool:
        """Evict what is in the way and give the part its whole length, so that others count it."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
            copies = [copy for copy in self._copies() if copy.name != part.name]
            limit = self.limit
            if limit is None:
                free = shutil.disk_usage(self.folder).free
                limit = default_limit(free, sum(copy.bytes for copy in copies))
            chosen = victims(copies, size, limit, time.time())
            if chosen is None:
                return False
            for name in chosen:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part.parent / name)
            os.posix_fallocate(descriptor, 0, max(1, size))
            os.ftruncate(descriptor, size)
            return True
        finally:
            os.close(lock)

    def _copies(self) -> list[Copy]:
        found = []
        for entry in os.scandir(self.folder / "files"):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                unfinished = entry.name.endswith(_PART) and not _abandoned(Path(entry.path))
                found.append(Copy(entry.name, status.st_size, status.st_atime, unfinished))
        return found


def _default_folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE, "")
    if named:
        return Path(named).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if caches.startswith("/") else Path.home() / ".cache") / "segprop"


def _touch(path: Path) -> bool:
    """Note a use of a copy; False when there is none. Its time of change, which says whether it was altered, stays."""
    try:
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _abandoned(part: Path) -> bool:
    """Whether nobody is writing a part any more: its writer holds a lock on it as long as it lives."""
    descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _download(storage: Storage, record: FileRecord, part: int) -> bool:
    """Fill the file `part` with the store's bytes; whether they are those of the record."""
    hasher = xxhash.xxh3_128()
    place = 0
    try:
        for piece in storage.chunks(record.path, record.bytes):
            if place + piece.nbytes > record.bytes:
                return False
            hasher.update(piece)
            while piece.nbytes:
                written = os.pwrite(part, piece, place)
                place += written
                piece = piece[written:]
    except FileNotFoundError:
        raise CorruptShard(
            f"{storage.uri}: {record.path} is missing, though a record lists it", path=record.path
        ) from None
    return bool(place == record.bytes and hasher.hexdigest() == record.xxh3)
