"""fsspec's in-memory file system as a store. The only module that touches fsspec."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cache_store.storage.addresses import Address
from cache_store.storage.base import FileInfo, Storage, views_of

if TYPE_CHECKING:
    from cache_store.storage.base import Content, Names

# fsspec's memory file system is one dictionary a process, whatever the root.
_MEMORY_LOCK = threading.RLock()


class MemoryStorage(Storage):
    """fsspec's in-memory file system: this process only, for tests."""

    def __init__(self, address: Address) -> None:
        import fsspec

        self.uri = address.uri
        self._files: Any = fsspec.filesystem("memory")
        self._root = "/" + address.path

    def _at(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _make_root(self) -> None:
        with _MEMORY_LOCK:
            self._files.makedirs(self._root, exist_ok=True)

    def _open(self, path: str) -> io.BufferedIOBase:
        with _MEMORY_LOCK:
            return io.BytesIO(self._files.cat_file(self._at(path)))

    def _write(self, path: str, contents: tuple[Content, ...]) -> int:
        data = b"".join(views_of(contents))
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

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        with _MEMORY_LOCK:
            found = self._files.find(self._at(prefix).rstrip("/") or "/", detail=True)
        for name, info in found.items():
            created = info["created"]  # a datetime, or seconds, by fsspec's version
            modified = created if isinstance(created, float) else created.timestamp()
            yield FileInfo(name[len(self._at("")) :], int(info["size"]), modified)
