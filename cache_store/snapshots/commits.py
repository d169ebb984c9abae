"""The records of a set's shards: published once, read and checked, moved aside with their file when damaged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cache_store.crashpoints import reach
from cache_store.errors import CorruptRecord, CorruptShard, MissingShard, StoreError
from cache_store.records.file_record import FileRecord, valid_digests
from cache_store.records.record_io import (
    check_name,
    dump_record,
    has_keys,
    new_attempt_id,
    parse_record,
    publish,
    read_bounded,
)
from cache_store.snapshots.spec import FORMAT, SetSpec
from cache_store.storage.base import Storage

_COMMIT = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class ShardCommit:
    """What a shard's record says: its file, and the attempt that wrote it. `raw`: the record's bytes."""

    file: FileRecord
    attempt: str
    raw: bytes


def committed_shards(storage: Storage, set_id: str) -> set[int]:
    """Return the indices of the shards that have a record. Records are not opened."""
    names = (_COMMIT.fullmatch(name) for name in storage.list(f"sets/{set_id}/commits"))
    return {int(match.group(1)) for match in names if match}


class ShardCommits:
    """The records of one set. Stateless: the store is the only source."""

    def __init__(self, storage: Storage, spec: SetSpec) -> None:
        self._storage = storage
        self._spec = spec
        self.root = f"sets/{spec.id}"

    def path(self, i: int) -> str:
        """Return where the record of shard `i` lies."""
        return f"{self.root}/commits/{i:06d}.json"

    def shard_path(self, i: int, attempt: str) -> str:
        """Return where `attempt` writes the file of shard `i`."""
        return f"{self.root}/shards/{i:06d}.{attempt}.arrow"

    def exists(self, i: int) -> bool:
        """Return whether shard `i` has a record that can be read; it is not checked."""
        return read_bounded(self._storage, self.path(i)) is not None

    def absent(self, i: int) -> MissingShard:
        """Return the error that says that shard `i` has no record."""
        return MissingShard(f"{self._storage.uri}: set {self._spec.id} has no shard {i}", set=self._spec.id, shard=i)

    def publish(self, i: int, attempt: str, file: FileRecord) -> bool:
        """Publish `file`, written by `attempt`, as shard `i`. False: another attempt was first."""
        record = {
            "format": FORMAT,
            "set": self._spec.id,
            "index": i,
            "attempt": attempt,
            "file": file.path,
            "bytes": file.bytes,
            "xxh3_128": file.xxh3,
            "sha256": file.sha256,
            "rows": len(self._spec.shard_range(i)),
        }

        def winner() -> str | None:
            return self.published(i)

        ours = publish(self._storage, self.path(i), dump_record(record, f"shard {i}"), attempt, winner)
        reach("shard.committed")
        return ours

    def read(self, i: int) -> ShardCommit | None:
        """Read the record of shard `i`; None when there is none. CorruptShard, after quarantine, when it is not one."""
        raw = read_bounded(self._storage, self.path(i))
        if raw is None:
            return None
        try:
            return self.parse(i, raw)
        except StoreError as error:
            raise self.quarantine(i, raw, None, error.message) from None

    def parse(self, i: int, raw: bytes) -> ShardCommit:
        """Return what `raw`, the bytes of shard `i`'s record, says. CorruptRecord when it is not one."""
        path = self.path(i)
        record = parse_record(raw, path)
        attempt = check_name(str(record.get("attempt")))
        if (
            has_keys(record, "format set index attempt file bytes xxh3_128 sha256 rows")
            and record.get("format") == FORMAT
            and record.get("set") == self._spec.id
            and record.get("index") == i
            and record.get("rows") == len(self._spec.shard_range(i))
            and record.get("file") == self.shard_path(i, attempt)
            and valid_digests(record.get("bytes"), record.get("xxh3_128"), record.get("sha256"))
        ):
            file = FileRecord(record["file"], record["bytes"], record["xxh3_128"], record["sha256"])
            return ShardCommit(file, attempt, raw)
        raise CorruptRecord(f"{path} is not a record of this shard", path=path)

    def published(self, i: int) -> str | None:
        """Return the attempt whose valid record, with a file of the right length, is there. Damage is quarantined."""
        try:
            commit = self.read(i)
            if commit is None:
                return None
            try:
                size = self._storage.size(commit.file.path)
            except FileNotFoundError:
                size = -1
            if size != commit.file.bytes:
                raise self.quarantine(i, commit.raw, commit.file.path, "its file is gone or of another length")
        except CorruptShard:
            return None
        return commit.attempt

    def quarantine(self, i: int, raw: bytes, shard: str | None, reason: str) -> CorruptShard:
        """Move the record `raw` of shard `i`, and its file `shard`, aside, after which the shard is missing; returns
        the error that says so. Deletes nothing."""
        details: dict[str, Any] = {"set": self._spec.id, "shard": i}
        text = f"{self._storage.uri}: set {self._spec.id}, shard {i} is damaged: {reason}"
        aside = f"{self.root}/quarantine/{i:06d}.{new_attempt_id()}.json"
        try:
            self._storage.move(self.path(i), aside)
            if self._storage.read(aside) != raw:
                # Somebody replaced it since we read it: put theirs back (or leave a still newer one in place).
                self._storage.create(self.path(i), self._storage.read(aside))
                self._storage.delete(aside)
            elif shard is not None:
                self._storage.move(shard, f"{self.root}/quarantine/{shard.rsplit('/', 1)[-1]}")
        except FileNotFoundError:
            # Moved by another reader, or the file was gone to begin with.
            pass
        except StoreError as error:
            return CorruptShard(f"{text}; it could not be quarantined: {error.message}", **details)
        return CorruptShard(f"{text}; moved to quarantine", **details)
