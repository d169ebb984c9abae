"""Sets of shards: rows by sample index, addressed by what determines their bytes.

A shard is a file named by index and attempt, published by an exclusive record that lists its length and
checksums. Readers follow records only. A record whose file is damaged is moved to `quarantine/` together with
the file, after which the shard is simply missing and can be put again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cache_store.crashpoints import reach
from cache_store.errors import CorruptRecord, CorruptShard, MissingShard, StoreError
from cache_store.formats.codec import Array
from cache_store.formats.layouts import SHARD_LAYOUTS
from cache_store.keys import canonical_json, digest_json
from cache_store.records.file_record import FileRecord
from cache_store.records.files import read_aligned, verify_once, write_file
from cache_store.records.record_io import check_name, new_attempt_id, parse_record, publish, read_bounded
from cache_store.snapshots.commits import ShardCommit, ShardCommits, committed_shards
from cache_store.snapshots.mapped import ATTEMPTS, ShardArrays, map_file
from cache_store.snapshots.shard_cache import ShardCache
from cache_store.snapshots.spec import SetSpec
from cache_store.storage.base import Storage
from cache_store.storage.os_errors import typed_error

if TYPE_CHECKING:
    # Inside SnapshotStore `list` is a method.
    Infos = list["SetInfo"]

T = TypeVar("T")


@dataclass
class Counters:
    """What one SnapshotSet object did. `hits`: shard requests answered from committed bytes; `misses`: those
    that found none, or damaged ones; `bytes_read`: bytes of values handed out (rows gathered, or whole
    shards); `bytes_written`: bytes of shard files published."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class SetInfo:
    """One set in a store. `bytes`: on storage now, quarantine and unpublished files included;
    `shards_present`: committed ones, of `shards`. A set whose set.json is damaged has an empty key and rows
    0."""

    id: str
    key: Mapping[str, Any]
    rows: int
    bytes: int
    shards_present: int
    shards: int


