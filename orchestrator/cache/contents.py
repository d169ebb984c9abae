"""Read what the cache commands decide on from a store: files, commits, plans and what the sets are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_store.errors import MissingShard, StorageDenied, StoreError, UserError
from cache_store.records.nodes import NodeStore
from cache_store.records.record_io import is_name, read_bounded
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import existing_storage
from orchestrator.cache.garbage import CommitFacts, StoreFacts
from orchestrator.cache.inventory import SetFiles, Survey, survey
from orchestrator.execution.plan_record import read_plans
from orchestrator.execution.run_record import read_pointer, read_run


def open_store(place: str, *, repair: bool = False) -> Storage:
    """Open the store at `place`: a run directory, a configuration file, a folder or a URI; `repair` as
    `existing_storage`. UserError when there is none."""
    path = Path(place)
    if "://" not in place:
        if path.is_file():
            from orchestrator.config.load import load

            place = load(path).store
        elif (path / "config.yaml").is_file():
            from orchestrator.config.load import load

            # The directory may have been moved since.
            place = load(path / "config.yaml", [f"run_dir={path}"]).store
        elif not path.is_dir():
            raise UserError(f"{place}: no such folder")
    return existing_storage(place, repair=repair)


def nodes_of_run(storage: Storage, run_dir: Path) -> frozenset[str]:
    """Return the nodes of a run, by its record in this store. UserError when the directory names none that is there."""
    digest = read_pointer(run_dir)
    record = None if digest is None else read_run(storage, digest)
    if record is None:
        raise UserError(
            f"{run_dir}: no run of {storage.uri}; allowed: a run directory whose run was started on this store"
        )
    return frozenset(record.nodes)


@dataclass(frozen=True)
class SetFacts:
    """One set for people: `label` and `run` where a plan names them, `boundary` the block it comes after."""

    id: str
    kind: str
    run: str
    label: str
    boundary: str
    rows: int
    bytes: int
    shards_present: int
    shards: int
    age_s: float


def store_facts(storage: Storage) -> StoreFacts:
    """Read everything that `collect` decides on."""
    found = survey(storage.files(""))
    snapshots = {set_id: _find(storage, set_id) for set_id in found.sets if is_name(set_id)}
    kinds = {set_id: str(item.spec.key.get("kind", "")) if item else "" for set_id, item in snapshots.items()}
    listed = frozenset(path for set_id, files in found.sets.items() for path in _listed(snapshots.get(set_id), files))
    return StoreFacts(
        survey=found,
        commits=dict(_commits(storage, found)),
        plans=read_plans(storage),
        kinds=kinds,
        listed=listed,
        now=_now(storage, found),
    )


def _now(storage: Storage, found: Survey) -> float:
    try:
        return storage.now()
    except StorageDenied:
        # A store that may only be read: this machine's clock, or the newest file where that is ahead of it.
        return max([time.time(), *(files.all.newest for files in found.sets.values())])


def _find(storage: Storage, set_id: str) -> SnapshotSet | None:
    try:
        return SnapshotStore(storage).find(set_id)
    except StoreError as error:
        if error.retryable:
            raise
        return None


def _listed(snapshots: SnapshotSet | None, files: SetFiles) -> Iterator[str]:
    """Yield the shard files that records list. Where one file stands beside one record, it is taken to be that."""
    by_index: dict[int, list[str]] = {}
    for path in files.shards:
        by_index.setdefault(int(path.rsplit("/", 1)[1].split(".", 1)[0]), []).append(path)
    for index, paths in by_index.items():
        if index not in files.records:
            continue
        if len(paths) == 1 or snapshots is None:
            yield from paths
            continue
        raw = read_bounded(snapshots.storage, f"sets/{snapshots.spec.id}/commits/{index:06d}.json")
        try:
            if raw is not None:
                yield snapshots.record(index, raw).path
        except (StoreError, IndexError):
            # A damaged record: `verify` decides about it, not we.
            yield from paths


def _commits(storage: Storage, found: Survey) -> Iterator[tuple[str, CommitFacts]]:
    nodes = NodeStore(storage)
    for node_id, files in found.nodes.items():
        if not files.committed or not is_name(node_id):
            continue
        try:
            commit = nodes.commit_of(node_id)
        except StoreError as error:
            if error.retryable:
                raise
            yield node_id, CommitFacts(None)
            continue
        if commit is not None:
            named = frozenset(text for text in _strings(commit.result) if text in found.sets)
            yield node_id, CommitFacts(commit.attempt, named)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def sets_of(storage: Storage, facts: StoreFacts) -> list[SetFacts]:
    """Return every set, by kind, run and label."""
    owners = {set_id: node_id for node_id, commit in facts.commits.items() for set_id in commit.sets}
    names = {node_id: (plan.run, node.label) for plan in facts.plans.values() for node_id, node in plan.nodes.items()}
    found = []
    for set_id, files in facts.survey.sets.items():
        item = _find(storage, set_id) if is_name(set_id) else None
        run, label = names.get(owners.get(set_id, ""), ("", ""))
        key = item.spec.key if item is not None else {}
        found.append(
            SetFacts(
                id=set_id,
                kind=facts.kinds.get(set_id, "") or "damaged",
                run=run,
                label=label,
                boundary=_boundary(key),
                rows=item.spec.rows if item is not None else 0,
                bytes=files.all.bytes,
                shards_present=len(files.records),
                shards=item.spec.shards if item is not None else 0,
                age_s=max(0.0, facts.now - files.all.newest),
            )
        )
    return sorted(found, key=lambda each: (each.kind, each.run, each.label, each.id))


def _boundary(key: Mapping[str, Any]) -> str:
    """Name the last block a set's values went through; empty for decoded data. Keys come from stores: not trusted."""
    try:
        blocks = [str(hop["block"]) for group in key.get("hops", ()) for hop in group]
    except (TypeError, KeyError, AttributeError):
        return ""
    return blocks[-1] if blocks else ""


def drop_set(storage: Storage, set_id: str) -> None:
    """Delete a set. MissingShard when there is none."""
    if not is_name(set_id) or not any(True for _ in storage.files(f"sets/{set_id}")):
        raise MissingShard(f"{storage.uri} has no set {set_id}", set=set_id)
    SnapshotStore(storage).drop(set_id)
