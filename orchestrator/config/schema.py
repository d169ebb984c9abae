"""What a configuration may say and what it means: its sections, and regimes with every override resolved.

Sections that travel to workers are the dataclasses of `workers.specs.experiment`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

from cache_store.formats.encodings import EncodingName
from orchestrator.config.budget import BudgetConfig
from orchestrator.config.rates import Rates
from orchestrator.config.resources import GPU_THREADS, ResourceConfig
from orchestrator.config.sweep_schema import SweepConfig
from orchestrator.config.tiers import write_out
from orchestrator.config.values import Bytes, NonBlank, OneOf, Section, StoreAddress, default_store
from orchestrator.regimes.blocks import BlockSettings, Trained, block_schedule
from orchestrator.regimes.stages import Cut, Stage
from orchestrator.regimes.table import REGIMES, RegimeKind, layout
from orchestrator.regimes.wavefront import FINAL, final_stage
from workers.domains.planning import AnyData
from workers.domains.registry import Planning, planning_of, planning_of_family
from workers.judge.judges import JUDGES
from workers.models.base import Traits
from workers.models.registry import DEFAULT, Family, family, family_of
from workers.specs.as_json import to_json
from workers.specs.experiment import LossSpec, SnapshotDtype, TrainSpec
from workers.specs.memory import FrozenTier, MemorySpec
from workers.specs.model import ModelSpec
from workers.specs.tasks import LEAST_MEASURED, Bandwidth, BlockSchedule, GateSpec, Measure


class SplitConfig(Section):
    """How the chain is cut into base prefix, intermediate blocks and global head."""

    base: int = Field(
        default=1,
        ge=0,
        description="p: blocks 0..p-1 are trained first, together with the global head. 0 (language models only): the "
        "embedding alone.",
    )
    base_segment_size: int | None = Field(
        default=None,
        ge=1,
        description="Blocks of the base that are trained at a time, with the global head; the rest of the base stays "
        "in the path, frozen. null: the whole base in one stage (the publication).",
    )
    head: int = Field(default=0, ge=0, description="r: the global head is the last r blocks and the head itself.")
    segment_size: int = Field(default=1, ge=1, description="Blocks that are trained together in one stage.")
    intermediate: Literal["omit", "frozen"] = Field(
        default="omit",
        description="Blocks between the current segment and the global head: bridged by an adapter, or kept "
        "in the path without being trained (for pretrained models).",
    )
    order: Literal["bottom_up", "top_down"] = Field(
        default="bottom_up",
        description="bottom_up: the base first, then segment after segment towards the head (the publication). "
        "top_down: the segment under the global head first, the base last, with intermediate: frozen (for pretrained "
        "models). No block before a boundary has changed when it is read, so all snapshots are made in one pass, the "
        "first stages are the cheapest, and the network is whole after each.",
    )
    train_base: bool = Field(
        default=True,
        description="false: the base is taken as it comes, stage 1 trains the global head alone.",
    )
    embedding: Literal["train", "frozen"] = Field(
        default="train",
        description="Whether the base's stage, or that of badam and lisa, trains the token embedding too (language "
        "models).",
    )
    omit: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="Decoder layers left out while training and put back untouched afterwards (language models).",
    )


class SnapshotConfig(Section):
    """Frozen prefix activations: whether they are stored, and how."""

    mode: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: stored where that saves forward work and fits the budget."
    )
    costs: Literal["counted", "measured"] = Field(
        default="counted",
        description="How mode auto weighs storing against recomputing. counted: forward operations, the same on every "
        "machine. measured: seconds, which the first run over a store measures on one of its slots and every later one "
        "takes from there.",
    )
    dtype: SnapshotDtype = Field(default="auto", description="auto: the type the training precision computes in.")
    encoding: EncodingName = Field(
        default="plain",
        description="plain: values as they are. lossless: byte planes packed by zstd, for slow links. int8: a byte a "
        "value, a scale every 32 values (images: every map). fp8: e4m3, a scale every 128 (language models). What a "
        "stage trains on is what int8 and fp8 decode to (docs/storage.md).",
    )
    group_rows: int | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="Samples that go through the frozen prefix together. None: 256 images, 16 samples of text.",
    )
    shard_bytes: Bytes = Field(default=32 << 20, description="Size of a shard, rounded down to whole groups.")
    budget: Bytes | None = Field(
        default=None,
        description="Most snapshot bytes alive at one time, e.g. 20GB; shared evenly by the regimes that "
        "store. None: the free space.",
    )
    retention: Literal["release", "keep"] = Field(
        default="release", description="release: a set is dropped when its last reader has committed."
    )
    production: Literal["before", "overlap"] = Field(
        default="before",
        description="before: a stage starts when its snapshot sets are complete. overlap: it starts at once and makes "
        "what it finds missing, while free slots make the rest ahead of it. The results are the same.",
    )
    shuffle: Literal["global", "window"] = Field(
        default="global",
        description="Order of an epoch over snapshots. global: any sample may follow any other. window: shards are "
        "opened in a shuffled order and samples drawn from those open, for sets larger than memory (docs/storage.md).",
    )
    window: int = Field(default=16, ge=1, le=1 << 24, description="Shards open at one time with shuffle: window.")


Pipeline = Literal["sequential", "wavefront"]


class WavefrontConfig(Section):
    """How the stages of a regime overlap under `pipeline: wavefront`."""

    rounds: int = Field(
        default=4,
        ge=2,
        le=10_000,
        description="Rounds into which the epochs of every stage are cut; a stage starts a round after the one before.",
    )
    average_every: int = Field(
        default=1, ge=1, description="The replicas of the global head are averaged after every so many rounds."
    )
    final_epochs: int = Field(
        default=1,
        ge=0,
        le=1_000_000,
        description="Epochs of the last stage alone, at the end, on the finished prefix. 0: its last round, which "
        "reads the finished prefix too, is the end.",
    )


class RunExitConfig(Section):
    """The end of a regime before its last stage (segprop): as soon as the whole network, scored on validation after a
    stage, is this good, the stages that are left change nothing. All that is given must be met."""

    accuracy: float | None = Field(default=None, gt=0, le=1, description="At least. null: not asked for.")
    loss: float | None = Field(default=None, gt=0, description="At most. null: not asked for.")

    @property
    def gate(self) -> GateSpec | None:
        if self.accuracy is None and self.loss is None:
            return None
        return GateSpec(accuracy=self.accuracy, loss=self.loss)


class JudgeConfig(Section):
    """Public benchmarks that the network of a language model is asked after every stage (docs/language-models.md)."""

    tasks: tuple[Annotated[str, OneOf(JUDGES)], ...] = Field(
        default=("mmlu", "winogrande"),
        min_length=1,
        description="mmlu, winogrande, humaneval, humaneval_plus; each is a task of the plan of its own.",
    )
    data: NonBlank = Field(
        description="Folder that holds `mmlu/`, `winogrande/`, `humaneval/`. The contents of its files are part of "
        "what a score is known by, so the hub is not asked."
    )
    of: tuple[Literal["original", "stages", "final"], ...] = Field(
        default=("original", "stages", "final"),
        min_length=1,
        description="Which networks are asked: the untouched model, the whole network after every stage, and what each "
        "regime comes to, which is that of its last stage.",
    )
    limit: int | None = Field(
        default=None, ge=1, le=1 << 40, description="Questions a task, for MMLU a subject. null: all."
    )
    shots: int = Field(default=5, ge=0, le=5, description="Example answers before a question of MMLU or WinoGrande.")
    subjects: tuple[NonBlank, ...] | None = Field(
        default=None, min_length=1, description="Only these of MMLU. null: all that there are."
    )
    batch_size: int = Field(default=8, ge=1, le=1 << 24, description="Sequences at once.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the judged weights. auto: the one that the model's config names."
    )
    seed: int = Field(default=1234, ge=0, lt=1 << 63, description="Draws WinoGrande's examples.")
    max_new_tokens: int = Field(default=512, ge=1, le=1 << 24, description="Of an answer to HumanEval.")
    allow_code_execution: bool = Field(
        default=False, description="Run code that the models write (HumanEval), in a jail."
    )
    allow_unisolated: bool = Field(default=False, description="Run it even where the machine has no way to isolate it.")
    allow_contaminated: bool = Field(
        default=False, description="Judge by questions that are trained on, too, and mark the scores."
    )


class BoundariesConfig(Section):
    """What the boundaries between blocks know of inputs and targets (docs/what-a-boundary-knows.md). Nothing is trained
    for it: a finished run that is given this section measures alone."""

    measures: tuple[Measure, ...] = Field(
        default=("nhsic", "cka", "probe", "effective_rank"),
        min_length=1,
        description="nhsic: normalized HSIC with inputs and with targets; cka: alignment with the same boundary of the "
        "end-to-end regime, where there is one; probe: what a linear probe tells right of validation; effective_rank.",
    )
    samples: int = Field(
        default=10_000,
        ge=LEAST_MEASURED,
        le=1 << 24,
        description="Training samples that are measured, and validation samples that probes are scored on, at most. "
        "Every figure has its standard error.",
    )
    bandwidth: Bandwidth = Field(
        default="fixed",
        description="Width of nHSIC's kernels. fixed: 5 a number, as published, which takes samples for alike where "
        "activations are small. median: the median distance of a block, which does not depend on their scale.",
    )
    of: Literal["stages", "final"] = Field(
        default="stages",
        description="Which networks: the one after every stage (boundaries that a stage leaves as they were are not "
        "measured again), or what each regime comes to.",
    )


class EvaluationConfig(Section):
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=1 << 24,
        description="Samples of one evaluation batch. None: 512 images, 16 samples of text.",
    )
    every: Literal["epoch"] | None = Field(
        default=None,
        description="epoch: score the test split after every epoch of every stage, the whole chain as it stands and, "
        "where it is another one, the stage's own path (as published; for curves: nothing is chosen by it). null: the "
        "test split is scored once, at the end.",
    )
    stages: bool = Field(
        default=True,
        description="Score the whole chain on validation after every stage; of a language model also the truncated "
        "one, whose missing blocks are simply left out.",
    )
    yardstick: str | None = Field(
        default=None,
        description="Regime that results compare the others with. null: the end-to-end regime without `training` or "
        "`split` of its own, else the first one.",
    )
    judge: JudgeConfig | None = Field(
        default=None, description="Public benchmarks, after every stage (language models); null: none."
    )
    boundaries: BoundariesConfig | None = Field(
        default=None, description="What boundaries know, after every stage (images); null: nothing is measured."
    )


class TrackingConfig(Section):
    """Dashboards that are told of a run while it trains, an experiment a regime. TensorBoard's files always are."""

    trackers: tuple[Literal["wandb", "mlflow", "trackio", "swanlab"], ...] = Field(
        default=(),
        description="Services beside TensorBoard, whose own settings and tokens are theirs (WANDB_MODE, "
        "MLFLOW_TRACKING_URI, …). One that is away stops nothing.",
    )
    project: NonBlank = Field(default="segprop", description="What they gather runs under.")


