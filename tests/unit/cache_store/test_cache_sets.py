"""Shards and sets: what is read is what was written, or a typed error, never wrong data."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_store.errors import (
    CorruptRecord,
    CorruptShard,
    MissingShard,
    SegpropError,
    StorageFull,
    StorageUnavailable,
    StoreError,
)
from cache_store.formats import codec
from cache_store.formats.codec import Array, Field, decode, encode
from cache_store.formats.dtypes import STORED
from cache_store.records import files
from cache_store.records.record_io import parse_record
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage import local as storage_module
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

FIELDS = (Field("x", "bfloat16", (3, 5)), Field("label", "int64", ()), Field("image", "uint8", (7,)))


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def spec_of(rows: int = 20, shard_rows: int = 8, fields: tuple[Field, ...] = FIELDS, **key: Any) -> SetSpec:
    return SetSpec({"what": "test", **key}, rows, fields, 4, shard_rows)


def values(fields: tuple[Field, ...], rows: range, salt: int = 0) -> tuple[Array, ...]:
    """Random bits (NaNs included), a function of row and field alone."""
    arrays = []
    for k, field in enumerate(fields):
        bits = [np.random.default_rng((salt, k, row)).bytes(field.bytes) for row in rows]
        arrays.append(np.frombuffer(b"".join(bits), field.numpy_dtype).reshape(len(rows), *field.shape))
    return tuple(arrays)


def fill(snapshots: SnapshotSet, only: range | None = None) -> None:
    for i in only or range(snapshots.spec.shards):
        snapshots.put(i, values(snapshots.spec.fields, snapshots.spec.shard_range(i)))


def same_bits(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def shard_file(storage: Storage, snapshots: SnapshotSet, i: int) -> Path:
    (name,) = [n for n in storage.list(f"sets/{snapshots.spec.id}/shards") if n.startswith(f"{i:06d}.")]
    path = storage.local_path(f"sets/{snapshots.spec.id}/shards/{name}")
    assert path is not None
    return path


def commit_file(storage: Storage, snapshots: SnapshotSet, i: int) -> Path:
    path = storage.local_path(f"sets/{snapshots.spec.id}/commits/{i:06d}.json")
    assert path is not None
    return path


# The codec


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STORED)), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_decoding_returns_the_bits_encoded_for_every_dtype(kinds: list[tuple[str, list[int]]], rows: int) -> None:
    fields = tuple(Field(f"f{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds))
    arrays = values(fields, range(rows))
    data = b"".join(encode(fields, arrays))
    decoded = decode(data, fields, rows)
    assert all(same_bits(a, b) for a, b in zip(arrays, decoded, strict=True))
    assert not any(array.flags.writeable for array in decoded)
    assert data == b"".join(encode(fields, arrays))


def test_any_arrow_reader_reads_a_shard() -> None:
    data = b"".join(encode(FIELDS, values(FIELDS, range(9))))
    table = pa.ipc.open_file(data).read_all()
    table.validate(full=True)
    assert table.column_names == ["x", "label", "image"]
    assert table["label"][3].as_py() == values(FIELDS, range(9))[1][3].tobytes()


def test_encoding_shares_the_arrays_memory() -> None:
    big = np.zeros((16, 1024), np.float32)
    pieces = encode((Field("x", "float32", (1024,)),), [big])
    assert any(np.shares_memory(np.frombuffer(piece, np.uint8), big) for piece in pieces)
    assert sum(memoryview(piece).nbytes for piece in pieces) < big.nbytes + 2048


def test_arrays_that_are_not_contiguous_are_encoded_right() -> None:
    array = np.arange(48, dtype=np.int64).reshape(6, 8)[:, ::2]
    fields = (Field("x", "int64", (4,)),)
    assert same_bits(decode(b"".join(encode(fields, [array])), fields, 6)[0], np.ascontiguousarray(array))


@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [np.zeros((3, 4), np.float64)],
        [np.zeros((3, 5), np.float32)],
        [np.zeros((0, 4), np.float32)],
        [np.float32(1)],
        [np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)],
    ],
)
def test_arrays_that_are_not_the_fields_are_refused(arrays: list[Array]) -> None:
    with pytest.raises(ValueError, match="field"):
        encode((Field("x", "float32", (4,)),), arrays)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Field("x", "float64", ()),
        lambda: Field("a/b", "uint8", ()),
        lambda: Field("x", "uint8", (0,)),
        lambda: Field("x", "uint8", (-1,)),
        lambda: Field("x", "int64", (1 << 30,)),
        lambda: spec_of(rows=0),
        lambda: spec_of(shard_rows=6),
        lambda: spec_of(fields=()),
        lambda: spec_of(fields=(FIELDS[0], FIELDS[0])),
    ],
)
def test_impossible_fields_and_specs_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        build()


def test_bytes_of_another_shape_are_refused_before_use() -> None:
    arrays = values(FIELDS, range(8))
    data = b"".join(encode(FIELDS, arrays))
    others = [
        (data, FIELDS, 7),
        (data, FIELDS, 9),
        (data, FIELDS[:2], 8),
        (data, (Field("y", "bfloat16", (3, 5)), *FIELDS[1:]), 8),
        (data, (Field("x", "bfloat16", (5, 3)), *FIELDS[1:]), 8),
        (data, (Field("x", "float16", (3, 5)), *FIELDS[1:]), 8),
        (b"", FIELDS, 8),
        (os.urandom(len(data)), FIELDS, 8),
        (data * 2, FIELDS, 16),
    ]
    for buffer, fields, rows in others:
        with pytest.raises(CorruptShard):
            decode(buffer, fields, rows)


def test_compressed_and_split_arrow_files_are_refused() -> None:
    fields = (Field("x", "uint8", (4096,)),)
    array = pa.array([b"\0" * 4096] * 64, pa.binary(4096))
    schema = codec._schema(fields, 0, codec.describe(fields))

    def written(batches: int, **options: Any) -> Any:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            for _ in range(batches):
                writer.write_batch(pa.record_batch([array[: 64 // batches]], schema=schema))
        return sink.getvalue()

    assert decode(written(1), fields, 64)[0].shape == (64, 4096)
    for foreign in (written(2), written(1, compression="zstd")):
        with pytest.raises(CorruptShard):
            decode(foreign, fields, 64)


def test_decoding_damaged_bytes_fails_typed_or_gives_arrays_of_the_right_shape() -> None:
    fields = (Field("x", "uint8", (4,)), Field("y", "int64", ()))
    data = b"".join(encode(fields, values(fields, range(3))))
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        try:
            arrays = decode(bytes(damaged), fields, 3)
        except CorruptShard:
            continue
        assert [a.shape for a in arrays] == [(3, 4), (3,)]


# Sets


def test_a_set_returns_what_was_put(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    assert snapshots.missing() == [0, 1, 2]
    written = [snapshots.put(i, values(FIELDS, snapshots.spec.shard_range(i))) for i in (2, 0)]
    assert snapshots.missing() == [1]
    fill(snapshots)
    again = SnapshotStore(storage).load(snapshots.spec.id)
    assert again.spec == snapshots.spec
    assert again.missing() == []
    for i in range(3):
        expected = values(FIELDS, again.spec.shard_range(i))
        assert all(same_bits(a, b) for a, b in zip(again.shard(i), expected, strict=True))
    assert (again.counters.hits, again.counters.misses) == (3, 0)
    assert again.counters.bytes_read == again.spec.bytes == 20 * (30 + 8 + 7)
    assert snapshots.counters.bytes_written > again.spec.bytes
    assert min(written) > 0


def test_a_shard_of_the_wrong_number_of_rows_is_refused(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    for i, rows in ((0, range(7)), (2, range(8)), (0, range(0))):
        with pytest.raises(ValueError, match=r"rows|expected"):
            snapshots.put(i, values(FIELDS, rows))
    with pytest.raises(IndexError):
        snapshots.put(3, values(FIELDS, range(8)))


def test_the_set_id_covers_key_rows_fields_and_geometry() -> None:
    specs = [
        spec_of(),
        spec_of(view=1),
        spec_of(rows=21),
        spec_of(shard_rows=12),
        spec_of(fields=FIELDS[:2]),
        spec_of(fields=(Field("x", "float16", (3, 5)), *FIELDS[1:])),
        SetSpec({"what": "test"}, 20, FIELDS, 8, 8),
    ]
    assert len({spec.id for spec in specs}) == len(specs)
    assert spec_of().id == spec_of().id
    assert spec_of() == spec_of()


def test_a_second_put_writes_nothing(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    fill(snapshots)
    before = storage.list(f"sets/{snapshots.spec.id}/shards")
    assert SnapshotStore(storage).open(spec_of()).put(1, values(FIELDS, range(8, 16))) == 0
    assert storage.list(f"sets/{snapshots.spec.id}/shards") == before


def test_a_lost_race_leaves_the_winners_shard_and_no_bytes_of_the_loser(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (SnapshotStore(storage).open(spec_of()) for _ in range(2))
    arrays = values(FIELDS, range(8))
    create = type(storage)._create
    done: list[int] = []

    def late(self: Storage, path: str, data: bytes) -> bool:
        if "/commits/" in path and not done:
            done.append(0)
            done[0] = theirs.put(0, arrays)
        return create(self, path, data)

    monkeypatch.setattr(type(storage), "_create", late)
    assert ours.put(0, arrays) == 0
    assert done[0] > 0
    assert len(storage.list(f"sets/{ours.spec.id}/shards")) == 1
    assert all(same_bits(a, b) for a, b in zip(ours.shard(0), arrays, strict=True))


@pytest.mark.parametrize("landed", [True, False])
def test_an_unacknowledged_commit_is_read_back(storage: Storage, monkeypatch: pytest.MonkeyPatch, landed: bool) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    create = type(storage)._create

    def lost_reply(self: Storage, path: str, data: bytes) -> bool:
        if landed:
            create(self, path, data)
        raise TimeoutError("no reply")

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "_create", lost_reply)
        if landed:
            assert snapshots.put(0, values(FIELDS, range(8))) > 0
        else:
            with pytest.raises(StorageUnavailable):
                snapshots.put(0, values(FIELDS, range(8)))
    assert snapshots.missing() == ([1, 2] if landed else [0, 1, 2])
    # On doubt nothing is deleted.
    assert len(storage.list(f"sets/{snapshots.spec.id}/shards")) == 1


def test_of_eight_racing_threads_one_publishes_each_shard(storage: Storage) -> None:
    spec = spec_of(rows=40)
    results: list[int] = []
    start = threading.Barrier(8)

    def race() -> None:
        snapshots = SnapshotStore(storage).open(spec)
        start.wait()
        for i in range(spec.shards):
            results.append(snapshots.put(i, values(FIELDS, spec.shard_range(i))))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert sum(1 for size in results if size) == spec.shards
    assert len(storage.list(f"sets/{spec.id}/shards")) == spec.shards
    SnapshotStore(storage).load(spec.id).digest()


def test_a_missing_shard_is_a_typed_error(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    fill(snapshots, range(2))
    with pytest.raises(MissingShard, match="no shard 2"):
        snapshots.shard(2)
    with pytest.raises(MissingShard):
        snapshots.digest()
    with pytest.raises(MissingShard):
        SnapshotStore(storage).load("0" * 32)
    assert SnapshotStore(storage).find("0" * 32) is None
    assert SnapshotStore(storage).find(snapshots.spec.id) is not None
    assert (snapshots.counters.hits, snapshots.counters.misses) == (0, 1)


def test_a_rebuilt_shard_gives_the_same_digest(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    fill(snapshots)
    digest = snapshots.digest()
    storage.delete(f"sets/{snapshots.spec.id}/commits/000001.json")
    fill(snapshots)
    assert SnapshotStore(storage).load(snapshots.spec.id).digest() == digest
    other = SnapshotStore(storage).open(spec_of(view=2))
    for i in range(3):
        other.put(i, values(FIELDS, other.spec.shard_range(i), salt=1))
    assert other.digest() != digest


def test_mapped_arrays_are_aligned_read_only_and_hold_no_file_open(local: Storage) -> None:
    snapshots = SnapshotStore(local).open(spec_of(rows=1000))
    fill(snapshots)
    before = len(os.listdir("/proc/self/fd"))
    arrays = [array for i in range(snapshots.spec.shards) for array in snapshots.shard(i)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert not any(array.flags.writeable for array in arrays)
    assert snapshots.shard(3)[0] is snapshots.shard(3)[0]


def test_drop_removes_the_set_and_keeps_mapped_arrays_valid(storage: Storage) -> None:
    store = SnapshotStore(storage)
    snapshots, other = store.open(spec_of()), store.open(spec_of(view=1))
    fill(snapshots)
    fill(other)
    arrays = snapshots.shard(0)
    store.drop(snapshots.spec.id)
    store.drop(snapshots.spec.id)
    assert all(same_bits(a, b) for a, b in zip(arrays, values(FIELDS, range(8)), strict=True))
    assert [info.id for info in store.list()] == [other.spec.id]
    with pytest.raises(MissingShard):
        SnapshotStore(storage).load(snapshots.spec.id)
    # Whoever still has it open makes it whole again.
    snapshots.put(1, values(FIELDS, range(8, 16)))
    assert store.load(snapshots.spec.id).missing() == [0, 2]


def test_drop_takes_the_records_first(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SnapshotStore(storage)
    fill(store.open(spec_of()))
    delete_tree = type(storage)._delete_tree

    def once(self: Storage, prefix: str) -> None:
        delete_tree(self, prefix)
        raise OSError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "_delete_tree", once)
        with pytest.raises(StoreError):
            store.drop(spec_of().id)
    again = store.load(spec_of().id)
    assert again.missing() == [0, 1, 2]
    assert len(storage.list(f"sets/{again.spec.id}/shards")) == 3
    store.drop(again.spec.id)
    assert store.list() == []


def test_list_tells_what_is_there(storage: Storage) -> None:
    store = SnapshotStore(storage)
    assert store.list() == []
    snapshots = store.open(spec_of(view=3))
    fill(snapshots, range(2))
    (info,) = store.list()
    assert (info.id, dict(info.key), info.rows) == (snapshots.spec.id, {"what": "test", "view": 3}, 20)
    assert (info.shards_present, info.shards) == (2, 3)
    assert info.bytes == snapshots.counters.bytes_written


def test_a_foreign_set_json_is_refused(storage: Storage) -> None:
    store = SnapshotStore(storage)
    snapshots, other = store.open(spec_of()), store.open(spec_of(view=1))
    path = f"sets/{snapshots.spec.id}/set.json"
    good = storage.read(path)
    foreign = storage.read(f"sets/{other.spec.id}/set.json")
    for data in (
        foreign,
        b"{",
        b"[]",
        b"{}",
        good[:-1],
        good.replace(b'"rows":20', b'"rows":-1'),
        b"\xff" * 10,
    ):
        storage.write(path, data)
        with pytest.raises(CorruptRecord):
            store.load(snapshots.spec.id)
        with pytest.raises(CorruptRecord):
            store.open(snapshots.spec)
        assert len(store.list()) == 2


# Damage


def outcome(storage: Storage, spec: SetSpec, i: int = 0) -> str:
    """ "equal", "corrupt" or "missing"; wrong data fails the test. Afterwards the shard can be put again."""
    snapshots = SnapshotStore(storage).open(spec)
    expected = values(spec.fields, spec.shard_range(i))
    try:
        found = snapshots.shard(i)
    except CorruptShard:
        assert i in snapshots.missing()
        return "corrupt"
    except MissingShard:
        return "missing"
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True)), "wrong data"
    return "equal"


class Fast:
    """A small shard that is damaged thousands of times: no fsync, one folder."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.spec = SetSpec({}, 3, (Field("x", "uint8", (4,)), Field("y", "int64", ())), 1, 3)
        self.set = SnapshotStore(storage).open(self.spec)
        fill(self.set)
        self.shard = shard_file(storage, self.set, 0)
        self.commit = commit_file(storage, self.set, 0)
        self.good = {path: path.read_bytes() for path in (self.shard, self.commit)}

    def restore(self) -> None:
        for path, data in self.good.items():
            path.write_bytes(data)


