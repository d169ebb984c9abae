"""What a worker is told to do, as frozen data: plain dataclasses that travel as JSON.

The same classes are sections of the user's configuration, so a setting is defined, typed and bounded in
one place. Beside our own pure modules only the standard library and `annotated_types` (pure metadata) are imported
here: pydantic reads the annotations when a configuration is loaded, a worker needs neither pydantic nor Ray.

Vocabulary: a *part* is a named piece of the chain with weights: the blocks (`seg1`, `seg2`, … in order) and
`head`. `adapter` and `aux` are training-only parts of one stage. A *hop* is the run of consecutive blocks
that takes one stored boundary to the next stored boundary.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from cache_store.formats.encodings import EncodingName
from workers.lm_specs import CausalLMSpec, LoraSpec, TextSpec

Precision = Literal["fp32", "bf16", "fp16"]
SnapshotDtype = Literal["auto", "float32", "bfloat16", "float16"]
ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"]

_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A torchvision ResNet as a chain. Sizes of adapters and heads are read from the boundaries."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    family: Literal["resnet"] = "resnet"
    name: ResNetName
    #: imagenet: 7x7 stride 2 + max-pool. small: 3x3 stride 1, no pool, for images of 16 to 64 pixels.
    stem: Literal["imagenet", "small"] = "imagenet"
    classifier: Literal["mlp", "linear"] = "mlp"
    hidden: Annotated[int, Ge(1)] = 512
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.3
    #: How many of the last residual block's convolutions belong to the head (1..2 basic, 1..3 bottleneck).
    head_convs: Annotated[int, Ge(1), Le(3)] = 1
    #: stages: seg1 = stem+layer1 … seg4; blocks: each residual block; or explicit lists of unit names.
    segments: Literal["stages", "blocks"] | tuple[tuple[str, ...], ...] = "stages"
    #: A torchvision state dict (.safetensors, or .pth read with weights_only) to start from; None: random.
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """An image classification data set and the views made of it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: Literal["digits", "cifar10", "cifar100", "folder"]
    #: cifar: a folder or file of Parquet as on the Hugging Face hub, or torchvision's download folder.
    #: folder: has train/ and test/ (or val/) with one subfolder a class. digits: not used.
    path: str | None = None
    download: bool = False
    image_size: Annotated[int, Ge(4), Le(4096)] = 224
    #: Side to which images are resized before cropping; None: image_size * 256 / 224, rounded.
    resize: Annotated[int, Ge(4)] | None = None
    #: paper: RandomResizedCrop(0.6, 1) + flip + RandAugment(2, 9) + RandomErasing(0.25).
    #: light: pad-free random crop scale (0.6, 1) + flip. none: the test transform.
    augment: Literal["paper", "light", "none"] = "paper"
    #: Horizontal flips (off for digits, where a mirrored image is another symbol).
    flip: bool = True
    #: Epoch e uses augmentation view e mod views.
    views: Annotated[int, Ge(1)] = 1
    #: Held out of train for choosing epochs: a fraction (< 1) or a count.
    validation: Annotated[float, Gt(0)] = 0.1
    #: Use only this many training / test samples, chosen by seed (None: all).
    train_limit: Annotated[int, Ge(1)] | None = None
    test_limit: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    #: Update rule; momentum and nesterov count for sgd, betas and eps for adamw. adamw8bit: its moments in 8 bits
    #: (bitsandbytes).
    name: Literal["adamw", "sgd", "adamw8bit"] = "adamw"
    lr: Annotated[float, Gt(0)] = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.01


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """Learning rate over the steps of one stage; restarts at the base rate with every stage."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: Literal["cosine", "linear", "constant"] = "constant"
    #: Linear warm-up over this share of the stage's steps.
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.0
    #: Final rate as a share of the base rate (cosine, linear).
    final: Annotated[float, Ge(0), Le(1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """When a stage stops before its last epoch. Metrics are of the validation split on the stage's path."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    #: Stop after this many optimizer steps (None: epochs decide).
    steps: Annotated[int, Ge(1)] | None = None
    #: Stop when the monitored metric has not improved by `min_delta` for this many epochs.
    plateau: Annotated[int, Ge(1)] | None = None
    min_delta: Annotated[float, Ge(0)] = 0.0
    #: Stop when validation accuracy (0..1) reaches this.
    target: Annotated[float, Gt(0), Le(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    epochs: Annotated[int, Ge(1)] = 400
    batch_size: Annotated[int, Ge(1)] = 256
    #: Micro-batches per optimizer step; batch_size must be a multiple.
    accumulate: Annotated[int, Ge(1)] = 1
    #: Most samples that go through the path at once; None: batch_size / accumulate. With it the batch stays what it
    #: is wherever the stage runs, and the micro-batches per step follow.
    micro_batch: Annotated[int, Ge(1)] | None = None
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    exit: ExitSpec = field(default_factory=ExitSpec)
    precision: Precision = "fp32"
    #: Max gradient norm (after unscaling); None: no clipping.
    clip: Annotated[float, Gt(0)] | None = None
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    #: Drop the last short batch of a training epoch (kept anyway when it is the only one).
    drop_last: bool = True
    #: Commit the weights of the best validation epoch or of the last.
    commit: Literal["best", "last"] = "best"
    #: The head's optimizer state at the start of a stage.
    head_optimizer: Literal["reset", "carry"] = "reset"
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = True
    #: Train low-rank adapters instead of whole matrices (language models).
    lora: LoraSpec | None = None
    #: The LM head's matrix in a stage that has it: trained, left alone, or (with lora) trained by an adapter.
    lm_head: Literal["train", "frozen", "lora"] = "train"
    #: Linear layers of the decoder layers of a path whose matrices are frozen, on the device (bitsandbytes): 8 or 4
    #: bits, or as they are. With lora also those under adapters (QLoRA).
    frozen_weights: Literal["full", "int8", "nf4"] = "full"
    #: Mid-stage checkpoint about this often (seconds), between steps; None: after every epoch.
    checkpoint_every_s: Annotated[float, Gt(0)] | None = 60.0

    @property
    def micro(self) -> int:
        """Samples of a micro-batch (the last of a step may be smaller)."""
        return min(self.batch_size, self.micro_batch or -(-self.batch_size // self.accumulate))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all nodes of a regime share: the chain, the data and the seed."""

    model: ModelSpec | CausalLMSpec
    data: DataSpec | TextSpec
    #: Classes, or the size of the vocabulary.
    classes: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class DataTask:
    """Decode a data set once into the store. `fingerprint` identifies the source files (names, sizes, times)."""

    data: DataSpec | TextSpec
    fingerprint: str
    #: Text is split and tokenized by this task: its seed, and the model whose tokenizer it takes.
    seed: int = 0
    model: CausalLMSpec | None = None


@dataclass(frozen=True, kw_only=True)
class ModelTask:
    """Write the initial state (torchvision names) as one safetensors file."""

    model: ModelSpec | CausalLMSpec
    classes: int
    seed: int
    #: Identity of the initial weights (sha256 of the file, or of a checkpoint's files) or None.
    weights_digest: str | None = None


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
    """Whole groups that fit into `shard_bytes`, at least one: the rows of a shard of rows of `row_bytes`."""
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

    LATER: ClassVar[tuple[str, ...]] = ("gate",)

    experiment: Experiment
    boundary: BoundarySpec
    split: Literal["train", "validation", "test"]
    #: None: the evaluation transform.
    view: int | None
    gate: GateSpec | None = None


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
class StageTask:
    """One training stage. Parents: data, weights/<part> for every part of `path` and of `boundary.hops`
    (the node whose commit holds that part: a model node or an earlier stage), snapshot/<split>/<view> for each
    set read (view `eval` for validation), and `optimizer` (the previous stage) when its state is carried; `continue`
    (the round before) for every round of a stage but its first; `gate` (an evaluate node) with a gate: if it is met,
    the parts are committed as they are."""

    experiment: Experiment
    #: Fields that came later: left out where they are None, so that tasks without them keep their ids.
    LATER: ClassVar[tuple[str, ...]] = ("window", "round", "gate")

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

    @property
    def epochs(self) -> range:
        """The epochs trained here."""
        return range(self.train.epochs) if self.round is None else range(self.round.first, self.round.end)

    @property
    def goes_on(self) -> bool:
        """Whether a later round continues this one."""
        return self.epochs.stop < self.train.epochs


def snapshot_role(split: str, view: int | None) -> str:
    """The role of the materialize node of one set among a stage's parents."""
    return f"snapshot/{split}/{'eval' if view is None else view}"


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Score an assembled chain from the images. Parents: data, weights/<part> for every part of `path`."""

    experiment: Experiment
    path: tuple[str, ...]
    split: Literal["validation", "test"]
    batch_size: int
    precision: Precision
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class AverageTask:
    """The mean of some parts over replicas that were trained apart. Parents: replica/<i> (train nodes, each of which
    commits all of `parts`), counted from 0."""

    experiment: Experiment
    parts: tuple[str, ...]


Task = DataTask | ModelTask | MeasureTask | MaterializeTask | StageTask | EvaluateTask | AverageTask
TASKS: dict[str, type[Any]] = {
    "data": DataTask,
    "model": ModelTask,
    "measure": MeasureTask,
    "materialize": MaterializeTask,
    "train": StageTask,
    "evaluate": EvaluateTask,
    "average": AverageTask,
}

T = TypeVar("T")


def to_json(spec: Any) -> dict[str, Any]:
    """The spec as JSON values (tuples become lists)."""
    plain = typing.cast("dict[str, Any]", _plain(dataclasses.asdict(spec)))
    for name in getattr(spec, "LATER", ()):
        if plain[name] is None:
            del plain[name]
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def from_json(cls: type[T], data: Any) -> T:
    """Inverse of `to_json`. The data was validated when the configuration was loaded; unknown keys still fail."""
    return typing.cast(T, _build(cls, data))


def _build(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{key: _build(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(arguments[0], item) for item in value)
        return tuple(_build(argument, item) for argument, item in zip(arguments, value, strict=True))
    if origin in (typing.Union, types.UnionType) and value is not None:
        classes = [argument for argument in arguments if dataclasses.is_dataclass(argument)]
        if classes and isinstance(value, dict):
            # The first that has all these fields: no two members of a union here have the same.
            return _build(next(c for c in classes if value.keys() <= {f.name for f in dataclasses.fields(c)}), value)
        for argument in arguments:
            if typing.get_origin(argument) is tuple and isinstance(value, list):
                return _build(argument, value)
    return value
