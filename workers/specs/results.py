"""Define what nodes of a plan commit, one dataclass a kind (those of data are in `data_results`): made to and read from
JSON here alone. Loads no torch.

A store outlives the version that filled it: fields that came later have a default, and keys that are not known are
passed over (`as_json.read_record`). Names and order of the keys stay as they are. All times are unix seconds, all
durations seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from workers.specs.as_json import read_record, write_record

#: The file of a model node that holds every tensor of the network.
INITIAL_STATE = "state.safetensors"
#: What a stage spends its time on, in the order in which it comes (`TimeSpent`). `opening` ends with the first step;
#: `prefix` are the frozen blocks before a stage that computes its inputs again; `rest` is what no other name covers.
PHASES = (
    *("opening", "data", "copies", "prefix", "forward", "loss", "backward", "update", "checkpoints"),
    *("validation", "test", "measuring", "publishing", "rest"),
)


class Record:
    """Write and read a record whose fields are its keys."""

    #: Fields that are left out of the JSON where they are None.
    OMITTED: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        """Write the record as JSON values."""
        return write_record(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what this version or another one wrote. ValueError when a field is missing that all versions write."""
        return read_record(cls, data)


@dataclass(frozen=True, kw_only=True)
class Rank(Record):
    """One process of a gang."""

    host: str
    pid: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Where(Record):
    """Where and when a node was run."""

    OMITTED = ("strategy", "ranks", "first_step")

    host: str
    pid: int
    device: str
    threads: int
    world_size: int = 1
    started: float
    finished: float
    #: Of a gang: how its ranks shared the stage, and who they were.
    strategy: str | None = None
    ranks: tuple[Rank, ...] | None = None
    #: Of a stage: when its first step began; what lies before it is hand-over.
    first_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class PartRecord(Record):
    """One part's weights: the file of the commit that holds them, the digest of the state and the file's length."""

    file: str
    digest: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class SnapshotCounters(Record):
    """Shards of snapshot sets that were found and that were not, and the bytes that were read and written."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: SnapshotCounters) -> SnapshotCounters:
        return SnapshotCounters(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
        )


@dataclass(frozen=True, kw_only=True)
class EpochFigures(Record):
    """What one epoch of a stage came to. Accuracies 0..1; `epoch` counts from 0."""

    OMITTED = ("test", "test_auxiliary", "test_seconds")

    epoch: int
    train_loss: float
    #: None where the domain does not count it.
    train_accuracy: float | None
    validation_loss: float
    #: None where targets are no classes; what they are scored by is in `validation`.
    validation_accuracy: float | None
    #: All metrics of the domain.
    validation: Mapping[str, float] = field(default_factory=dict)
    lr: float
    seconds: float
    validation_seconds: float = 0.0
    #: Of the test split, where it is scored after every epoch: the whole network as it stands, and the stage's own path
    #: where that is another one; and what scoring took, which is in no other time.
    test: Mapping[str, float] | None = None
    test_auxiliary: Mapping[str, float] | None = None
    test_seconds: float | None = None
    #: Samples a second, and what they are called: the key is `<unit>_per_s`.
    unit: str = "images"
    rate: float = 0.0
    peak_device_bytes: int | None = None
    peak_device_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None

    def validation_of(self, metric: str) -> float:
        """Return a metric of the validation split. KeyError where it was not counted."""
        known = {"loss": self.validation_loss, "accuracy": self.validation_accuracy, **self.validation}
        value = known[metric]
        if value is None:
            raise KeyError(metric)
        return value

    def to_json(self) -> dict[str, Any]:
        named = {"rate": f"{self.unit}_per_s"}
        return {named.get(key, key): value for key, value in write_record(self).items() if key != "unit"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        key = next((key for key in data if key.endswith("_per_s")), None)
        rate = {} if key is None else {"unit": key.removesuffix("_per_s"), "rate": data[key]}
        return read_record(cls, {**data, **rate})


@dataclass(frozen=True, kw_only=True)
class NodeFigures(Record):
    """What results of several kinds have in common, read without the rest: for progress and logs."""

    seconds: float | None = None
    resumed: int | None = None
    snapshot: SnapshotCounters | None = None
    where: Where | None = None
    #: Of a snapshot set.
    bytes: int | None = None
    #: Sentences for the user, of a text data set.
    warnings: tuple[str, ...] = ()
    #: Of an evaluation, or of a benchmark.
    metrics: Mapping[str, float] = field(default_factory=dict)
    #: Of a stage: its epochs, and the one whose weights it committed.
    epochs: tuple[EpochFigures, ...] = ()
    committed_epoch: int | None = None

    def score(self) -> Mapping[str, float]:
        """Return the metrics of an evaluation, or of a stage's weights on the validation split; else {}."""
        if self.metrics or not self.epochs:
            return self.metrics
        committed = self.epochs[min(self.committed_epoch or 0, len(self.epochs) - 1)]
        accuracy = committed.validation_accuracy
        plain = {"loss": committed.validation_loss, **({} if accuracy is None else {"accuracy": accuracy})}
        return committed.validation or plain


