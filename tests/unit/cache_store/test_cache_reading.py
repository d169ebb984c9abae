"""Reading ahead, limits to what is held, and gathers of runs: the bytes are those that were written, always checked."""

from __future__ import annotations

import gc
import threading
import time
import uuid
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.errors import CorruptShard, MissingShard
from cache_store.formats.codec import PACKED, Array, Field
from cache_store.snapshots import gather as copies_module
from cache_store.snapshots import gather as runs_module
from cache_store.snapshots.gather import Copier
from cache_store.snapshots.read_ahead import ReadAhead
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.shard_cache import ShardCache
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

WIDE, NARROW = Field("x", "bfloat16", (5000,)), Field("label", "int64", ())


def values(rows: range) -> tuple[Array, ...]:
    row = np.arange(rows.start, rows.stop)
    return (row[:, None] * 31 + np.arange(5000)).astype(np.uint16), row * 10**12


def filled(storage: Storage, cuts: list[int], kept: ShardCache | None = None) -> SnapshotSet:
    spec = SetSpec.ragged({"what": "reading"}, (WIDE, NARROW), 1, cuts)
    snapshots = SnapshotStore(storage).open(spec, kept)
    for i in snapshots.missing():
        snapshots.put(i, values(spec.shard_range(i)))
    return snapshots


def local(folder: Path) -> Storage:
    return open_storage(str(folder / "store"))


def same(found: tuple[torch.Tensor, ...], rows: Array) -> bool:
    wide, narrow = values(range(int(rows.max(initial=0)) + 1))
    return bool(
        (found[0].view(torch.int16).numpy().view(np.uint16) == wide[rows]).all()
        and (found[1].numpy() == narrow[rows]).all()
    )


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 20)), max_size=15),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 20_000, 10**9]),
)
@settings(max_examples=60, deadline=None)
def test_runs_over_any_cuts_are_gathered_by_any_number_of_threads(
    lengths: list[int], runs: list[tuple[int, int]], threads: int, limit: int
) -> None:
    snapshots = filled(
        open_storage(f"memory://{uuid.uuid4().hex}"), np.cumsum([0, *lengths]).tolist(), ShardCache(limit)
    )
    rows = np.concatenate(
        [np.empty(0, np.int64), *((np.arange(start, start + count) % snapshots.spec.rows) for start, count in runs)]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies_module, "SHARE_BYTES", 8)
        assert same(RowReader(snapshots, threads=threads).gather(rows), rows)


def test_threads_share_rows_of_which_every_shard_has_few(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: dict[str, int] = {}
    copy = Copier.copy

    def counted(self: Copier, first: int, last: int, source: np.ndarray, target: np.ndarray) -> None:
        name = threading.current_thread().name
        copied[name] = copied.get(name, 0) + last - first
        copy(self, first, last, source, target)

    monkeypatch.setattr(Copier, "copy", counted)
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), list(range(0, 129, 2)))
    rows = np.random.default_rng(0).permutation(64) * 2
    monkeypatch.setattr(copies_module, "SHARE_BYTES", 8 * snapshots.spec.row_bytes)
    assert same(RowReader(snapshots, threads=4).gather(rows), rows)
    here = copied.pop(threading.current_thread().name)
    # Two groups of 32 rows, of each of which every thread gets a quarter; both columns of a row.
    assert here == 2 * 16
    assert sum(copied.values()) == 2 * 48


def test_threads_hold_a_few_shards_of_a_gather_over_many(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[np.ndarray]] = []
    most = 0
    read = RowReader._bytes

    def counted(self: RowReader, i: int) -> tuple[tuple[tuple[Array, ...], memoryview | bytes], bool]:
        nonlocal most
        found, hit = read(self, i)
        held.append(weakref.ref(found[0][0]))
        most = max(most, sum(array() is not None for array in held))
        return found, hit

    monkeypatch.setattr(RowReader, "_bytes", counted)
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), list(range(401)), ShardCache(1))
    monkeypatch.setattr(copies_module, "SHARE_BYTES", 4 * snapshots.spec.row_bytes)
    rows = np.random.default_rng(0).permutation(400)
    assert same(RowReader(snapshots, threads=2).gather(rows), rows)
    # Groups of 8, one being collected, and those of at most 4 copies that wait.
    assert most <= 50


