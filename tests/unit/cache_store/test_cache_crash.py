"""Processes: killed writers at every crash point, and races between processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache_store import crashpoints
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage

ROOT = Path(__file__).parents[3]
SPEC = SetSpec({"what": "crash"}, 8, (Field("x", "int64", (3,)),), 4, 8)
ARRAY = np.arange(24, dtype=np.int64).reshape(8, 3)

WRITER = """
import sys
import numpy as np
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
storage = open_storage(sys.argv[1])
snapshots = SnapshotStore(storage).open(SetSpec({"what": "crash"}, 8, (Field("x", "int64", (3,)),), 4, 8))
print("put", snapshots.put(0, [np.arange(24, dtype=np.int64).reshape(8, 3)]), flush=True)
attempt = NodeStore(storage).attempt("node")
attempt.write("f", b"x" * 100)
attempt.checkpoint({"model": b"model"}, (1, 2), {"step": 2})
commit = attempt.commit({"ok": True})
print("commit", commit.attempt == attempt.id, flush=True)
"""


def start(store: Path, crash: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEGPROP_CRASH": crash}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store)], env=environment, text=True, stdout=subprocess.PIPE
    )


def check(store: Path) -> tuple[bool, bool, bool]:
    """Whether shard, node and checkpoint are published; anything published must be whole."""
    storage = open_storage(str(store))
    snapshots = SnapshotStore(storage).open(SPEC)
    shard = snapshots.missing() == []
    if shard:
        assert (snapshots.shard(0)[0] == ARRAY).all()
    nodes = NodeStore(storage)
    commit = nodes.commit_of("node")
    if commit is not None:
        assert nodes.read_file(commit.files["f"]) == b"x" * 100
    checkpoint = nodes.latest_checkpoint("node")
    if checkpoint is not None:
        assert nodes.read_file(checkpoint.files["model"]) == b"model"
    return shard, commit is not None, checkpoint is not None


# Creates, in order: probe (twice), store.json, set.json, shard record, manifest, commit.
@pytest.mark.parametrize(
    ("point", "published"),
    [
        ("storage.before-rename:1", (False, False, False)),  # the shard's bytes
        ("storage.before-link:5", (False, False, False)),  # the shard's record
        (
            "storage.after-link:4",
            (True, False, False),
        ),  # the same, linked
        ("storage.before-link:7", (True, False, True)),  # the node's commit
        ("shard.written:1", (False, False, False)),
        ("shard.committed:1", (True, False, False)),
        ("checkpoint.written:1", (True, False, False)),
        ("checkpoint.committed:1", (True, False, True)),
        ("node.written:1", (True, False, True)),
        ("node.committed:1", (True, True, True)),
    ],
)
def test_a_writer_killed_at_any_point_leaves_whole_records_or_none(
    tmp_path: Path, point: str, published: tuple[bool, bool, bool]
) -> None:
    store = tmp_path / "store"
    crash = f"{point}:{tmp_path / 'marker'}"
    process = start(store, crash)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert check(store) == published
    storage = open_storage(str(store))
    put = SnapshotStore(storage).open(SPEC).put(0, [ARRAY])
    assert (put == 0) == published[0]
    attempt = NodeStore(storage).attempt("node")
    attempt.write("f", b"x" * 100)
    assert (attempt.commit({}).attempt == attempt.id) == (not published[1])
    assert check(store)[:2] == (True, True)


def test_a_crash_point_kills_once_per_marker(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    marker.write_text("")
    process = start(tmp_path / "store", f"shard.written:1:{marker}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "commit True" in output


def test_of_four_processes_one_publishes(tmp_path: Path) -> None:
    store = tmp_path / "store"
    processes = [start(store) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("commit True" in output for output in outputs) == 1
    assert sum("put 0" not in output for output in outputs) == 1
    assert check(store) == (True, True, True)
    assert len(os.listdir(store / "nodes/node/attempts")) == 1
    assert len(os.listdir(store / "sets" / SPEC.id / "shards")) == 1
    assert json.loads((store / "store.json").read_text())["format"] == 1
    assert sorted(os.listdir(store)) == ["nodes", "sets", "store.json"]


def test_unarmed_points_do_nothing() -> None:
    assert not crashpoints._armed
    for point in crashpoints.POINTS:
        crashpoints.reach(point)


@pytest.mark.parametrize("value", ["x", "x:1", "x:0:m", "x:a:m", ":1:m", "x:1:"])
def test_a_malformed_setting_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="SEGPROP_CRASH"):
        crashpoints._parse(value)
