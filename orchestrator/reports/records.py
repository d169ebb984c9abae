"""Define the types of `summary.json`: what a run came to, its regimes, their stages, and every node's figures.

`to_json` and `from_json` of `record_json` are the one way between these and the file. Field names are the file's keys,
in its order. None stands for what was not measured (yet). Epochs count from 0; times are seconds of computing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.costs.formulas import Estimate
from orchestrator.environment import Environment
from orchestrator.reports.record_json import OPTIONAL, REST
from workers.specs.results import TimeSpent

#: Of a model on one split, by name: loss, accuracy, perplexity, token_accuracy.
Metrics = Mapping[str, float | None]
#: Of a node, a stage or a regime: pending, partial, done, reused, failed.
Status = str

FORMAT = 1
#: Statuses of what has its result.
FINISHED = ("done", "reused")


@dataclass(frozen=True)
class ShardCounts:
    """Reads and writes of snapshot shards."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class WorkPlace:
    """Where and when a task ran; unix seconds. `others`: the ranks of a gang and how they worked together."""

    host: str | None = field(default=None, metadata=OPTIONAL)
    pid: int | None = field(default=None, metadata=OPTIONAL)
    device: str | None = field(default=None, metadata=OPTIONAL)
    threads: int | None = field(default=None, metadata=OPTIONAL)
    world_size: int | None = field(default=None, metadata=OPTIONAL)
    started: float | None = field(default=None, metadata=OPTIONAL)
    finished: float | None = field(default=None, metadata=OPTIONAL)
    others: Mapping[str, Any] = field(default_factory=dict, metadata=REST)
    #: When a stage made its first step.
    first_step: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class EpochSummary:
    """One epoch as the stage's commit has it. `others`: rates by unit (`images_per_s`), and what newer workers add."""

    epoch: int | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation: Metrics | None = field(default=None, metadata=OPTIONAL)
    lr: float | None = None
    seconds: float | None = None
    validation_seconds: float | None = field(default=None, metadata=OPTIONAL)
    #: Of the test split: the whole network as it stood, and the stage's own path.
    test: Metrics | None = field(default=None, metadata=OPTIONAL)
    test_auxiliary: Metrics | None = field(default=None, metadata=OPTIONAL)
    test_seconds: float | None = field(default=None, metadata=OPTIONAL)
    others: Mapping[str, float | None] = field(default_factory=dict, metadata=REST)
    peak_device_bytes: int | None = None
    peak_device_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None

    def figure(self, name: str) -> float | None:
        """Return a figure by its key in the file; None where the epoch has none of that name."""
        if name in _OF_EPOCHS:
            value: float | None = getattr(self, name)
            return value
        split, _, metric = name.partition("_")
        return (self.validation or {}).get(metric) if split == "validation" else self.others.get(name)


_OF_EPOCHS = frozenset(EpochSummary.__dataclass_fields__) - {"validation", "test", "test_auxiliary", "others"}


@dataclass(frozen=True)
class StageMeasured:
    """What came of a stage, to stand beside its `Estimate`. `peak_kind`: `device`, or `host` without one."""

    trainable: int | None
    peak_bytes: int | None
    peak_kind: str
    seconds: float | None


@dataclass(frozen=True)
class StageEstimate:
    predicted: Estimate
    measured: StageMeasured


@dataclass(frozen=True)
class ContaminatedBy:
    """Of `asked` questions a model, or what it comes from, was trained on `same`, and on near-duplicates of `near`."""

    asked: int
    same: int
    near: int


@dataclass(frozen=True)
class BenchmarkScore:
    """A network's score on a benchmark: `value` (0..1) of `metric` over `n` questions, each asked after `shots`
    examples; `stderr` is the standard error of the mean."""

    metric: str
    value: float
    stderr: float | None
    n: int
    shots: int
    contaminated: ContaminatedBy | None = field(default=None, metadata=OPTIONAL)
    #: Of a benchmark in groups (MMLU): group -> value.
    groups: Mapping[str, float] | None = field(default=None, metadata=OPTIONAL)


#: Benchmark -> score.
Benchmarks = Mapping[str, BenchmarkScore]