class SnapshotStore:
    """All snapshot and decoded-data sets of one storage, under `sets/`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def open(self, spec: SetSpec, kept: ShardCache | None = None) -> SnapshotSet:
        """Open the set of `spec`, making it if absent. CorruptRecord when a set.json is there that is not this spec's.
        `kept`: as for `SnapshotSet`."""
        found = SnapshotSet(self.storage, spec, kept)
        found.ensure()
        return found

    def load(self, set_id: str) -> SnapshotSet:
        """Open a set that exists. MissingShard when it does not; CorruptRecord when its set.json is damaged."""
        found = self.find(set_id)
        if found is None:
            raise MissingShard(f"{self.storage.uri} has no set {set_id}", set=set_id)
        return found

    def find(self, set_id: str) -> SnapshotSet | None:
        """Open a set as `load` does, but return None when the set does not exist."""
        spec = self._spec(set_id)
        return None if spec is None else SnapshotSet(self.storage, spec)

    def _spec(self, set_id: str) -> SetSpec | None:
        path = f"sets/{check_name(set_id)}/set.json"
        data = read_bounded(self.storage, path)
        if data is None:
            return None
        try:
            spec = SetSpec.from_json(parse_record(data, path))
            if spec.id == set_id:
                return spec
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptRecord(f"{self.storage.uri}: {path} is not a set of this version: {error}") from error
        raise CorruptRecord(f"{self.storage.uri}: {path} describes another set, {spec.id}", path=path)

    def drop(self, set_id: str) -> None:
        """Delete a set; nothing happens when it is absent. Arrays already handed out stay valid.

        Records go before files, so no reader finds a record whose file is being deleted; a drop that was
        killed is finished by dropping again.
        """
        root = f"sets/{check_name(set_id)}"
        for folder in ("commits", "shards", "quarantine"):
            self.storage.delete_tree(f"{root}/{folder}")
        self.storage.delete_tree(root)

    def list(self) -> Infos:
        """Describe every set in the store, by id."""
        return [self._info(set_id) for set_id in self.storage.list("sets")]

    def _info(self, set_id: str) -> SetInfo:
        size = sum(self._file_bytes(f"sets/{set_id}/{folder}") for folder in ("shards", "quarantine"))
        present = len(committed_shards(self.storage, set_id))
        try:
            spec = self._spec(set_id)
        except StoreError:
            spec = None
        if spec is None:
            return SetInfo(set_id, {}, 0, size, present, 0)
        return SetInfo(set_id, spec.key, spec.rows, size, present, spec.shards)

    def _file_bytes(self, folder: str) -> int:
        size = 0
        for name in self.storage.list(folder):
            # A file may be deleted between listing and looking.
            with contextlib.suppress(FileNotFoundError):
                size += self.storage.size(f"{folder}/{name}")
        return size


class SnapshotSet:
    """One set. Thread-safe; `counters` belongs to this object. `kept`: where shards stay once they were read, to be
    shared by sets that have one limit together; None: a place of its own."""

    def __init__(self, storage: Storage, spec: SetSpec, kept: ShardCache | None = None) -> None:
        self.storage = storage
        self.spec = spec
        self.counters = Counters()
        self._layout = SHARD_LAYOUTS[spec.codec_version]
        self._records = ShardCommits(storage, spec)
        self._root = self._records.root
        self._lock = threading.Lock()
        self._kept = ShardCache() if kept is None else kept
        self._loading: dict[int, threading.Event] = {}
        # Records of shards read before: one that was let go is not asked of the store again.
        self._commits: dict[int, ShardCommit] = {}

    def ensure(self) -> None:
        """Make set.json if absent. CorruptRecord when one is there that is not this spec's."""
        path = f"{self._root}/set.json"
        expected = canonical_json(self.spec.to_json())

        def found() -> str | None:
            data = read_bounded(self.storage, path)
            if data is None:
                return None
            if canonical_json(parse_record(data, path)) != expected:
                raise CorruptRecord(f"{self.storage.uri}: {path} is not that of set {self.spec.id}", path=path)
            return "set"

        if found() is None:
            publish(self.storage, path, expected, "set", found)

    def missing(self) -> list[int]:
        """List the indices of the shards without a record, ascending. Records are not opened."""
        present = committed_shards(self.storage, self.spec.id)
        return [i for i in range(self.spec.shards) if i not in present]

    def has(self, i: int) -> bool:
        """Return whether shard `i` has a valid record and a file of the right length; its bytes are not read. Damage is
        quarantined."""
        return self._records.published(i) is not None

    @property
    def leases(self) -> str:
        """The folder for leases of those who make shards of this set; it goes with the set."""
        return f"{self._root}/leases"

    def stored_bytes(self) -> int:
        """Count the bytes of the set's committed shard files: less than `spec.bytes` only where they are packed."""
        commits = (self._records.read(i) for i in range(self.spec.shards))
        return sum(commit.file.bytes for commit in commits if commit is not None)

    def put(self, i: int, arrays: Sequence[Array]) -> int:
        """Write and publish shard `i`; returns the file's bytes, or 0 when a valid record was there already.

        `arrays[k]`: (rows of the shard, *fields[k].shape), bfloat16 as uint16 bits; not copied when
        C-contiguous. ValueError for other shapes or dtypes. After losing the race to publish, the own file is
        deleted.
        """
        rows = len(self.spec.shard_range(i))
        if arrays and arrays[0].shape[:1] != (rows,):
            raise ValueError(f"shard {i} holds {rows} rows, got an array of shape {arrays[0].shape}")
        if self._records.published(i):
            return 0
        attempt = new_attempt_id()
        path = self._records.shard_path(i, attempt)
        file = write_file(self.storage, path, *self._layout.encode(self.spec.fields, arrays))
        reach("shard.written")
        # A set dropped since it was opened comes back complete.
        self.ensure()
        ours = self._records.publish(i, attempt, file)
        if not ours:
            with contextlib.suppress(StoreError):
                self.storage.delete(path)
            return 0
        self.count(bytes_written=file.bytes)
        return file.bytes

    def shard(self, i: int) -> ShardArrays:
        """Read the arrays of shard `i`, read-only, (rows of the shard, *shape) each, bfloat16 as uint16 bits.

        Local storage: the file is mapped, checked whole (length and xxh3_128) when this object first touches
        it, and kept mapped. MissingShard when there is none. CorruptShard when record or file are damaged,
        foreign or gone; they are moved to quarantine first, so that `put` can replace the shard. A file truncated
        later reads as zeros behind its new end: `read` copies out of it safely.
        """
        try:
            arrays = self.touch(i)
        except (MissingShard, CorruptShard):
            self.count(misses=1)
            raise
        self.count(hits=1, bytes_read=len(self.spec.shard_range(i)) * self.spec.row_bytes)
        return arrays

    def read(self, i: int, copy: Callable[[ShardArrays], T]) -> T:
        """Return what `copy` makes of the arrays of shard `i`, sharing no memory with them. `copy` runs again where the
        file was truncated meanwhile. Errors as `shard`."""
        for _ in range(ATTEMPTS):
            arrays = self.shard(i)
            made = copy(arrays)
            if arrays.intact:
                return made
            self.let_go(i)
        raise self.torn(i)

    def let_go(self, i: int) -> None:
        """Drop what is kept of shard `i`: its file is read and checked again at the next use."""
        self._kept.drop((self.spec.id, i))

    def torn(self, i: int) -> CorruptShard:
        """Return the error of a shard whose file was truncated whenever it was read."""
        return CorruptShard(
            f"{self.storage.uri}: set {self.spec.id}, shard {i} was truncated while it was read, {ATTEMPTS} times",
            set=self.spec.id,
            shard=i,
        )

    def touch(self, i: int) -> ShardArrays:
        """Read as `shard` does, without counting."""
        key = (self.spec.id, i)
        while True:
            kept = self._kept.get(key)
            if kept is not None:
                return kept
            with self._lock:
                elsewhere = self._loading.get(i)
                if elsewhere is None:
                    done = self._loading[i] = threading.Event()
            if elsewhere is not None:
                # Another thread reads it: wait, and look again (it may have failed).
                elsewhere.wait()
                continue
            try:
                arrays, mapped = self._load(i)
                folder = mapped and self.storage.local_path(self._records.path(i)) is not None
                return self._kept.add(key, arrays, mapped_folder=folder)
            finally:
                with self._lock:
                    del self._loading[i]
                done.set()

    def count(self, hits: int = 0, misses: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        """Add to `counters`, safely from any thread."""
        with self._lock:
            self.counters.hits += hits
            self.counters.misses += misses
            self.counters.bytes_read += bytes_read
            self.counters.bytes_written += bytes_written

    def digest(self) -> str:
        """Compute the sha256 over the recorded checksums of all shards in order, 32 hex characters; shard files are not
        read.

        Equal for equal shard files, whoever wrote them. MissingShard when incomplete; CorruptShard as
        `shard`.
        """
        parts = []
        for i in range(self.spec.shards):
            commit = self._records.read(i)
            if commit is None:
                raise self._records.absent(i)
            parts.append(commit.file.sha256)
        return digest_json([self.spec.id, parts])

    @property
    def holds_all(self) -> bool:
        """Whether every shard stays in reach once it was read: all are mapped, and nothing lets go of them."""
        mapped = self._layout.mapped and self.storage.local_path(f"{self._root}/set.json") is not None
        return mapped and self._kept.limit is None

    def close(self) -> None:
        """Let go of this set's shards; arrays already handed out stay valid. The object can still be used."""
        for i in range(self.spec.shards):
            self._kept.drop((self.spec.id, i))

    def record(self, i: int, raw: bytes) -> FileRecord:
        """Return the file that `raw`, the bytes of shard `i`'s record, publishes. CorruptRecord when it is not one."""
        return self._records.parse(i, raw).file

    def quarantine(self, i: int, raw: bytes, shard: str | None, reason: str) -> CorruptShard:
        """Move the record `raw` of shard `i`, and its file, aside, after which the shard is missing; the error
        that says so."""
        return self._records.quarantine(i, raw, shard, reason)

    def _load(self, i: int) -> tuple[ShardArrays, bool]:
        """(the arrays of shard `i`, whether they lie in a mapped file)."""
        known = self._commits.pop(i, None)
        if known is not None:
            # Its record may have been replaced since: what the old one says counts only if it holds.
            with contextlib.suppress(CorruptShard, FileNotFoundError):
                return self._decoded(i, known)
        commit = self._records.read(i)
        if commit is None:
            raise self._records.absent(i)
        try:
            return self._decoded(i, commit)
        except (CorruptShard, FileNotFoundError) as error:
            if not self._records.exists(i):
                # Dropped, or quarantined by somebody else, while we looked.
                raise self._records.absent(i) from error
            raise self._records.quarantine(i, commit.raw, commit.file.path, str(error)) from error

    def _decoded(self, i: int, commit: ShardCommit) -> tuple[ShardArrays, bool]:
        for _ in range(ATTEMPTS):
            buffer, tail = self._verified(commit.file)
            try:
                arrays = self._layout.decode(buffer, self.spec.fields, len(self.spec.shard_range(i)))
            except CorruptShard:
                if tail is None or tail[0]:
                    raise
            else:
                if tail is None or tail[0]:
                    self._commits[i] = commit
                    if tail is None or not self._layout.mapped:
                        return ShardArrays(arrays), False
                    return ShardArrays(arrays, tail), True
            # Truncated since it was checked: the check says now what there is, or fetches another copy.
        raise self.torn(i)

    def _verified(self, file: FileRecord) -> tuple[Any, memoryview | bytes | None]:
        """(the checked bytes of a file, the last one of them where they are mapped)."""
        # Checked with reads, so a failing disk is an error and not a signal; the pages are then there to be
        # mapped.
        path = verify_once(self.storage, file)
        if path is None:
            return read_aligned(self.storage, file), None
        try:
            return map_file(path, file.bytes)
        except FileNotFoundError:
            if self.storage.remote:
                return read_aligned(self.storage, file), None  # this machine's copy was evicted just now
            raise
        except OSError as error:
            raise typed_error(error, "map", str(path)) from error
