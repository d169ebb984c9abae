"""Record what a run is about, as people ask for it: its regimes, their stages in order, and every node's name.

Left in the store beside the driver's lease, so that `segprop status` needs neither the data set nor the model, and
works on any machine that sees the store. Without parents, so that a plan of 10^5 nodes still fits a record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_store.errors import CorruptRecord
from cache_store.records.record_io import (
    MAX_PLAN_BYTES,
    dump_record,
    is_name,
    parse_record,
    read_bounded,
    read_local,
)
from cache_store.storage.base import Storage
from cache_store.storage.durable import write_atomically
from orchestrator.execution.run_lease import FOLDER
from orchestrator.plan.graph import Node, Plan
from workers.specs.task_kinds import TASKS

FORMAT = 1
#: In a run directory: which plan of its store it was last used for.
POINTER = "driver.json"


@dataclass(frozen=True)
class NodeRecord:
    kind: str
    label: str
    #: Of a stage, at most; None for other nodes.
    epochs: int | None
    #: Of a set, as planned.
    snapshot_bytes: int

    @property
    def trains(self) -> bool:
        """Whether it is a stage, or a round of one. A kind that this program does not know is none."""
        return self.kind in TASKS and TASKS[self.kind].trains

    @property
    def makes_set(self) -> bool:
        """Whether it makes a snapshot set."""
        return self.kind in TASKS and TASKS[self.kind].makes_set

    @property
    def prepares(self) -> bool:
        """Whether it puts the data set into the store."""
        return self.kind in TASKS and TASKS[self.kind].prepares


@dataclass(frozen=True)
class RegimeRecord:
    """Node ids. `assembled`: stage -> evaluation of the whole chain after it."""

    kind: str
    stages: tuple[str, ...]
    assembled: Mapping[str, str]
    validation: str
    test: str


@dataclass(frozen=True)
class RunRecord:
    run: str
    nodes: Mapping[str, NodeRecord]
    targets: frozenset[str]
    regimes: Mapping[str, RegimeRecord]

    @classmethod
    def of(cls, run: str, plan: Plan) -> RunRecord:
        nodes = {
            node.id: NodeRecord(
                node.kind,
                node.label,
                _epochs(node) if node.trains else None,
                node.estimate.snapshot_bytes if node.makes_set else 0,
            )
            for node in plan.nodes
        }
        regimes = {
            name: RegimeRecord(
                regime.kind,
                # A stage that is trained in rounds is as many lines.
                tuple(part for stage in regime.stages for part in regime.work_of(stage)),
                regime.assembled,
                regime.validation,
                regime.test,
            )
            for name, regime in plan.regimes.items()
        }
        return cls(run, nodes, frozenset(plan.targets), regimes)


def _epochs(node: Node) -> int:
    """Return the epochs of a stage, or those of its epochs that are over with this round."""
    return int(node.task["round"]["end"] if "round" in node.task else node.task["train"]["epochs"])


def write_run(storage: Storage, digest: str, record: RunRecord) -> None:
    """Leave the record of a run that starts now: the same bytes whenever it does."""
    ids = {node_id: index for index, node_id in enumerate(record.nodes)}
    body = {
        "format": FORMAT,
        "run": record.run,
        "nodes": [
            [node_id, node.kind, node.label, node.epochs, node.snapshot_bytes] for node_id, node in record.nodes.items()
        ],
        "targets": sorted(ids[node_id] for node_id in record.targets),
        "regimes": {
            name: {
                "kind": regime.kind,
                "stages": [ids[node_id] for node_id in regime.stages],
                "assembled": [[ids[stage], ids[node_id]] for stage, node_id in regime.assembled.items()],
                "validation": ids[regime.validation],
                "test": ids[regime.test],
            }
            for name, regime in record.regimes.items()
        },
    }
    storage.write(_path(digest), dump_record(body, f"the stages of {record.run}", MAX_PLAN_BYTES))


def read_run(storage: Storage, digest: str) -> RunRecord | None:
    """Read the record of a run. None when there is none of this version, or it is damaged."""
    path = _path(digest)
    data = read_bounded(storage, path, MAX_PLAN_BYTES)
    if data is None:
        return None
    try:
        body = parse_record(data, path, MAX_PLAN_BYTES)
        if body.get("format") != FORMAT:
            return None
        return _parse(body)
    except (CorruptRecord, KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _path(digest: str) -> str:
    return f"{FOLDER}/{digest}/plan.json"


def _parse(body: Mapping[str, Any]) -> RunRecord:
    ids = [str(row[0]) for row in body["nodes"]]
    if not all(map(is_name, ids)):
        raise ValueError("not the id of a node")
    nodes = {
        node_id: NodeRecord(str(kind), str(label), None if epochs is None else int(epochs), int(size))
        for node_id, (_, kind, label, epochs, size) in zip(ids, body["nodes"], strict=True)
    }
    regimes = {
        str(name): RegimeRecord(
            str(regime["kind"]),
            tuple(ids[index] for index in regime["stages"]),
            {ids[stage]: ids[node] for stage, node in regime["assembled"]},
            ids[regime["validation"]],
            ids[regime["test"]],
        )
        for name, regime in body["regimes"].items()
    }
    return RunRecord(str(body["run"]), nodes, frozenset(ids[index] for index in body["targets"]), regimes)


def write_pointer(run_dir: Path, digest: str) -> None:
    """Note in the run directory which plan it is used for."""
    write_atomically(run_dir / POINTER, (json.dumps({"plan": digest}) + "\n").encode())


def read_pointer(run_dir: Path) -> str | None:
    """Read which plan a run directory was last used for; None where nothing says so."""
    try:
        digest = (read_local(run_dir / POINTER) or {}).get("plan")
    except CorruptRecord:
        return None
    return digest if isinstance(digest, str) and is_name(digest) else None
