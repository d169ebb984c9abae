"""One contract, every kind of storage: memory, a folder, SeaweedFS and rclone over S3."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_stores import S3Server, use
from running import ROOT

from cache_store.errors import CorruptShard, StorageDenied, StoreError
from cache_store.formats.codec import Field
from cache_store.records.files import read_aligned, write_file
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import PIECE_BYTES, Storage, Stream
from cache_store.storage.layered import LayeredStorage
from cache_store.storage.object_reading import PART_BYTES
from cache_store.storage.object_store import ObjectStorage
from cache_store.storage.open import open_storage, parse_address

SPEC = SetSpec({"what": "contract"}, 24, (Field("x", "int64", (3,)),), 4, 8)


def values(i: int) -> list[np.ndarray]:
    rows = SPEC.shard_range(i)
    return [np.arange(3 * rows.start, 3 * rows.stop, dtype=np.int64).reshape(len(rows), 3)]


@dataclass(frozen=True)
class Place:
    """Where a kind of storage can be opened. rclone serves everything but exclusive creation."""

    kind: str
    uri: str

    def open(self) -> Storage:
        if self.kind == "layered":
            return LayeredStorage(open_storage(f"{self.uri}-over"), open_storage(self.uri))
        # Without the probe, which rclone rightly fails.
        return ObjectStorage(parse_address(self.uri)) if self.kind == "rclone" else open_storage(self.uri)


def place(kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if kind in ("folder", "layered"):
        return Place(kind, str(tmp_path / "store"))
    if kind == "memory":
        return Place(kind, f"memory://{uuid.uuid4().hex}")
    server: S3Server = request.getfixturevalue(kind)
    use(server, tmp_path, monkeypatch)
    return Place(kind, server.address())


@pytest.fixture(params=["memory", "folder", "layered", "seaweed", "rclone"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    return place(request.param, request, tmp_path, monkeypatch).open()


@pytest.fixture(params=["memory", "folder", "layered", "seaweed"])
def exclusive(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    return place(request.param, request, tmp_path, monkeypatch).open()


# Files


def test_what_was_written_is_read_back_and_replaced(storage: Storage) -> None:
    assert storage.write("a/b/c", b"one", memoryview(b"-two"), np.arange(2, dtype=np.uint8)) == 9
    assert storage.read("a/b/c") == b"one-two\0\1"
    assert storage.read("a/b/c", limit=3) == b"one"
    assert (storage.size("a/b/c"), storage.exists("a/b/c"), storage.exists("a/b")) == (9, True, False)
    storage.write("a/b/c", b"")
    assert storage.read("a/b/c") == storage.read("a/b/c", limit=5) == b""
    assert list(storage.chunks("a/b/c")) == []
    with storage.open_read("a/b/c") as file:
        assert file.read() == b""


@pytest.mark.parametrize("size", [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 7])
def test_large_files_come_back_whole_and_in_part(storage: Storage, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    assert storage.write("f", data[:7], data[7:]) == size
    assert storage.size("f") == size
    assert storage.read("f") == data
    for limit in (1, PART_BYTES, size - 1, size + 1):
        assert storage.read("f", limit=limit) == data[:limit]
    for known in (None, size):
        assert b"".join(bytes(piece) for piece in storage.chunks("f", known)) == data
    with storage.open_read("f") as file:
        assert file.read(5) == data[:5]
        assert file.read() == data[5:]


class Counted(Stream):
    """Bytes made while they are written. `fails_after`: pieces after which no more can be made."""

    def __init__(self, data: bytes, fails_after: int | None = None) -> None:
        self.nbytes, self.data, self.fails_after = len(data), data, fails_after
        self.alive = self.most = 0

    def pieces(self) -> Iterator[memoryview]:
        for count, start in enumerate(range(0, self.nbytes, PIECE_BYTES)):
            if count == self.fails_after:
                raise StoreError("the stream is over")
            piece = np.frombuffer(self.data[start : start + PIECE_BYTES], np.uint8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(piece, self._gone)
            yield piece.data
            del piece

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("size", [1, PART_BYTES + 1, 8 * PART_BYTES + 7])
def test_a_stream_is_written_as_its_bytes_and_few_of_them_are_held(storage: Storage, size: int) -> None:
    stream = Counted(np.random.default_rng(0).bytes(size))
    record = write_file(storage, "f", stream)
    assert storage.read("f") == stream.data
    assert (record.bytes, record.sha256) == (size, hashlib.sha256(stream.data).hexdigest())
    # Memory itself holds all of a file; on their way to others, parts wait for each other.
    assert storage.uri.startswith("memory:") or stream.most * PIECE_BYTES <= 48 << 20


@pytest.mark.parametrize("pieces", [1, 5])
def test_of_a_stream_that_ends_in_the_middle_nothing_is_written(storage: Storage, pieces: int) -> None:
    data = np.random.default_rng(0).bytes(8 * PART_BYTES)
    with pytest.raises(StoreError):
        write_file(storage, "f", Counted(data, fails_after=pieces))
    assert not storage.exists("f")
    stream = Counted(data)
    stream.nbytes -= 1
    with pytest.raises(StoreError):
        write_file(storage, "g", stream)


@pytest.mark.parametrize("size", [1, PART_BYTES, 2 * PART_BYTES + 7])
def test_a_file_as_long_as_its_record_says_is_read_aligned_and_no_other_is(storage: Storage, size: int) -> None:
    data = np.random.default_rng(0).bytes(size)
    record = write_file(storage, "f", data)
    found = read_aligned(storage, record)
    assert found.tobytes() == data
    assert found.ctypes.data % 64 == 0
    for other in (b"", data[:-1], data + b"1", data + bytes(PART_BYTES)):
        storage.write("f", other)
        assert sum(piece.nbytes for piece in storage.chunks("f", size)) < max(1, size), len(other)
        with pytest.raises(CorruptShard, match="does not match"):
            read_aligned(storage, record)
    storage.write("f", data[:-1], bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptShard, match="does not match"):
        read_aligned(storage, record)
    storage.delete("f")
    with pytest.raises(CorruptShard, match="is missing"):
        read_aligned(storage, record)


def test_what_is_absent_raises_file_not_found_and_lists_as_empty(storage: Storage) -> None:
    reads: list[Callable[[str], object]] = [storage.read, storage.size, storage.open_read]
    for read in (*reads, lambda path: list(storage.chunks(path))):
        with pytest.raises(FileNotFoundError):
            read("no/such")
    with pytest.raises(FileNotFoundError):
        storage.move("no/such", "b")
    assert not storage.exists("no/such")
    assert storage.list("no") == list(storage.files("no")) == []
    storage.delete("no/such")
    storage.delete_tree("no")


def test_list_names_immediate_children_sorted(storage: Storage) -> None:
    for name in ("d/b", "d/a", "d/sub/deep/er", "d/.tmp-1", "dd"):
        storage.write(name, b"1")
    assert storage.list("d") == ["a", "b", "sub"]
    assert set(storage.list("")) - {"store.json"} == {"d", "dd"}


def test_a_folder_that_became_empty_lists_as_empty(storage: Storage) -> None:
    storage.write("d/e/f", b"1")
    storage.move("d/e/f", "elsewhere/f")
    assert storage.list("d/e") == list(storage.files("d/e")) == []
    storage.write("d/e/f", b"1")
    storage.delete("d/e/f")
    assert storage.list("d/e") == list(storage.files("d/e")) == []


def test_a_folder_of_thousands_is_listed_whole(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    # More than a page of a listing, which is 1,000 in S3.
    for i in range(1100):
        storage.write(f"d/{i:05d}", b"")
    assert storage.list("d") == [f"{i:05d}" for i in range(1100)]
    assert len(list(storage.files("d"))) == 1100
    storage.delete_tree("d")
    assert storage.list("d") == []


def test_names_with_every_allowed_sign_are_kept(storage: Storage) -> None:
    for name in ("a b", "ü+%20~", "x.y-z_0=", "q'(1)"):
        storage.write(f"n/{name}", name.encode())
        assert storage.read(f"n/{name}") == name.encode()
    assert storage.list("n") == sorted(["a b", "ü+%20~", "x.y-z_0=", "q'(1)"])


def test_files_tells_length_and_age_by_the_storages_clock(storage: Storage) -> None:
    before = storage.now()
    storage.write("d/e/f", b"12345")
    storage.write("d/g", b"1")
    found = {info.path: info for info in storage.files("d")}
    assert {path: info.bytes for path, info in found.items()} == {"d/e/f": 5, "d/g": 1}
    # Some clocks show whole seconds.
    assert all(before - 1.1 <= info.modified <= storage.now() + 1.1 for info in found.values())
    assert {info.path for info in storage.files("")} >= {"d/e/f", "d/g"}
    assert [name for name in storage.list("") if name.startswith(".probe")] == []


def test_move_renames_and_delete_tree_clears(storage: Storage) -> None:
    storage.write("d/a", b"1")
    storage.write("d/deep/b", b"2")
    storage.move("d/a", "q/r/a")
    assert (storage.exists("d/a"), storage.read("q/r/a")) == (False, b"1")
    for folder in ("d", "q"):
        storage.delete_tree(folder)
        assert storage.list(folder) == list(storage.files(folder)) == []
    assert storage.list("") in ([], ["store.json"])


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a//b", "a/./b", "", "a/", "a\0b", "a\\b"])
def test_paths_never_leave_the_root(storage: Storage, path: str) -> None:
    uses: list[Callable[[str], object]] = [storage.read, storage.write, storage.exists, storage.delete]
    for use_of in (*uses, storage.delete_tree, storage.size, lambda p: storage.move(p, "b")):
        with pytest.raises(StoreError, match="not a path inside the store"):
            use_of(path)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "create", "delete", "move", "tree", "read", "list"]),
            st.sampled_from(["a", "b", "d/a", "d/b", "e/x/a"]),
            st.sampled_from(["m", "d/m", "e/x/m"]),
            st.binary(max_size=20),
        ),
        max_size=25,
    )
)
def test_storage_behaves_as_a_dictionary(
    exclusive: Storage, steps: list[tuple[str, str, str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    root = uuid.uuid4().hex
    model: dict[str, bytes] = {}
    for action, path, target, data in steps:
        at = f"{root}/{path}"
        if action == "write":
            exclusive.write(at, data)
            model[path] = data
        elif action == "create":
            assert exclusive.create(at, data) == (path not in model)
            model.setdefault(path, data)
        elif action == "delete":
            exclusive.delete(at)
            model.pop(path, None)
        elif action == "move" and path in model:
            exclusive.move(at, f"{root}/{target}")
            model[target] = model.pop(path)
        elif action == "tree" and "/" in path:
            folder = path.split("/")[0]
            exclusive.delete_tree(f"{root}/{folder}")
            model = {key: value for key, value in model.items() if not key.startswith(f"{folder}/")}
        elif action == "list":
            assert exclusive.list(f"{root}/d") == sorted(key[2:] for key in model if key.startswith("d/"))
        assert exclusive.exists(at) == (path in model)
        if path in model:
            assert exclusive.read(at) == model[path]
    found = {info.path.removeprefix(f"{root}/"): info.bytes for info in exclusive.files(root)}
    assert found == {key: len(value) for key, value in model.items()}


# Exclusive creation


def test_create_succeeds_once_and_keeps_the_first(exclusive: Storage) -> None:
    assert exclusive.create("x/commit.json", b"first")
    assert not exclusive.create("x/commit.json", b"second")
    assert exclusive.read("x/commit.json") == b"first"
    exclusive.delete("x/commit.json")
    assert exclusive.create("x/commit.json", b"third")


@pytest.mark.parametrize("racers", [2, 8, 32])
def test_of_racing_threads_one_creates_and_all_read_the_same(exclusive: Storage, racers: int) -> None:
    # SeaweedFS takes about a second for every racer but the first.
    for turn in range(10 if not exclusive.remote else 1):
        wins: list[int] = []
        start = threading.Barrier(racers)

        def race(me: int, turn: int = turn, start: threading.Barrier = start, wins: list[int] = wins) -> None:
            start.wait()
            if exclusive.create(f"race/{turn}", f"{me:04d}".encode() * 500):
                wins.append(me)

        join(*(threading.Thread(target=race, args=(i,)) for i in range(racers)))
        assert len(wins) == 1
        assert exclusive.read(f"race/{turn}") == f"{wins[0]:04d}".encode() * 500


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_server_that_ignores_the_condition_is_refused(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(rclone, tmp_path, monkeypatch)
    uri = rclone.address()
    with pytest.raises(StoreError, match="is not exclusive here"):
        open_storage(uri)
    assert list(ObjectStorage(parse_address(uri)).files("")) == []


def test_a_marker_copied_to_such_a_server_does_not_help(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(rclone, tmp_path, monkeypatch)
    uri = rclone.address()
    ObjectStorage(parse_address(uri)).write("store.json", b'{"format": 1}')
    with pytest.raises(StoreError, match="is not exclusive here"):
        open_storage(uri)


def test_wrong_credentials_are_a_typed_error_that_does_not_show_them(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageDenied, match="403 SignatureDoesNotMatch") as raised:
        open_storage(s3.address())
    assert "not-the-secret" not in str(raised.value)


# Sets and nodes


@pytest.mark.parametrize("racers", [2, 8, 32])
def test_of_racing_writers_of_a_shard_one_wins_and_all_read_its_bytes(exclusive: Storage, racers: int) -> None:
    written: list[int] = []
    read: list[bool] = []
    start = threading.Barrier(racers)

    def race() -> None:
        mine = SnapshotStore(exclusive).open(SPEC)
        start.wait()
        written.append(mine.put(0, values(0)))
        read.append(bool((mine.shard(0)[0] == values(0)[0]).all()))

    join(*(threading.Thread(target=race) for _ in range(racers)))
    assert len(written) == racers
    assert sum(size > 0 for size in written) == 1
    assert read == [True] * racers
    assert len(exclusive.list(f"sets/{SPEC.id}/shards")) == 1


RACER = """
import sys, time
import numpy as np
from cache_store.formats.codec import Field
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
store = SnapshotStore(open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(10):
    snapshots = store.open(SetSpec({"turn": turn}, 8, (Field("x", "int64", (3,)),), 4, 8))
    put = snapshots.put(0, [np.arange(24, dtype=np.int64).reshape(8, 3)])
    assert (snapshots.shard(0)[0] == np.arange(24).reshape(8, 3)).all()
    print(int(put > 0), flush=True)
"""


def test_of_racing_processes_one_publishes_each_shard(s3: S3Server) -> None:
    uri = s3.address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, uri],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append([int(line) for line in process.communicate(timeout=120)[0].split()])
    assert [process.returncode for process in processes] == [0] * 4
    assert [sum(turn) for turn in zip(*outputs, strict=True)] == [1] * 10


def test_damage_is_found_moved_aside_and_put_again(exclusive: Storage) -> None:
    snapshots = SnapshotStore(exclusive).open(SPEC)
    for i in range(3):
        snapshots.put(i, values(i))
    digest = snapshots.digest()
    (name,) = (name for name in exclusive.list(f"sets/{SPEC.id}/shards") if name.startswith("000001."))
    path = f"sets/{SPEC.id}/shards/{name}"
    damaged = bytearray(exclusive.read(path))
    damaged[-100] ^= 1
    exclusive.write(path, damaged)
    again = SnapshotStore(exclusive).load(SPEC.id)
    with pytest.raises(CorruptShard, match="moved to quarantine"):
        again.shard(1)
    assert again.missing() == [1]
    assert len(exclusive.list(f"sets/{SPEC.id}/quarantine")) == 2
    assert again.put(1, values(1)) > 0
    assert (again.shard(1)[0] == values(1)[0]).all()
    assert again.digest() == digest


def test_nodes_commit_once_and_their_files_are_mapped_or_read(exclusive: Storage) -> None:
    nodes = NodeStore(exclusive)
    first, second = nodes.attempt("node"), nodes.attempt("node")
    data = np.random.default_rng(0).bytes(PART_BYTES + 5)
    first.write("weights", data)
    second.write("weights", b"other")
    commit = first.commit({"n": 1})
    assert second.commit({"n": 2}) == commit
    assert exclusive.list("nodes/node/attempts") == [first.id]
    record = commit.files["weights"]
    assert nodes.read_file(record) == data
    path = nodes.verified_path(record)
    assert path is None or path.read_bytes() == data
    nodes.save_checkpoint("node", first.id, files={"f": data}, position=(1, 2), data={"step": 2})
    found = nodes.latest_checkpoint("node")
    assert found is not None
    assert nodes.read_file(found.files["f"]) == data


def test_a_shard_is_downloaded_once_by_a_machine(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(s3.address())
    SnapshotStore(storage).open(SPEC).put(0, values(0))
    asked: list[str] = []
    real = ObjectStorage._chunks

    def spy(self: ObjectStorage, path: str, size: int | None) -> object:
        asked.append(path)
        time.sleep(0.05)
        return real(self, path, size)

    monkeypatch.setattr(ObjectStorage, "_chunks", spy)
    found: list[bool] = []

    def read() -> None:
        mine = SnapshotStore(open_storage(storage.uri)).load(SPEC.id)
        found.append(bool((mine.shard(0)[0] == values(0)[0]).all()))

    join(*(threading.Thread(target=read) for _ in range(8)))
    assert found == [True] * 8
    assert len(asked) == 1
