"""Copies on this machine's disk: which go, which stay, and that none is ever trusted unchecked."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
import xxhash
from counting_storage import Counting, put
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import CorruptShard, UserError
from cache_store.records.eviction import GRACE_S, Copy, default_limit, victims
from cache_store.records.files import read_file, verify_once
from cache_store.records.local_cache import LocalCache

NOW = 1_000_000.0

copies_of = st.lists(
    st.builds(
        Copy,
        name=st.uuids().map(str),
        bytes=st.integers(0, 100),
        used=st.floats(NOW - 10 * GRACE_S, NOW + GRACE_S),
        unfinished=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda copy: copy.name,
)


@given(copies_of, st.integers(0, 200), st.integers(0, 600))
def test_victims_make_room_oldest_first_and_spare_what_is_in_use(copies: list[Copy], needed: int, limit: int) -> None:
    chosen = victims(copies, needed, limit, NOW)
    free = [copy for copy in copies if not copy.unfinished and copy.used <= NOW - GRACE_S]
    total = sum(copy.bytes for copy in copies)
    if chosen is None:
        assert needed > limit or total - sum(copy.bytes for copy in free) + needed > limit
        return
    gone = [copy for copy in copies if copy.name in chosen]
    assert total - sum(copy.bytes for copy in gone) + needed <= limit
    assert all(copy in free for copy in gone)
    # Nothing used less recently stays while something used later goes, and none goes without need.
    assert chosen == [copy.name for copy in sorted(free, key=lambda copy: (copy.used, copy.name))][: len(chosen)]
    if gone:
        last = next(copy for copy in gone if copy.name == chosen[-1])
        assert total - sum(copy.bytes for copy in gone) + last.bytes + needed > limit


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50))
def test_the_default_leaves_as_much_free_as_it_takes(free: int, held: int) -> None:
    limit = default_limit(free, held)
    assert free + held - limit >= limit


@pytest.fixture
def storage() -> Counting:
    return Counting()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGPROP_CACHE_DIR", str(tmp_path / "machine"))
    monkeypatch.setenv("SEGPROP_CACHE_BYTES", "1000000")
    return tmp_path / "machine"


def held(folder: Path) -> set[str]:
    return set(os.listdir(folder / "files"))


def test_a_file_is_downloaded_once_and_served_verified(storage: Counting, folder: Path) -> None:
    record = put(storage, "f")
    paths = {verify_once(storage, record) for _ in range(3)}
    assert len(paths) == storage.reads == 1
    (path,) = paths
    assert path is not None
    assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == record.xxh3
    assert held(folder) == {f"{record.sha256}.1000"}


def test_two_stores_with_the_same_file_share_its_copy(storage: Counting, folder: Path) -> None:
    other = Counting()
    assert verify_once(storage, put(storage, "f")) == verify_once(other, put(other, "f"))
    assert (storage.reads, other.reads) == (1, 0)


def test_a_copy_damaged_on_this_disk_is_replaced_and_the_store_not_blamed(storage: Counting, folder: Path) -> None:
    record = put(storage, "f")
    path = verify_once(storage, record)
    assert path is not None
    for damage in (b"x" * 1000, b"x", b""):
        path.write_bytes(damage)
        found = verify_once(storage, record)
        assert found is not None
        assert hashlib.sha256(found.read_bytes()).hexdigest() == record.sha256
    assert storage.reads == 4


def test_bytes_damaged_once_on_their_way_are_asked_for_again(storage: Counting, folder: Path) -> None:
    record = put(storage, "f")
    storage.damaged = 1
    path = verify_once(storage, record)
    assert path is not None
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256


def test_a_file_damaged_in_the_store_is_a_typed_error_and_leaves_no_copy(storage: Counting, folder: Path) -> None:
    record = put(storage, "f")
    for data in (b"x" * 1000, b"x" * 999, b"x" * 1001):
        storage.write("f", data)
        with pytest.raises(CorruptShard):
            verify_once(storage, record)
        assert held(folder) == set()
    storage.delete("f")
    with pytest.raises(CorruptShard, match="is missing"):
        verify_once(storage, record)


def test_the_copies_stay_within_their_bytes_least_recently_used_first(
    storage: Counting, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGPROP_CACHE_BYTES", "3500")
    records = [put(storage, f"file{'x' * i}") for i in range(5)]
    for i, record in enumerate(records):
        path = verify_once(storage, record)
        assert path is not None
        # Long ago, the first ones last: their age decides, not their order of arrival.
        old = 1e9 - i if i < 3 else 1e9 + i
        os.utime(path, (old, os.stat(path).st_mtime))
        assert sum(entry.stat().st_size for entry in os.scandir(folder / "files")) <= 3500
    assert held(folder) == {f"{record.sha256}.1000" for record in (records[0], records[3], records[4])}


def test_what_finds_no_room_is_read_from_the_store(
    storage: Counting, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = put(storage, "f")
    for setting in ("999", "0"):
        monkeypatch.setenv("SEGPROP_CACHE_BYTES", setting)
        assert verify_once(storage, record) is None
        assert len(read_file(storage, record)) == 1000
    monkeypatch.setenv("SEGPROP_CACHE_BYTES", "1500")
    assert verify_once(storage, record) is not None
    assert verify_once(storage, put(storage, "other")) is None  # the first was used a moment ago


def test_a_folder_that_cannot_be_written_is_no_error(
    storage: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGPROP_CACHE_DIR", str(tmp_path / "file" / "below"))
    record = put(storage, "f")
    assert verify_once(storage, record) is None
    assert len(read_file(storage, record)) == 1000


def test_a_bad_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPROP_CACHE_BYTES", "1 GB")
    with pytest.raises(UserError, match="SEGPROP_CACHE_BYTES"):
        LocalCache.from_environment()


def test_a_part_left_by_a_killed_process_is_taken_over_and_others_make_room(
    storage: Counting, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = put(storage, "f")
    (folder / "files").mkdir(parents=True)
    part = folder / "files" / f"{record.sha256}.1000.part"
    part.write_bytes(b"half")
    path = verify_once(storage, record)
    assert path is not None
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record.sha256
    # Another one's, which nobody comes back for, is evicted as any copy is.
    monkeypatch.setenv("SEGPROP_CACHE_BYTES", "2500")
    (folder / "files" / "gone.part").write_bytes(b"x" * 1400)
    os.utime(folder / "files" / "gone.part", (1e9, 1e9))
    assert verify_once(storage, put(storage, "other")) is not None
    assert "gone.part" not in held(folder)


def test_of_racing_threads_one_downloads(storage: Counting, folder: Path) -> None:
    record = put(storage, "f", 200_000)
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(verify_once(storage, record))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert storage.reads == 1
    assert held(folder) == {f"{record.sha256}.200000"}
