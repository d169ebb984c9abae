"""Commits and checkpoints of plan nodes.

An attempt writes files under its own id; one small JSON record, created exclusively, publishes them. Whoever
reads a node reads that record and verifies each file against it. All JSON is bounded and checked before use.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import xxhash

from cache_store.crashpoints import reach
from cache_store.errors import CorruptRecord, CorruptShard, StoreError
from cache_store.keys import Digests
from cache_store.storage import Storage, typed_error

if TYPE_CHECKING:
    from cache_store.storage import Buffer

FORMAT = 1
MAX_RECORD_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_HEX = re.compile(r"[0-9a-f]+")


class FileRecord(TypedDict):
    """One file a record publishes; plain JSON. `path` from the storage root, `bytes` its length, `xxh3` the
    xxh3_128 and `sha256` the sha256 of its bytes in lower-case hex."""

    path: str
    bytes: int
    xxh3: str
    sha256: str


def new_attempt_id() -> str:
    """An id no other attempt has; ids made later sort later (to the clock's precision)."""
    return f"{time.time_ns() // 1_000_000:011x}-{secrets.token_hex(6)}"


def check_name(name: str) -> str:
    """`name` if it can be one component of a store path; StoreError otherwise."""
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r} is not a name for the store: use letters, digits, '_', '.', '+', '-'")
    return name


def dump_record(record: Mapping[str, Any], what: str) -> bytes:
    """JSON bytes of a record. StoreError when it is not JSON (NaN included) or longer than 16 MiB."""
    try:
        data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} is not JSON: {error}") from error
    if len(data) > MAX_RECORD_BYTES:
        raise StoreError(f"{what} takes {len(data)} bytes; at most {MAX_RECORD_BYTES} are allowed")
    return data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def parse_record(data: bytes, path: str) -> dict[str, Any]:
    """The object in `data`. CorruptRecord when it is not a JSON object or longer than 16 MiB."""
    if len(data) > MAX_RECORD_BYTES:
        raise CorruptRecord(f"{path} is longer than {MAX_RECORD_BYTES} bytes", path=path)
    try:
        record = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{path} is not JSON: {error}", path=path) from error
    if not isinstance(record, dict):
        raise CorruptRecord(f"{path} is not a JSON object", path=path)
    return record


