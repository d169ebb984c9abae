"""The table of storages: a kind is a row with its address rule, and nothing else asks which kind a store is."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from dictionary_storage import ROW, SCHEME
from running import Lab

from cache_store.errors import UserError
from cache_store.storage.open import BACKENDS, existing_storage, open_storage, parse_address


def test_what_is_allowed_is_what_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as refusal:
        parse_address(f"{SCHEME}://x")
    assert refusal.value.message == (
        f"'{SCHEME}://x': this storage is not supported; allowed: a folder path, file:///folder, memory://name, "
        "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"
    )
    monkeypatch.setitem(BACKENDS, SCHEME, ROW)
    assert parse_address(f"{SCHEME}://x/").path == "x"
    with pytest.raises(UserError, match=rf"az://container/prefix, {SCHEME}://name$"):
        parse_address("http://x")


def test_only_a_store_that_is_there_is_an_existing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, SCHEME, ROW)
    uri = f"{SCHEME}://{uuid.uuid4().hex}"
    with pytest.raises(UserError, match="there is no store here"):
        existing_storage(uri)
    open_storage(uri).write("a", b"1")
    assert existing_storage(uri).read("a") == b"1"


def test_a_run_keeps_everything_on_a_storage_that_was_only_entered_as_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, SCHEME, ROW)
    store = f"{SCHEME}://{uuid.uuid4().hex}"
    lab = Lab.make(tmp_path, {"store": store, "training.epochs": 1, "regimes": ["segprop"]})
    lab.run_all()
    assert all(lab.nodes.commit_of(node.id) is not None for node in lab.prepared.plan.nodes if node.kind != "release")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run" / "store").exists()
    # Again from the store alone.
    assert Lab.make(tmp_path, {"store": store, "training.epochs": 1, "regimes": ["segprop"]}).nodes.commit_of(
        lab.prepared.plan.nodes[0].id
    )