@dataclass(frozen=True, kw_only=True)
class HeldParts(Record):
    """The parts that a commit holds in files of their own, whichever kind of node made it; read without the rest."""

    parts: Mapping[str, PartRecord] = field(default_factory=dict)

    def file_of(self, part: str) -> str:
        """Name the file of the commit that holds a part: its own, or the one with the whole initial state."""
        held = self.parts.get(part)
        return INITIAL_STATE if held is None else held.file


@dataclass(frozen=True, kw_only=True)
class ModelResult(Record):
    """Initial weights: one file with every tensor (`digest`), or an imported checkpoint's `parts`, with the names of
    the files that go beside them."""

    OMITTED = ("digest", "parts", "companions")

    digest: str | None = None
    parts: Mapping[str, PartRecord] | None = None
    companions: tuple[str, ...] | None = None
    seconds: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class MeasuredMemory(Record):
    """What a stage held. Peaks are the largest of its epochs but the first, where there are more; None: not known."""

    OMITTED = ("trained_at_once",)

    trainable_parameters: int
    resident_bytes: int
    #: Of a stage whose parts take turns (`StageTask.schedule`): the most that had gradients at one time.
    trained_at_once: int | None = None
    peak_device_bytes: int | None = None
    peak_device_reserved_bytes: int | None = None
    peak_host_bytes: int | None = None
    #: Of the process, before the stage began.
    host_baseline_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class PartialSet(Record):
    """A set of which only some shards are in the store, and how many samples these are."""

    set: str
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class LeftSets(Record):
    """Role -> set that a stage made along but not whole: the part of a `StageResult` that says so, without the rest."""

    partial: Mapping[str, PartialSet] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TimeSpent(Record):
    """Where the time of a stage's last attempt went, from the start of its worker's order until its result was written;
    of a gang, of its first rank. Keys of the mappings are those of `PHASES` that took any time."""

    OMITTED = ("host",)

    #: On the clock.
    seconds: float
    #: They add up to `seconds`. On a CUDA device the steps are divided by the device's own timeline, which is that of
    #: the steps that were looked at: the host is ahead of it.
    phases: Mapping[str, float]
    #: Processor seconds of all threads of the process while the phase ran; of steps estimated from those looked at.
    processor: Mapping[str, float]
    #: Processor seconds of the process, all threads; of the thread that trains alone; and in the kernel.
    processor_seconds: float
    thread_seconds: float
    system_seconds: float
    #: Part of the path -> its seconds of `phases["forward"]`, estimated; empty where no step was looked at.
    forward: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    #: Steps in which processor time, the device and the parts were looked at, too.
    looked_at: int = 0
    #: With a CUDA device: the host's clock by phase, which says where the host waited.
    host: Mapping[str, float] | None = None

    def __add__(self, other: TimeSpent) -> TimeSpent:
        """Add the time of another piece of the same stage's work."""
        hosts = [each.host for each in (self, other) if each.host is not None]
        return TimeSpent(
            seconds=self.seconds + other.seconds,
            phases=_added(self.phases, other.phases),
            processor=_added(self.processor, other.processor),
            processor_seconds=self.processor_seconds + other.processor_seconds,
            thread_seconds=self.thread_seconds + other.thread_seconds,
            system_seconds=self.system_seconds + other.system_seconds,
            forward=_added(self.forward, other.forward),
            steps=self.steps + other.steps,
            looked_at=self.looked_at + other.looked_at,
            host=_added(*hosts) if hosts else None,
        )


