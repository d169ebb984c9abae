"""Commits and checkpoints of nodes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from cache_store.errors import CorruptRecord, CorruptShard, StorageUnavailable, StoreError
from cache_store.records.files import read_file, verify
from cache_store.records.nodes import Commit, NodeStore
from cache_store.records.record_io import new_attempt_id
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

NODE = "abc123"


@pytest.fixture(params=["local", "memory"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> NodeStore:
    uri = str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return NodeStore(open_storage(uri))


@pytest.fixture
def local(tmp_path: Path) -> NodeStore:
    return NodeStore(open_storage(str(tmp_path / "store")))


def test_a_commit_publishes_files_and_result(nodes: NodeStore) -> None:
    assert nodes.commit_of(NODE) is None
    attempt = nodes.attempt(NODE)
    record = attempt.write("state.safetensors", b"head", np.arange(1000))
    assert nodes.commit_of(NODE) is None
    commit = attempt.commit({"loss": 0.5, "rows": [1, 2]})
    assert commit == nodes.commit_of(NODE)
    assert (commit.node, commit.attempt) == (NODE, attempt.id)
    assert commit.result == {"loss": 0.5, "rows": [1, 2]}
    data = b"head" + np.arange(1000).tobytes()
    assert commit.files == {"state.safetensors": record}
    kept = json.loads(nodes.storage.read(f"nodes/{NODE}/commit.json"))
    assert set(kept) == {"format", "node", "attempt", "files", "result", "check"}
    assert {key: kept[key] for key in kept if key != "check"} == commit.to_json()
    assert kept["files"]["state.safetensors"] == record.to_json()
    assert record.to_json() == {
        "path": f"nodes/{NODE}/attempts/{attempt.id}/state.safetensors",
        "bytes": len(data),
        "xxh3": xxhash.xxh3_128_hexdigest(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert nodes.read_file(record) == read_file(nodes.storage, record) == data
    nodes.verify(record)


def test_the_second_attempt_gets_the_winners_commit_and_its_own_files_go(nodes: NodeStore) -> None:
    first, second = nodes.attempt(NODE), nodes.attempt(NODE)
    first.write("a", b"1")
    second.write("a", b"2")
    winner = first.commit({"who": 1})
    assert second.commit({"who": 2}) == winner == nodes.commit_of(NODE)
    assert first.commit({"who": 3}) == winner
    assert nodes.storage.list(f"nodes/{NODE}/attempts") == [first.id]
    assert nodes.read_file(winner.files["a"]) == b"1"


def test_of_eight_racing_attempts_all_get_the_one_commit(nodes: NodeStore) -> None:
    start = threading.Barrier(8)
    commits: list[Commit] = []

    def race(me: int) -> None:
        attempt = nodes.attempt(NODE)
        attempt.write("f", str(me).encode())
        start.wait()
        commits.append(attempt.commit({"who": me}))

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commits) == 8
    assert all(commit == commits[0] for commit in commits)
    assert nodes.read_file(commits[0].files["f"]) == str(commits[0].result["who"]).encode()


@pytest.mark.parametrize("before", ["absent", "ours", "theirs"])
def test_an_unacknowledged_commit_is_read_back(nodes: NodeStore, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    attempt, rival = nodes.attempt(NODE), nodes.attempt(NODE)
    attempt.write("f", b"1")
    storage_class = type(nodes.storage)
    create = storage_class._create
    theirs = rival.commit({"who": "them"}) if before == "theirs" else None

    def lost_reply(self: Storage, path: str, data: bytes) -> bool:
        if before == "ours":
            create(self, path, data)
        raise TimeoutError("no reply")

    monkeypatch.setattr(storage_class, "_create", lost_reply)
    if before == "absent":
        with pytest.raises(StorageUnavailable):
            attempt.commit({"who": "us"})
        assert nodes.storage.exists(f"nodes/{NODE}/attempts/{attempt.id}/f")
    elif before == "ours":
        assert attempt.commit({"who": "us"}).attempt == attempt.id
    else:
        assert attempt.commit({"who": "us"}) == theirs


@pytest.mark.parametrize("result", [{"a": float("nan")}, {"a": {1, 2}}, {"a": "x" * (16 << 20)}])
def test_a_result_that_is_not_small_json_is_refused_and_nothing_committed(nodes: NodeStore, result: Any) -> None:
    with pytest.raises(StoreError):
        nodes.attempt(NODE).commit(result)
    assert nodes.commit_of(NODE) is None


def test_a_commit_records_what_the_node_is_made_of_and_is_read_with_and_without_it(nodes: NodeStore) -> None:
    identity = {"kind": "train", "task": {"lr": 0.1}}
    assert nodes.identity_of(NODE) is None
    commit = nodes.attempt(NODE, identity).commit({"a": 1})
    assert nodes.identity_of(NODE) == identity
    assert nodes.commit_of(NODE) == commit
    nodes.attempt("older").commit({})
    assert nodes.identity_of("older") == {}


def damaged(commit: dict[str, Any]) -> list[bytes]:
    (name,) = commit["files"]
    record = commit["files"][name]
    changes: list[dict[str, Any]] = [
        {"format": 2},
        {"node": "other"},
        {"attempt": None},
        {"attempt": "../x"},
        {"result": []},
        {"files": []},
        {"files": {name: 1}},
        {"files": {"other": record}},
        {"files": {"../x": record}},
        *({"files": {name: {**record, **c}}} for c in ({"bytes": -1}, {"xxh3": "q"}, {"sha256": 1}, {"more": 1})),
        *({"files": {name: {**record, "path": p}}} for p in ("/etc/passwd", "../../x", "store.json")),
    ]
    whole = json.dumps(commit).encode()
    raw = [whole[:size] for size in range(0, len(whole), 7)]
    raw += [b"[]", b"\xff\xfe", b"[" * 100_000, b" " * ((16 << 20) + 1), b'{"format": NaN}', b"1" * 5000]
    return raw + [json.dumps({**commit, **change}).encode() for change in changes]


def test_every_damaged_commit_is_refused_with_its_path(nodes: NodeStore) -> None:
    attempt = nodes.attempt(NODE)
    attempt.write("f", b"1")
    for data in damaged(attempt.commit({}).to_json()):
        nodes.storage.write(f"nodes/{NODE}/commit.json", data)
        with pytest.raises(CorruptRecord, match=r"commit\.json"):
            nodes.commit_of(NODE)
        assert nodes.storage.exists(f"nodes/{NODE}/commit.json")


def test_damaged_and_missing_files_are_refused(local: NodeStore) -> None:
    record = local.attempt(NODE).write("f", b"precious bytes")
    path = local.storage.local_path(record.path)
    assert path is not None
    assert local.verified_path(record) == path
    for data in (b"precious byteS", b"precious byte", b"precious bytes!", b""):
        path.write_bytes(data)
        os.utime(path, ns=(1, len(data)))
        for check in (local.read_file, local.verify, local.verified_path, lambda r: verify(local.storage, r)):
            with pytest.raises(CorruptShard, match="attempts"):
                check(record)
    path.unlink()
    for check in (local.read_file, local.verify, local.verified_path):
        with pytest.raises(CorruptShard, match="missing"):
            check(record)


def test_a_mapped_file_is_checked_once_until_it_changes(local: NodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record = local.attempt(NODE).write("f", b"1")
    checked: list[str] = []
    monkeypatch.setattr("cache_store.records.files.verify", lambda _, r: checked.append(r.path))
    path = local.verified_path(record)
    assert path is not None
    local.verified_path(record)
    assert len(checked) == 2  # so young a file might change within one tick of the clock
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        assert NodeStore(local.storage).verified_path(record) == path
        assert len(checked) == 3
    os.utime(path, ns=(2, 2))
    local.verified_path(record)
    assert len(checked) == 4


def test_storage_that_is_not_local_has_no_path_to_map() -> None:
    nodes = NodeStore(open_storage(f"memory://{uuid.uuid4().hex}"))
    assert nodes.verified_path(nodes.attempt(NODE).write("f", b"1")) is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", ".hidden", "a b", "x" * 300, "a\n"])
def test_names_that_are_not_one_path_component_are_refused(nodes: NodeStore, name: str) -> None:
    with pytest.raises(StoreError):
        nodes.attempt(NODE).write(name, b"")
    with pytest.raises(StoreError):
        nodes.attempt(name)
    with pytest.raises(StoreError):
        nodes.commit_of(name)
    with pytest.raises(StoreError):
        nodes.drop_checkpoints(name)


def test_attempt_ids_are_unique_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({new_attempt_id() for _ in range(1000)}) == 1000
    early = new_attempt_id()
    monkeypatch.setattr("time.time_ns", lambda: 4 * 10**18)
    assert early < new_attempt_id()


def test_pruning_keeps_the_committed_attempt_only(nodes: NodeStore) -> None:
    lost, kept = nodes.attempt(NODE), nodes.attempt(NODE)
    lost.write("f", b"1")
    kept.write("f", b"2")
    assert nodes.prune_attempts(NODE) == 0
    commit = kept.commit({})
    assert nodes.prune_attempts(NODE) == 1
    assert nodes.storage.list(f"nodes/{NODE}/attempts") == [kept.id]
    nodes.verify(commit.files["f"])


# Checkpoints


def test_the_newest_checkpoint_over_all_attempts_is_found(nodes: NodeStore) -> None:
    assert nodes.latest_checkpoint(NODE) is None
    first, second = nodes.attempt(NODE), nodes.attempt(NODE)
    first.checkpoint({"model": b"a", "optimizer": [b"b", b"c"]}, (0, 5), {"loss": 1.5})
    written = first.checkpoint({"model": b"d"}, (1, 2), {"loss": 1.0})
    second.checkpoint({"model": b"e"}, (0, 9))
    found = nodes.latest_checkpoint(NODE)
    assert found == written
    assert (found.position, found.data, found.attempt) == ((1, 2), {"loss": 1.0}, first.id)
    assert nodes.read_file(found.files["model"]) == b"d"
    assert [c.position for c in nodes.checkpoints(NODE)] == [(1, 2), (0, 9), (0, 5)]
    assert nodes.read_file(nodes.checkpoints(NODE)[2].files["optimizer"]) == b"bc"


def test_equal_positions_are_ordered_by_attempt(nodes: NodeStore) -> None:
    attempts = [nodes.attempt(NODE) for _ in range(3)]
    for attempt in attempts:
        attempt.checkpoint({}, (1, 1))
    ids = [attempt.id for attempt in attempts]
    for order in (ids, ids[::-1], [ids[1], ids[2], ids[0]]):
        latest = nodes.latest_checkpoint(NODE, order)
        assert latest is not None
        assert latest.attempt == order[-1]


def test_torn_and_damaged_checkpoints_are_passed_over(local: NodeStore) -> None:
    attempt = local.attempt(NODE)
    good = attempt.checkpoint({"model": b"good"}, (1,))
    flipped, gone, torn, foreign, shape = (attempt.checkpoint({"model": b"good"}, (p,)) for p in range(2, 7))

    def path(checkpoint: Any, name: str) -> Path:
        found = local.storage.local_path(f"{checkpoint.folder}/{name}")
        assert found is not None
        return found

    path(flipped, "model").write_bytes(b"goof")
    path(gone, "model").unlink()
    path(torn, "manifest.json").unlink()
    path(foreign, "manifest.json").write_bytes(path(good, "manifest.json").read_bytes())
    path(shape, "manifest.json").write_text('{"format": 1}')
    local.storage.write(f"nodes/{NODE}/checkpoints/{attempt.id}/notes/x", b"")
    assert local.latest_checkpoint(NODE) == good
    path(good, "model").unlink()
    assert local.latest_checkpoint(NODE) is None


def test_pruning_keeps_the_newest_and_dropping_all_of_none(nodes: NodeStore) -> None:
    attempts = [nodes.attempt(NODE), nodes.attempt(NODE)]
    for step in range(6):
        attempts[step % 2].checkpoint({"model": b"x"}, (step,))
    assert nodes.prune_checkpoints(NODE, 2) == 4
    assert [c.position for c in nodes.checkpoints(NODE)] == [(5,), (4,)]
    assert nodes.prune_checkpoints(NODE, 2) == 0
    assert sum(len(nodes.storage.list(f"nodes/{NODE}/checkpoints/{a.id}")) for a in attempts) == 2
    nodes.drop_checkpoints(NODE)
    nodes.drop_checkpoints(NODE)
    assert nodes.checkpoints(NODE) == []


def test_a_checkpoint_pruned_while_it_is_looked_at_makes_way_for_the_newer(
    nodes: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = nodes.attempt(NODE)
    attempt.checkpoint({"model": b"old"}, (1,))
    listed = nodes.checkpoints(NODE)
    newer = attempt.checkpoint({"model": b"new"}, (2,))
    nodes.prune_checkpoints(NODE, 1)
    real, answers = nodes.checkpoints, [listed]
    monkeypatch.setattr(nodes, "checkpoints", lambda *a: answers.pop() if answers else real(*a))
    assert nodes.latest_checkpoint(NODE) == newer


def test_a_checkpoint_with_a_state_that_is_not_json_is_refused(nodes: NodeStore) -> None:
    with pytest.raises(StoreError, match="JSON"):
        nodes.attempt(NODE).checkpoint({}, (1,), {"x": object()})
    assert nodes.latest_checkpoint(NODE) is None