@dataclass(frozen=True)
class StageSummary:
    """One stage; its rounds, if it was trained in rounds, as one piece of work."""

    name: str
    node: str
    label: str
    status: Status
    #: How many pieces of work it is made of, and how many of them are done.
    rounds: int
    rounds_done: int
    blocks: tuple[str, ...]
    trained: tuple[str, ...]
    path: tuple[str, ...]
    #: Where its input comes from, and why.
    source: str | None
    source_reason: str | None
    #: Whether a local head stood in for the network's own.
    auxiliary: bool
    seconds: float | None
    epochs: int
    planned_epochs: int | None
    steps: int | None
    exit: str | None
    best_epoch: int | None
    committed_epoch: int | None
    resumed: int | None
    trainable_parameters: int | None
    resident_bytes: int | None
    train_loss: float | None
    metrics: Metrics
    #: The whole chain after the stage.
    assembled: Metrics
    #: Of language models: the whole chain, the chain as far as it was trained, and how far that is.
    full: Metrics
    truncated: Metrics
    layer: int | Literal["head"] | None
    peak_device_bytes: int | None
    peak_device_reserved_bytes: int | None
    peak_host_bytes: int | None
    host_baseline_bytes: int | None
    host_growth_bytes: int | None
    snapshot: ShardCounts
    #: Frozen block -> samples run forward.
    forwards: Mapping[str, int]
    reused: bool
    world_size: int
    where: WorkPlace | None
    estimate: StageEstimate
    curve: tuple[EpochSummary, ...]
    #: The share of the updates (by size) that rounding to bfloat16 took, of rounds the largest; None where no weights
    #: are in bfloat16.
    swallowed: float | None = field(default=None, metadata=OPTIONAL)
    #: Of a stage whose parts take turns: the most parameters that are trained at one time.
    trained_at_once: int | None = field(default=None, metadata=OPTIONAL)
    #: Where its time went; of rounds all together.
    times: TimeSpent | None = field(default=None, metadata=OPTIONAL)
    #: The whole network after the stage on benchmarks, as far as they have been asked; None: none has.
    judged: Benchmarks | None = field(default=None, metadata=OPTIONAL)

    @property
    def done(self) -> bool:
        return self.status in FINISHED


@dataclass(frozen=True)
class ClassCounts:
    """How single classes fared, each a place in these: samples, those told right, how often it was said. `confused`:
    [class, what it was taken for, how often]."""

    samples: tuple[int, ...]
    right: tuple[int, ...]
    said: tuple[int, ...]
    confused: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FinalSummary:
    """The finished model. `metrics`, `rows` and `by_class` are of `split`; `validation` are the metrics of the other
    split."""

    metrics: Metrics
    split: str
    rows: int | None
    validation: Metrics
    status: Status
    by_class: ClassCounts | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class EndedEarly:
    """After which stage the network was good enough, what was asked for and what it had reached."""

    after: str
    stages_left_out: int
    target: Mapping[str, float]
    reached: Metrics


@dataclass(frozen=True)
class SetSummary:
    """One snapshot set. `boundary`: the blocks its rows went through; `shared`: more than one regime reads it."""

    label: str
    node: str
    status: Status
    split: str | None
    view: int | None
    boundary: tuple[str, ...]
    set: str | None
    rows: int | None
    bytes: int | None
    seconds: float | None
    shared: bool


@dataclass(frozen=True)
class BoundaryFigures:
    """What a boundary costs: the bytes of its sets, and seconds to make, to read or to compute again."""

    bytes: int | None
    make_seconds: float | None
    read_seconds: float | None
    recompute_seconds: float | None


@dataclass(frozen=True)
class BoundarySummary:
    """What was decided for one boundary and on what grounds. `basis`: `measured` or `nominal` speeds."""

    label: str
    source: str
    reason: str
    basis: str
    predicted: BoundaryFigures
    measured: BoundaryFigures
    #: Of every sample; None where samples have none.
    views: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class ForwardCount:
    """How often a frozen block ran: samples forward, and how many (sample, view) pairs there are."""

    samples: int
    sample_views: int | None
    per_sample_view: float | None


