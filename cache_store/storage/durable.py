"""Read and write files of a local folder: writes are on disk when they return, and only regular files are read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cache_store.errors import StorageUnavailable
from cache_store.storage.os_errors import typed_error

#: How names of files begin that are being written, or were when a process died.
TEMPORARY = ".tmp-"


def make_folders(folder: Path, top: Path) -> None:
    """Make `folder` and what is missing above it, up to `top`."""
    missing = []
    while folder != top and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each)
        sync_folder(each.parent)


def make_folders_in(folder: Path, root: Path, marker: str | None) -> None:
    """Make `folder` below `root`. StorageUnavailable when `root`, or the `marker` in it, is not there (any more):
    making it anew could put the data under an unmounted disk's mount point."""
    if not root.is_dir() or (marker is not None and not (root / marker).exists()):
        raise StorageUnavailable(f"the storage root {root} has disappeared; is its volume mounted?", path=str(root))
    make_folders(folder, root)


@contextlib.contextmanager
def temporary_file(
    target: Path, root: Path, pieces: Iterable[memoryview], marker: str | None = None
) -> Iterator[tuple[Path, int]]:
    """Write a complete, fsynced file of `pieces` beside `target`, and yield it and its bytes; it is gone afterwards
    unless renamed.

    Folders between `root` and `target` are made. StorageUnavailable when `root`, or the `marker` in it, has
    disappeared.
    """
    temporary = target.parent / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        file = os.open(temporary, flags, 0o666)
    except FileNotFoundError:
        make_folders_in(target.parent, root, marker)
        file = os.open(temporary, flags, 0o666)
    try:
        total = 0
        try:
            for piece in pieces:
                while piece.nbytes:
                    written = os.write(file, piece)
                    piece = piece[written:]
                    total += written
            os.fsync(file)
        finally:
            os.close(file)
        yield temporary, total
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_atomically(path: Path, data: bytes | Iterable[memoryview]) -> None:
    """Write a file beside a store (a run directory's, an export's) whole or not at all; readers see the old one or the
    new one. `data`: at once or in pieces. Missing folders are made; who may read it is the user's umask to say.
    StoreErrors as `Storage.write`."""
    with typed_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pieces = [memoryview(data)] if isinstance(data, bytes) else data
        with temporary_file(path, path.parent, pieces) as (temporary, _):
            os.replace(temporary, path)


def put_in_place(file: Path, target: Path) -> None:
    """Give a file that another program wrote in the folder of `target` that name, in place of what has it; on disk when
    it returns. StoreErrors as `Storage.write`."""
    with typed_errors("write", target):
        descriptor = open_regular(file)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(file, target)
        sync_folder(target.parent)


@contextlib.contextmanager
def typed_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn what the system says against `doing` something to a file beside a store into a StoreError."""
    try:
        yield
    except OSError as error:
        raise typed_error(error, doing, str(path)) from error


def open_regular(path: Path, *, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, itself or behind a symbolic link; returns the descriptor. OSError, also for anything else:
    nothing is waited for and no device read."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file, or the first `limit` bytes of it. OSError as `open_regular`."""
    with open(open_regular(path), "rb") as file:
        return file.read(limit)


def read_json(path: Path, limit: int) -> Any:
    """Read the JSON value in a regular file of at most `limit` bytes. OSError as `open_regular`; ValueError for what is
    longer, nested too deeply or no JSON."""
    data = read_regular(path, limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit} bytes")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def open_appending(path: Path) -> TextIOWrapper:
    """Open a text file beside a store to append to; missing folders are made. OSError as it comes, and for what is no
    regular file: a symbolic link may lead anywhere, a pipe would wait for a reader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        descriptor = open_regular(path, flags=flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a pipe that nobody reads
            raise OSError(errno.EINVAL, "not a regular file", str(path)) from error
        raise
    return open(descriptor, "a", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or deleted in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
