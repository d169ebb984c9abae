"""One storage root behind a small interface: the contract, and what is the same for every kind of storage.

Every path is relative to the root, '/'-separated and may not leave it. No listing is ever cached. A write is
durable when the call returns (local folders: file and directory fsync). OS errors become the typed errors of
`cache_store.errors`, with the path in the message; reading what is absent raises FileNotFoundError.

How a new kind of storage is added is in `cache_store.storage.open`.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import xxhash

from cache_store.errors import StorageUnavailable, StoreError, UserError
from cache_store.storage.durable import TEMPORARY
from cache_store.storage.os_errors import typed_error

if TYPE_CHECKING:
    import typing_extensions

    #: What holds bytes: bytes, bytearray, memoryview, Arrow's buffers; of an array its `data`.
    Buffer = typing_extensions.Buffer
    #: What can be written.
    Content: TypeAlias = "Buffer | Stream"
    # Inside the class `list` is a method.
    Names = list[str]

FORMAT = 1
MARKER = "store.json"
#: Most bytes that a write takes at one time.
PIECE_BYTES = 4 << 20
_READ_CHUNK = 1 << 20


#: Most bytes of a marker that are read; it has some 60.
_MARKER_BYTES = 1 << 12
#: The marker that the first versions left.
_UNSEALED = json.dumps({"format": FORMAT}).encode()


def _marker(number: int) -> bytes:
    """Return the marker of a format, with a checksum, so that damage does not look like another format."""
    text = json.dumps({"format": number})
    return json.dumps({"format": number, "check": xxhash.xxh3_128_hexdigest(text.encode())}).encode()


def _format_of(data: bytes) -> int | None:
    """Return the format that an intact marker names; None when it is damaged."""
    try:
        number = json.loads(data)["format"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return number if type(number) is int and data == _marker(number) else None


@dataclass(frozen=True)
class FileInfo:
    """A file in a store: its path from the root, its length, and when it was last written, in seconds since 1970
    by the *storage's* clock (compare it with `Storage.now`)."""

    path: str
    bytes: int
    modified: float


def _check(path: str, *, root_allowed: bool = False) -> str:
    if path == "" and root_allowed:
        return path
    parts = path.split("/")
    if "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{path!r} is not a path inside the store", path=path)
    return path


class Stream(abc.ABC):
    """Bytes that are made while they are written, so that they need not all be in memory. `nbytes`: how many."""

    nbytes: int

    @abc.abstractmethod
    def pieces(self) -> Iterator[memoryview]:
        """Make the bytes, from the first one on, in pieces of at most `PIECE_BYTES`.

        Nobody changes a piece after it was yielded. Asked for again when a write is repeated: StoreError where the
        bytes can no longer be made.
        """


def views_of(contents: tuple[Content, ...]) -> Iterator[memoryview]:
    """Yield the bytes of each content that is not empty, without a copy."""
    for content in contents:
        if isinstance(content, Stream):
            yield from content.pieces()
            continue
        view = memoryview(content)
        if view.nbytes:
            yield view.cast("B")


