"""What travels from the driver to a worker; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkOrder:
    """One node for a worker. `parents` maps roles to the parents' commits; everything travels as JSON values."""

    node_id: str
    kind: str
    task: Mapping[str, Any]
    parents: Mapping[str, Mapping[str, Any]]
    store: str
    device: str
    threads: int
    #: Most bytes of snapshot shards held at a time; None: what `cache_store.kept` says.
    snapshot_memory: int | None = None
