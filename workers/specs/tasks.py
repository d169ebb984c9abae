"""The tasks that nodes of a plan carry, one dataclass a kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cache_store.formats.encodings import EncodingName
from workers.specs.experiment import Experiment, ImageSpec, Precision, TrainSpec
from workers.specs.language import CausalLMSpec, LabelledTextSpec, TextSpec
from workers.specs.memory import ON_DEVICE, Activations, FrozenTier, MemorySpec
from workers.specs.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class DataTask:
    """Decode a data set once into the store. `fingerprint` identifies the source files (names and contents)."""

    data: ImageSpec | TextSpec | LabelledTextSpec
    fingerprint: str
    #: Text is split and tokenized by this task: its seed, and the model whose tokenizer it takes.
    seed: int = 0
    model: CausalLMSpec | None = None
    #: Identity of that tokenizer, its chat template included.
    tokenizer: str | None = None
    LATER: ClassVar[tuple[str, ...]] = ("tokenizer",)


@dataclass(frozen=True, kw_only=True)
class ModelTask:
    """Write the initial weights: one safetensors file with the names of the whole network, or one a part."""

    LATER: ClassVar[tuple[str, ...]] = ("sample", "companions", "code")

    model: ModelSpec
    classes: int
    seed: int
    #: Identity of the initial weights (sha256 of the file, or of a checkpoint's files) or None.
    weights_digest: str | None = None
    #: Shape of one sample, for families whose weights depend on it; else None.
    sample: tuple[int, ...] | None = None
    #: Identity of what an export copies beside the weights (tokenizer, chat template), and of trusted model code.
    companions: str | None = None
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class BoundarySpec:
    """One stored boundary: what turns images into it, and how it is laid out.

    `hops[i]` are the blocks between stored boundary i-1 (or the images) and stored boundary i; the last hop
    ends at this boundary. Blocks run frozen (eval, no_grad) in groups of `group_rows` samples in data set
    order and every hop's output is cast to `dtype`: so a shard has the same bytes however it was made.
    """

    hops: tuple[tuple[str, ...], ...]
    precision: Precision
    dtype: Literal["float32", "bfloat16", "float16"]
    group_rows: int
    #: Aim for shards of this size; see `rows_per_shard`. (Bytes, not rows: one rule then gives the geometry of
    #: every boundary of a chain, so a worker can find an earlier hop's set from its own spec.)
    shard_bytes: int
    channels_last: bool = False
    #: How rows are kept. The next hop, too, is computed from what they decode to.
    encoding: EncodingName = "plain"


def rows_per_shard(row_bytes: int, shard_bytes: int, group_rows: int) -> int:
    """Return the rows of a shard: whole groups of rows of `row_bytes` that fit into `shard_bytes`, at least one."""
    return max(1, shard_bytes // (row_bytes * group_rows)) * group_rows


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """When nothing more needs to be trained: what the whole network must reach on validation. All that is given."""

    #: At least (0..1).
    accuracy: float | None = None
    #: At most.
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class MaterializeTask:
    """Compute one snapshot set. Parents: data, weights/<part> for every part in hops, `previous` (the materialize
    node one hop earlier) where there is one, and `gate` (an evaluate node) with a gate: if it is met, nothing is
    computed."""

    LATER: ClassVar[tuple[str, ...]] = ("gate", "frozen")

    experiment: Experiment
    boundary: BoundarySpec
    split: Literal["train", "validation", "test"]
    #: None: the evaluation transform.
    view: int | None
    gate: GateSpec | None = None
    #: Where the weights of its blocks lie; None: on the device.
    frozen: FrozenTier | None = None


@dataclass(frozen=True, kw_only=True)
class RoundSpec:
    """Some consecutive epochs of a stage, as a piece of work of its own: `first` up to, not with, `end`. The stage's
    schedule, views and order of samples go by its own epochs, of which it has `train.epochs`."""

    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class MeasureTask:
    """Measure what snapshots of this chain cost on a slot. Parents: data, weights/<part> for every block.

    `blocks`: (name, how many blocks lie before it), in chain order, one for all that do the same work.
    """

    experiment: Experiment
    blocks: tuple[tuple[str, int], ...]
    precision: Precision
    dtype: Literal["float32", "bfloat16", "float16"]
    encoding: EncodingName
    channels_last: bool
    group_rows: int
    batch_rows: int
    shard_bytes: int


@dataclass(frozen=True, kw_only=True)
class EpochTestSpec:
    """Score the test split after every epoch of a stage. `path`: the whole network, in forward order."""

    path: tuple[str, ...]
    batch_size: int


#: How a block schedule goes through its blocks: in cycles over all of them, or drawing some every time.
BlockOrder = Literal["ascending", "descending", "random", "sampled"]


@dataclass(frozen=True, kw_only=True)
class BlockSchedule:
    """Which of a stage's trained parts are trained when (`workers.training.updates.active_parts`): all others are
    frozen meanwhile, and have neither gradients nor a state of the optimizer."""

    #: What is chosen from, in chain order; the parts of one entry are trained together.
    blocks: tuple[tuple[str, ...], ...]
    #: Optimizer steps for which a choice is kept. With it the chosen blocks' state of the optimizer ends.
    steps: int
    order: BlockOrder
    #: Blocks that are drawn at one time (sampled).
    count: int = 1
    #: Parts that are trained throughout; their state of the optimizer lives on.
    always: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageTask:
    """One training stage. Parents: data, weights/<part> for every part of `path` and of `boundary.hops`
    (the node whose commit holds that part: a model node or an earlier stage), snapshot/<split>/<view> for each
    set read (view `eval` for validation), and `optimizer` (the previous stage) when its state is carried; `continue`
    (the round before) for every round of a stage but its first; `gate` (an evaluate node) with a gate: if it is met,
    the parts are committed as they are."""

    experiment: Experiment
    #: Fields that came later: left out where they are None, so that tasks without them keep their ids.
    LATER: ClassVar[tuple[str, ...]] = ("window", "round", "gate", "test", "tied", "memory", "schedule")

    #: Unique inside a regime, e.g. `stage2-seg2`.
    name: str
    #: Parts in forward order: blocks, then maybe `adapter`, blocks of the global head, `head`; or `aux` last (LW).
    path: tuple[str, ...]
    #: The parts of `path` that are updated and committed. `adapter` and `aux` train always, are never committed.
    trained: tuple[str, ...]
    train: TrainSpec
    #: Where inputs come from: images; snapshots of `boundary`; or recompute (frozen prefix on the device).
    source: Literal["images", "snapshots", "recompute"]
    #: The boundary this stage reads; None when it starts at the images.
    boundary: BoundarySpec | None = None
    #: Shards of `boundary` open at one time in the order of an epoch; None: any sample may follow any other.
    window: int | None = None
    #: The part of the stage's epochs that is trained here; None: all.
    round: RoundSpec | None = None
    gate: GateSpec | None = None
    #: With it, weights/<part> of all parts of the network are parents.
    test: EpochTestSpec | None = None
    #: true: parts of the path hold together what the model shares between them (embedding and LM head).
    tied: bool | None = None
    #: Where the stage keeps what it holds; None: all on the device.
    memory: MemorySpec | None = None
    #: None: all of `trained` at every step.
    schedule: BlockSchedule | None = None

    @property
    def tiers(self) -> MemorySpec:
        """Where the stage keeps what it holds."""
        return self.memory or ON_DEVICE

    @property
    def activations(self) -> Activations:
        """What happens to activations between the forward and the backward pass."""
        return self.tiers.activations_of(self.train)

    @property
    def stored_boundary(self) -> BoundarySpec:
        """The boundary this stage reads or computes again. ValueError where it starts at the images."""
        if self.boundary is None:
            raise ValueError(f"{self.name} starts at the images: it reads no boundary")
        return self.boundary

    @property
    def epochs(self) -> range:
        """The epochs trained here."""
        return range(self.train.epochs) if self.round is None else range(self.round.first, self.round.end)

    @property
    def ordered_by(self) -> str | None:
        """The name that its orders of samples go by. None for a stage that starts at the raw inputs: every regime has
        one such stage, the first, and their orders are the same, so that regimes are compared on equal terms."""
        return None if self.boundary is None else self.name

    @property
    def goes_on(self) -> bool:
        """Tell whether a later round continues this one."""
        return self.epochs.stop < self.train.epochs


def snapshot_role(split: str, view: int | None) -> str:
    """Return the role of the materialize node of one set among a stage's parents."""
    return f"snapshot/{split}/{'eval' if view is None else view}"


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Score an assembled chain from the images. Parents: data, weights/<part> for every part of `path`."""

    LATER: ClassVar[tuple[str, ...]] = ("tied", "frozen")

    experiment: Experiment
    path: tuple[str, ...]
    split: Literal["validation", "test"]
    batch_size: int
    precision: Precision
    channels_last: bool = False
    #: As `StageTask.tied`.
    tied: bool | None = None
    #: Where the weights lie; None: on the device.
    frozen: FrozenTier | None = None


@dataclass(frozen=True, kw_only=True)
class AverageTask:
    """The mean of some parts over replicas that were trained apart. Parents: replica/<i> (train nodes, each of which
    commits all of `parts`), counted from 0."""

    experiment: Experiment
    parts: tuple[str, ...]


#: The type that weights of a judged model are held in; `auto`: the one that its config names.
JudgedType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class QuestionsTask:
    """Put the questions of one benchmark into the store, once they are known to be sound and not to be trained on.
    Parents: `model`, whose weights may have been trained on some before, and `data` where the run trains on questions.
    `fingerprint` identifies the files (names and contents)."""

    LATER: ClassVar[tuple[str, ...]] = ("limit", "subjects")

    #: A key of `workers.judge.judges.JUDGES`.
    benchmark: str
    fingerprint: str
    #: The folder that holds the benchmarks' own.
    path: str
    limit: int | None = None
    subjects: tuple[str, ...] | None = None
    allow_code_execution: bool = False
    allow_unisolated: bool = False
    #: Go on where some are trained on; scores are then marked.
    allow_contaminated: bool = False


@dataclass(frozen=True, kw_only=True)
class JudgeTask:
    """Ask an assembled language model the questions of one benchmark. Parents: `questions`, `model` (whose commit has
    what goes beside the weights), weights/<part> for every part of the network; and `before`, where a stage may leave
    the network as it was: the judge node after the stage before it, whose score is then this one's."""

    #: Settings that the benchmark has no use for are None, so that they change no id.
    LATER: ClassVar[tuple[str, ...]] = ("limit", "subjects", "shots", "seed", "max_new_tokens")

    experiment: Experiment
    benchmark: str
    batch_size: int
    dtype: JudgedType = "auto"
    limit: int | None = None
    subjects: tuple[str, ...] | None = None
    shots: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    allow_code_execution: bool = False
    allow_unisolated: bool = False
    #: Package -> version, of those that ask, beside what computes the model.
    libraries: Mapping[str, str] = field(default_factory=dict)


