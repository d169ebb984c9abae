"""A folder as a store: on this machine's disk, or on a shared volume with hard links and fsync (NFS)."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cache_store.crashpoints import reach
from cache_store.errors import StoreError, UserError
from cache_store.storage.base import MARKER, FileInfo, Storage, pieces_of
from cache_store.storage.durable import (
    TEMPORARY,
    make_folders,
    make_folders_in,
    open_regular,
    sync_folder,
    temporary_file,
)

if TYPE_CHECKING:
    from cache_store.storage.base import Content, Names


class LocalStorage(Storage):
    """A folder on a file system with hard links and fsync."""

    def __init__(self, folder: str) -> None:
        self.root = Path(folder).expanduser().absolute()
        self.uri = str(self.root)

    def _make_root(self) -> None:
        if self.root.is_dir():
            return
        if self.root.exists():
            raise UserError(f"{self.uri} is a file; the store needs a folder")
        make_folders(self.root, Path(self.root.anchor))

    def _write(self, path: str, contents: tuple[Content, ...]) -> int:
        target = self.root / path
        with temporary_file(target, self.root, pieces_of(contents), MARKER) as (temporary, total):
            reach("storage.before-rename")
            os.replace(temporary, target)
        sync_folder(target.parent)
        return total

    def _create(self, path: str, data: bytes) -> bool:
        target = self.root / path
        with temporary_file(target, self.root, pieces_of((data,)), MARKER) as (temporary, _):
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

    def _open(self, path: str) -> io.BufferedIOBase:
        try:
            return open(open_regular(self.root / path), "rb")
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
        make_folders_in(goal.parent, self.root, MARKER)
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

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        base = self.root / prefix
        for folder, _, names in os.walk(base):
            for name in names:
                if name.startswith(TEMPORARY):
                    continue
                path = os.path.join(folder, name)
                # A file may be deleted between listing and looking.
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(path)
                    yield FileInfo(os.path.relpath(path, self.root), status.st_size, status.st_mtime)
