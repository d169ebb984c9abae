"""Read what a summary needs from the commits of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.reports.record_json import from_json
from orchestrator.reports.records import EpochSummary, Metrics, ShardCounts, WorkPlace

if TYPE_CHECKING:
    from orchestrator.plan.graph import Node

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class CommitView:
    """The commits of a plan's nodes. `results`: node -> the result it committed; `failures`: node -> message."""

    nodes: Mapping[str, Node]
    results: Mapping[str, Mapping[str, Any]]
    reused: frozenset[str]
    failures: Mapping[str, str]

    def status(self, node_id: str) -> str:
        """Return reused, done, failed or pending."""
        if node_id in self.results:
            return "reused" if node_id in self.reused else "done"
        return "failed" if node_id in self.failures else "pending"

    def result(self, node_id: str) -> Mapping[str, Any]:
        """Return what a node committed; {} before it has."""
        return self.results.get(node_id, {})

    def metrics(self, node_id: str) -> Metrics:
        """Return the metrics of an evaluation; {} before it is committed."""
        return dict(self.result(node_id).get("metrics", {}))

    def place(self, node_id: str) -> WorkPlace | None:
        """Return where and when a node ran; None before it is committed."""
        return place_of(self.result(node_id))

    def shard_counts(self, node_ids: Iterable[str]) -> ShardCounts:
        """Return the reads and writes of snapshot shards of some nodes together."""
        return shard_counts(self.result(node_id) for node_id in node_ids)


def place_of(result: Mapping[str, Any]) -> WorkPlace | None:
    """Return where and when the work of a result was done."""
    where = result.get("where")
    return from_json(WorkPlace, where, "where") if where else None


def epochs_of(result: Mapping[str, Any]) -> tuple[EpochSummary, ...]:
    """Return the epochs of a stage's result, of earlier rounds too."""
    return tuple(from_json(EpochSummary, epoch, "an epoch") for epoch in result.get("epochs", ()))


def epoch_at_commit(result: Mapping[str, Any], epochs: Iterable[EpochSummary]) -> EpochSummary:
    """Return the epoch whose weights were committed; one without figures where there is none."""
    committed = result.get("committed_epoch")
    return next((epoch for epoch in epochs if epoch.epoch == committed), EpochSummary())


def shard_counts(results: Iterable[Mapping[str, Any]]) -> ShardCounts:
    """Return the reads and writes of snapshot shards of some results together."""
    counted = [result.get("snapshot", {}) for result in results]
    keys = ("hits", "misses", "bytes_read", "bytes_written")
    return ShardCounts(**{key: sum(int(counts.get(key, 0) or 0) for counts in counted) for key in keys})


def host_growth(result: Mapping[str, Any]) -> int | None:
    """Return by how much the host's memory grew above the idle level; None where that was not measured."""
    peak, baseline = result.get("peak_host_bytes"), result.get("host_baseline_bytes")
    return None if peak is None or baseline is None else max(0, peak - baseline)


def sum_known(values: Iterable[Number | None]) -> Number | None:
    """Return the sum; None unless all values are known, and for no values."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if known and len(known) == len(found) else None


def maximum(values: Iterable[Number | None]) -> Number | None:
    """Return the largest of the known values."""
    return max((value for value in values if value is not None), default=None)