class BlocksConfig(Section):
    """Which parts of the network take turns, and for how long (badam, lisa)."""

    steps: int | None = Field(
        default=None,
        ge=1,
        le=1 << 40,
        description="Optimizer steps for which a choice is kept (K in both papers). null: 50 of badam, 20 of lisa.",
    )
    order: Literal["ascending", "descending", "random"] | None = Field(
        default=None,
        description="badam: from the input, from the head, or every cycle in an order of its own. null: ascending.",
    )
    count: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="lisa: layers that are drawn at one time, beside embedding and head. null: 2.",
    )


class RegimeConfig(Section):
    """One regime of the comparison. Every mapping is a partial override of the section of the same name."""

    kind: Annotated[str, OneOf(REGIMES)] = Field(
        description="e2e, lw, segprop, or the peers badam and lisa; needed where the regime has another name."
    )
    head_convs: int | None = Field(default=None, ge=1, le=3, description="Overrides model.head_convs.")
    variant: Literal["published", "mapped"] | None = Field(
        default=None,
        description="lw of ResNets and VGGs. published (the default): the last stage of convolutions has pooling and a "
        "linear layer as its local head, and the last stage trains the classifier alone; head_convs does not count. "
        "mapped: a mapping in front of every local head, and the last stage trains the head's convolutions too.",
    )
    blocks: BlocksConfig = Field(default_factory=BlocksConfig)
    training: dict[str, Any] = Field(default_factory=dict, description="Overrides `training`.")
    split: dict[str, Any] = Field(default_factory=dict, description="Overrides `split`.")
    snapshots: dict[str, Any] = Field(default_factory=dict, description="Overrides `snapshots`.")
    pipeline: Pipeline | None = Field(default=None, description="Overrides `pipeline` (segprop).")
    wavefront: dict[str, Any] = Field(default_factory=dict, description="Overrides `wavefront` (segprop).")
    run_exit: dict[str, Any] = Field(default_factory=dict, description="Overrides `run_exit` (segprop).")
    memory: dict[str, Any] = Field(default_factory=dict, description="Overrides `memory`.")
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Overrides `training` for single stages, by name (stage2-seg2) or by group (base, segments, head, "
        "final); under `memory` those of `memory`.",
    )


