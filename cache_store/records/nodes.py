"""Commits of plan nodes, and the attempts that make them.

An attempt writes files under its own id; one small JSON record, created exclusively, publishes them. Whoever
reads a node reads that record and verifies each file against it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from cache_store.crashpoints import reach
from cache_store.errors import CorruptRecord, StoreError
from cache_store.formats.codec import Array
from cache_store.records.checkpoints import Checkpoint, CheckpointStore
from cache_store.records.file_record import FileRecord, files_to_json, read_files
from cache_store.records.files import read_aligned, read_file, verify, verify_once, write_file
from cache_store.records.record_io import (
    check_name,
    dump_record,
    has_keys,
    is_name,
    new_attempt_id,
    parse_record,
    publish,
    read_bounded,
)

if TYPE_CHECKING:
    from cache_store.storage.base import Content

FORMAT = 1
#: Key of a commit record under which lies what the node's id is made of.
IDENTITY = "identity"


class FromJson(Protocol):
    """A type whose instances are read from JSON values."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an instance. ValueError, naming the key, when something is missing."""


R = TypeVar("R", bound=FromJson)


@dataclass(frozen=True)
class Commit:
    """What a node of a plan has published: the attempt that made it, its files by name, and its result as JSON
    values. `read` gives the result as the type its kind of node commits."""

    node: str
    attempt: str
    files: Mapping[str, FileRecord]
    result: Mapping[str, Any]

    def read(self, kind: type[R]) -> R:
        """Read the result as an instance of `kind`. CorruptRecord when it lacks what every version of that kind has."""
        try:
            return kind.from_json(self.result)
        except ValueError as error:
            path = NodeStore.commit_path(self.node)
            raise CorruptRecord(f"{path}: {error}; move it away to run the node again", path=path) from error

    def to_json(self) -> dict[str, Any]:
        """Write the commit as its record in the store has it."""
        return {
            "format": FORMAT,
            "node": self.node,
            "attempt": self.attempt,
            "files": files_to_json(self.files),
            "result": dict(self.result),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], node_id: str) -> Commit | None:
        """Inverse of `to_json`; None when `record` is not a commit of this node."""
        attempt, result = record.get("attempt"), record.get("result")
        # What the node's id is made of was not always recorded; it is read apart (`NodeStore.identity_of`).
        if (
            not has_keys({**record, IDENTITY: None}, f"format node attempt files result {IDENTITY}")
            or record["format"] != FORMAT
            or record["node"] != node_id
            or not isinstance(attempt, str)
            or not is_name(attempt)
            or not isinstance(result, dict)
        ):
            return None
        files = read_files(record["files"], f"nodes/{node_id}/attempts/{attempt}")
        return None if files is None else cls(node_id, attempt, files, result)


