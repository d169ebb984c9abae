"""A prepared split of labelled text in the store: a set of tokens, a set of samples, and one row of summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache_store.formats.codec import Field
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data.text.samples.stored import SHARD_BYTES, StoredSplit
from workers.specs.tasks import rows_per_shard

#: `type`: which of two texts a token is of.
TOKEN_FIELDS = (Field("token", "int32", ()), Field("type", "uint8", ()))
SAMPLE_FIELDS = (Field("start", "int64", ()), Field("length", "int64", ()), Field("label", "int64", ()))


def open_sets(snapshots: SnapshotStore, key: Mapping[str, Any], split: StoredSplit) -> tuple[SnapshotSet, SnapshotSet]:
    """Open the token set and the sample set of the split `key` stands for, making them if absent."""
    tokens = SetSpec.ragged({**key, "what": "tokens"}, TOKEN_FIELDS, 1, split.cuts)
    rows = rows_per_shard(sum(field.bytes for field in SAMPLE_FIELDS), SHARD_BYTES, 1)
    table = SetSpec({**key, "what": "samples"}, split.samples, SAMPLE_FIELDS, 1, min(split.samples, rows))
    return snapshots.open(tokens), snapshots.open(table)