@dataclass(frozen=True)
class Regime:
    """One regime with everything resolved."""

    name: str
    #: A key of `orchestrator.regimes.table.REGIMES`.
    kind: str
    model: ModelSpec
    split: SplitConfig
    training: TrainSpec
    snapshots: SnapshotConfig
    #: Partial overrides of `training` by stage name or group, and of `memory` among them under that name.
    stages: Mapping[str, Mapping[str, Any]]
    pipeline: Pipeline = "sequential"
    wavefront: WavefrontConfig = field(default_factory=WavefrontConfig)
    run_exit: RunExitConfig = field(default_factory=RunExitConfig)
    memory: MemorySpec = field(default_factory=MemorySpec)
    #: One of its row's `variants`; None where the regime or the family has none.
    variant: str | None = None
    #: How its parts take turns; None where all are trained at every step.
    blocks: BlockSettings | None = None

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def frozen_beside(self) -> FrozenTier | None:
        """Where a network lies that runs frozen as a whole, if not on the device; with `auto` the plan says it."""
        return "host" if self.memory.frozen == "host" else None

    @property
    def traits(self) -> Traits:
        """What the chain of its model is like."""
        return self.family.traits

    @property
    def domain(self) -> Planning:
        """What planning knows of its kind of data."""
        return planning_of(self.model)

    @property
    def row(self) -> RegimeKind:
        """What its kind allows."""
        return REGIMES[self.kind]

    @property
    def bare_head(self) -> bool:
        """Whether the head of its chain is pooling and classifier alone."""
        return self.variant is not None and self.row.variants.get(self.variant, False)

    @property
    def ends_early(self) -> bool:
        """Whether a good score may end it before its last stage."""
        return self.run_exit.gate is not None and self.row.may_end_early

    @property
    def base(self) -> int:
        """Blocks of the base: a language model's embedding is one of its blocks, but not one that users count."""
        return self.split.base + self.traits.stem

    @property
    def group_rows(self) -> int:
        return self.snapshots.group_rows or self.domain.group_rows

    def in_training(self, blocks: Sequence[str]) -> tuple[str, ...]:
        """The blocks that stages see: all but those omitted for the time being, which are numbered behind the stem."""
        omitted = {index + self.traits.stem for index in self.split.omit} if self.traits.can.omit is None else set()
        return tuple(block for index, block in enumerate(blocks) if index not in omitted)

    def cut(self, blocks: Sequence[str]) -> Cut:
        """How a chain of these blocks is cut into stages."""
        stem = tuple(blocks[: self.traits.stem])
        return Cut(
            base=self.base,
            head=self.split.head,
            segment_size=self.split.segment_size,
            frozen_intermediate=self.split.intermediate == "frozen",
            train_base=self.split.train_base,
            adapters=self.traits.adapters,
            untrained=frozenset(stem) if self.split.embedding == "frozen" else frozenset(),
            first_segment=1 + len(stem),
            base_segment_size=self.split.base_segment_size,
            top_down=self.split.order == "top_down",
        )

    def layout(self, blocks: Sequence[str]) -> tuple[Stage, ...]:
        """The stages in order; under `wavefront` the final pass behind them."""
        stages = layout(self.kind, self.in_training(blocks), self.cut(blocks))
        if self.pipeline == "wavefront" and self.wavefront.final_epochs:
            return (*stages, final_stage(stages))
        return stages

    def schedule(self, stage: Stage, *, tied: bool) -> BlockSchedule | None:
        """How the parts of a stage take turns; None where all are trained at every step. `tied`: what parts share is
        held together."""
        if self.row.blocks is None or self.blocks is None:
            return None
        stem = self.traits.stem
        frozen = self.stage_training(stage).lm_head == "frozen"
        trained = Trained(stage.trained, frozenset(stage.path[:stem]), tied=tied, frozen_head=frozen)
        return block_schedule(self.row.blocks, self.blocks, trained)

    def stage_training(self, stage: Stage) -> TrainSpec:
        """`training` for one stage: the override of its name wins over that of its group."""
        overrides = self._overrides(stage)
        if stage.group != FINAL and not overrides:
            return self.training
        merged = to_json(self.training)
        if stage.group == FINAL:
            merged["epochs"] = self.wavefront.final_epochs
        for override in overrides:
            merged = merge(merged, training_of(override))
        spec: TrainSpec = validate(TrainSpec, merged)
        return spec

    def stage_memory(self, stage: Stage) -> MemorySpec:
        """`memory` for one stage, overridden as `training` is."""
        overrides = self._overrides(stage)
        if not overrides:
            return self.memory
        merged = to_json(self.memory)
        for override in overrides:
            merged = merge(merged, override.get(MEMORY, {}))
        spec: MemorySpec = validate(MemorySpec, merged)
        return spec

    def _overrides(self, stage: Stage) -> list[Mapping[str, Any]]:
        keys = dict.fromkeys((stage.group, stage.name))
        return [self.stages[key] for key in keys if key in self.stages]


