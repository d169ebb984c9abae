"""An object store (S3 and what speaks it, Google Cloud Storage, Azure) as a store, through obstore.

Every request ends by itself (`RetryPolicy.request_s`); what can be repeated is, a bounded number of times. Creation is
a conditional PUT; when its reply is lost the object is read back, and equal bytes mean it was ours (records carry
the attempt's id). Large files move in parts of 8 MiB, several at a time; what arrives is checked for its length.
"""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cache_store.crashpoints import reach
from cache_store.errors import StorageDenied, StorageUnavailable
from cache_store.storage.addresses import Address
from cache_store.storage.base import FileInfo, Storage, length_of, pieces_of, views_of
from cache_store.storage.object_reading import PART_BYTES, PARTS_AHEAD, ObjectReader
from cache_store.storage.object_requests import ObjectRequests, WrongLength
from cache_store.storage.retry import RetryPolicy

if TYPE_CHECKING:
    from cache_store.storage.base import Content, Names

_BATCH = 1000

# Stores this process has probed, by address and endpoint.
_probed: set[tuple[str, ...]] = set()


class ObjectStorage(Storage):
    """A prefix in a bucket of an object store."""

    remote = True

    def __init__(self, address: Address, patience: RetryPolicy | None = None) -> None:
        self.uri = address.uri
        self._requests = ObjectRequests(address, patience)
        self._reader = ObjectReader(self._requests)

    def probe(self) -> None:
        readable = self.is_store()
        # The marker does not say which server answered when it was left: a copied store has one too.
        if self._requests.endpoint not in _probed:
            try:
                self._probe_create()
            except StorageDenied:
                if readable:
                    # A finished store that may only be read can be read.
                    return
                raise
            _probed.add(self._requests.endpoint)
        if not readable:
            self._leave_marker()

    def _make_root(self) -> None:
        """Nothing to do: a prefix exists with its first object, and buckets are not ours to make."""

    def _read(self, path: str, limit: int | None) -> bytes:
        return self._reader.read(path, limit)

    def _chunks(self, path: str, size: int | None) -> Iterator[memoryview]:
        yield from self._reader.chunks(path, size)

    def _open(self, path: str) -> io.BufferedIOBase:
        return self._reader.open(path)

    def _write(self, path: str, contents: tuple[Content, ...]) -> int:
        total = length_of(contents)
        reach("storage.before-rename")
        # Multipart uploads become visible when they are completed, so in either way whole or not at all.
        data = b"".join(views_of(contents)) if total <= PART_BYTES else None

        def put() -> None:
            if data is not None:
                self._requests.api.put(self._requests.client, path, data, use_multipart=False)
            else:
                self._requests.api.put(
                    self._requests.uploads,
                    path,
                    pieces_of(contents),
                    use_multipart=True,
                    chunk_size=PART_BYTES,
                    max_concurrency=PARTS_AHEAD,
                )
            stored = int(self._requests.api.head(self._requests.client, path)["size"])
            if stored != total:
                raise WrongLength(f"{stored} bytes were stored instead of {total}")

        self._requests.call("write", path, put)
        return total

    def _create(self, path: str, data: bytes) -> bool:
        reach("storage.before-link")
        first = self._requests.create(path, data, lambda: self._found(path))
        if first:
            reach("storage.after-link")
        return first

    def _found(self, path: str) -> bytes | None:
        try:
            return self._read(path, None)
        except FileNotFoundError:
            return None

    def _exists(self, path: str) -> bool:
        try:
            self._requests.head("look up", path)
        except FileNotFoundError:
            return False
        return True

    def _size(self, path: str) -> int:
        return self._requests.size(path)

    def _list(self, prefix: str) -> Names:
        def look() -> Names:
            found = self._requests.api.list_with_delimiter(self._requests.client, prefix or None)
            return [*found["common_prefixes"], *(item["path"] for item in found["objects"])]

        # Servers over a file system may list an empty folder as something inside itself.
        paths = [path for path in self._requests.call("list", prefix, look) if path != prefix]
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        def look() -> list[FileInfo]:
            return [
                FileInfo(item["path"], int(item["size"]), item["last_modified"].timestamp())
                for batch in self._requests.api.list(self._requests.client, prefix or None, chunk_size=_BATCH)
                for item in batch
                if item["path"] != prefix
            ]

        yield from self._requests.call("list", prefix, look)

    def _move(self, source: str, target: str) -> None:
        before = self._requests.head("move", source)
        self._requests.call("move", source, lambda: self._requests.api.copy(self._requests.client, source, target))
        if self._size(target) != before["size"]:
            raise StorageUnavailable(f"cannot move {self._name(source)}: the copy has another length", path=source)
        # There is no rename. Whoever replaced the source since keeps what they wrote; between this look and the
        # deletion a replacement can still be lost, which costs its writer the work, and no reader anything.
        after = self._requests.head("move", source)
        if after["e_tag"] != before["e_tag"]:
            self._delete(target)
            raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", source)
        self._delete(source)

    def _delete(self, path: str) -> None:
        # Some object stores report an absent object, others do not.
        with contextlib.suppress(FileNotFoundError):
            self._requests.call("delete", path, lambda: self._requests.api.delete(self._requests.client, path))

    def _delete_all(self, prefix: str, paths: Names) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._requests.call("delete", prefix, lambda: self._requests.api.delete(self._requests.client, paths))

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
