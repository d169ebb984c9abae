"""Disks that are full or may only be read: typed errors, nothing half-written, and a rerun completes."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from counting_storage import Counting, put

from cache_store.errors import StorageDenied, StorageFull
from cache_store.formats.codec import Field
from cache_store.records.files import verify_once
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

SPEC = SetSpec({"what": "full"}, 64, (Field("x", "uint8", (4096,)),), 8, 8)


def values(i: int) -> list[np.ndarray]:
    return [np.full((8, 4096), i, np.uint8)]


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where that is not allowed."""
    folder.mkdir(exist_ok=True)
    program = shutil.which("mount")
    made = program and subprocess.run(
        [program, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not made or made.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(storage: Storage) -> int:
    """Puts shards until an error; the number that are there."""
    snapshots = SnapshotStore(storage).open(SPEC)
    try:
        for i in range(8):
            snapshots.put(i, values(i))
    finally:
        for i in range(8):
            if i not in snapshots.missing():
                assert (snapshots.shard(i)[0] == i).all()
    return 8 - len(snapshots.missing())


def test_a_disk_that_fills_up_is_a_typed_error_and_a_rerun_completes(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=160k") as disk:
        storage = open_storage(str(disk / "store"))
        with pytest.raises(StorageFull, match="free some space"):
            fill(storage)
        assert not [path for path in disk.rglob("*") if path.name.startswith(".tmp-")]
        there = 8 - len(SnapshotStore(storage).open(SPEC).missing())
        assert 1 <= there < 8
        attempt = NodeStore(storage).attempt("node")
        with pytest.raises(StorageFull):
            attempt.write("f", b"x" * 200_000)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert fill(storage) == 8
        attempt.write("f", b"x" * 200_000)
        assert attempt.commit({}).attempt == attempt.id


def test_a_store_remounted_read_only_can_be_read_and_not_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        assert fill(open_storage(str(disk / "store"))) == 8
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        storage = open_storage(str(disk / "store"))
        snapshots = SnapshotStore(storage).load(SPEC.id)
        assert (snapshots.shard(3)[0] == 3).all()
        for action in (lambda: storage.write("f", b"1"), lambda: storage.create("g", b"1")):
            with pytest.raises(StorageDenied, match="must be writable"):
                action()
        with pytest.raises(StorageDenied):
            open_storage(str(disk / "another"))


def test_a_full_disk_for_copies_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        monkeypatch.setenv("SEGPROP_CACHE_DIR", str(disk))
        monkeypatch.setenv("SEGPROP_CACHE_BYTES", "10000000")
        storage = Counting()
        assert verify_once(storage, put(storage, "small", 1000)) is not None
        assert verify_once(storage, put(storage, "large", 200_000)) is None
        assert sorted(path.stat().st_size for path in (disk / "files").iterdir()) == [1000]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from cache_store.errors import StorageFull
from cache_store.storage.open import open_storage
storage = open_storage(sys.argv[1])
for action in (storage.write, storage.create):
    try:
        action("d/f", b"x" * 100_000)
    except StorageFull as error:
        print("full", error.message)
assert storage.list("d") == []
"""


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(tmp_path: Path) -> None:
    assert hasattr(signal, "SIGXFSZ")
    assert hasattr(resource, "RLIMIT_FSIZE")
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("full cannot ") == 2