@pytest.fixture
def fast(local: Storage, monkeypatch: pytest.MonkeyPatch) -> Fast:
    found = Fast(local)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return found


def test_every_flipped_byte_of_a_shard_is_found(fast: Fast) -> None:
    for position in range(len(fast.good[fast.shard])):
        damaged = bytearray(fast.good[fast.shard])
        damaged[position] ^= 1 << position % 8
        fast.restore()
        fast.shard.write_bytes(damaged)
        assert outcome(fast.storage, fast.spec) == "corrupt", position
    assert fast.set.put(0, values(fast.spec.fields, range(3))) > 0
    assert outcome(fast.storage, fast.spec) == "equal"


def test_every_truncation_of_a_shard_is_found(fast: Fast) -> None:
    whole = fast.good[fast.shard]
    for size in [*range(len(whole)), len(whole) + 1]:
        fast.restore()
        fast.shard.write_bytes((whole + b"\0")[:size])
        assert outcome(fast.storage, fast.spec) == "corrupt", size


def test_no_flipped_byte_or_truncation_of_a_record_gives_wrong_data(fast: Fast) -> None:
    whole = fast.good[fast.commit]
    damaged = [whole[:size] for size in range(len(whole))]
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        damaged.append(bytes(flipped))
    seen = set()
    for data in damaged:
        fast.restore()
        fast.commit.write_bytes(data)
        seen.add(outcome(fast.storage, fast.spec))
    assert seen == {"corrupt"}