#: Regimes of one file, as many as a sweep has trials.
MOST_REGIMES = 1000


class Config(Section):
    """A whole configuration. What is read into one is a subclass, `config_class` of its model's family."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200, description="Name; default: the file's name."
    )
    run_dir: NonBlank = Field(
        description="Folder of the results; default: runs/<run>, or a numbered one beside it, such as runs/<run>-2, "
        "where that holds another configuration."
    )
    store: StoreAddress = Field(
        description="Storage root, a folder or URI (docs/storage.md); default: <run_dir>/store."
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Every random choice derives from it.")
    model: ModelSpec
    data: AnyData
    split: SplitConfig = Field(default_factory=SplitConfig)
    training: TrainSpec = Field(default_factory=TrainSpec)
    regimes: dict[str, RegimeConfig] = Field(
        min_length=1,
        max_length=MOST_REGIMES,
        description="Names out of e2e, lw, segprop, badam, lisa, or name -> overrides. Default: the first three.",
    )
    snapshots: SnapshotConfig = Field(default_factory=SnapshotConfig)
    pipeline: Pipeline = Field(
        default="sequential",
        description="sequential: a stage of SegProp starts when the one before it is finished. wavefront: it starts on "
        "snapshots of a segment that still trains, so that several devices train several segments at once.",
    )
    wavefront: WavefrontConfig = Field(default_factory=WavefrontConfig)
    run_exit: RunExitConfig = Field(default_factory=RunExitConfig)
    memory: MemorySpec = Field(default_factory=MemorySpec)
    resources: ResourceConfig = Field(default_factory=ResourceConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    budget: BudgetConfig | None = Field(
        default=None, description="What every regime may spend on training; null: each has its epochs as they are set."
    )
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    reuse_versions: dict[Literal["torch", "transformers", "tokenizers", "numpy", "pillow"], str] = Field(
        default_factory=dict,
        description="Package -> version whose results count as those of the installed one, e.g. {torch: 2.8.0}. Other "
        "versions may give other numbers, so without this an upgrade computes everything again.",
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...] | None = Field(
        default=None,
        min_length=2,
        description="Run the file once with each of these in place of `seed`, side by side on one store, and report "
        "means, spread and paired differences: the same as a grid of `seed` in `sweep` (docs/sweeps.md).",
    )
    sweep: SweepConfig | None = Field(
        default=None, description="Run the file many times with other settings (docs/sweeps.md)."
    )

    def regime(self, name: str) -> Regime:
        """The regime called `name`, resolved."""
        own = self.regimes[name]
        return Regime(
            name=name,
            kind=own.kind,
            model=self.model_of(own),
            split=validate(SplitConfig, merge(plain(self.split), own.split)),
            training=validate(TrainSpec, merge(plain(self.training), own.training)),
            snapshots=validate(SnapshotConfig, merge(plain(self.snapshots), own.snapshots)),
            stages=own.stages,
            pipeline=self.pipeline_of(own),
            wavefront=validate(WavefrontConfig, merge(plain(self.wavefront), own.wavefront)),
            run_exit=validate(RunExitConfig, merge(plain(self.run_exit), own.run_exit)),
            memory=validate(MemorySpec, merge(plain(self.memory), own.memory)),
            variant=self.variant_of(own),
            blocks=self.blocks_of(own),
        )

    def with_epochs(self, epochs: Mapping[str, int]) -> Config:
        """The same with other `training.epochs` of the regimes named."""
        changed = dict(self.regimes)
        for name, number in epochs.items():
            training = self.regimes[name].training | {"epochs": number}
            changed[name] = self.regimes[name].model_copy(update={"training": training})
        return self.model_copy(update={"regimes": changed})

    def blocks_of(self, regime: RegimeConfig) -> BlockSettings | None:
        """How a regime's parts take turns, with the defaults of its kind; None where they do not."""
        rule, own = REGIMES[regime.kind].blocks, regime.blocks
        if rule is None:
            return None
        return BlockSettings(
            steps=own.steps or rule.steps, order=own.order or rule.orders[0], count=own.count or rule.count or 1
        )

    def variant_of(self, regime: RegimeConfig) -> str | None:
        """A regime's own word, or the first variant of its kind; None where the kind or the family has none."""
        variants = REGIMES[regime.kind].variants
        if not variants or self.family.traits.can.variant is not None:
            return None
        return regime.variant or next(iter(variants))

    def model_of(self, regime: RegimeConfig) -> ModelSpec:
        """The model with the head that a regime's chain has."""
        variant = self.variant_of(regime)
        if variant is not None and REGIMES[regime.kind].variants.get(variant, False):
            bare: ModelSpec = self.family.with_bare_head(self.model)
            return bare
        cut: ModelSpec = self.family.with_head_convs(self.model, regime.head_convs)
        return cut

    def pipeline_of(self, regime: RegimeConfig) -> Pipeline:
        """A regime's own word, or what all regimes that have segments to overlap are told."""
        if not REGIMES[regime.kind].may_wave:
            return "sequential"
        return regime.pipeline or self.pipeline

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def domain(self) -> Planning:
        """What planning knows of its kind of data."""
        return planning_of(self.model)

    @property
    def evaluation_batch(self) -> int:
        return self.evaluation.batch_size or self.domain.evaluation_batch

    def rates(self, auto: Literal["cpu", "cuda"] = "cpu") -> Rates:
        """Speed of a slot for predicted times; `auto`: what `resources.device: auto` stands for."""
        resources = self.resources
        device = auto if resources.device == "auto" else resources.device
        wide = GPU_THREADS if device == "cuda" else 1
        threads = wide if resources.threads == "auto" else resources.threads
        if resources.gflops != "auto":
            return Rates.measured(resources.gflops, threads, device == "cuda")
        return Rates.nominal(device, threads)

    def resolved(self) -> dict[str, Any]:
        """Every setting written out and loadable again: what `config.yaml` in a run directory holds."""
        # How stages overlap, or end a run, is said by the regimes that do: the others are what they were before there
        # was a choice. A sweep is no setting of a run, and what a budget says is in the epochs of the regimes.
        by_regime = ("regimes", "pipeline", "wavefront", "run_exit", "sweep", "seeds", "budget")
        dump: dict[str, Any] = {
            name: plain(getattr(self, name)) for name in type(self).model_fields if name not in by_regime
        }
        if self.store == default_store(self.run_dir):
            del dump["store"]  # so that a run directory can be moved
        dump["regimes"] = {
            name: {
                "kind": regime.kind,
                **({} if regime.variant is None else {"variant": regime.variant}),
                **({} if regime.bare_head else regime.family.regime_settings(regime.model)),
                "training": plain(regime.training),
                "split": plain(regime.split),
                "snapshots": plain(regime.snapshots),
                "stages": plain(regime.stages),
                **({} if regime.memory == MemorySpec() else {"memory": plain(regime.memory)}),
                **(
                    {"pipeline": regime.pipeline, "wavefront": plain(regime.wavefront)}
                    if regime.pipeline == "wavefront"
                    else {}
                ),
                **({"run_exit": plain(regime.run_exit)} if regime.ends_early else {}),
                **self._resolved_blocks(name),
            }
            for name, regime in ((name, self.regime(name)) for name in self.regimes)
        }
        return dump

    def _resolved_blocks(self, name: str) -> dict[str, Any]:
        """The section `blocks` of a regime that has one, with the settings its kind knows."""
        settings, rule = self.blocks_of(self.regimes[name]), REGIMES[self.regimes[name].kind].blocks
        if settings is None or rule is None:
            return {}
        order = {"order": settings.order} if len(rule.orders) > 1 else {}
        count = {"count": settings.count} if rule.count is not None else {}
        return {"blocks": {"steps": settings.steps, **order, **count}}


