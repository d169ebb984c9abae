"""Summaries for tests: read from JSON values, or made of as little as a test is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.costs.formulas import Estimate
from orchestrator.environment import Environment
from orchestrator.reports.record_json import from_json
from orchestrator.reports.records import (
    FinalSummary,
    NodeCounts,
    RegimeSummary,
    ShardCounts,
    StageEstimate,
    StageMeasured,
    StageSummary,
    Summary,
)


def read(summary: Mapping[str, Any]) -> Summary:
    """The summary of these JSON values."""
    return from_json(Summary, summary)


def bare_summary(**values: Any) -> Summary:
    """A summary of which only `values` say anything."""
    nothing: dict[str, Any] = {
        "run": "bare",
        "status": "done",
        "environment": Environment(),
        "regimes": {},
        "nodes": NodeCounts(0, 0, 0, 0),
        "work": (),
        "original": {},
        "failures": (),
    }
    return Summary(**(nothing | values))


def bare_regime(kind: str, **values: Any) -> RegimeSummary:
    """A finished regime without stages or figures, but for `values`; `metrics` and `validation` are its final ones."""
    final = FinalSummary(values.pop("metrics", {}), "test", None, values.pop("validation", {}), "done")
    nothing: dict[str, Any] = dict.fromkeys(RegimeSummary.__dataclass_fields__) | {
        "kind": kind,
        "pipeline": "sequential",
        "status": "done",
        "stages": (),
        "final": final,
        "seconds": 0.0,
        "seconds_by_kind": {},
        "snapshot": ShardCounts(),
        "snapshots": (),
        "boundaries": (),
        "forwards": {},
    }
    return RegimeSummary(**(nothing | values))


def bare_stage(**values: Any) -> StageSummary:
    """A finished stage without figures, but for `values`."""
    nothing: dict[str, Any] = dict.fromkeys(StageSummary.__dataclass_fields__) | {
        "name": "stage",
        "node": "n",
        "label": "regime/stage",
        "status": "done",
        "rounds": 1,
        "rounds_done": 1,
        "blocks": (),
        "trained": (),
        "path": (),
        "auxiliary": False,
        "epochs": 0,
        "metrics": {},
        "assembled": {},
        "full": {},
        "truncated": {},
        "snapshot": ShardCounts(),
        "forwards": {},
        "reused": False,
        "world_size": 1,
        "estimate": StageEstimate(Estimate(), StageMeasured(None, None, "host", None)),
        "curve": (),
    }
    return StageSummary(**(nothing | values))
