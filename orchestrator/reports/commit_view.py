"""Read what a summary needs from the commits of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from cache_store.records.nodes import Commit
from orchestrator.reports.record_json import REST, finite, from_json
from orchestrator.reports.records import (
    Benchmarks,
    BenchmarkScore,
    ClassCounts,
    ContaminatedBy,
    DataSummary,
    EpochSummary,
    Metrics,
    ShardCounts,
    SplitSummary,
    WorkPlace,
)
from workers.specs.data_results import DataFigures, SplitStatistics
from workers.specs.results import JudgeResult

if TYPE_CHECKING:
    from orchestrator.plan.graph import Node

Number = TypeVar("Number", int, float)
#: What a step does before it has its input, and behind that.
INPUT_PHASES = ("data", "copies", "prefix")
STEP_PHASES = ("forward", "loss", "backward", "update")


@dataclass(frozen=True)
class PartOfSet:
    """How much of a set a stage made along that was not whole when it ended."""

    rows: int = 0
    others: Mapping[str, Any] = field(default_factory=dict, metadata=REST)


@dataclass(frozen=True)
class TimeFigures:
    """Where the time of a stage went: seconds by phase (`workers.specs.results.PHASES`)."""

    phases: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict, metadata=REST)

    @property
    def waiting(self) -> float | None:
        """Return the share of the steps' time in which they waited for their input, 0 to 1; None without steps."""
        taken = [self.phases.get(phase, 0.0) for phase in (*INPUT_PHASES, *STEP_PHASES)]
        return sum(taken[: len(INPUT_PHASES)]) / sum(taken) if sum(taken) > 0 else None


@dataclass(frozen=True)
class CommitFigures:
    """What summaries take of a commit, whichever kind of node made it and whichever version: None, or empty, where the
    kind has no such figure. `others`: what no summary asks for. Epochs count from 0; times are seconds."""

    seconds: float | None = None
    where: WorkPlace | None = None
    #: Of scores: by name, and how many rows they are of. `rows` and `bytes` also of snapshot sets.
    metrics: Metrics = field(default_factory=dict)
    rows: int | None = None
    bytes: int | None = None
    set: str | None = None
    #: Of what reads snapshots or runs frozen blocks; `snapshot` by the names of `ShardCounts`.
    snapshot: Mapping[str, int] = field(default_factory=dict)
    forwards: Mapping[str, int] = field(default_factory=dict)
    partial: Mapping[str, PartOfSet] | None = None
    #: Of stages; `epochs` also hold those of earlier rounds.
    epochs: tuple[EpochSummary, ...] = ()
    best_epoch: int | None = None
    committed_epoch: int | None = None
    exit: str | None = None
    steps: int | None = None
    resumed: int | None = None
    path_is_auxiliary: bool | None = None
    input_seconds: float | None = None
    trainable_parameters: int | None = None
    trained_at_once: int | None = None
    resident_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_device_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None
    host_baseline_bytes: int | None = None
    #: The share of a stage's updates that rounding to bfloat16 took.
    swallowed: float | None = None
    times: TimeFigures | None = None
    by_class: ClassCounts | None = None
    others: Mapping[str, Any] = field(default_factory=dict, metadata=REST)

    @classmethod
    def of(cls, commit: Commit) -> CommitFigures:
        """Read a commit's result; figures that are not finite become None. CorruptRecord when it has another shape."""
        return from_json(cls, finite(commit.result), f"the result of node {commit.node}")

    @property
    def at_commit(self) -> EpochSummary:
        """Return the epoch whose weights were committed; one without figures where there is none."""
        return next((epoch for epoch in self.epochs if epoch.epoch == self.committed_epoch), EpochSummary())

    @property
    def host_growth(self) -> int | None:
        """Return by how much the host's memory grew above the idle level; None where that was not measured."""
        if self.peak_host_bytes is None or self.host_baseline_bytes is None:
            return None
        return max(0, self.peak_host_bytes - self.host_baseline_bytes)


#: What a node that has committed nothing (yet) has come to.
NO_FIGURES = CommitFigures()


@dataclass(frozen=True)
class CommitView:
    """The commits of a plan's nodes. `commits` and `figures`: by node; `failures`: node -> message."""

    nodes: Mapping[str, Node]
    commits: Mapping[str, Commit]
    figures: Mapping[str, CommitFigures]
    reused: frozenset[str]
    failures: Mapping[str, str]

    def status(self, node_id: str) -> str:
        """Return reused, done, failed or pending."""
        if node_id in self.figures:
            return "reused" if node_id in self.reused else "done"
        return "failed" if node_id in self.failures else "pending"

    def of(self, node_id: str) -> CommitFigures:
        """Return the figures of a node; none before it has committed."""
        return self.figures.get(node_id, NO_FIGURES)

    def judged(self, nodes: Mapping[str, str]) -> Benchmarks | None:
        """Return what benchmarks say, of those whose judge node (`nodes`: benchmark -> node) has committed."""
        found = {
            benchmark: _benchmark_score(self.commits[node].read(JudgeResult))
            for benchmark, node in nodes.items()
            if node in self.commits
        }
        return found or None


def _benchmark_score(result: JudgeResult) -> BenchmarkScore:
    score, overlap = result.score, result.contaminated
    return BenchmarkScore(
        metric=score.metric,
        value=score.value,
        stderr=score.stderr,
        n=score.n,
        shots=score.shots,
        contaminated=None if overlap is None else ContaminatedBy(overlap.asked, overlap.same, overlap.near),
        groups={part.task: part.value for part in score.parts} or None,
    )


def data_summary(found: DataFigures) -> DataSummary:
    """Sum up a prepared data set. Of images the splits are those of the files: what is held out of train later counts
    as train."""
    if found.statistics is not None:
        splits = {name: _split_summary(part) for name, part in found.statistics.items()}
    else:
        held_out = found.rows.get("held_out", 0)
        rows = {**found.rows, "train": found.rows.get("train", 0) - held_out, "held_out": 0, "validation": held_out}
        splits = {name: SplitSummary(samples=count) for name, count in rows.items() if count}
    unit = "images" if found.statistics is None else "samples"
    return DataSummary(unit, splits, dict(found.skipped or {}), found.warnings)


def _split_summary(part: SplitStatistics) -> SplitSummary:
    return SplitSummary(
        samples=part.samples.count,
        read=part.documents.count + part.empty,
        tokens=part.tokens,
        shortest=part.samples.min,
        longest=part.samples.max,
        mean=part.samples.mean,
        longest_read=part.documents.max,
        cut=part.truncated,
        dropped=part.dropped,
        empty=part.empty,
        without_targets=part.without_targets,
        skipped=part.skipped,
    )


def shard_counts(figures: Iterable[CommitFigures]) -> ShardCounts:
    """Return the reads and writes of snapshot shards of some commits together."""
    counted = [each.snapshot for each in figures]
    names = [each.name for each in fields(ShardCounts)]
    return ShardCounts(**{name: sum(counts.get(name, 0) for counts in counted) for name in names})


def sum_known(values: Iterable[Number | None]) -> Number | None:
    """Return the sum; None unless all values are known, and for no values."""
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if known and len(known) == len(found) else None


def maximum(values: Iterable[Number | None]) -> Number | None:
    """Return the largest of the known values."""
    return max((value for value in values if value is not None), default=None)
