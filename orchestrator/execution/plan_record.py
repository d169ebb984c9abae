"""Leave in the store what a run is after, so that the store alone tells which of its sets are still needed.

A record is named by its content and written anew, with the same bytes, whenever the run starts: its age says when
that was. Nothing a run does depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cache_store.errors import CorruptRecord
from cache_store.keys import digest_json
from cache_store.records.record_io import (
    MAX_PLAN_BYTES,
    dump_record,
    has_keys,
    is_name,
    parse_record,
    read_bounded,
)
from cache_store.storage.base import Storage
from orchestrator.plan.graph import Plan

FORMAT = 2
#: Those that are read: in the first one parents were written by their ids.
FORMATS = (1, 2)
FOLDER = "plans"


@dataclass(frozen=True)
class PlannedNode:
    """A node of a recorded plan."""

    kind: str
    label: str
    parents: tuple[str, ...]


@dataclass(frozen=True)
class PlanRecord:
    """A plan as far as others need to know it. `kept`: materialize nodes whose sets outlive the run."""

    run: str
    nodes: dict[str, PlannedNode]
    targets: frozenset[str]
    kept: frozenset[str]


def write_plan(storage: Storage, run: str, plan: Plan) -> str:
    """Leave the plan of a run that starts now; returns its digest, which names the record."""
    body, digest = _body(run, plan)
    storage.write(f"{FOLDER}/{digest}.json", dump_record(body, f"the plan of {run}", MAX_PLAN_BYTES))
    return digest


def plan_digest(run: str, plan: Plan) -> str:
    """Return the name of a plan in the store: the digest of what it is after, under the run's name."""
    return _body(run, plan)[1]


def _body(run: str, plan: Plan) -> tuple[dict[str, Any], str]:
    place = {node.id: number for number, node in enumerate(plan.nodes)}
    body = {
        "format": FORMAT,
        "run": run,
        # Parents by their places: of long chains they would be most of the record.
        "nodes": {
            node.id: {
                "kind": node.kind,
                "label": node.label,
                "parents": sorted({place[parent] for parent in node.parents.values()}),
            }
            for node in plan.nodes
        },
        "targets": sorted(plan.targets),
        "kept": sorted(plan.kept),
    }
    return body, digest_json(body)


def read_plans(storage: Storage) -> dict[str, PlanRecord]:
    """Read path -> plan of every record that is one; what is damaged or of another format is passed over."""
    found: dict[str, PlanRecord] = {}
    for name in storage.list(FOLDER):
        path = f"{FOLDER}/{name}"
        data = read_bounded(storage, path, MAX_PLAN_BYTES)
        if data is None:
            continue
        try:
            found[path] = _parse(parse_record(data, path, MAX_PLAN_BYTES))
        except (CorruptRecord, KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


def _parse(record: dict[str, Any]) -> PlanRecord:
    if not has_keys(record, "format run nodes targets kept") or record["format"] not in FORMATS:
        raise ValueError("not a plan of a known version")
    ids = [str(node_id) for node_id in record["nodes"]]

    def parent(written: Any) -> str:
        if not isinstance(written, int):
            return str(written)
        if not 0 <= written < len(ids):
            raise ValueError("no place of a node")
        return ids[written]

    nodes = {
        str(node_id): PlannedNode(str(node["kind"]), str(node["label"]), tuple(map(parent, node["parents"])))
        for node_id, node in record["nodes"].items()
        if is_name(node_id)
    }
    return PlanRecord(str(record["run"]), nodes, frozenset(record["targets"]), frozenset(record["kept"]))
