"""Every single bit of what a store holds, flipped; every truncation; strange files: a typed error or right data."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cache_store.audit import Audit
from cache_store.errors import CorruptRecord, CorruptShard, MissingShard, SegpropError
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.records.record_io import dump_record, parse_record
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

SPEC = SetSpec({"k": 1}, 4, (Field("x", "uint8", (3,)), Field("y", "int64", ())), 1, 2)


def values(i: int) -> list[np.ndarray]:
    return [np.full((2, 3), 7 + i, np.uint8), np.array([5, 6 + i], np.int64)]


@pytest.fixture
def folder() -> Iterator[str]:
    """In memory where there is such a file system: things are damaged thousands of times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sp-", dir=memory) as found:
        yield found


@pytest.fixture
def storage(folder: str, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Two shards, a node and a checkpoint."""
    found = open_storage(f"{folder}/store")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    snapshots = SnapshotStore(found).open(SPEC)
    for i in range(2):
        snapshots.put(i, values(i))
    attempt = NodeStore(found).attempt("node")
    attempt.write("f", b"weights")
    attempt.checkpoint({"f": b"state"}, (3, 4), {"loss": 0.125})
    attempt.commit({"accuracy": 0.5})
    return found


def damages(good: bytes) -> Iterator[bytes]:
    for place in range(len(good)):
        for bit in range(8):
            flipped = bytearray(good)
            flipped[place] ^= 1 << bit
            yield bytes(flipped)
    for size in range(len(good)):
        yield good[:size]


def only(storage: Storage, pattern: str) -> Path:
    (path,) = sorted(Path(storage.uri).glob(pattern))[:1]
    return path


def read_shard(storage: Storage) -> bool:
    found = SnapshotStore(storage).load(SPEC.id).shard(0)
    assert all((a == b).all() for a, b in zip(found, values(0), strict=True)), "wrong data"
    return True


def read_commit(storage: Storage) -> bool:
    nodes = NodeStore(storage)
    commit = nodes.commit_of("node")
    assert commit is not None
    assert commit.result == {"accuracy": 0.5}, "wrong data"
    assert nodes.read_file(commit.files["f"]) == b"weights", "wrong data"
    return True


def read_checkpoint(storage: Storage) -> bool:
    nodes = NodeStore(storage)
    found = nodes.latest_checkpoint("node")
    if found is None:  # passed over
        return False
    assert (found.position, found.data) == ((3, 4), {"loss": 0.125}), "wrong data"
    assert nodes.read_file(found.files["f"]) == b"state", "wrong data"
    return True


@pytest.mark.parametrize(
    ("pattern", "read", "harmless"),
    [
        ("sets/*/shards/000000*", read_shard, 0),
        ("sets/*/commits/000000.json", read_shard, 0),
        ("sets/*/set.json", read_shard, 0),
        ("nodes/node/commit.json", read_commit, 0),
        ("nodes/node/attempts/*/f", read_commit, 0),
        ("nodes/node/checkpoints/*/*/manifest.json", read_checkpoint, 0),
        ("nodes/node/checkpoints/*/*/f", read_checkpoint, 0),
        ("store.json", lambda storage: bool(open_storage(storage.uri)), 0),
    ],
    ids=["shard", "record", "set", "commit", "file", "manifest", "state", "marker"],
)
def test_no_flipped_bit_and_no_truncation_gives_wrong_data(
    storage: Storage, pattern: str, read: Callable[[Storage], bool], harmless: int
) -> None:
    path = only(storage, pattern)
    record = only(storage, "sets/*/commits/000000.json")
    shard = only(storage, "sets/*/shards/000000*")
    good = {each: each.read_bytes() for each in {path, record, shard}}
    assert read(storage)
    passed = 0
    for damaged in damages(good[path]):
        for each, data in good.items():
            each.write_bytes(data)
        path.write_bytes(damaged)
        try:
            passed += read(storage)
        except SegpropError:
            continue
    # Only a marker may say the same in another spelling: a space can become another blank.
    assert passed <= (4 if path.name == "store.json" else harmless)


def test_swapped_duplicated_deleted_and_foreign_files_are_found_or_ignored(storage: Storage) -> None:
    root = Path(storage.uri)
    records = [root / f"sets/{SPEC.id}/commits/{i:06d}.json" for i in range(2)]
    shards = sorted((root / f"sets/{SPEC.id}/shards").iterdir())
    # Foreign files, and second copies under names no record lists.
    for name in ("notes.txt", "000000.zz.arrow", "000007.a.arrow", ".DS_Store"):
        shutil.copy(shards[0], shards[0].parent / name)
    (records[0].parent / "notes.txt").write_text("x")
    (records[0].parent / "999999.json").write_text("{}")
    (root / "sets" / "foreign").mkdir()
    (root / "sets" / "not a name").write_text("")
    (root / "nodes" / "foreign").write_text("")
    again = SnapshotStore(storage).load(SPEC.id)
    assert again.missing() == []
    assert all(read(storage) for read in (read_shard, read_commit, read_checkpoint))
    # A record under another index.
    data = [record.read_bytes() for record in records]
    records[0].write_bytes(data[1])
    with pytest.raises(CorruptShard):
        read_shard(storage)
    # A shard deleted under its record.
    shards[1].unlink()
    with pytest.raises(CorruptShard):
        again.shard(1)
    assert again.missing() == [0, 1]
    with pytest.raises(MissingShard):
        again.shard(0)
    for i in range(2):
        assert again.put(i, values(i)) > 0
    assert read_shard(storage)


def test_a_file_that_has_grown_is_not_read_by_an_audit(storage: Storage) -> None:
    """Of a terabyte that takes no space nothing is waited for."""
    for pattern in ("nodes/node/attempts/*/f", "nodes/node/checkpoints/*/*/f", "sets/*/shards/000000*"):
        os.truncate(only(storage, pattern), 1 << 27)
    audit = Audit(storage)
    found = list(audit.run())
    assert len(found) == 3
    assert all("it has 134217728 bytes, its record says" in finding.reason for finding in found)
    assert audit.tally.bytes < 1 << 20


def test_records_without_a_checksum_of_themselves_are_still_read(storage: Storage) -> None:
    """A store of the version before."""
    for path in [
        only(storage, "sets/*/commits/000000.json"),
        only(storage, "nodes/node/commit.json"),
        only(storage, "nodes/node/checkpoints/*/*/manifest.json"),
    ]:
        path.write_text(json.dumps(parse_record(path.read_bytes(), str(path)), separators=(",", ":")))
    assert all(read(storage) for read in (read_shard, read_commit, read_checkpoint))


def test_a_record_returns_what_was_put_into_it_and_refuses_any_change() -> None:
    record = {"a": [1.5, "ü", None, True], "b": {"c": {}}}
    data = dump_record(record, "record")
    assert parse_record(data, "record") == record
    for damaged in damages(data):
        try:
            assert set(parse_record(damaged, "record")) != set(record), "the same keys, so not noticed"
        except CorruptRecord:
            continue