def test_after_an_error_nobody_writes_to_the_output_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    writing: set[int] = set()
    copy = Copier.copy

    def slow(self: Copier, first: int, last: int, source: np.ndarray, target: np.ndarray) -> None:
        if threading.current_thread() is not threading.main_thread():
            writing.add(threading.get_ident())
            time.sleep(0.3)
            copy(self, first, last, source, target)
            writing.discard(threading.get_ident())

    monkeypatch.setattr(Copier, "copy", slow)
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), list(range(65)))
    snapshots.storage.delete(f"sets/{snapshots.spec.id}/commits/000063.json")
    monkeypatch.setattr(copies_module, "SHARE_BYTES", 8 * snapshots.spec.row_bytes)
    with pytest.raises(MissingShard):
        RowReader(snapshots, threads=4).gather(np.arange(0, 64)[::-1].copy())
    assert not writing


@pytest.mark.parametrize(("bytes_of_a_run", "few"), [(1, 0), (1 << 40, 0), (1 << 40, 16)])
def test_all_ways_of_copying_give_the_same_rows(bytes_of_a_run: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "RUN_BYTES", bytes_of_a_run)
    monkeypatch.setattr(runs_module, "RUN_BYTES_TOGETHER", bytes_of_a_run)
    monkeypatch.setattr(runs_module, "FEW_RUNS", few)
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), [0, 4, 9, 20])
    for rows in (np.array([3, 4, 5, 0, 0, 19, 12, 13]), np.arange(20), np.arange(20)[::-1], np.array([7])):
        assert same(RowReader(snapshots).gather(rows), rows)


def test_what_is_held_stays_within_the_limit_and_is_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ShardCache(3 * 10_100)
    snapshots = filled(local(tmp_path), list(range(41)), kept)
    monkeypatch.setattr("cache_store.records.files._SETTLED_NS", 0)
    checked: list[str] = []
    verify = "cache_store.records.files.verify"
    original = __import__("cache_store.records.files", fromlist=["verify"]).verify
    monkeypatch.setattr(verify, lambda storage, record: (checked.append(record.path), original(storage, record)))
    reader = RowReader(snapshots)
    for _ in range(2):
        for rows in np.random.default_rng(0).permutation(40).reshape(8, 5):
            assert same(reader.gather(rows), rows)
            assert kept.bytes <= 3 * 10_100
            assert len(kept.keys()) == 3
    assert len(checked) == len(set(checked)) == 40


def test_mapped_shards_of_a_folder_are_all_held_where_nothing_is_said(tmp_path: Path) -> None:
    kept = ShardCache()
    snapshots = filled(local(tmp_path), list(range(11)), kept)
    assert snapshots.holds_all
    RowReader(snapshots).gather(np.arange(10))
    assert (len(kept.keys()), kept.bytes) == (10, 0)
    assert not filled(open_storage(f"memory://{uuid.uuid4().hex}"), [0, 1]).holds_all
    packed = replace(snapshots.spec, key={"what": "packed"}, codec_version=PACKED)
    assert not SnapshotStore(snapshots.storage).open(packed).holds_all  # unpacked into memory, which is bounded


def test_a_held_shard_is_asked_for_once_whatever_is_gathered_from_it(tmp_path: Path) -> None:
    snapshots = filled(local(tmp_path), [0, 3, 6])
    touched: list[int] = []
    touch = snapshots.touch
    snapshots.touch = lambda i: (touched.append(i), touch(i))[1]  # type: ignore[method-assign, assignment]
    reader = RowReader(snapshots)
    for rows in ([5, 0], [1, 2, 3], [4]):
        assert same(reader.gather(np.array(rows)), np.array(rows))
    assert sorted(touched) == [0, 1]
    assert snapshots.counters.hits == 2 + 2 + 1
    reader.expect(np.array([0, 1]))  # nothing is left to be read ahead
    reader.forget()
    assert sorted(touched) == [0, 1]


def test_two_sets_share_one_limit(tmp_path: Path) -> None:
    kept = ShardCache(25_000)
    one = filled(local(tmp_path / "a"), [0, 1, 2], kept)
    other = SnapshotStore(one.storage).open(SetSpec({"other": 1}, 2, (NARROW, WIDE), 1, 1), kept)
    for i in range(2):
        other.put(i, values(range(i, i + 1))[::-1])
    one.shard(0), other.shard(0), other.shard(1)
    assert kept.keys() == [(other.spec.id, 0), (other.spec.id, 1)]
    other.close()
    assert (kept.keys(), kept.bytes) == ([], 0)


def test_memory_is_bounded_by_the_limit_over_a_set_ten_times_as_large() -> None:
    limit = 4 << 20
    kept = ShardCache(limit)
    rows = 10 * limit // 10_008
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), [*range(0, rows, 50), rows], kept)
    reader = RowReader(snapshots)
    reader.expect(np.arange(snapshots.spec.shards), depth=2)
    gc.collect()
    for start in range(0, rows, 50):
        index = np.arange(start, min(start + 50, rows))
        assert same(reader.gather(index), index)
        assert kept.bytes <= limit
    reader.forget()
    assert len(kept.keys()) < snapshots.spec.shards / 5


