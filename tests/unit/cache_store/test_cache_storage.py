"""Storage: the same contract on every kind of storage, and what is special about folders."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import xxhash
from dictionary_storage import ROW, SCHEME

from cache_store.errors import StorageDenied, StorageFull, StorageUnavailable, StoreError, UserError
from cache_store.keys import canonical_json, digest_json
from cache_store.records.files import write_file
from cache_store.storage.base import Storage, _marker
from cache_store.storage.open import BACKENDS, existing_storage, open_storage, running_storage


@pytest.fixture(params=["local", "memory", "a row added"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setitem(BACKENDS, SCHEME, ROW)
    name = uuid.uuid4().hex
    addresses = {"local": str(tmp_path / "store"), "memory": f"memory://{name}", "a row added": f"{SCHEME}://{name}"}
    return open_storage(addresses[request.param])


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def test_what_was_written_is_read_back_and_replaced(storage: Storage) -> None:
    assert storage.write("a/b/c", b"one", memoryview(b"-two"), np.arange(2, dtype=np.uint8)) == 9
    assert storage.read("a/b/c") == b"one-two\0\1"
    assert storage.read("a/b/c", limit=3) == b"one"
    assert storage.size("a/b/c") == 9
    storage.write("a/b/c", b"")
    assert storage.read("a/b/c") == b""
    with storage.open_read("a/b/c") as file:
        assert file.read() == b""


@pytest.mark.parametrize("size", [0, 5, (1 << 20) - 1, 1 << 20, (5 << 20) + 3])
def test_a_file_is_recorded_with_the_checksums_of_its_bytes(storage: Storage, size: int) -> None:
    data = os.urandom(size)
    record = write_file(storage, "f", data[:7], data[7:])
    assert b"".join(bytes(piece) for piece in storage.chunks("f")) == data
    assert record.to_json() == {
        "path": "f",
        "bytes": size,
        "xxh3": xxhash.xxh3_128_hexdigest(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_what_is_absent_raises_file_not_found_and_lists_as_empty(storage: Storage) -> None:
    for read in (storage.read, storage.size, storage.open_read, lambda p: list(storage.chunks(p))):
        with pytest.raises(FileNotFoundError):
            read("no/such")
    with pytest.raises(FileNotFoundError):
        storage.move("no/such", "b")
    assert not storage.exists("no/such")
    assert storage.list("no") == []
    storage.delete("no/such")
    storage.delete_tree("no")


def test_create_succeeds_once_and_keeps_the_first(storage: Storage) -> None:
    assert storage.create("x/commit.json", b"first")
    assert not storage.create("x/commit.json", b"second")
    assert storage.read("x/commit.json") == b"first"
    storage.delete("x/commit.json")
    assert storage.create("x/commit.json", b"third")


def test_list_names_immediate_children_sorted_without_temporaries(storage: Storage) -> None:
    for name in ("d/b", "d/a", "d/sub/deep", "d/.tmp-1"):
        storage.write(name, b"1")
    assert storage.list("d") == ["a", "b", "sub"]
    assert storage.list("") == ["d", "store.json"]


def test_move_and_delete_tree(storage: Storage) -> None:
    storage.write("d/a", b"1")
    storage.move("d/a", "q/r/a")
    assert (storage.exists("d/a"), storage.read("q/r/a")) == (False, b"1")
    storage.delete_tree("q")
    assert storage.list("q") == []


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a//b", "a/./b", "", "a/", "a\0b", "a\\b"])
def test_paths_never_leave_the_root(storage: Storage, path: str) -> None:
    for use in (
        storage.read,
        storage.write,
        storage.exists,
        storage.delete,
        storage.local_path,
        storage.delete_tree,
    ):
        with pytest.raises(StoreError, match="not a path inside the store"):
            use(path)
    with pytest.raises(StoreError):
        storage.move(path, "b")


def test_of_eight_racing_threads_one_creates(storage: Storage) -> None:
    for turn in range(10):
        wins: list[int] = []
        start = threading.Barrier(8)

        def race(me: int, turn: int = turn, start: threading.Barrier = start, wins: list[int] = wins) -> None:
            start.wait()
            if storage.create(f"race/{turn}", str(me).encode() * 1000):
                wins.append(me)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert storage.read(f"race/{turn}") == str(wins[0]).encode() * 1000


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "s3:/b",
        "file://rel/x",
        "simplecache::memory://x",
        "FILE:/x",
        "http://x",
    ],
)
def test_unsupported_addresses_say_what_is_allowed(uri: str) -> None:
    with pytest.raises(UserError, match=r"allowed|write file:///"):
        open_storage(uri)


def test_file_address_and_plain_path_are_the_same_store(tmp_path: Path) -> None:
    open_storage(f"file://{tmp_path}/s").write("a", b"1")
    assert open_storage(str(tmp_path / "s")).read("a") == b"1"
    assert open_storage(str(tmp_path / "s")).local_path("a") == tmp_path / "s" / "a"


def test_a_store_of_another_format_is_refused(storage: Storage) -> None:
    storage.write("store.json", _marker(2))
    with pytest.raises(UserError, match="says format 2; this program knows format 1"):
        open_storage(storage.uri)
    existing = storage.read("store.json")
    with pytest.raises(UserError, match="says format 2"):
        existing_storage(storage.uri, repair=True)
    assert storage.read("store.json") == existing


def test_every_damaged_bit_of_a_marker_is_called_damage_and_repaired(storage: Storage) -> None:
    whole = storage.read("store.json")
    for index in range(8 * len(whole)):
        data = bytearray(whole)
        data[index // 8] ^= 1 << index % 8
        storage.write("store.json", bytes(data))
        with pytest.raises(UserError, match=r"is damaged.*cache verify .* --repair"):
            open_storage(storage.uri)
    for data in (b"", b"[]", b"\xff", b"null", b"[" * 100_000, b'{"format": ' + b"9" * 6000 + b"}", b'{"format": 3}'):
        storage.write("store.json", bytes(data))
        with pytest.raises(UserError, match=r"is damaged.*cache verify .* --repair"):
            existing_storage(storage.uri)
        existing_storage(storage.uri, repair=True)
        assert storage.read("store.json") == whole


def test_the_marker_of_the_first_stores_is_still_one(storage: Storage) -> None:
    storage.write("store.json", b'{"format": 1}')
    assert open_storage(storage.uri).is_store()


def test_what_is_no_regular_file_is_neither_read_nor_waited_for(local: Storage, tmp_path: Path) -> None:
    for name in ("pipe", "folder", "device"):
        path = Path(local.uri, "nodes", name, "commit.json")
        path.parent.mkdir(parents=True)
        if name == "pipe":
            os.mkfifo(path)
        elif name == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(StoreError, match=r"not a regular file|is a folder"):
            local.read(f"nodes/{name}/commit.json")


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a file"])
def test_a_store_that_was_unmounted_is_not_made_anew(local: Storage, left: str) -> None:
    """Workers open what exists: writes of those that had it open find no folder to make, either."""
    local.write("nodes/a/file", b"1")
    root = Path(local.uri)
    root.rename(root.with_name("elsewhere"))
    if left != "nothing":
        root.mkdir() if left == "an empty folder" else root.write_text("")
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(StorageUnavailable, match="is its volume mounted"):
        running_storage(local.uri)
    for write in (lambda: local.write("nodes/b/file", b"2"), lambda: local.create("runs/x/holder", b"3")):
        with pytest.raises(StoreError):
            write()
    assert sorted(root.parent.rglob("*")) == before
    if left != "nothing":
        root.rmdir() if left == "an empty folder" else root.unlink()
    root.with_name("elsewhere").rename(root)
    assert running_storage(local.uri).read("nodes/a/file") == b"1"


def test_a_file_in_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_storage(str(tmp_path / "f"))


def test_the_probe_runs_once_and_leaves_only_the_marker(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.listdir(local.uri) == ["store.json"]

    def never(*_: object) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr(os, "link", never)
    open_storage(local.uri)


def test_storage_without_exclusive_creation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", os.replace)
    with pytest.raises(StoreError):
        open_storage(str(tmp_path / "s"))
    assert not (tmp_path / "s" / "store.json").exists()


def test_storage_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="hard links"):
        open_storage(str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EROFS, StorageDenied),
        (errno.EACCES, StorageDenied),
        (errno.EIO, StorageUnavailable),
        (errno.ESTALE, StorageUnavailable),
        (errno.ENAMETOOLONG, StoreError),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_os_errors_become_typed_errors_naming_the_path_and_leave_nothing(
    local: Storage, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[StoreError], call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    local.write("d/other", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for action in (lambda: local.write("d/x", b"1"), lambda: local.create("d/y", b"1")):
            with pytest.raises(kind, match=r"d/[xy]") as raised:
                action()
            assert type(raised.value) is kind
    assert os.listdir(Path(local.uri) / "d") == ["other"]


def test_short_writes_are_continued(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: max(1, len(data) // 2)]))
    data = os.urandom(1000)
    assert local.write("x", data) == 1000
    assert local.read("x") == data


def test_every_write_is_fsynced_with_its_folder(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def spy(file: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        real(file)

    monkeypatch.setattr(os, "fsync", spy)
    local.write("x", b"1")
    assert synced == ["file", "folder"]
    local.create("y", b"1")
    assert synced[2:] == ["file", "folder"]
    local.create("y", b"1")  # the loser relies on the winner's entry too
    assert synced[4:] == ["file", "folder"]


def test_a_vanished_root_is_not_made_anew(local: Storage) -> None:
    os.rename(local.uri, local.uri + ".gone")
    with pytest.raises(StorageUnavailable, match="disappeared"):
        local.write("a/b", b"1")
    assert not os.path.exists(local.uri)


def test_a_read_only_store_can_be_read(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    local.write("a", b"1")

    def fail(*_: object) -> int:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    again = open_storage(local.uri)
    assert again.read("a") == b"1"
    with pytest.raises(StorageDenied):
        again.write("b", b"1")


def test_equal_json_has_one_digest_and_different_json_another() -> None:
    assert digest_json({"b": [1, 2], "a": None}) == digest_json({"a": None, "b": (1, 2)})
    different = [1, 1.0, "1", True, None, [1], {"1": 1}, [], {}]
    assert len({digest_json(value) for value in different}) == len(different)
    assert canonical_json({"ü": 1}) == b'{"\\u00fc":1}'
    for bad in (float("nan"), {1: 2}, {"a": {1, 2}}, b"x", np.float32(1)):
        with pytest.raises((TypeError, ValueError)):
            digest_json(bad)