def test_swapped_shard_files_and_swapped_records_are_found(local: Storage) -> None:
    for swap in (shard_file, commit_file):
        spec = spec_of(swap=swap.__name__)
        snapshots = SnapshotStore(local).open(spec)
        fill(snapshots)
        first, second = (swap(local, snapshots, i) for i in (0, 1))
        first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
        first.write_bytes(second_bytes)
        second.write_bytes(first_bytes)
        assert [outcome(local, spec, i) for i in range(3)] == ["corrupt", "corrupt", "equal"]


def test_a_consistent_shard_of_another_set_is_found(storage: Storage) -> None:
    store = SnapshotStore(storage)
    ours, other = store.open(spec_of()), store.open(spec_of(view=1))
    fill(ours)
    other.put(0, values(FIELDS, range(8), salt=9))
    storage.delete(f"sets/{ours.spec.id}/commits/000000.json")
    storage.move(f"sets/{other.spec.id}/commits/000000.json", f"sets/{ours.spec.id}/commits/000000.json")
    assert outcome(storage, ours.spec) == "corrupt"


@pytest.mark.parametrize(
    "file", ["../../outside", "/etc/passwd", "store.json", "sets/x/shards/000000.a.arrow", 7, None]
)
def test_a_record_naming_a_file_elsewhere_is_refused_and_the_file_untouched(
    local: Storage, tmp_path: Path, file: Any
) -> None:
    (tmp_path / "outside").write_bytes(b"precious")
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    path = commit_file(local, snapshots, 0)
    record = parse_record(path.read_bytes(), "record")
    path.write_text(json.dumps({**record, "file": file}))
    assert outcome(local, snapshots.spec) == "corrupt"
    assert (tmp_path / "outside").read_bytes() == b"precious"
    assert local.exists("store.json")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"set": "0" * 32},
        {"index": 1},
        {"rows": 7},
        {"bytes": -1},
        {"bytes": 1e3},
        {"xxh3_128": "zz"},
        {"sha256": ""},
        {"attempt": "../a"},
    ],
)
def test_a_record_of_another_shape_is_quarantined_and_put_succeeds(storage: Storage, change: dict[str, Any]) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    fill(snapshots)
    path = f"sets/{snapshots.spec.id}/commits/000000.json"
    record = parse_record(storage.read(path), path)
    storage.write(path, json.dumps({**record, **change}).encode())
    assert snapshots.put(0, values(FIELDS, range(8))) > 0
    assert outcome(storage, snapshots.spec) == "equal"
    assert len(storage.list(f"sets/{snapshots.spec.id}/quarantine")) == 1


