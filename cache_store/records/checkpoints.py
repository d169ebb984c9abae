"""Keep mid-stage checkpoints of plan nodes: files and the manifest that makes them count, ordered by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache_store.crashpoints import reach
from cache_store.errors import CorruptRecord, CorruptShard, StoreError
from cache_store.records.file_record import FileRecord, files_to_json, read_files
from cache_store.records.files import verify, write_file
from cache_store.records.record_io import (
    check_name,
    dump_record,
    has_keys,
    is_name,
    parse_record,
    publish,
    read_bounded,
)
from cache_store.storage.base import Storage

if TYPE_CHECKING:
    from cache_store.storage.base import Content

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A committed mid-stage checkpoint. `position` orders checkpoints of a node, e.g. (epoch, step); `data`
    is JSON; `files` are read with `NodeStore.read_file` or mapped through `NodeStore.verified_path`."""

    node_id: str
    attempt: str
    sequence: int
    position: tuple[int, ...]
    data: dict[str, Any]
    files: dict[str, FileRecord]

    @property
    def folder(self) -> str:
        """Its folder in the store."""
        return f"nodes/{self.node_id}/checkpoints/{self.attempt}/{self.sequence:06d}"

    def to_json(self) -> dict[str, Any]:
        """Write the checkpoint as its manifest in the store has it."""
        return {
            "format": FORMAT,
            "node": self.node_id,
            "attempt": self.attempt,
            "sequence": self.sequence,
            "position": list(self.position),
            "data": dict(self.data),
            "files": files_to_json(self.files),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], node_id: str, attempt: str, name: str) -> Checkpoint | None:
        """Inverse of `to_json`; None when `record` is not the manifest of this node and attempt in folder `name`."""
        position, sequence, data = record.get("position"), record.get("sequence"), record.get("data")
        if (
            not has_keys(record, "format node attempt sequence position data files")
            or (record["format"], record["node"], record["attempt"]) != (FORMAT, node_id, attempt)
            or type(sequence) is not int
            or f"{sequence:06d}" != name
            or not isinstance(position, list)
            or not all(type(p) is int for p in position)
            or not isinstance(data, dict)
        ):
            return None
        files = read_files(record["files"], f"nodes/{node_id}/checkpoints/{attempt}/{name}")
        return None if files is None else cls(node_id, attempt, sequence, tuple(position), data, files)


class CheckpointStore:
    """Checkpoints of plan nodes under `nodes/` of one storage. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def save_checkpoint(
        self,
        node_id: str,
        attempt_id: str,
        *,
        files: Mapping[str, Content | Sequence[Content]],
        position: Sequence[int],
        data: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Write a mid-stage checkpoint: `files` (one content or a list of contents each), then the manifest
        that makes it count. `position`, ints such as (epoch, step), orders checkpoints over all attempts of
        the node; `data` is JSON of at most 16 MiB. One writer an attempt.

        StoreError for other `data` and for bad names; storage errors as `Storage.write`.
        """
        root = f"nodes/{check_name(node_id)}/checkpoints/{check_name(attempt_id)}"
        sequence = 1 + max((int(name) for name in self.storage.list(root) if name.isdecimal()), default=0)
        checkpoint = Checkpoint(node_id, attempt_id, sequence, tuple(int(p) for p in position), dict(data or {}), {})
        for name, content in files.items():
            contents = content if isinstance(content, (list, tuple)) else (content,)
            path = f"{checkpoint.folder}/{check_name(name)}"
            checkpoint.files[name] = write_file(self.storage, path, *contents)
        raw = dump_record(checkpoint.to_json(), f"a checkpoint of node {node_id}")
        reach("checkpoint.written")
        path = f"{checkpoint.folder}/manifest.json"

        def winner() -> str | None:
            found = read_bounded(self.storage, path)
            return None if found is None else attempt_id if found == raw else "another"

        if not publish(self.storage, path, raw, attempt_id, winner):
            raise StoreError(f"{path} exists already, written by somebody else", path=path)
        reach("checkpoint.committed")
        return checkpoint

    def checkpoints(self, node_id: str, attempt_order: Sequence[str] | None = None) -> list[Checkpoint]:
        """Checkpoints of all attempts with a valid manifest, newest (greatest position) first; files not
        read.

        Equal positions: the attempt later in `attempt_order` (default: later id), then the later sequence,
        first.
        """
        order = {attempt: i for i, attempt in enumerate(attempt_order or ())}
        found = list(self._manifests(check_name(node_id)))
        return sorted(found, key=lambda c: (c.position, order.get(c.attempt, -1), c.attempt, c.sequence), reverse=True)

    def _manifests(self, node_id: str) -> Iterator[Checkpoint]:
        root = f"nodes/{node_id}/checkpoints"
        for attempt in self.storage.list(root):
            if not is_name(attempt):
                continue
            for name in self.storage.list(f"{root}/{attempt}"):
                checkpoint = self._manifest(node_id, attempt, name) if name.isdecimal() else None
                if checkpoint is not None:
                    yield checkpoint

    def _manifest(self, node_id: str, attempt: str, name: str) -> Checkpoint | None:
        path = f"nodes/{node_id}/checkpoints/{attempt}/{name}/manifest.json"
        data = read_bounded(self.storage, path)
        if data is None:
            return None
        try:
            record = parse_record(data, path)
        except CorruptRecord:
            return None
        return Checkpoint.from_json(record, node_id, attempt, name)

    def latest_checkpoint(
        self,
        node_id: str,
        attempt_order: Sequence[str] | None = None,
        usable: Callable[[Checkpoint], bool] = lambda checkpoint: True,
    ) -> Checkpoint | None:
        """The newest checkpoint, over all attempts, whose files are all there and intact; None when there is
        none.

        Torn and damaged ones, and those that are not `usable`, are passed over and left in place.
        """
        for _ in range(3):
            pruned = False
            for checkpoint in filter(usable, self.checkpoints(node_id, attempt_order)):
                try:
                    for record in checkpoint.files.values():
                        verify(self.storage, record)
                except CorruptShard:
                    pruned |= not self.storage.exists(f"{checkpoint.folder}/manifest.json")
                    continue
                return checkpoint
            if not pruned:
                break
            # Another attempt pruned it while we looked, so it has a newer one by now: look again.
        return None

    def prune_checkpoints(self, node_id: str, keep: int) -> int:
        """Delete all but the `keep` newest checkpoints; how many were deleted. Torn ones stay until
        dropped."""
        old = self.checkpoints(node_id)[max(keep, 0) :]
        for checkpoint in old:
            # The manifest first: a checkpoint half deleted must not look whole.
            self.storage.delete(f"{checkpoint.folder}/manifest.json")
            self.storage.delete_tree(checkpoint.folder)
        return len(old)

    def drop_checkpoints(self, node_id: str) -> None:
        """Delete every checkpoint of a node, torn ones too."""
        self.storage.delete_tree(f"nodes/{check_name(node_id)}/checkpoints")
