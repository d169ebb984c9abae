"""What a plan is made from, and what is known of one regime while its nodes are added."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config.rates import Rates
from orchestrator.config.rules.judged import Questions
from orchestrator.costs.boundary_costs import Costs
from orchestrator.costs.estimator import Estimator
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.snapshot_policy import Decision
from orchestrator.plan.boundaries import Boundaries, Hops
from orchestrator.plan.experiment import experiment_of, rows_of
from orchestrator.plan.node_table import NodeTable
from orchestrator.plan.views import LEAST, ViewsSeen, views_to_give
from orchestrator.regimes import wavefront
from orchestrator.regimes.stages import Stage
from workers.domains.planning import SplitRows
from workers.specs.experiment import Experiment
from workers.specs.memory import AUTO, FrozenTier
from workers.specs.results import MeasuredCosts
from workers.specs.task_kinds import TASKS

if TYPE_CHECKING:
    from orchestrator.config.schema import Config, Regime
    from workers.domains.planning import AnyOutline
    from workers.models.outline import ChainOutline


@dataclasses.dataclass(frozen=True)
class Speeds:
    """How fast and where the workers compute. `rates`: seconds; None: those that the configuration names. `on_host`:
    workers train on the CPU, so that predicted memory is the host's. `device_bytes`: what tensors may take on a device
    (None: not known), `host_bytes`: what a stage may take of its machine beside it. All but these two change
    predictions alone; they settle `training.micro_batch: auto` and `memory: auto`."""

    rates: Rates | None = None
    on_host: bool = False
    device_bytes: int | None = None
    host_bytes: int | None = None
    #: The devices of a gang whose size is `auto`; None: not known.
    devices: int | None = None


@dataclasses.dataclass(frozen=True)
class FilesRead:
    """Identities of files that a plan is made for. `weights`: of the initial weights; `questions`: benchmark -> what it
    will ask."""

    weights: str | None = None
    questions: Mapping[str, Questions] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """What all regimes of a plan share. `found`: what the model's family found when it looked at the
    model; `weights_digest`: identity of the initial weights' files; `figures`: what measure nodes found, by node id."""

    config: Config
    data: AnyOutline
    found: object | None
    weights_digest: str | None
    speeds: Speeds
    figures: Mapping[str, MeasuredCosts]
    #: Benchmark -> what it will ask.
    questions: Mapping[str, Questions] = dataclasses.field(default_factory=dict)

    @cached_property
    def rates(self) -> Rates:
        return self.speeds.rates or self.config.rates()

    @property
    def on_host(self) -> bool:
        return self.speeds.on_host

    @cached_property
    def rows(self) -> SplitRows:
        return rows_of(self.config, self.data)

    @cached_property
    def sharing(self) -> int:
        """How many regimes share the snapshot budget: those that store boundaries."""
        return max(1, sum(not self.config.regime(name).row.whole for name in self.config.regimes))


@dataclasses.dataclass
class Collected:
    """What the regimes of a plan add to."""

    table: NodeTable = dataclasses.field(default_factory=NodeTable)
    targets: dict[str, None] = dataclasses.field(default_factory=dict)
    #: Measure nodes without figures.
    unmeasured: dict[str, None] = dataclasses.field(default_factory=dict)
    #: Split -> evaluate node of the model as it came (pretrained language models).
    original: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Benchmark -> judge node of the same.
    judged: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Node that keeps the features of boundaries that others are compared with; None: there is none (yet).
    reference: str | None = None