def _added(*counts: Mapping[str, float]) -> dict[str, float]:
    """Add up values by their keys, in the order in which keys come first."""
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each.get(name, 0.0) for each in counts) for name in names}


@dataclass(frozen=True, kw_only=True)
class HeldTimes(Record):
    """Where the time of a stage went: the part of a `StageResult` that says so, without the rest."""

    times: TimeSpent | None = None


@dataclass(frozen=True, kw_only=True)
class StageResult(Record):
    """A stage, or a round of one, that was trained; or left out by the run's exit (`epochs` empty, no `memory`)."""

    OMITTED = ("scaler", "train_spec", "swallowed", "warnings", "emulated", "partial", "waited_s", "times", "adapters")

    stage: str
    parts: Mapping[str, PartRecord]
    epochs: tuple[EpochFigures, ...]
    best_epoch: int | None
    committed_epoch: int | None
    exit: str
    steps: int
    path_is_auxiliary: bool
    #: Of a round that another one follows: the state of the gradient scaler, empty where there is none.
    scaler: Mapping[str, Any] | None = None
    #: Its fields are keys of the result itself.
    memory: MeasuredMemory | None = None
    snapshot: SnapshotCounters = field(default_factory=SnapshotCounters)
    #: Samples that ran through each frozen block.
    forwards: Mapping[str, int] = field(default_factory=dict)
    input_seconds: float | None = None
    seconds: float
    resumed: int = 0
    #: The settings it was trained with, as JSON values.
    train_spec: Mapping[str, Any] | None = None
    #: The share of the updates (by size) that rounding to bfloat16 took; None where no weights are in bfloat16.
    swallowed: float | None = None
    #: What the user should know, in sentences.
    warnings: tuple[str, ...] | None = None
    #: The precision it was trained in, where the device has no instructions for it.
    emulated: str | None = None
    where: Where
    #: Where others worked on its sets: those that are not whole, and how long it waited for somebody else's shards.
    partial: Mapping[str, PartialSet] | None = None
    waited_s: float | None = None
    #: Where its time went; None of stages that were left out, and of earlier versions.
    times: TimeSpent | None = None
    #: With `train.lora`, the low-rank adapters by themselves, of every part that has some; merged, they are in `parts`.
    adapters: Mapping[str, PartRecord] | None = None

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, value in write_record(self).items():
            plain |= {key: value} if key != "memory" else value or {}
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        held = {"memory": data} if "trainable_parameters" in data else {}
        return read_record(cls, {**data, **held})


@dataclass(frozen=True, kw_only=True)
class MaterializeResult(Record):
    """A snapshot set that is whole; or empty, where the run's exit left its reader out."""

    set: str
    rows: int
    bytes: int
    forwards: Mapping[str, int] = field(default_factory=dict)
    snapshot: SnapshotCounters = field(default_factory=SnapshotCounters)
    seconds: float
    where: Where


