"""A file truncated while it is mapped: right rows or a typed error, and never the end of the process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

#: Each case has a set of its own; of all the first of two shards is truncated.
CASES = """
import itertools, os, sys
import numpy as np
from cache_store.errors import CorruptShard
from cache_store.formats.codec import Field
from cache_store.snapshots import store as module
from cache_store.snapshots.gather import Copier
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage

FIELDS = (Field("x", "float32", (1024,)), Field("y", "int64", ()))
storage = open_storage(sys.argv[1])
numbers = itertools.count()
mapping = module.map_file

def values(i):
    rows = np.arange(32 * i, 32 * i + 32)
    return [(rows[:, None] * 1000.0 + np.arange(1024) + 1).astype(np.float32), rows + 1]

whole = [np.concatenate(pair) for pair in zip(values(0), values(1))]

def filled(codec=1):
    snapshots = SnapshotStore(storage).open(SetSpec({"k": next(numbers)}, 64, FIELDS, 1, 32, codec_version=codec))
    for i in range(2):
        snapshots.put(i, values(i))
    (first,) = (storage.root / snapshots._root / "shards").glob("000000.*")
    return snapshots, first, first.stat().st_size

def same(found, rows=np.arange(64)):
    return all((tensor.numpy() == column[rows]).all() for tensor, column in zip(found, whole))

def refused(act):
    try:
        act()
    except CorruptShard as error:
        return error.details["shard"] == 0
    return False
"""
#: A few bytes less is no signal: the rest of the last page reads as zeros.
SIZES = "(0, size // 2, size - 1)"


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CASES + script, str(folder / "store")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def works(script: str, folder: Path) -> None:
    found = run(script, folder)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("size", ["0", "size // 2", "size - 1"])
def test_a_shard_truncated_between_two_copies_of_a_gather_is_made_again(size: str, tmp_path: Path) -> None:
    works(
        f"""
copy = Copier.copy
for rows, threads in itertools.product((np.arange(64), np.arange(64)[::-1].copy()), (1, 3)):
    snapshots, first, size = filled()
    made, copied = [], []
    reader = RowReader(snapshots, lambda i: (made.append(i), values(i))[1], threads=threads)
    assert same(reader.gather(rows), rows) and made == []

    def then_truncate(self, *arguments):
        copy(self, *arguments)
        if not copied:
            os.truncate(first, {size})
        copied.append(1)

    Copier.copy = then_truncate
    assert same(reader.gather(rows), rows) and made == [0], (rows, threads)
    Copier.copy = copy
    assert same(reader.gather(rows), rows) and made == [0]
    assert len(list((storage.root / snapshots._root / "quarantine").iterdir())) == 2
""",
        tmp_path,
    )


def test_without_a_way_to_make_it_again_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    works(
        f"""
for turn in range(3):
    snapshots, first, size = filled()
    reader = RowReader(snapshots)
    assert same(reader.gather(np.arange(64)))
    os.truncate(first, {SIZES}[turn])
    assert refused(lambda: reader.gather(np.arange(64))), turn
""",
        tmp_path,
    )


def test_what_is_copied_out_of_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    works(
        f"""
for turn in range(3):
    snapshots, first, size = filled()

    def copy(arrays):
        os.truncate(first, {SIZES}[turn])
        return arrays[0].copy()

    assert (snapshots.read(0, lambda arrays: arrays[0].copy()) == values(0)[0]).all()
    assert refused(lambda: snapshots.read(0, copy)), turn
""",
        tmp_path,
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_truncated_before_or_after_it_is_mapped_is_made_again(when: str, tmp_path: Path) -> None:
    works(
        f"""
for turn, codec in itertools.product(range(3), (1, 2)):
    snapshots, first, size = filled(codec)

    def truncated(path, length):
        found = mapping(path, length) if {when == "after"} else None
        os.truncate(path, {SIZES}[turn])
        return found or mapping(path, length)

    module.map_file = truncated
    made = []
    compute = lambda i: (made.append(i), setattr(module, "map_file", mapping), values(i))[2]
    assert same(RowReader(snapshots, compute).gather(np.arange(64))) and made == [0], (turn, codec)
""",
        tmp_path,
    )


@pytest.mark.parametrize("also", ["", "import faulthandler; faulthandler.enable()"])
def test_a_bus_error_elsewhere_still_ends_the_process(also: str, tmp_path: Path) -> None:
    found = run(
        f"""
import mmap
snapshots, _, _ = filled()
RowReader(snapshots).gather(np.arange(64))
{also}
foreign = open(sys.argv[1] + "/other", "w+b")
foreign.truncate(8192)
mapped = mmap.mmap(foreign.fileno(), 8192)
foreign.truncate(0)
mapped[5000]
""",
        tmp_path,
    )
    assert found.returncode == -signal.SIGBUS