class Attempt:
    """One try at a node. Its files are private until `commit`. Use from one thread."""

    def __init__(
        self,
        store: NodeStore,
        node_id: str,
        attempt_id: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.node_id = check_name(node_id)
        self.id = check_name(attempt_id or new_attempt_id())
        self.files: dict[str, FileRecord] = {}
        self._store = store
        self._identity = identity

    @property
    def _folder(self) -> str:
        return f"nodes/{self.node_id}/attempts/{self.id}"

    def write(self, name: str, *contents: Content) -> FileRecord:
        """Write file `name` (one path component), durable on return, to be published by `commit`.

        Buffers are C-contiguous. StoreError for bad names; storage errors as `Storage.write`.
        """
        record = write_file(self._store.storage, f"{self._folder}/{check_name(name)}", *contents)
        self.files[name] = record
        return record

    def commit(self, result: Mapping[str, Any]) -> Commit:
        """Publish every file written and the JSON `result`. Returns the commit that counts: ours or the
        winner's.

        After losing to another attempt this attempt's files are deleted: use the returned records. When the
        storage did not acknowledge, the record is read back first. StoreError when `result` is not JSON.
        """
        path = self._store.commit_path(self.node_id)
        own = Commit(self.node_id, self.id, self.files, result)
        identity = {} if self._identity is None else {IDENTITY: dict(self._identity)}
        data = dump_record({**own.to_json(), **identity}, f"the result of node {self.node_id}")
        reach("node.written")

        def winner() -> str | None:
            commit = self._store.commit_of(self.node_id)
            return None if commit is None else commit.attempt

        publish(self._store.storage, path, data, self.id, winner)
        reach("node.committed")
        commit = self._store.commit_of(self.node_id)
        if commit is None:
            raise StoreError(f"{path} was there and is gone", path=path)
        if commit.attempt != self.id:
            with contextlib.suppress(StoreError):
                self._store.storage.delete_tree(self._folder)
        return commit

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Write JSON beside the attempt's files, in place of an earlier note of that name. No commit lists it; whoever
        finishes the node may read it (`NodeStore.notes`), whatever became of this attempt."""
        data = dump_record(record, f"a note on node {self.node_id}")
        self._store.storage.write(f"{self._folder}/{check_name(name)}", data)

    def checkpoint(
        self,
        files: Mapping[str, Content | Sequence[Content]],
        position: Sequence[int],
        data: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """`NodeStore.save_checkpoint` for this attempt."""
        return self._store.save_checkpoint(self.node_id, self.id, files=files, position=position, data=data)


class NodeStore(CheckpointStore):
    """Commits, files and checkpoints of plan nodes under `nodes/` of one storage. Thread-safe."""

    @staticmethod
    def commit_path(node_id: str) -> str:
        """Name the path of a node's commit record. StoreError for an id that is not a name."""
        return f"nodes/{check_name(node_id)}/commit.json"

    def commit_of(self, node_id: str) -> Commit | None:
        """Read the commit of a node; None when it is not finished.

        CorruptRecord when the record is not one (wrong node, format or shape, larger than 16 MiB); it is left
        in place. Files are not read.
        """
        path = self.commit_path(node_id)
        record = self._record(path)
        if record is None:
            return None
        if record.get("format") != FORMAT:
            raise CorruptRecord(
                f"{self.storage.uri}: {path} has format {record.get('format')!r}, expected {FORMAT}",
                path=path,
            )
        commit = Commit.from_json(record, node_id)
        if commit is None:
            raise CorruptRecord(
                f"{self.storage.uri}: {path} is not a commit of node {node_id}; move it away to run the node again",
                path=path,
            )
        return commit

    def identity_of(self, node_id: str) -> Mapping[str, Any] | None:
        """Read what a committed node's id is made of, as JSON values; {} where its commit does not record it, None
        without a commit. Not part of `Commit`, which drivers keep of every node. CorruptRecord when it is no JSON."""
        record = self._record(self.commit_path(node_id))
        found = None if record is None else record.get(IDENTITY, {})
        return {} if found is not None and not isinstance(found, dict) else found

    def _record(self, path: str) -> dict[str, Any] | None:
        data = read_bounded(self.storage, path)
        return None if data is None else parse_record(data, path)

    def attempt(self, node_id: str, identity: Mapping[str, Any] | None = None) -> Attempt:
        """Begin an attempt at a node; nothing is written yet. `identity`: what the node's id is made of, as JSON
        values, for the commit to record."""
        return Attempt(self, node_id, identity=identity)

    def notes(self, node_id: str, name: str) -> list[dict[str, Any]]:
        """Read what the attempts at a node, finished or not, have noted under `name`; damaged notes are passed over."""
        folder = f"nodes/{check_name(node_id)}/attempts"
        found = []
        for attempt in self.storage.list(folder):
            path = f"{folder}/{attempt}/{check_name(name)}"
            data = read_bounded(self.storage, path)
            if data is not None:
                with contextlib.suppress(CorruptRecord):
                    found.append(parse_record(data, path))
        return found

    def read_file(self, record: FileRecord) -> bytes:
        """Read and verify the bytes of a published file. CorruptShard when they differ or the file is gone."""
        return read_file(self.storage, record)

    def read_aligned(self, record: FileRecord) -> Array:
        """As `read_file`, of one byte at least: (bytes,) uint8 that may be changed and begins at a multiple of 64
        bytes; checked while it arrives, so that it is held once."""
        return read_aligned(self.storage, record)

    def verify(self, record: FileRecord) -> None:
        """Check a published file without keeping it. CorruptShard when it differs or is gone."""
        verify(self.storage, record)

    def verified_path(self, record: FileRecord) -> Path | None:
        """The file's local path, or that of this machine's copy of it, checked once by this process per (path,
        size, mtime); None when it can be neither.

        For mapping. Files in the store are never changed in place. CorruptShard when it differs or is gone.
        """
        return verify_once(self.storage, record)

    def prune_attempts(self, node_id: str) -> int:
        """Delete the files of all attempts but the committed one; how many were deleted. Nothing without a
        commit."""
        commit = self.commit_of(node_id)
        if commit is None:
            return 0
        folder = f"nodes/{node_id}/attempts"
        losers = [name for name in self.storage.list(folder) if name != commit.attempt]
        for name in losers:
            self.storage.delete_tree(f"{folder}/{name}")
        return len(losers)
