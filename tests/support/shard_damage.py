"""Damage the shards of a snapshot set on a local store."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cache_store.snapshots.store import SnapshotSet


def folder_of(snapshots: SnapshotSet) -> Path:
    return Path(snapshots.storage.uri.removeprefix("file://")) / "sets" / snapshots.spec.id


def replace(path: Path, data: bytes) -> None:
    """By another file: the original is shared with the reference store."""
    path.with_name("new").write_bytes(data)
    os.replace(path.with_name("new"), path)


def shard_files(snapshots: SnapshotSet) -> list[Path]:
    records = sorted((folder_of(snapshots) / "commits").iterdir())
    store = folder_of(snapshots).parents[1]
    return [store / json.loads(record.read_text())["file"] for record in records]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    replace(file, bytes(data))