def pieces_of(contents: tuple[Content, ...]) -> Iterator[memoryview]:
    """Yield the bytes of `contents` in pieces of at most `PIECE_BYTES`."""
    for view in views_of(contents):
        for start in range(0, view.nbytes, PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def length_of(contents: tuple[Content, ...]) -> int:
    """Count the bytes of `contents` without making any."""
    return sum(content.nbytes if isinstance(content, Stream) else memoryview(content).nbytes for content in contents)


class Storage(abc.ABC):
    """A storage root. Make one with `open_storage` of `cache_store.storage.open`; safe to use from several threads."""

    uri: str
    #: Whether bytes come over a network: worth keeping a copy of on this machine, and of asking for twice.
    remote = False

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Read the bytes of `path`, or only the first `limit` of them. FileNotFoundError when absent."""
        with self._errors("read", path):
            return self._read(_check(path), limit)

    def chunks(self, path: str, size: int | None = None) -> Iterator[memoryview]:
        """Yield the bytes of `path` in pieces of at most 8 MiB, each valid until the next one. Errors as `read`.

        `size`: how long the caller knows the file to be, which spares a question over the network. Of a file of another
        length there are no pieces, or, when it changes meanwhile, fewer.
        """
        with self._errors("read", path):
            yield from self._chunks(_check(path), size)

    def open_read(self, path: str) -> io.BufferedIOBase:
        """Open a binary file over `path`, to be closed by the caller. FileNotFoundError when absent."""
        with self._errors("read", path):
            return self._open(_check(path))

    def write(self, path: str, *contents: Content) -> int:
        """Write the concatenation of `contents` to `path`, whole or not at all; returns the number of bytes.

        Replaces what was there, so only for names private to one attempt. Buffers are C-contiguous
        and are not copied on local storage; streams are made piece by piece.
        """
        with self._errors("write", path, absent_is_normal=False):
            return self._write(_check(path), contents)

    def create(self, path: str, data: bytes) -> bool:
        """Create `path` with `data`, exclusively, atomically and durably. False: somebody was first.

        When it raises, the file may or may not exist: read it back.
        """
        with self._errors("create", path, absent_is_normal=False):
            return self._create(_check(path), data)

    def exists(self, path: str) -> bool:
        """Return whether a file is there."""
        with self._errors("look up", path):
            return self._exists(_check(path))

    def size(self, path: str) -> int:
        """Return how many bytes the file has. FileNotFoundError when absent."""
        with self._errors("look up", path):
            return self._size(_check(path))

    def list(self, prefix: str) -> Names:
        """List the names (not paths) of the immediate children of a folder, sorted; empty when there is none. "" is the
        root."""
        with self._errors("list", prefix):
            return sorted(n for n in self._list(_check(prefix, root_allowed=True)) if not n.startswith(TEMPORARY))

    def files(self, prefix: str) -> Iterator[FileInfo]:
        """Yield every file below a folder, at any depth, in no order; none when there is no folder. "" is the root."""
        with self._errors("list", prefix):
            yield from self._walk(_check(prefix, root_allowed=True))

    def now(self) -> float:
        """Return the time by the storage's own clock, which `FileInfo.modified` goes by: that of a file just
        written."""
        folder = f".probe-{uuid.uuid4().hex}"
        self.write(f"{folder}/clock", b"1")
        try:
            return max(info.modified for info in self.files(folder))
        except ValueError:
            raise StoreError(f"{self.uri}: a file just written is not listed; use another storage") from None
        finally:
            with contextlib.suppress(StoreError):
                self.delete_tree(folder)

    def move(self, source: str, target: str) -> None:
        """Rename a file, durably. FileNotFoundError when `source` is absent, or was replaced meanwhile on storage
        that can only copy and delete. `target` should not exist."""
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
        """Return the file's path on this machine's file system, for mapping; None on storage that is not local."""
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

    def probe(self) -> None:
        """Make the root and check that the storage does what a store needs; see `open_storage`."""
        with self._errors("create", ""):
            self._make_root()
        if self.is_store():
            return
        self._probe_create()
        self._leave_marker()

    def _probe_create(self) -> None:
        name = f".probe-{uuid.uuid4().hex}"
        try:
            exclusive = self.create(name, b"1") and not self.create(name, b"2") and self.read(name) == b"1"
        except FileNotFoundError:
            raise StoreError(f"{self.uri}: a file just written cannot be read here; use another storage") from None
        finally:
            # What the probe found is the news, not that cleaning up after it failed as well.
            with contextlib.suppress(StoreError):
                self.delete(name)
        if not exclusive:
            raise StoreError(f"{self.uri}: creating a file exclusively is not exclusive here; use another storage")

    def _leave_marker(self) -> None:
        if not self.create(MARKER, _marker(FORMAT)):
            self.is_store()

    def is_store(self) -> bool:
        """Return whether the marker of a store is at the root. UserError when it is that of another format, or
        damaged."""
        data = b""
        for _ in range(2 if self.remote else 1):  # once more: bytes may be damaged on their way
            try:
                data = self.read(MARKER, limit=_MARKER_BYTES)
            except FileNotFoundError:
                return False
            if data in (_marker(FORMAT), _UNSEALED):
                return True
        if other := _format_of(data):
            raise UserError(
                f"{self._name(MARKER)} says format {other}; this program knows format {FORMAT}: "
                "use another store folder, or the program version that made it"
            )
        raise UserError(
            f"{self._name(MARKER)} is damaged, or of another program. If this program made the store, "
            f"`segprop cache verify {self.uri} --repair` writes it again; everything else there is checked by itself"
        )

    def restore_marker(self) -> bool:
        """Write the marker of a store again where it is there and damaged; True when it was."""
        try:
            data = self.read(MARKER, limit=_MARKER_BYTES)
        except FileNotFoundError:
            return False
        if data in (_marker(FORMAT), _UNSEALED) or _format_of(data):
            return False
        self.write(MARKER, _marker(FORMAT))
        return True

    def _read(self, path: str, limit: int | None) -> bytes:
        with self._open(path) as file:
            return file.read(-1 if limit is None else limit)

    def _chunks(self, path: str, size: int | None) -> Iterator[memoryview]:
        if size is not None and self._size(path) != size:
            return
        buffer = memoryview(bytearray(_READ_CHUNK))
        with self._open(path) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    @abc.abstractmethod
    def _make_root(self) -> None: ...
    @abc.abstractmethod
    def _open(self, path: str) -> io.BufferedIOBase: ...
    @abc.abstractmethod
    def _write(self, path: str, contents: tuple[Content, ...]) -> int: ...
    @abc.abstractmethod
    def _create(self, path: str, data: bytes) -> bool: ...
    @abc.abstractmethod
    def _exists(self, path: str) -> bool: ...
    @abc.abstractmethod
    def _size(self, path: str) -> int: ...
    @abc.abstractmethod
    def _list(self, prefix: str) -> Names: ...
    @abc.abstractmethod
    def _walk(self, prefix: str) -> Iterator[FileInfo]: ...
    @abc.abstractmethod
    def _move(self, source: str, target: str) -> None: ...
    @abc.abstractmethod
    def _delete(self, path: str) -> None: ...
    @abc.abstractmethod
    def _delete_tree(self, prefix: str) -> None: ...

    def _local_path(self, path: str) -> Path | None:
        return None