@cache
def config_class(name: str) -> type[Config]:
    """What a configuration of a family may say: its own spec under `model`, that of its domain under `data`.

    ConfigError when the family is not known."""
    spec: Any = family(name).spec
    data: Any = planning_of_family(name).data
    return create_model("Config", __base__=Config, model=(spec, ...), data=(data, ...))


def config_of(raw: Mapping[str, Any]) -> type[Config]:
    """The class of a configuration file, by `model.family`: then only what it may say is offered."""
    return config_class(_family_name(raw))


def _family_name(raw: Mapping[str, Any]) -> str:
    model = raw.get("model")
    name = model.get("family", DEFAULT) if isinstance(model, Mapping) else DEFAULT
    return name if isinstance(name, str) else DEFAULT


def fill_in(raw: dict[str, Any]) -> None:
    """Put what a raw configuration leaves out of `training`, and its kind of data has a default of its own for, into
    it, with what a loss says of targets, and write out `memory: auto`. What is no section is left for the checks that
    follow. ConfigError when the family is not known."""
    write_out(raw)
    training = raw.setdefault("training", {})
    if isinstance(training, dict):
        planning = planning_of_family(_family_name(raw))
        for key, value in planning.training.items():
            training.setdefault(key, value)
        loss, data = training.get("loss"), raw.get("data")
        if isinstance(loss, dict) and isinstance(data, dict) and data.get("targets") is None:
            targets = planning.targets(str(data.get("name")), str(loss.get("name", LossSpec.name)))
            data.update({} if targets is None else {"targets": targets})


#: The sections that a regime may override.
OVERRIDES: dict[str, type[Any]] = {
    "training": TrainSpec,
    "split": SplitConfig,
    "snapshots": SnapshotConfig,
    "wavefront": WavefrontConfig,
    "run_exit": RunExitConfig,
    "memory": MemorySpec,
}

#: The key under which an override of a stage, which else is one of `training`, overrides `memory`.
MEMORY = "memory"


def training_of(override: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's override says of `training`."""
    return {key: value for key, value in override.items() if key != MEMORY}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validate(kind: Any, raw: Any) -> Any:
    """`raw` as `kind`; pydantic's ValidationError when it is not one."""
    # Through JSON, where strict mode still takes a list for a tuple, but never "3" or true for 3.
    return _adapter(kind).validate_json(json.dumps(raw), strict=True)


def plain(value: Any) -> Any:
    """JSON values of a section."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def merge(base: Any, override: Any) -> Any:
    """`override` laid over `base`, section by section."""
    if not isinstance(base, Mapping) or not isinstance(override, Mapping):
        return override
    merged = dict(base)
    for key, value in override.items():
        merged[key] = merge(base[key], value) if key in base else value
    return merged
