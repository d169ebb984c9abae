"""A real S3 server behind a proxy that breaks things: right data or a typed error, and then a rerun completes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import Choice, Fault, FaultyProxy, Request, faulty_proxy
from object_stores import S3Server

from cache_store.errors import SegpropError, StorageDenied, StorageUnavailable
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage

SPEC = SetSpec({"what": "faults"}, 16, (Field("x", "int64", (200,)),), 4, 8)
REQUEST_S = 1.0
#: What a client gets over by asking again.
PASSING = [
    Fault.THROTTLED,
    Fault.UNAVAILABLE,
    Fault.BROKEN,
    Fault.RESET_BEFORE,
    Fault.RESET_AFTER,
    Fault.BROKEN_AFTER,
    Fault.STALLED,
    Fault.TRUNCATED,
    Fault.TOO_LONG,
    Fault.SLOW,
]
#: What HTTP itself cannot show: lengths and bytes that agree with each other and are wrong.
SILENT = [Fault.TOO_SHORT, Fault.FLIPPED]


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("SEGPROP_STORE_REQUEST_S", str(REQUEST_S))
    monkeypatch.setenv("SEGPROP_STORE_ATTEMPTS", "4")
    with faulty_proxy(s3.port) as found:
        found.stall_s = 3 * REQUEST_S
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.port}")
        yield found


def values(i: int) -> list[np.ndarray]:
    return [np.arange(1600 * i, 1600 * (i + 1), dtype=np.int64).reshape(8, 200)]


def work(uri: str) -> None:
    """What a run does with a store; finding anything but what was written fails the test."""
    storage = open_storage(uri)
    snapshots = SnapshotStore(storage).open(SPEC)
    for i in range(2):
        snapshots.put(i, values(i))
    again = SnapshotStore(storage).load(SPEC.id)
    for i in range(2):
        assert (again.shard(i)[0] == values(i)[0]).all(), "wrong data"
    nodes = NodeStore(storage)
    if nodes.commit_of("node") is None:
        attempt = nodes.attempt("node")
        attempt.write("f", b"weights" * 1000)
        attempt.checkpoint({"f": b"state" * 1000}, (1,), {"step": 1})
        attempt.commit({"accuracy": 0.5})
    commit = nodes.commit_of("node")
    assert commit is not None
    assert commit.result == {"accuracy": 0.5}, "wrong data"
    assert nodes.read_file(commit.files["f"]) == b"weights" * 1000, "wrong data"
    nodes.drop_checkpoints("node")
    assert nodes.checkpoints("node") == []


def completed(uri: str) -> bool:
    """Whether the store holds all of `work`, each thing once."""
    storage = open_storage(uri)
    return (
        SnapshotStore(storage).load(SPEC.id).missing() == []
        and len(storage.list(f"sets/{SPEC.id}/commits")) == 2
        and NodeStore(storage).commit_of("node") is not None
    )


def first_of_each(fault: Fault) -> Choice:
    return lambda request: fault if request.seen == 0 else None


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.name.lower())
def test_every_request_failing_once_is_got_over(proxy: FaultyProxy, s3: S3Server, fault: Fault) -> None:
    uri = s3.address()
    proxy.choose = first_of_each(fault)
    work(uri)
    assert sum(1 for _, chosen in proxy.requests if chosen is fault) > 10
    proxy.choose = lambda _: None
    assert completed(uri)


@pytest.mark.parametrize("fault", SILENT, ids=lambda fault: fault.name.lower())
def test_bodies_that_lie_are_noticed_and_a_rerun_completes(proxy: FaultyProxy, s3: S3Server, fault: Fault) -> None:
    uri = s3.address()
    for turn in range(6):
        proxy.choose = lambda request, turn=turn: (
            fault
            if request.method == "GET" and "list-type" not in request.target and request.seen % 4 == turn % 4
            else None
        )
        try:
            work(uri)
        except SegpropError:
            continue
    proxy.choose = lambda _: None
    work(uri)
    assert completed(uri)


@pytest.mark.parametrize("fault", [*PASSING[:-1]], ids=lambda fault: fault.name.lower())
def test_a_server_that_stays_broken_is_a_typed_error_in_bounded_time(
    proxy: FaultyProxy, s3: S3Server, fault: Fault
) -> None:
    uri = s3.address()
    storage = open_storage(uri)
    storage.write("f", b"x" * 1000)
    proxy.choose = lambda _: fault
    before = len(proxy.requests)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"cannot read s3://bucket/.*4 times") as raised:
        storage.read("f")
    assert raised.value.retryable
    assert len(proxy.requests) - before == 4
    # Four requests and the waits between them.
    assert time.monotonic() - started < 4 * REQUEST_S + 5
    proxy.choose = lambda _: None
    work(uri)


@pytest.mark.parametrize("fault", [Fault.DENIED, Fault.EXPIRED], ids=lambda fault: fault.name.lower())
def test_lost_permission_and_expired_credentials_are_final_and_a_rerun_completes(
    proxy: FaultyProxy, s3: S3Server, fault: Fault
) -> None:
    uri = s3.address()
    storage = open_storage(uri)
    for action in (
        lambda: storage.read("f"),
        lambda: storage.write("f", b"1"),
        lambda: storage.create("g", b"1"),
        lambda: storage.list("d"),
        lambda: storage.size("f"),
        lambda: storage.delete_tree("d"),
    ):
        proxy.choose = lambda _: fault
        before = len(proxy.requests)
        with pytest.raises(StorageDenied, match="AWS_"):
            action()
        assert len(proxy.requests) == before + 1, "a refusal was asked for again"
        proxy.choose = lambda _: None
    work(uri)


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER, Fault.BROKEN_AFTER], ids=lambda fault: fault.name.lower())
def test_a_lost_reply_to_a_conditional_put_is_not_taken_for_a_lost_race(
    proxy: FaultyProxy, s3: S3Server, fault: Fault
) -> None:
    storage = open_storage(s3.address())
    proxy.choose = lambda request: fault if request.conditional and request.seen == 0 else None
    assert storage.create("ours", b"attempt-1")
    assert not storage.create("ours", b"attempt-2")
    snapshots = SnapshotStore(storage).open(SPEC)
    assert snapshots.put(0, values(0)) > 0
    assert len(storage.list(f"sets/{SPEC.id}/shards")) == 1
    proxy.choose = lambda _: None
    # Somebody else's, while our own reply is lost: read back, and theirs counts.
    assert storage.create("theirs", b"theirs")
    proxy.choose = lambda request: fault if request.conditional else None
    assert not storage.create("theirs", b"ours")
    assert storage.read("theirs") == b"theirs"


def test_a_large_upload_cut_half_way_is_not_visible(
    proxy: FaultyProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGPROP_STORE_REQUEST_S", "30")
    storage = open_storage(s3.address())
    data = random.Random(0).randbytes(20 << 20)

    def choose(request: Request) -> Fault | None:
        return Fault.UNAVAILABLE if "partNumber=2" in request.target else None

    proxy.choose = choose
    with pytest.raises(StorageUnavailable):
        storage.write("large", data)
    proxy.choose = lambda _: None
    assert not storage.exists("large")
    assert storage.list("") == ["store.json"]
    storage.write("large", data)
    assert storage.read("large") == data


@pytest.mark.parametrize("fault", [Fault.TOO_SHORT, Fault.TRUNCATED, Fault.RESET_AFTER], ids=lambda f: f.name.lower())
def test_parts_of_a_large_file_that_come_short_are_asked_for_again(
    proxy: FaultyProxy, s3: S3Server, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("SEGPROP_STORE_REQUEST_S", "30")
    storage = open_storage(s3.address())
    data = random.Random(0).randbytes(20 << 20)
    storage.write("large", data)
    ranges: set[str] = set()

    def choose(request: Request) -> Fault | None:
        wanted = request.headers.get("range", "")
        if not wanted or wanted in ranges:
            return None
        ranges.add(wanted)
        return fault

    proxy.choose = choose
    assert storage.read("large") == data
    ranges.clear()
    assert b"".join(bytes(piece) for piece in storage.chunks("large")) == data
    assert len(ranges) == 3


def test_an_upload_of_another_length_is_repeated_and_then_a_typed_error(proxy: FaultyProxy, s3: S3Server) -> None:
    storage = open_storage(s3.address())
    proxy.choose = lambda request: Fault.HEAD_SHORT if request.seen == 0 else None
    storage.write("f", b"x" * 100)
    assert [request.method for request, _ in proxy.requests][-4:] == ["PUT", "HEAD", "PUT", "HEAD"]
    proxy.choose = lambda _: Fault.HEAD_SHORT
    with pytest.raises(StorageUnavailable, match="99 bytes were stored instead of 100"):
        storage.write("g", b"x" * 100)


def test_a_record_replaced_while_it_is_moved_aside_stays(proxy: FaultyProxy, s3: S3Server) -> None:
    uri = s3.address()
    storage = open_storage(uri)
    storage.write("record", b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        other = open_storage(uri)

    def choose(request: Request) -> Fault | None:
        # Looked at when it was written, before it is copied, and, now, before it is deleted.
        if request.method == "HEAD" and "/quarantine/" not in request.path and request.seen == 2:
            other.write("record", b"made again")
        return None

    proxy.choose = choose
    with pytest.raises(FileNotFoundError):
        storage.move("record", "quarantine/record")
    assert storage.read("record") == b"made again"
    assert storage.list("quarantine") == []


def test_damage_on_the_way_does_not_condemn_a_good_shard(proxy: FaultyProxy, s3: S3Server) -> None:
    storage = open_storage(s3.address())
    snapshots = SnapshotStore(storage).open(SPEC)
    snapshots.put(0, values(0))
    proxy.choose = lambda request: Fault.FLIPPED if "/shards/" in request.target and request.seen == 2 else None
    again = SnapshotStore(storage).load(SPEC.id)
    assert (again.shard(0)[0] == values(0)[0]).all()
    assert storage.list(f"sets/{SPEC.id}/quarantine") == []


@pytest.mark.parametrize("seed", range(6))
def test_under_random_faults_every_outcome_is_right_or_typed_and_a_rerun_completes(
    proxy: FaultyProxy, s3: S3Server, tmp_path: Path, seed: int
) -> None:
    uri = s3.address()
    draw = random.Random(seed)
    faults = [*PASSING, *SILENT, Fault.DENIED]
    proxy.stall_s = 1.2 * REQUEST_S
    proxy.choose = lambda _: draw.choice(faults) if draw.random() < 0.12 else None
    for _ in range(4):
        try:
            work(uri)
        except SegpropError:
            continue
    proxy.choose = lambda _: None
    work(uri)
    assert completed(uri)