@dataclass(frozen=True)
class BlockCosts(Record):
    """Of one block and of the boundary behind it, in seconds a sample (`build`: in seconds)."""

    #: Loading the block's weights.
    build: float
    #: Its forward pass in groups, as snapshots are made, with what is done to keep a row: cast, encode.
    group: float
    #: Its forward pass over training batches, as a stage that recomputes runs it.
    batch: float
    #: Of rows of the boundary behind it: writing; reading for the first time (verified, mapped, gathered shuffled,
    #: decoded); reading again.
    write: float
    open: float
    read: float


@dataclass(frozen=True, kw_only=True)
class LoadCosts(Record):
    """Seconds a sample to load raw inputs, in groups of a shard and in batches."""

    group: float
    batch: float


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts(Record):
    """What snapshots of a chain cost on a slot."""

    load: LoadCosts
    blocks: Mapping[str, BlockCosts]


@dataclass(frozen=True, kw_only=True)
class MeasureResult(Record):
    """Costs that were measured on a slot of the run."""

    figures: MeasuredCosts
    seconds: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class AverageResult(Record):
    """Parts averaged over replicas."""

    parts: Mapping[str, PartRecord]
    replicas: int
    seconds: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class ByClass(Record):
    """How single classes fared, each a place in these: how many samples of it there are, how many of them were told
    `right`, and how often it was `said` at all. `confused`: (class, what it was taken for, how often), most often
    first; a class that was never wrong is in none."""

    samples: tuple[int, ...]
    right: tuple[int, ...]
    said: tuple[int, ...]
    confused: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class EvaluateResult(Record):
    """Scores of an assembled chain: at least its mean `loss`; of classes and of text `accuracy` (0..1), too."""

    OMITTED = ("by_class",)

    #: Where there are classes, and not too many of them.
    by_class: ByClass | None = None
    metrics: Mapping[str, float]
    rows: int
    seconds: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class Overlap(Record):
    """Of `asked` questions a model was trained on `same`, and on near-duplicates of `near` more; `example`: one."""

    asked: int
    same: int
    near: int
    example: str = ""


@dataclass(frozen=True, kw_only=True)
class QuestionsResult(Record):
    """Questions of a benchmark, kept in a file of the commit. `contaminated`: those that are trained on."""

    OMITTED = ("contaminated",)

    benchmark: str
    contaminated: Overlap | None = None
    seconds: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class JudgedScore(Record):
    """What a benchmark says of a model (`workers.judge.scores.Score`): `value` (0..1) of `metric` over `n` questions,
    each asked after `shots` examples, with the standard error of the mean; and the same of its groups and subjects."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    shots: int
    parts: tuple[JudgedScore, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JudgeResult(Record):
    """A network's score on a benchmark. `contaminated`: questions that it, or what it comes from, was trained on;
    `weights`: identity of all of its weights."""

    OMITTED = ("contaminated", "weights")

    benchmark: str
    score: JudgedScore
    contaminated: Overlap | None = None
    #: The share of right answers as `accuracy`, for whoever shows scores of any kind.
    metrics: Mapping[str, float]
    weights: str | None = None
    seconds: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class MeasuredValue(Record):
    """A figure and its standard error."""

    value: float
    error: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.error)


@dataclass(frozen=True, kw_only=True)
class BoundaryMeasures(Record):
    """What was measured behind a block, by name; `width`: numbers that stand for a sample there."""

    width: int
    measures: Mapping[str, MeasuredValue]


@dataclass(frozen=True, kw_only=True)
class BoundariesResult(Record):
    """What boundaries of a network know, by the block before them. `samples`: those measured, in blocks of `block`;
    `held_out`: those that probes are scored on, none without probes."""

    samples: int
    held_out: int
    block: int
    classes: int
    boundaries: Mapping[str, BoundaryMeasures]
    #: Samples, of both kinds, whose first boundary was read from snapshots; those that ran through the blocks before
    #: it; and what reading took of the store.
    read: int
    ran: int
    snapshot: SnapshotCounters = field(default_factory=SnapshotCounters)
    #: Of `seconds`: forward passes, reading and loading; the rest is estimating.
    forward_seconds: float
    seconds: float
    where: Where