def test_a_huge_record_is_not_read_whole(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    storage.write(f"sets/{snapshots.spec.id}/commits/000000.json", b" " * ((16 << 20) + 1))
    with pytest.raises(CorruptShard, match="longer than"):
        snapshots.shard(0)


def test_a_file_deleted_under_its_record_is_quarantined_and_put_succeeds(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    fill(snapshots)
    folder = f"sets/{snapshots.spec.id}/shards"
    for name in storage.list(folder):
        storage.delete(f"{folder}/{name}")
    assert snapshots.put(0, values(FIELDS, range(8))) > 0
    assert [outcome(storage, snapshots.spec, i) for i in (0, 1)] == ["equal", "corrupt"]


def test_quarantine_keeps_the_damaged_bytes(local: Storage) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    path = shard_file(local, snapshots, 0)
    path.write_bytes(b"x" * path.stat().st_size)
    assert outcome(local, snapshots.spec) == "corrupt"
    folder = f"sets/{snapshots.spec.id}/quarantine"
    names = local.list(folder)
    assert sorted(name.rsplit(".", 1)[1] for name in names) == ["arrow", "json"]
    assert any(set(local.read(f"{folder}/{name}")) == {ord("x")} for name in names)


def test_quarantine_gives_back_a_record_that_was_replaced_meanwhile(local: Storage) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    error = snapshots.quarantine(0, b"the record judged", None, "test")
    assert isinstance(error, CorruptShard)
    assert outcome(local, snapshots.spec) == "equal"


def test_a_damaged_shard_in_a_read_only_store_is_still_a_typed_error(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    shard_file(local, snapshots, 0).write_bytes(b"")

    def fail(*_: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CorruptShard, match="could not be quarantined"):
        snapshots.shard(0)


def test_a_shard_is_read_whole_once_by_a_process_and_again_when_its_file_changed(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    path = shard_file(local, snapshots, 0)
    os.utime(path, ns=(1, 1))
    real, checked = files.verify, []

    def spy(storage: Storage, record: Any) -> None:
        checked.append(record.path)
        real(storage, record)

    monkeypatch.setattr(files, "verify", spy)
    assert [outcome(local, snapshots.spec) for _ in range(3)] == ["equal"] * 3
    assert len(checked) == 1
    path.write_bytes(b"x" * path.stat().st_size)
    assert outcome(local, snapshots.spec) == "corrupt"


def test_a_failing_disk_is_not_taken_for_damage(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)

    def fail(*_: object) -> Any:
        raise OSError(5, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(storage_module.LocalStorage, "_open", fail)
        with pytest.raises(StorageUnavailable):
            snapshots.shard(0)
    assert snapshots.missing() == []


def test_errors_survive_being_shipped_to_another_process() -> None:
    error = CorruptShard("text", set="a", shard=3)
    rebuild, arguments = error.__reduce__()
    again = rebuild(*arguments)
    assert (type(again), again.message, again.details) == (CorruptShard, "text", {"set": "a", "shard": 3})
    assert isinstance(again, SegpropError)


# The reader


def expected_rows(spec: SetSpec, rows: Array) -> list[bytes]:
    everything = values(spec.fields, range(spec.rows))
    return [array[rows].tobytes() for array in everything]


def bytes_of(tensor: torch.Tensor) -> bytes:
    raw: Array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.tobytes()


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gathering_any_rows_in_any_order_returns_what_was_written(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    group = data.draw(st.integers(1, 5))
    shard_rows = group * data.draw(st.integers(1, 12))
    fields = tuple(
        Field(f"f{i}", dtype, tuple(data.draw(st.lists(st.integers(1, 4), max_size=2))))
        for i, dtype in enumerate(data.draw(st.permutations(sorted(STORED)))[:3])
    )
    spec = SetSpec({"id": data.draw(st.integers(0, 10**9))}, rows, fields, group, shard_rows)
    snapshots = SnapshotStore(open_storage(f"memory://{uuid.uuid4().hex}")).open(spec)
    fill(snapshots)
    reader = RowReader(snapshots)
    order = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=60)), np.int64)
    fresh = reader.gather(order)
    assert [bytes_of(tensor) for tensor in fresh] == expected_rows(spec, order)
    assert [str(t.dtype).removeprefix("torch.") for t in fresh] == [f.dtype for f in fields]
    assert [tuple(t.shape) for t in fresh] == [(len(order), *f.shape) for f in fields]
    out = reader.empty(len(order) + 2)
    reused = reader.gather(torch.from_numpy(order), out)
    assert [bytes_of(tensor) for tensor in reused] == expected_rows(spec, order)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(out, reused, strict=True) if len(order))


def test_gathered_tensors_are_the_callers_to_write(local: Storage) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    for tensor in RowReader(snapshots).gather(np.arange(20)):
        tensor.zero_()
    assert outcome(local, snapshots.spec) == "equal"


def test_missing_shards_are_computed_put_and_served(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    fill(snapshots, range(1, 2))
    asked: list[int] = []

    def compute(i: int) -> tuple[Array, ...]:
        asked.append(i)
        return values(FIELDS, snapshots.spec.shard_range(i))

    reader = RowReader(snapshots, compute)
    order = np.random.default_rng(0).permutation(20)
    for _ in range(2):
        assert [bytes_of(t) for t in reader.gather(order)] == expected_rows(snapshots.spec, order)
    assert sorted(asked) == [0, 2]
    assert snapshots.missing() == []
    assert (snapshots.counters.hits, snapshots.counters.misses) == (4, 2)
    assert snapshots.counters.bytes_read == 2 * snapshots.spec.bytes


def test_damaged_shards_are_rebuilt_and_served(local: Storage) -> None:
    spec = spec_of()
    fill(SnapshotStore(local).open(spec))
    snapshots = SnapshotStore(local).open(spec)
    path = shard_file(local, snapshots, 1)
    path.write_bytes(path.read_bytes()[:-1])
    reader = RowReader(snapshots, lambda i: values(FIELDS, spec.shard_range(i)))
    assert [bytes_of(t) for t in reader.gather(np.arange(20))] == expected_rows(spec, np.arange(20))
    assert snapshots.counters.misses == 1
    assert outcome(local, spec, 1) == "equal"


def test_without_compute_the_typed_error_reaches_the_caller(local: Storage) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots, range(2))
    with pytest.raises(MissingShard):
        RowReader(snapshots).gather(np.arange(20))
    shard_file(local, snapshots, 0).write_bytes(b"")
    with pytest.raises(CorruptShard):
        RowReader(SnapshotStore(local).open(spec_of())).gather(np.arange(8))


def test_a_full_disk_while_inserting_reaches_the_caller(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = SnapshotStore(local).open(spec_of())

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StorageFull):
        RowReader(snapshots, lambda i: values(FIELDS, snapshots.spec.shard_range(i))).gather(np.arange(4))


def test_two_threads_compute_a_missing_shard_once(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    asked: list[int] = []
    start = threading.Barrier(4)

    def compute(i: int) -> tuple[Array, ...]:
        asked.append(i)
        return values(FIELDS, snapshots.spec.shard_range(i))

    reader = RowReader(snapshots, compute)
    results: list[list[bytes]] = []

    def gather() -> None:
        start.wait()
        results.append([bytes_of(t) for t in reader.gather(np.arange(20))])

    threads = [threading.Thread(target=gather) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == [0, 1, 2]
    assert results == [expected_rows(snapshots.spec, np.arange(20))] * 4


@pytest.mark.parametrize("rows", [[-1], [20], [0, 99]])
def test_rows_outside_the_set_are_refused(storage: Storage, rows: list[int]) -> None:
    snapshots = SnapshotStore(storage).open(spec_of())
    with pytest.raises(IndexError, match="20 rows"):
        RowReader(snapshots).gather(np.array(rows))


def test_rows_and_outputs_of_another_kind_are_refused(storage: Storage) -> None:
    snapshots = SnapshotStore(storage).open(spec_of(fields=FIELDS[1:2]))
    fill(snapshots)
    reader = RowReader(snapshots)
    for rows in (np.zeros((2, 2), np.int64), np.array([0.0]), np.array([True])):
        with pytest.raises(ValueError, match="rows"):
            reader.gather(rows)
    for out in (
        [],
        [torch.zeros(3)],
        [torch.zeros(1, dtype=torch.int64)],
        [torch.zeros(3, 1, dtype=torch.int64)],
        [torch.zeros(6, dtype=torch.int64)[::2]],
    ):
        with pytest.raises(ValueError, match="out"):
            reader.gather(np.arange(3), out)


def test_storage_that_cannot_be_mapped_keeps_a_bounded_number_of_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cache_store.snapshots.shard_cache.UNMAPPED_BYTES", 2 * 8 * 45)
    snapshots = SnapshotStore(open_storage(f"memory://{uuid.uuid4().hex}")).open(spec_of(rows=64))
    fill(snapshots)
    for i in range(8):
        snapshots.shard(i)
    assert snapshots._kept.keys() == [(snapshots.spec.id, 6), (snapshots.spec.id, 7)]


def test_record_checksums_are_those_of_the_file(local: Storage) -> None:
    snapshots = SnapshotStore(local).open(spec_of())
    fill(snapshots)
    record = json.loads(commit_file(local, snapshots, 2).read_bytes())
    data = shard_file(local, snapshots, 2).read_bytes()
    assert record["xxh3_128"] == xxhash.xxh3_128_hexdigest(data)
    assert (record["bytes"], record["rows"], record["index"]) == (len(data), 4, 2)
