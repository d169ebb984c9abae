"""One storage above another that is only read: what is written, replaced or deleted stays in the upper one."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cache_store.storage.base import FileInfo, Storage, length_of

if TYPE_CHECKING:
    from cache_store.storage.base import Content, Names


class LayeredStorage(Storage):
    """Reads from `over`, and from `under` what is not there. For trying something on a store without changing it.

    What was deleted or replaced is remembered by this object alone: it is for one process, which throws `over` away.
    """

    def __init__(self, over: Storage, under: Storage) -> None:
        self._over, self._under = over, under
        self.uri = under.uri
        self.remote = under.remote
        #: Files and folders of `under` that were deleted here.
        self._deleted: set[str] = set()

    def _visible(self, path: str) -> bool:
        """Whether a file would be read from below if it is not above."""
        parts = path.split("/")
        return not any("/".join(parts[: count + 1]) in self._deleted for count in range(len(parts)))

    def _layer(self, path: str) -> Storage:
        """The storage that has a file. FileNotFoundError when none has."""
        if self._over.exists(path):
            return self._over
        if self._visible(path) and self._under.exists(path):
            return self._under
        raise FileNotFoundError(errno.ENOENT, "not in the store", path)

    def _make_root(self) -> None:
        """Both are there."""

    def _open(self, path: str) -> io.BufferedIOBase:
        return self._layer(path).open_read(path)

    def _write(self, path: str, contents: tuple[Content, ...]) -> int:
        self._over.write(path, *contents)
        return length_of(contents)

    def _create(self, path: str, data: bytes) -> bool:
        return not self._exists(path) and self._over.create(path, data)

    def _exists(self, path: str) -> bool:
        return self._over.exists(path) or (self._visible(path) and self._under.exists(path))

    def _size(self, path: str) -> int:
        return self._layer(path).size(path)

    def _list(self, prefix: str) -> Names:
        found = set(self._over.list(prefix))
        if not prefix or self._visible(prefix):
            below = (name for name in self._under.list(prefix))
            found |= {name for name in below if self._visible(f"{prefix}/{name}" if prefix else name)}
        return list(found)

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        above = {info.path: info for info in self._over.files(prefix)}
        yield from above.values()
        for info in self._under.files(prefix):
            if info.path not in above and self._visible(info.path):
                yield info

    def _move(self, source: str, target: str) -> None:
        layer = self._layer(source)
        self._over.write(target, layer.read(source))
        self._delete(source)

    def _delete(self, path: str) -> None:
        self._over.delete(path)
        self._deleted.add(path)

    def _delete_tree(self, prefix: str) -> None:
        self._over.delete_tree(prefix)
        self._deleted.add(prefix)

    def _local_path(self, path: str) -> Path | None:
        above = self._over.local_path(path)
        if above is not None and self._over.exists(path):
            return above
        return self._under.local_path(path) if self._visible(path) and self._under.exists(path) else above