@dataclass(frozen=True)
class RegimeSummary:
    """One regime. `seconds`: of training, materialization and averaging; `wall_seconds`: while any of its nodes ran."""

    kind: str
    pipeline: str
    status: Status
    ended_early: EndedEarly | None
    stages: tuple[StageSummary, ...]
    final: FinalSummary
    seconds: float
    seconds_by_kind: Mapping[str, float]
    wall_seconds: float | None
    export: str | None
    peak_device_bytes: int | None
    peak_host_bytes: int | None
    host_growth_bytes: int | None
    trainable_parameters: int | None
    snapshot: ShardCounts
    snapshots: tuple[SetSummary, ...]
    boundaries: tuple[BoundarySummary, ...]
    forwards: Mapping[str, ForwardCount]
    #: Question that is asked after each stage -> stage -> what the answer says; None where none is asked.
    diagnoses: Mapping[str, Mapping[str, Any]] | None = field(default=None, metadata=OPTIONAL)
    #: Which variant of its kind it is, where there are several.
    variant: str | None = field(default=None, metadata=OPTIONAL)
    #: What a user should know of its stages, in sentences; None: nothing.
    notes: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    #: As `StageSummary.trained_at_once`.
    trained_at_once: int | None = field(default=None, metadata=OPTIONAL)
    #: What its stages are trained with, in words; several values where stages differ.
    settings: Mapping[str, str] | None = field(default=None, metadata=OPTIONAL)

    @property
    def done(self) -> bool:
        return self.status in FINISHED

    @property
    def judged(self) -> Benchmarks:
        """What it comes to on benchmarks: the network after its last stage."""
        return (self.stages[-1].judged or {}) if self.stages else {}


@dataclass(frozen=True)
class SplitSummary:
    """One split of the prepared data; of images, `samples` alone. `read`: documents (of tasks: answers) as they were
    found; `tokens`, `shortest`, `longest` and `mean` are of the samples as stored, `longest_read` of the documents."""

    samples: int
    read: int | None = field(default=None, metadata=OPTIONAL)
    tokens: int | None = field(default=None, metadata=OPTIONAL)
    shortest: int | None = field(default=None, metadata=OPTIONAL)
    longest: int | None = field(default=None, metadata=OPTIONAL)
    mean: float | None = field(default=None, metadata=OPTIONAL)
    longest_read: int | None = field(default=None, metadata=OPTIONAL)
    cut: int | None = field(default=None, metadata=OPTIONAL)
    dropped: int | None = field(default=None, metadata=OPTIONAL)
    empty: int | None = field(default=None, metadata=OPTIONAL)
    without_targets: int | None = field(default=None, metadata=OPTIONAL)
    skipped: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class DataSummary:
    """What the data came to when they were prepared. `unit`: what samples are; `skipped`: files that are no images, by
    suffix; `warnings`: sentences."""

    unit: str
    splits: Mapping[str, SplitSummary]
    skipped: Mapping[str, int]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class About:
    """What was configured, in words. `yardstick`: the regime that the others are compared with; None: there is none."""

    model: str
    data: str
    seed: int
    yardstick: str | None
    #: What classes are called, in their order.
    class_names: tuple[str, ...] | None = field(default=None, metadata=OPTIONAL)
    #: Name of the configuration file.
    source: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class NodeCounts:
    total: int
    done: int
    reused: int
    failed: int


@dataclass(frozen=True)
class WorkFigures:
    """Of one node. `snapshot_bytes`: what it adds to the store."""

    peak_bytes: int | None
    snapshot_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class WorkSummary:
    """One node on the timeline, with what was predicted for it beside what was measured."""

    node: str
    label: str
    kind: str
    regimes: tuple[str, ...]
    status: Status
    where: WorkPlace | None
    predicted: WorkFigures
    measured: WorkFigures


@dataclass(frozen=True)
class Failure:
    node: str
    label: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run came to. `original`: split -> metrics of the model as it came ({} where it came without weights)."""

    format: int = FORMAT
    run: str
    status: str
    environment: Environment
    regimes: Mapping[str, RegimeSummary]
    nodes: NodeCounts
    work: tuple[WorkSummary, ...]
    original: Mapping[str, Metrics]
    failures: tuple[Failure, ...]
    #: None before the data are prepared.
    data: DataSummary | None = field(default=None, metadata=OPTIONAL)
    about: About | None = field(default=None, metadata=OPTIONAL)
    #: The model as it came on benchmarks; None: not asked.
    judged: Benchmarks | None = field(default=None, metadata=OPTIONAL)