class RegimeState:
    """One regime while its nodes are added: its chain, its stages, and which node holds which weights now."""

    def __init__(self, inputs: PlanInputs, collected: Collected, regime: Regime, outline: ChainOutline) -> None:
        config = inputs.config
        self.inputs, self.collected = inputs, collected
        self.regime, self.outline = regime, outline
        self.blocks = tuple(block.name for block in outline.blocks)
        self.stages = regime.layout(self.blocks)
        self.training_blocks = regime.in_training(self.blocks)
        # What the loss is, the experiment says.
        self.training = {
            stage.name: dataclasses.replace(regime.stage_training(stage), loss=None) for stage in self.stages
        }
        #: What is asked for; stored boundaries have those of `boundaries`.
        self.views = config.domain.views(config.data)
        self.experiment = experiment_of(config, regime, inputs.data, inputs.found)
        #: The wave's steps; none where the stages run one after the other.
        self.wave = self._wave()
        self.boundaries = Boundaries(
            regime,
            outline,
            self.stages,
            self.training,
            inputs.rows,
            views=LEAST if self.views == "auto" else self.views,
            wave=self.wave,
        )
        #: Views of stored boundaries; settled together with what is stored.
        self.stored_views = LEAST
        #: Part -> the node that holds it now: moves on from stage to stage, in a wave from round to round.
        self.weights: dict[str, str] = {}
        #: Version of the blocks that move while a wave goes on.
        self.version = 0
        #: Boundaries whose sets stages read.
        self.stored: frozenset[Hops] = frozenset()
        #: Boundaries that are measured, by the nodes of all blocks before them.
        self.measured: set[tuple[str, ...]] = set()
        self.data_node = ""
        self.model_node = ""
        #: Evaluate node that may say that nothing more needs to be trained.
        self.gate: str | None = None
        trained = [(stage, self.training[stage.name]) for stage in self.stages]
        self.ties = regime.family.ties(regime.model, inputs.found, trained, in_turn=not self.wave)
        self._tied = dict(zip((stage.name for stage in self.stages), self.ties.held, strict=False))
        #: Whether the network, as it is now, holds shared tensors as one.
        self.tied = self.ties.start
        self.gate_spec = regime.run_exit.gate if regime.ends_early else None
        row_bytes = [self.boundaries.bytes_behind(index) for index in range(len(self.blocks))]
        self.costs = Costs.nominal(outline, inputs.rates, regime.training.precision, row_bytes)
        load = config.domain.load_seconds(config.data)
        self.estimator = Estimator(regime, outline, inputs.rows, inputs.rates, inputs.found, load, inputs.on_host)
        #: Where networks lie that run frozen as a whole, if not on the device.
        self.frozen_beside = self._frozen_beside()
        gang = config.resources.gang
        ranks = gang.ranks(inputs.speeds.devices)
        self.estimator = dataclasses.replace(
            self.estimator, frozen_beside=self.frozen_beside, ranks=ranks, ranks_from=gang.min_parameters
        )

    def _frozen_beside(self) -> FrozenTier | None:
        """With `memory.frozen: auto`, or a gang whose ranks share stages out, on the host where the device cannot hold
        the whole network while it is scored, which one device does alone."""
        usable, asked = self.inputs.speeds.device_bytes, self.regime.frozen_beside
        shares = self.inputs.config.resources.gang.shares and not self.inputs.on_host
        if (self.regime.memory.frozen != AUTO and not shares) or asked is not None:
            return asked
        if usable is None:
            # A network that is shared out is one that fits no device, as far as anybody knows here.
            return "host" if shares else None
        rows = max(self.inputs.config.evaluation_batch, self.regime.group_rows)
        whole = [*self.outline.blocks, self.outline.head]
        scoring = self.estimator.frozen(whole, rows, rows=rows, precision=self.regime.training.precision)
        return "host" if scoring.peak_bytes > usable else None

    def _wave(self) -> tuple[wavefront.Step, ...]:
        regime = self.regime
        if regime.pipeline != "wavefront":
            return ()
        epochs = {stage.name: self.training[stage.name].epochs for stage in self.stages}
        settings = regime.wavefront
        return wavefront.steps(self.stages, epochs, rounds=settings.rounds, average_every=settings.average_every)

    @property
    def head_start(self) -> int:
        """Blocks before the global head, of those that stages see."""
        return len(self.training_blocks) - self.regime.split.head

    def experiment_of_stage(self, stage: Stage, source: str) -> Experiment:
        """The experiment with the number of views that a stage with this source of inputs sees."""
        views = views_to_give(self.views, self.stored_views, source, self.training[stage.name].epochs)
        if views is None:
            return self.experiment
        data = self.inputs.config.domain.with_views(self.experiment.data, views)
        return dataclasses.replace(self.experiment, data=data)

    def views_seen(self, stage: Stage, source: str) -> ViewsSeen | None:
        """What a stage sees of its samples; None where they have no views."""
        if self.views is None:
            return None
        epochs = self.boundaries.epochs(stage)
        most = self.stored_views if source == "snapshots" else epochs
        return ViewsSeen(min(most if self.views == "auto" else self.views, epochs), epochs)

    def with_tests(self, predicted: Estimate, epochs: int) -> Estimate:
        """A stage's prediction with the test split scored after each of its epochs."""
        rows, training = self.inputs.rows.test, self.regime.training
        each = self.estimator.frozen(
            [*self.outline.blocks, self.outline.head],
            min(self.inputs.config.evaluation_batch, rows),
            rows=rows,
            precision=training.precision,
            load_row_seconds=self.estimator.load.evaluate,
        )
        return dataclasses.replace(predicted, seconds=predicted.seconds + epochs * each.seconds)

    def tied_in(self, stage: Stage) -> bool:
        """Whether a stage holds shared tensors as one."""
        return self._tied.get(stage.name, False)

    def gate_parent(self) -> dict[str, str]:
        return {} if self.gate is None else {"gate": self.gate}

    def add(self, kind: str, label: str, task: dict[str, Any], parents: dict[str, str], predicted: Estimate) -> str:
        """Add a node of this regime; return its id."""
        text = label if TASKS[kind].shared else f"{self.regime.name}/{label}"
        return self.collected.table.add(kind, self.regime.name, text, task, parents, predicted)


@dataclasses.dataclass
class Ended:
    """What is known of the stages that are planned; see `RegimePlan`."""

    stages: list[str] = dataclasses.field(default_factory=list)
    #: Question of `after_stage.QUESTIONS` -> train node -> node that answers it.
    answers: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    layers: dict[str, int | Literal["head"]] = dataclasses.field(default_factory=dict)
    decisions: dict[str, Decision] = dataclasses.field(default_factory=dict)
    reads: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rounds: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    views: dict[str, ViewsSeen] = dataclasses.field(default_factory=dict)
    averages: list[str] = dataclasses.field(default_factory=list)
    #: Benchmark -> train node -> judge node.
    judged: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def answered(self, question: str) -> dict[str, str]:
        return self.answers.get(question, {})
