"""Ragged sets: shards of different row counts, cut where samples end; the reader does not notice."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.errors import CorruptRecord, MissingShard
from cache_store.formats.codec import Array, Field
from cache_store.keys import digest_json
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage

FIELDS = (Field("hidden", "bfloat16", (3,)), Field("token", "int32", ()))
CUTS = (0, 5, 6, 20, 23)


def values(rows: range) -> tuple[Array, ...]:
    """Functions of the row alone; negative and large int32 among them."""
    row = np.arange(rows.start, rows.stop)
    hidden = (row[:, None] * 7 + np.arange(3)).astype(np.uint16)
    return hidden, (row * 97_000_003 - 2**30).astype(np.int32)


def fill(snapshots: SnapshotSet) -> None:
    for i in range(snapshots.spec.shards):
        snapshots.put(i, values(snapshots.spec.shard_range(i)))


def memory() -> Storage:
    return open_storage(f"memory://{uuid.uuid4().hex}")


def ragged(*cuts: int, **key: Any) -> SetSpec:
    return SetSpec.ragged({"what": "ragged", **key}, FIELDS, 2, cuts or CUTS)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_gathering_any_rows_over_any_cuts_returns_what_was_put(lengths: list[int], data: st.DataObject) -> None:
    spec = ragged(*np.cumsum([0, *lengths]).tolist())
    snapshots = SnapshotStore(memory()).open(spec)
    present = data.draw(st.sets(st.integers(0, spec.shards - 1)))
    for i in present:
        snapshots.put(i, values(spec.shard_range(i)))
    order = np.array(data.draw(st.lists(st.integers(0, spec.rows - 1), max_size=50)), np.int64)
    hidden, token = RowReader(snapshots, lambda i: values(spec.shard_range(i))).gather(order)
    expected = values(range(spec.rows))
    assert (hidden.view(torch.uint16).numpy() == expected[0][order]).all()
    assert (token.numpy() == expected[1][order]).all()
    assert str(token.dtype) == "torch.int32"
    # Hit and miss are the same bytes, and a gather makes just the shards that it needs.
    touched = {i for i in range(spec.shards) for row in order if row in spec.shard_range(i)}
    assert set(range(spec.shards)) - set(snapshots.missing()) == present | touched


def test_shards_lie_between_the_cuts_and_the_set_says_so_after_loading(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    snapshots = SnapshotStore(storage).open(ragged())
    fill(snapshots)
    loaded = SnapshotStore(storage).load(snapshots.spec.id)
    assert loaded.spec == ragged()
    assert (loaded.spec.cuts, loaded.spec.rows, loaded.spec.shard_rows, loaded.spec.shards) == (CUTS, 23, 14, 4)
    assert [loaded.spec.shard_range(i) for i in range(4)] == [range(a, b) for a, b in pairwise(CUTS)]
    for i in range(4):
        for stored, put in zip(loaded.shard(i), values(loaded.spec.shard_range(i)), strict=True):
            assert stored.tobytes() == put.tobytes()
    assert loaded.counters.bytes_read == loaded.spec.bytes == 23 * 10
    with pytest.raises(IndexError, match="shard 4 of a set of 4"):
        loaded.spec.shard_range(4)


def test_a_shard_must_have_the_rows_between_its_cuts() -> None:
    snapshots = SnapshotStore(memory()).open(ragged())
    with pytest.raises(ValueError, match="shard 1 holds 1 rows"):
        snapshots.put(1, values(range(2)))
    with pytest.raises(MissingShard):
        snapshots.shard(1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ragged(0),
        lambda: ragged(1, 4),
        lambda: ragged(0, 4, 4, 8),
        lambda: ragged(0, 8, 4),
        lambda: SetSpec({}, 9, FIELDS, 1, 8, (0, 8)),
        lambda: SetSpec({}, 8, FIELDS, 1, 4, (0, 8)),
        lambda: SetSpec({}, 8, FIELDS, 1, 8, (0, True, 8)),
        lambda: SetSpec({}, 8, FIELDS, 1, 8, ()),
    ],
)
def test_cuts_that_do_not_make_shards_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"cuts|rows"):
        build()


def test_the_id_covers_the_cuts() -> None:
    ids = {ragged().id, ragged(0, 5, 6, 19, 23).id, ragged(0, 23).id, SetSpec({"what": "ragged"}, 23, FIELDS, 2, 24).id}
    assert len(ids) == 4


def test_a_set_made_before_there_were_cuts_keeps_its_id_and_is_read() -> None:
    spec = SetSpec({"what": "test"}, 20, (Field("x", "float32", (2,)),), 4, 8)
    record = {
        "format": 1,
        "codec": 1,
        "key": {"what": "test"},
        "rows": 20,
        "fields": [{"name": "x", "dtype": "float32", "shape": [2]}],
        "group_rows": 4,
        "shard_rows": 8,
    }
    assert spec.id == digest_json(record) == "27d67c201afcbcc6b834ebce4843d3e1"
    storage = memory()
    storage.write(f"sets/{spec.id}/set.json", json.dumps(record).encode())
    assert SnapshotStore(storage).load(spec.id).spec.cuts is None


@pytest.mark.parametrize("cuts", ["null", "[0,5,6,20,24]", "[0,5,20,23]", '["0",5,6,20,23]', "7", "[0,5,6,20.0,23]"])
def test_a_set_json_with_other_cuts_is_refused(cuts: str) -> None:
    storage = memory()
    store = SnapshotStore(storage)
    spec = store.open(ragged()).spec
    path = f"sets/{spec.id}/set.json"
    text = storage.read(path).replace(b"[0,5,6,20,23]", cuts.encode())
    storage.write(path, text)
    with pytest.raises(CorruptRecord):
        store.load(spec.id)
