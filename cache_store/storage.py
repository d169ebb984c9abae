"""One storage root behind a small interface. The only module that touches fsspec.

Every path is relative to the root, '/'-separated and may not leave it. No listing is ever cached. A write is
durable when the call returns (local folders: file and directory fsync). OS errors become the typed errors of
`cache_store.errors`, with the path in the message; reading what is absent raises FileNotFoundError.

To add a kind of storage: subclass `Storage`, implement the underscore methods, enter it in `_SCHEMES`.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import io
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cache_store.crashpoints import reach
from cache_store.durable import TEMPORARY, make_folders, sync_folder, temporary_file
from cache_store.errors import StorageUnavailable, StoreError, UserError
from cache_store.os_errors import typed_error

if TYPE_CHECKING:
    import typing_extensions
    from numpy.typing import NDArray

    # numpy's stubs say that arrays are buffers only from Python 3.12 on.
    Buffer = typing_extensions.Buffer | NDArray[Any]
    # Inside the class `list` is a method.
    Names = list[str]

FORMAT = 1
MARKER = "store.json"
_CHUNK = 4 << 20
_READ_CHUNK = 1 << 20
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")

Observer = Callable[[memoryview], None]


def _check(path: str, *, root_allowed: bool = False) -> str:
    if path == "" and root_allowed:
        return path
    parts = path.split("/")
    if "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{path!r} is not a path inside the store", path=path)
    return path


def _views(buffers: tuple[Buffer, ...]) -> Iterator[memoryview]:
    for buffer in buffers:
        view = memoryview(buffer)  # type: ignore[arg-type]
        if view.nbytes:
            yield view.cast("B")


def _pieces(buffers: tuple[Buffer, ...], observe: Observer | None) -> Iterator[memoryview]:
    """The bytes of `buffers` in pieces of at most 4 MiB, each seen by `observe` just before it is used."""
    for view in _views(buffers):
        for start in range(0, view.nbytes, _CHUNK):
            piece = view[start : start + _CHUNK]
            if observe is not None:
                observe(piece)
            yield piece


class Storage(abc.ABC):
    """A storage root. Make one with `Storage.open`; safe to use from several threads."""

    uri: str

    @classmethod
    def open(cls, uri: str) -> Storage:
        """The storage at `uri`: a folder path, ``file:///folder`` or ``memory://name`` (this process only,
        for tests).

        Creates the root if needed. The first use probes that it can be written and that exclusive creation
        really is exclusive, then leaves ``store.json``; later uses only read that marker.
        UserError: unknown scheme, not a folder, or a store of another format version. StorageDenied,
        StorageFull, StorageUnavailable, StoreError: the root cannot be used, with the reason.
        """
        storage = _construct(uri)
        storage._probe()
        return storage

    def read(self, path: str, limit: int | None = None) -> bytes:
        """The bytes of `path`, or only the first `limit` of them. FileNotFoundError when absent."""
        with self._errors("read", path), self._open(_check(path)) as file:
            return file.read(-1 if limit is None else limit)

    def chunks(self, path: str) -> Iterator[memoryview]:
        """The bytes of `path` in pieces of at most 1 MiB, each valid until the next one. Errors as `read`."""
        buffer = memoryview(bytearray(_READ_CHUNK))
        with self._errors("read", path), self._open(_check(path)) as file:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                yield buffer[:count]

    def open_read(self, path: str) -> BinaryIO:
        """A binary file over `path`, to be closed by the caller. FileNotFoundError when absent."""
        with self._errors("read", path):
            return self._open(_check(path))

    def write(self, path: str, *buffers: Buffer, observe: Observer | None = None) -> int:
        """Write the concatenation of `buffers` to `path`, whole or not at all; returns the number of bytes.

        Replaces what was there, so only for names private to one attempt. `observe` sees every piece on its
        way out (for checksums). Buffers are C-contiguous and are not copied on local storage.
        """
        with self._errors("write", path, absent_is_normal=False):
            return self._write(_check(path), buffers, observe)

    def create(self, path: str, data: bytes) -> bool:
        """Create `path` with `data`, exclusively, atomically and durably. False: somebody was first.

        When it raises, the file may or may not exist: read it back.
        """
        with self._errors("create", path, absent_is_normal=False):
            return self._create(_check(path), data)

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        with self._errors("look up", path):
            return self._exists(_check(path))

    def size(self, path: str) -> int:
        """Bytes in the file. FileNotFoundError when absent."""
        with self._errors("look up", path):
            return self._size(_check(path))

    def list(self, prefix: str) -> Names:
        """Names (not paths) of the immediate children of a folder, sorted; empty when there is none. "" is
        the root."""
        with self._errors("list", prefix):
            return sorted(n for n in self._list(_check(prefix, root_allowed=True)) if not n.startswith(TEMPORARY))

    def move(self, source: str, target: str) -> None:
        """Rename a file, durably. FileNotFoundError when `source` is absent. `target` should not exist."""
        with self._errors("move", source):
            self._move(_check(source), _check(target))

    def delete(self, path: str) -> None:
        """Delete a file; nothing happens when it is absent."""
        with self._errors("delete", path):
            self._delete(_check(path))

    def delete_tree(self, prefix: str) -> None:
        """Delete everything below a folder and the folder; nothing happens when it is absent."""
        with self._errors("delete", prefix):
            self._delete_tree(_check(prefix))

    def local_path(self, path: str) -> Path | None:
        """The file's path on this machine's file system, for mapping; None on storage that is not local."""
        return self._local_path(_check(path))

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def _name(self, path: str) -> str:
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    @contextlib.contextmanager
    def _errors(self, doing: str, path: str, *, absent_is_normal: bool = True) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                if absent_is_normal:
                    raise FileNotFoundError(errno.ENOENT, "not in the store", self._name(path)) from error
                # A folder was removed under the write (a set dropped meanwhile): the retry makes it anew.
                raise StorageUnavailable(
                    f"cannot {doing} {self._name(path)}: its folder was removed meanwhile", path=path
                ) from error
            raise typed_error(error, doing, self._name(path)) from error

    def _probe(self) -> None:
        with self._errors("create", ""):
            self._make_root()
        if self._marker_valid():
            return
        name = f".probe-{uuid.uuid4().hex}"
        try:
            exclusive = self.create(name, b"1") and not self.create(name, b"2") and self.read(name) == b"1"
        finally:
            # What the probe found is the news, not that cleaning up after it failed as well.
            with contextlib.suppress(StoreError):
                self.delete(name)
        if not exclusive:
            raise StoreError(f"{self.uri}: creating a file exclusively is not exclusive here; use another storage")
        if not self.create(MARKER, json.dumps({"format": FORMAT}).encode()):
            self._marker_valid()

    def _marker_valid(self) -> bool:
        try:
            data = self.read(MARKER, limit=1 << 16)
        except FileNotFoundError:
            return False
        try:
            marker: Any = json.loads(data)
        except ValueError:
            marker = None
        found = marker.get("format") if isinstance(marker, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{self._name(MARKER)} says format {found!r}; this program knows format {FORMAT}: "
                "use another store folder, or the program version that made it"
            )
        return True

    @abc.abstractmethod
    def _make_root(self) -> None: ...
    @abc.abstractmethod
    def _open(self, path: str) -> BinaryIO: ...
    @abc.abstractmethod
    def _write(self, path: str, buffers: tuple[Buffer, ...], observe: Observer | None) -> int: ...
    @abc.abstractmethod
    def _create(self, path: str, data: bytes) -> bool: ...
    @abc.abstractmethod
    def _exists(self, path: str) -> bool: ...
    @abc.abstractmethod
    def _size(self, path: str) -> int: ...
    @abc.abstractmethod
    def _list(self, prefix: str) -> Names: ...
    @abc.abstractmethod
    def _move(self, source: str, target: str) -> None: ...
    @abc.abstractmethod
    def _delete(self, path: str) -> None: ...
    @abc.abstractmethod
    def _delete_tree(self, prefix: str) -> None: ...

    def _local_path(self, path: str) -> Path | None:
        return None


class LocalStorage(Storage):
    """A folder on a file system with hard links and fsync."""

    def __init__(self, uri: str) -> None:
        folder = uri[len("file://") :] if uri.startswith("file://") else uri
        if uri.startswith("file://") and not folder.startswith("/"):
            raise UserError(f"{uri!r}: write file:///absolute/folder, or just the folder's path")
        self.root = Path(folder).expanduser().absolute()
        self.uri = str(self.root)

    def _make_root(self) -> None:
        if self.root.is_dir():
            return
        if self.root.exists():
            raise UserError(f"{self.uri} is a file; the store needs a folder")
        make_folders(self.root, Path(self.root.anchor))

    def _write(self, path: str, buffers: tuple[Buffer, ...], observe: Observer | None) -> int:
        target = self.root / path
        with temporary_file(target, self.root, _pieces(buffers, observe)) as (temporary, total):
            reach("storage.before-rename")
            os.replace(temporary, target)
        sync_folder(target.parent)
        return total

    def _create(self, path: str, data: bytes) -> bool:
        target = self.root / path
        with temporary_file(target, self.root, _pieces((data,), None)) as (temporary, _):
            reach("storage.before-link")
            try:
                os.link(temporary, target)
                first = True
            except FileExistsError:
                # NFS repeats a link whose reply was lost and then reports EEXIST: two names mean it was ours.
                first = os.stat(temporary).st_nlink == 2
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise StoreError(
                        f"{self.uri}: this file system has no hard links, which commits need; use another folder",
                        path=path,
                        errno=error.errno,
                    ) from error
                raise
            if first:
                reach("storage.after-link")
        # Also for the loser: it will rely on the winner's file, whose folder entry may not be on disk yet.
        sync_folder(target.parent)
        return first

    def _open(self, path: str) -> BinaryIO:
        try:
            return open(self.root / path, "rb")
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, "not in the store", path) from error

    def _exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def _size(self, path: str) -> int:
        return os.stat(self.root / path).st_size

    def _list(self, prefix: str) -> Names:
        try:
            return os.listdir(self.root / prefix)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _move(self, source: str, target: str) -> None:
        origin, goal = self.root / source, self.root / target
        os.stat(origin)
        make_folders(goal.parent, self.root)
        os.replace(origin, goal)
        sync_folder(goal.parent)
        sync_folder(origin.parent)

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.root / path)
            sync_folder((self.root / path).parent)

    def _delete_tree(self, prefix: str) -> None:
        folder = self.root / prefix
        for last in (False, False, True):
            try:
                shutil.rmtree(folder)
                break
            except FileNotFoundError:
                if not folder.exists():
                    break
            except OSError as error:
                # Somebody wrote into it, or deleted from it, meanwhile: once more.
                if last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        with contextlib.suppress(FileNotFoundError):
            sync_folder(folder.parent)

    def _local_path(self, path: str) -> Path | None:
        return self.root / path


# fsspec's memory file system is one dictionary a process, whatever the root.
_MEMORY_LOCK = threading.RLock()


class MemoryStorage(Storage):
    """fsspec's in-memory file system: this process only, for tests."""

    def __init__(self, uri: str) -> None:
        import fsspec

        self.uri = uri
        self._files: Any = fsspec.filesystem("memory")
        self._root = "/" + uri[len("memory://") :].strip("/")

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _make_root(self) -> None:
        with _MEMORY_LOCK:
            self._files.makedirs(self._root, exist_ok=True)

    def _open(self, path: str) -> BinaryIO:
        with _MEMORY_LOCK:
            return io.BytesIO(self._files.cat_file(self._at(path)))

    def _write(self, path: str, buffers: tuple[Buffer, ...], observe: Observer | None) -> int:
        data = b"".join(_views(buffers))
        if observe is not None:
            observe(memoryview(data))
        with _MEMORY_LOCK:
            self._files.pipe_file(self._at(path), data)
        return len(data)

    def _create(self, path: str, data: bytes) -> bool:
        with _MEMORY_LOCK:
            if self._files.exists(self._at(path)):
                return False
            self._files.pipe_file(self._at(path), data)
            return True

    def _exists(self, path: str) -> bool:
        with _MEMORY_LOCK:
            return bool(self._files.isfile(self._at(path)))

    def _size(self, path: str) -> int:
        with _MEMORY_LOCK:
            return int(self._files.size(self._at(path)))

    def _list(self, prefix: str) -> Names:
        with _MEMORY_LOCK:
            try:
                found = self._files.ls(self._at(prefix).rstrip("/") or "/", detail=False)
            except FileNotFoundError:
                return []
        return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in found]

    def _move(self, source: str, target: str) -> None:
        with _MEMORY_LOCK:
            self._files.pipe_file(self._at(target), self._files.cat_file(self._at(source)))
            self._files.rm_file(self._at(source))

    def _delete(self, path: str) -> None:
        with _MEMORY_LOCK:
            if self._files.isfile(self._at(path)):
                self._files.rm_file(self._at(path))

    def _delete_tree(self, prefix: str) -> None:
        with _MEMORY_LOCK:
            if self._files.exists(self._at(prefix)):
                self._files.rm(self._at(prefix), recursive=True)


_SCHEMES: dict[str, type[LocalStorage] | type[MemoryStorage]] = {
    "file": LocalStorage,
    "memory": MemoryStorage,
}


def _construct(uri: str) -> Storage:
    allowed = "a folder path, " + ", ".join(f"{scheme}://…" for scheme in _SCHEMES)
    if not uri:
        raise UserError(f"the store's address is empty; allowed: {allowed}")
    if "::" in uri or "\0" in uri:
        raise UserError(f"{uri!r}: chained addresses are not allowed; allowed: {allowed}")
    match = _SCHEME.match(uri)
    if match is None:
        return LocalStorage(uri)
    scheme = match.group(1).lower()
    if scheme not in _SCHEMES or not uri.startswith(f"{scheme}://"):
        raise UserError(f"{uri!r}: this storage is not supported; allowed: {allowed}")
    return _SCHEMES[scheme](uri)