def test_a_shard_let_go_and_replaced_meanwhile_is_read_anew(tmp_path: Path) -> None:
    storage = local(tmp_path)
    snapshots = filled(storage, [0, 1, 2], ShardCache(1))
    reader = RowReader(snapshots)
    assert same(reader.gather(np.arange(2)), np.arange(2))
    other = SnapshotStore(storage).load(snapshots.spec.id)
    SnapshotStore(storage).drop(snapshots.spec.id)
    with pytest.raises(MissingShard):
        reader.gather(np.arange(1))
    SnapshotStore(storage).open(other.spec)
    other.put(0, values(range(1)))
    assert same(reader.gather(np.arange(1)), np.arange(1))


def test_a_shard_let_go_and_damaged_meanwhile_is_refused(tmp_path: Path) -> None:
    storage = local(tmp_path)
    snapshots = filled(storage, [0, 1, 2], ShardCache(1))
    RowReader(snapshots).gather(np.arange(2))
    (path,) = (tmp_path / "store" / "sets" / snapshots.spec.id / "shards").glob("000000.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard):
        RowReader(snapshots).gather(np.arange(1))


def test_expected_shards_are_read_in_the_order_of_first_need() -> None:
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), list(range(9)))
    read: list[int] = []
    touch = snapshots.touch
    snapshots.touch = lambda i: (read.append(i), touch(i))[1]  # type: ignore[method-assign, assignment]
    reader = RowReader(snapshots)
    reader.expect(np.array([5, 5, 2, 7, 2, 0]))
    until(lambda: len(read) == 4)
    assert read == [5, 2, 7, 0]
    reader.forget()
    assert same(reader.gather(np.array([7, 5])), np.array([7, 5]))


def test_no_more_is_read_ahead_than_asked_for() -> None:
    read: list[int] = []
    ahead = ReadAhead(range(10), lambda i: (read.append(i), values(range(1)))[1], depth=2)
    until(lambda: read == [0, 1])
    time.sleep(0.05)
    assert read == [0, 1]
    ahead.used(1)
    until(lambda: read == [0, 1, 2, 3])
    ahead.used(8)
    until(lambda: read == [0, 1, 2, 3, 9])  # 4 to 8 are in use already
    ahead.close()


def test_two_threads_read_two_shards_at_a_time_and_no_further_ahead_than_one() -> None:
    read: list[int] = []
    both = threading.Barrier(2)

    def load(i: int) -> tuple[Array, ...]:
        read.append(i)
        both.wait(timeout=10)  # passes only while two are being loaded
        return values(range(1))

    ahead = ReadAhead([4, 0, 3, 1, 2, 5], load, depth=2, threads=2)
    until(lambda: sorted(read) == [0, 4])
    time.sleep(0.05)
    ahead.used(0)
    until(lambda: sorted(read) == [0, 1, 3, 4])
    time.sleep(0.05)
    assert len(read) == 4
    ahead.used(2)  # the last is due, and nothing comes beside it
    until(lambda: len(read) == 5)
    both.wait(timeout=10)
    ahead.close()
    assert read[4] == 5


def test_what_cannot_be_read_ahead_is_left_to_whoever_wants_it(tmp_path: Path) -> None:
    snapshots = filled(local(tmp_path), [0, 1, 2, 3])
    (path,) = (tmp_path / "store" / "sets" / snapshots.spec.id / "shards").glob("000001.*")
    path.write_bytes(b"")
    made: list[int] = []
    reader = RowReader(snapshots, lambda i: (made.append(i), values(snapshots.spec.shard_range(i)))[1])
    reader.expect(np.arange(3))
    until(lambda: len(snapshots._kept.keys()) == 2)
    assert same(reader.gather(np.arange(3)), np.arange(3))
    assert made == [1]
    reader.forget()


def test_a_shard_wanted_while_it_is_read_ahead_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = filled(open_storage(f"memory://{uuid.uuid4().hex}"), [0, 1])
    loads: list[int] = []
    load = snapshots._load

    def slow(i: int) -> tuple[tuple[Array, ...], bool]:
        loads.append(i)
        time.sleep(0.1)
        return load(i)

    monkeypatch.setattr(snapshots, "_load", slow)
    threads = [threading.Thread(target=snapshots.touch, args=(0,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [0]


def until(condition: object) -> None:
    ends = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.005)