def read_bounded(storage: Storage, path: str) -> bytes | None:
    """The bytes of a record, cut just above 16 MiB (which `parse_record` refuses); None when absent."""
    try:
        return storage.read(path, limit=MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None


def valid_digests(size: Any, xxh3: Any, sha256: Any) -> bool:
    """Whether these can be the length, xxh3_128 and sha256 of a file."""
    return (
        type(size) is int
        and size >= 0
        and isinstance(xxh3, str)
        and len(xxh3) == 32
        and _HEX.fullmatch(xxh3) is not None
        and isinstance(sha256, str)
        and len(sha256) == 64
        and _HEX.fullmatch(sha256) is not None
    )


def _valid_files(files: Any, folder: str) -> bool:
    if not isinstance(files, dict):
        return False
    for name, record in files.items():
        if not (
            isinstance(record, dict)
            and set(record) == {"path", "bytes", "xxh3", "sha256"}
            and _NAME.fullmatch(name)
            and record["path"] == f"{folder}/{name}"
            and valid_digests(record["bytes"], record["xxh3"], record["sha256"])
        ):
            return False
    return True


def write_file(storage: Storage, path: str, *buffers: Buffer) -> FileRecord:
    """Write a file private to an attempt, computing both checksums on the way. StoreErrors as
    `Storage.write`."""
    digests = Digests()
    storage.write(path, *buffers, observe=digests.update)
    return {"path": path, "bytes": digests.bytes, "xxh3": digests.xxh3, "sha256": digests.sha256}


def _mismatch(storage: Storage, record: Mapping[str, Any], why: str) -> CorruptShard:
    return CorruptShard(f"{storage.uri}: {record['path']} {why}", path=record["path"])


def verify(storage: Storage, record: Mapping[str, Any]) -> None:
    """Check a file's length and xxh3_128, reading it once in pieces. CorruptShard when it differs or is
    gone."""
    try:
        size = storage.size(record["path"])
        if size != record["bytes"]:
            raise _mismatch(storage, record, f"has {size} bytes, its record says {record['bytes']}")
        hasher = xxhash.xxh3_128()
        for piece in storage.chunks(record["path"]):
            hasher.update(piece)
    except FileNotFoundError as error:
        raise _mismatch(storage, record, "is missing, though a record lists it") from error
    if hasher.hexdigest() != record["xxh3"]:
        raise _mismatch(storage, record, "does not match its checksum")


# (path, expected xxh3, size, mtime_ns, inode) of local files this process has checked.
_verified: set[tuple[Path, str, int, int, int]] = set()
_verified_lock = threading.Lock()
# A file changed twice within one tick of the clock keeps its mtime: younger ones are checked every time.
_SETTLED_NS = 2_000_000_000


def verify_once(storage: Storage, record: Mapping[str, Any]) -> Path | None:
    """As `verify`, but a local file this process has checked, unchanged in size and mtime since, is not read
    again. Its local path, for mapping; None (and nothing checked) on storage that is not local."""
    path = storage.local_path(record["path"])
    if path is None:
        return None
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise _mismatch(storage, record, "is missing, though a record lists it") from error
    except OSError as error:
        raise typed_error(error, "look up", str(path)) from error
    key = (path, record["xxh3"], status.st_size, status.st_mtime_ns, status.st_ino)
    with _verified_lock:
        known = key in _verified
    if not known or status.st_size != record["bytes"]:
        settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        verify(storage, record)
        if settled:
            with _verified_lock:
                _verified.add(key)
    return path


def read_file(storage: Storage, record: Mapping[str, Any]) -> bytes:
    """The verified bytes of a file. CorruptShard when they differ from the record or the file is gone."""
    try:
        # One byte more than recorded shows a longer file without reading all of it.
        data = storage.read(record["path"], limit=record["bytes"] + 1)
    except FileNotFoundError as error:
        raise _mismatch(storage, record, "is missing, though a record lists it") from error
    if len(data) != record["bytes"] or xxhash.xxh3_128_hexdigest(data) != record["xxh3"]:
        raise _mismatch(storage, record, "does not match its checksum")
    return data


def publish(storage: Storage, path: str, data: bytes, attempt: str, read: Callable[[], str | None]) -> bool:
    """Create the record at `path` exclusively; True when it is `attempt`'s, False when another attempt's
    counts.

    `read()` returns the attempt id of the valid record that is there, None when there is none. A creation
    that failed without an answer is read back: if a record is there, it decides, otherwise the failure is
    raised.
    """
    for last in (False, False, True):
        failure: StoreError | None = None
        try:
            if storage.create(path, data):
                return True
        except StoreError as error:
            failure = error
        winner = read()
        if winner is not None:
            return winner == attempt
        if failure is not None:
            raise failure
        # Somebody was first and the record is gone again (quarantined or dropped meanwhile): once more.
        if last:
            break
    raise StoreError(f"{path} keeps appearing and disappearing", path=path)


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


class Attempt:
    """One try at a node. Its files are private until `commit`. Use from one thread."""

    def __init__(self, store: NodeStore, node_id: str, attempt_id: str | None = None) -> None:
        self.node_id = check_name(node_id)
        self.id = check_name(attempt_id or new_attempt_id())
        self.files: dict[str, FileRecord] = {}
        self._store = store

    @property
    def _folder(self) -> str:
        return f"nodes/{self.node_id}/attempts/{self.id}"

    def write(self, name: str, *buffers: Buffer) -> FileRecord:
        """Write file `name` (one path component), durable on return, to be published by `commit`.

        Buffers are C-contiguous. StoreError for bad names; storage errors as `Storage.write`.
        """
        record = write_file(self._store.storage, f"{self._folder}/{check_name(name)}", *buffers)
        self.files[name] = record
        return record

    def commit(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Publish every file written and the JSON `result`. Returns the commit that counts: ours or the
        winner's.

        After losing to another attempt this attempt's files are deleted: use the returned records. When the
        storage did not acknowledge, the record is read back first. StoreError when `result` is not JSON.
        """
        path = self._store.commit_path(self.node_id)
        record = {
            "format": FORMAT,
            "node": self.node_id,
            "attempt": self.id,
            "files": self.files,
            "result": dict(result),
        }
        data = dump_record(record, f"the result of node {self.node_id}")
        reach("node.written")

        def winner() -> str | None:
            commit = self._store.commit_of(self.node_id)
            return None if commit is None else str(commit["attempt"])

        publish(self._store.storage, path, data, self.id, winner)
        reach("node.committed")
        commit = self._store.commit_of(self.node_id)
        if commit is None:
            raise StoreError(f"{path} was there and is gone", path=path)
        if commit["attempt"] != self.id:
            with contextlib.suppress(StoreError):
                self._store.storage.delete_tree(self._folder)
        return commit

    def checkpoint(
        self,
        files: Mapping[str, Buffer | Sequence[Buffer]],
        position: Sequence[int],
        data: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """`NodeStore.save_checkpoint` for this attempt."""
        return self._store.save_checkpoint(self.node_id, self.id, files=files, position=position, data=data)


class NodeStore:
    """Commits, files and checkpoints of plan nodes under `nodes/` of one storage. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @staticmethod
    def commit_path(node_id: str) -> str:
        """Where a node's commit record is. StoreError for an id that is not a name."""
        return f"nodes/{check_name(node_id)}/commit.json"

    def commit_of(self, node_id: str) -> dict[str, Any] | None:
        """The commit of a node, None when it is not finished: {"format", "node", "attempt", "files",
        "result"}.

        CorruptRecord when the record is not one (wrong node, format or shape, larger than 16 MiB); it is left
        in place. Files are not read.
        """
        path = self.commit_path(node_id)
        data = read_bounded(self.storage, path)
        if data is None:
            return None
        record = parse_record(data, path)
        if record.get("format") != FORMAT:
            raise CorruptRecord(
                f"{self.storage.uri}: {path} has format {record.get('format')!r}, expected {FORMAT}",
                path=path,
            )
        attempt = record.get("attempt")
        if (
            record.get("node") != node_id
            or not isinstance(attempt, str)
            or not _NAME.fullmatch(attempt)
            or not isinstance(record.get("result"), dict)
            or not _valid_files(record.get("files"), f"nodes/{node_id}/attempts/{attempt}")
        ):
            raise CorruptRecord(
                f"{self.storage.uri}: {path} is not a commit of node {node_id}; move it away to run the node again",
                path=path,
            )
        return record

    def attempt(self, node_id: str) -> Attempt:
        """A fresh attempt at a node; nothing is written yet."""
        return Attempt(self, node_id)

    def read_file(self, record: Mapping[str, Any]) -> bytes:
        """The verified bytes of a published file. CorruptShard when they differ or the file is gone."""
        return read_file(self.storage, record)

    def verify(self, record: Mapping[str, Any]) -> None:
        """Check a published file without keeping it. CorruptShard when it differs or is gone."""
        verify(self.storage, record)

    def verified_path(self, record: Mapping[str, Any]) -> Path | None:
        """The file's local path, checked once by this process per (path, size, mtime); None when not local.

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
        losers = [name for name in self.storage.list(folder) if name != commit["attempt"]]
        for name in losers:
            self.storage.delete_tree(f"{folder}/{name}")
        return len(losers)

    def save_checkpoint(
        self,
        node_id: str,
        attempt_id: str,
        *,
        files: Mapping[str, Buffer | Sequence[Buffer]],
        position: Sequence[int],
        data: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Write a mid-stage checkpoint: `files` (one buffer or a list of buffers each), then the manifest
        that makes it count. `position`, ints such as (epoch, step), orders checkpoints over all attempts of
        the node; `data` is JSON of at most 16 MiB. One writer an attempt.

        StoreError for other `data` and for bad names; storage errors as `Storage.write`.
        """
        root = f"nodes/{check_name(node_id)}/checkpoints/{check_name(attempt_id)}"
        sequence = 1 + max((int(name) for name in self.storage.list(root) if name.isdecimal()), default=0)
        checkpoint = Checkpoint(node_id, attempt_id, sequence, tuple(int(p) for p in position), dict(data or {}), {})
        for name, buffers in files.items():
            pieces = buffers if isinstance(buffers, (list, tuple)) else (buffers,)
            path = f"{checkpoint.folder}/{check_name(name)}"
            checkpoint.files[name] = write_file(self.storage, path, *pieces)
        manifest = {
            "format": FORMAT,
            "node": node_id,
            "attempt": attempt_id,
            "sequence": sequence,
            "position": checkpoint.position,
            "data": checkpoint.data,
            "files": checkpoint.files,
        }
        raw = dump_record(manifest, f"a checkpoint of node {node_id}")
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
            if not _NAME.fullmatch(attempt):
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
        position, sequence, kept = record.get("position"), record.get("sequence"), record.get("data")
        if (
            record.get("format") != FORMAT
            or record.get("node") != node_id
            or record.get("attempt") != attempt
            or type(sequence) is not int
            or f"{sequence:06d}" != name
            or not isinstance(position, list)
            or not all(type(p) is int for p in position)
            or not isinstance(kept, dict)
            or not _valid_files(record.get("files"), path.rsplit("/", 1)[0])
        ):
            return None
        return Checkpoint(node_id, attempt, sequence, tuple(position), kept, record["files"])

    def latest_checkpoint(self, node_id: str, attempt_order: Sequence[str] | None = None) -> Checkpoint | None:
        """The newest checkpoint, over all attempts, whose files are all there and intact; None when there is
        none.

        Torn and damaged ones are passed over and left in place.
        """
        for _ in range(3):
            pruned = False
            for checkpoint in self.checkpoints(node_id, attempt_order):
                try:
                    for record in checkpoint.files.values():
                        self.verify(record)
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
