"""A kind of storage from outside the package: a dictionary of this process, at ``dictionary://name``."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cache_store.storage.addresses import Address, name_address
from cache_store.storage.base import FileInfo, Storage, views_of
from cache_store.storage.open import Backend

if TYPE_CHECKING:
    from cache_store.storage.base import Content, Names

_STORES: dict[str, dict[str, tuple[bytes, float]]] = {}
_LOCK = threading.RLock()


class DictionaryStorage(Storage):
    """Files by path, with the time at which they were written."""

    def __init__(self, address: Address) -> None:
        self.uri = address.uri
        self._files = _STORES.setdefault(address.path, {})

    def _make_root(self) -> None:
        """Nothing to do: the dictionary is there."""

    def _found(self, path: str) -> tuple[bytes, float]:
        try:
            return self._files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def _open(self, path: str) -> io.BufferedIOBase:
        return io.BytesIO(self._found(path)[0])

    def _write(self, path: str, contents: tuple[Content, ...]) -> int:
        data = b"".join(views_of(contents))
        self._files[path] = (data, time.time())
        return len(data)

    def _create(self, path: str, data: bytes) -> bool:
        with _LOCK:
            first = path not in self._files
            if first:
                self._write(path, (data,))
            return first

    def _exists(self, path: str) -> bool:
        return path in self._files

    def _size(self, path: str) -> int:
        return len(self._found(path)[0])

    def _below(self, prefix: str) -> list[str]:
        return [path for path in list(self._files) if not prefix or path.startswith(f"{prefix}/")]

    def _list(self, prefix: str) -> Names:
        start = len(prefix) + 1 if prefix else 0
        return list({path[start:].split("/", 1)[0] for path in self._below(prefix)})

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        for path in self._below(prefix):
            data, written = self._files[path]
            if not Path(path).name.startswith(".tmp-"):
                yield FileInfo(path, len(data), written)

    def _move(self, source: str, target: str) -> None:
        with _LOCK:
            self._files[target] = self._found(source)
            del self._files[source]

    def _delete(self, path: str) -> None:
        self._files.pop(path, None)

    def _delete_tree(self, prefix: str) -> None:
        for path in self._below(prefix):
            self._delete(path)


#: The whole of what has to be said of it: its scheme, and this row.
SCHEME = "dictionary"
ROW = Backend("dictionary://name", name_address, DictionaryStorage)
