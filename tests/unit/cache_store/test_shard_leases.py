"""Leases avoid double work, end by themselves, and never make anybody wait for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cache_store.errors import StorageUnavailable
from cache_store.records.leases import LEASE_S, Leases
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

FOLDER = "sets/s/leases"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_one_holder_at_a_time(storage: Storage) -> None:
    first, second = Leases(storage, FOLDER), Leases(storage, FOLDER)
    assert first.take("000001")
    assert not second.take("000001")
    assert second.take("000002"), "another name is free"
    assert first.names() == ["000001", "000002"]
    first.release("000001")
    assert second.take("000001")
    first.release("000001")
    assert not first.take("000001"), "what is not held is not given back"


def test_of_many_at_once_one_gets_it(storage: Storage) -> None:
    taken: list[int] = []
    barrier = threading.Barrier(16)

    def work(number: int) -> None:
        leases = Leases(storage, FOLDER)
        barrier.wait()
        if leases.take("000000"):
            taken.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1


def test_a_lease_left_behind_long_ago_is_taken_at_once(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert Leases(storage, FOLDER).take("000000")
    os.utime(tmp_path / FOLDER / "000000", (time.time() - LEASE_S - 1,) * 2)
    assert Leases(storage, FOLDER).take("000000")


def test_a_lease_that_is_not_renewed_ends_and_one_that_is_does_not(tmp_path: Path) -> None:
    storage, clock = open_storage(str(tmp_path)), Clock()
    holder, other = Leases(storage, FOLDER, clock=clock), Leases(storage, FOLDER, clock=clock)
    assert holder.take("000000")
    for _ in range(4):
        assert not other.take("000000")
        clock.now += LEASE_S / 2
        time.sleep(0.01)  # so that the file's time differs
        holder.renew("000000")
    clock.now += LEASE_S / 2
    assert not other.take("000000")
    clock.now += LEASE_S
    assert other.take("000000"), "the holder has not been heard of"
    assert not holder.take("000000")


def test_a_lease_from_the_future_ends_too(tmp_path: Path) -> None:
    storage, clock = open_storage(str(tmp_path)), Clock()
    assert Leases(storage, FOLDER).take("000000")
    os.utime(tmp_path / FOLDER / "000000", (time.time() + 1e6,) * 2)
    other = Leases(storage, FOLDER, clock=clock)
    assert not other.take("000000")
    clock.now += LEASE_S
    assert other.take("000000")


def test_renewing_writes_only_now_and_then_and_a_failure_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, clock = open_storage(str(tmp_path)), Clock()
    leases = Leases(storage, FOLDER, clock=clock)
    leases.take("000000")
    writes = 0

    def write(*_: object) -> int:
        nonlocal writes
        writes += 1
        raise StorageUnavailable("not now")

    monkeypatch.setattr(storage, "write", write)
    for _ in range(100):
        leases.renew("000000")
    assert writes == 0
    clock.now += LEASE_S / 3
    for _ in range(100):
        leases.renew("000000")
    assert writes == 1
    leases.renew("another")
    assert writes == 1
