"""Check what a store holds in full: every record, and every file a record lists, by its SHA-256.

Looking changes nothing. Repairing moves what is damaged to `quarantine/`, with its record, so that the next run
finds it missing and makes it again; nothing is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cache_store.errors import StoreError
from cache_store.keys import Digests
from cache_store.records.file_record import FileRecord
from cache_store.records.nodes import NodeStore
from cache_store.records.record_io import check_name, is_name, new_attempt_id, read_bounded
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.base import Storage

_COMMIT = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Finding:
    """Something damaged. `kind`: set, shard, node, checkpoint; `owner`: the set's or node's id; `repair` moves it
    aside."""

    kind: str
    owner: str
    path: str
    reason: str
    repair: Callable[[], None] = field(repr=False, compare=False)


@dataclass
class Tally:
    """What an audit has looked at so far."""

    records: int = 0
    files: int = 0
    bytes: int = 0


class Audit:
    """Audit one store; `tally` counts as it goes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.tally = Tally()

    def run(self) -> Iterator[Finding]:
        """Find everything that is damaged, sets first. StoreErrors of the storage itself (denied, unavailable) pass."""
        for set_id in self.storage.list("sets"):
            if is_name(set_id):
                yield from self.audit_set(set_id)
        for node_id in self.storage.list("nodes"):
            if is_name(node_id):
                yield from self.audit_node(node_id)

    def audit_set(self, set_id: str) -> Iterator[Finding]:
        """Find what is damaged in one set."""
        folder = f"sets/{check_name(set_id)}"
        try:
            snapshots = SnapshotStore(self.storage).find(set_id)
        except StoreError as error:
            if error.retryable or not self.storage.exists(f"{folder}/set.json"):
                raise
            yield self._finding("set", set_id, f"{folder}/set.json", error.message, [f"{folder}/set.json"])
            return
        if snapshots is None:
            return
        self.tally.records += 1
        for name in self.storage.list(f"{folder}/commits"):
            yield from self._shard(snapshots, f"{folder}/commits/{name}", name)

    def _shard(self, snapshots: SnapshotSet, path: str, name: str) -> Iterator[Finding]:
        set_id = snapshots.spec.id
        match = _COMMIT.fullmatch(name)
        index = int(match.group(1)) if match else -1
        if not 0 <= index < snapshots.spec.shards or f"{index:06d}.json" != name:
            yield self._finding("shard", set_id, path, "no shard has such a record", [path])
            return
        raw = read_bounded(self.storage, path)
        if raw is None:  # dropped meanwhile
            return
        self.tally.records += 1
        file: str | None = None
        try:
            record = snapshots.record(index, raw)
            reason = self._damage(record)
            file = record.path
        except StoreError as error:
            if error.retryable:
                raise
            reason = error.message
        if reason is not None:
            why = reason
            yield Finding(
                "shard", set_id, file or path, why, lambda: _check_moved(snapshots.quarantine(index, raw, file, why))
            )

    def audit_node(self, node_id: str) -> Iterator[Finding]:
        """Find what is damaged of one plan node: its commit, committed files and checkpoints."""
        nodes = NodeStore(self.storage)
        path = nodes.commit_path(node_id)
        try:
            commit = nodes.commit_of(node_id)
        except StoreError as error:
            if error.retryable:
                raise
            yield self._finding("node", node_id, path, error.message, [path])
            commit = None
        for record in commit.files.values() if commit is not None else ():
            reason = self._damage(record)
            if reason is not None:
                yield self._finding("node", node_id, record.path, reason, [path, record.path])
        self.tally.records += commit is not None
        for checkpoint in nodes.checkpoints(node_id):
            self.tally.records += 1
            for record in checkpoint.files.values():
                reason = self._damage(record)
                if reason is not None:
                    # Without its manifest a checkpoint does not exist; its files go when the node is done.
                    manifest = f"{checkpoint.folder}/manifest.json"
                    yield self._finding("checkpoint", node_id, record.path, reason, [manifest])
                    break

    def _damage(self, record: FileRecord) -> str | None:
        """Say why a file is not what its record says; None when it is."""
        digests = Digests()
        try:
            # First its length: of a file that has grown (a terabyte of nothing takes no space) no byte is read.
            size = self.storage.size(record.path)
            if size != record.bytes:
                return f"it has {size} bytes, its record says {record.bytes}"
            for piece in self.storage.chunks(record.path, size):
                digests.update(piece)
        except FileNotFoundError:
            return "it is missing, though a record lists it"
        self.tally.files += 1
        self.tally.bytes += digests.bytes
        if digests.bytes != record.bytes:
            return f"it has {digests.bytes} bytes, its record says {record.bytes}"
        if digests.sha256 != record.sha256 or digests.xxh3 != record.xxh3:
            return "it does not match its checksums"
        return None

    def _finding(self, kind: str, owner: str, path: str, reason: str, aside: list[str]) -> Finding:
        folder = "sets" if kind in ("set", "shard") else "nodes"

        def repair() -> None:
            tag = new_attempt_id()
            for each in aside:
                target = f"{folder}/{owner}/quarantine/{tag}.{each.rsplit('/', 1)[-1]}"
                try:
                    self.storage.move(each, target)
                except FileNotFoundError:
                    continue  # gone, or moved aside together with another file of the same record

        return Finding(kind, owner, path, reason, repair)


def _check_moved(error: StoreError) -> None:
    if "could not be quarantined" in error.message:
        raise StoreError(error.message, **error.details)
