"""Which shards of a prepared set have yet to be made."""

from __future__ import annotations

from cache_store.errors import CorruptShard, MissingShard
from cache_store.snapshots.store import SnapshotSet


def missing_shards(target: SnapshotSet) -> list[int]:
    """List the shards to make, those without a record; a damaged record is moved aside first."""
    try:
        target.digest()
        return []
    except (MissingShard, CorruptShard):
        missing = target.missing()
        if not missing:  # damaged, but could not be moved aside
            raise
        return missing