#: What is measured of boundaries (`workers.measures`).
Measure = Literal["nhsic", "cka", "probe", "effective_rank"]
#: How wide the kernels of nHSIC are: `workers.measures.nhsic`.
Bandwidth = Literal["fixed", "median"]
#: Samples without which nothing is measured: with fewer no block has the four that an unbiased estimate needs.
LEAST_MEASURED = 64
#: Samples of a block over which kernels are computed, where there are enough for several.
MEASURED_BLOCK = 500
#: Numbers that stand for a sample at a boundary, at most.
MOST_FEATURES = 1024


@dataclass(frozen=True, kw_only=True)
class BoundariesTask:
    """Measure what boundaries of an assembled network know of inputs and targets. Parents: data, weights/<part> for
    every block up to the last of `boundaries`; and `reference`, where there is one: the node of the network that they
    are compared with, which has kept the features of its own."""

    LATER: ClassVar[tuple[str, ...]] = ("stored", "keeps", "frozen", "bandwidth")

    experiment: Experiment
    #: Blocks in forward order, from the first one on.
    path: tuple[str, ...]
    #: The blocks behind which is measured.
    boundaries: tuple[str, ...]
    measures: tuple[Measure, ...]
    #: Training samples, and validation samples for probes, at most.
    samples: int
    batch_size: int
    precision: Precision
    channels_last: bool = False
    #: Where it begins: a boundary that may be stored. None: at the raw inputs.
    stored: BoundarySpec | None = None
    #: true: the features are kept, for others to be compared with.
    keeps: bool | None = None
    #: Where the weights lie; None: on the device.
    frozen: FrozenTier | None = None
    #: None: fixed.
    bandwidth: Bandwidth | None = None


Task = (
    DataTask
    | ModelTask
    | MeasureTask
    | MaterializeTask
    | StageTask
    | EvaluateTask
    | AverageTask
    | QuestionsTask
    | JudgeTask
    | BoundariesTask
)
