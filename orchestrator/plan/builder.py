"""The stage graph that a configuration asks for, built.

Pure: configuration, outlines of the chain and of the data set go in, nodes come out (`graph` says what these
are). No torch, no Ray, no clock, no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config.rates import Rates
from orchestrator.costs import formulas, snapshot_policy
from orchestrator.costs.boundary_costs import Costs, Prediction, alike_blocks, make_seconds
from orchestrator.costs.estimator import Estimator
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.snapshot_policy import Decision
from orchestrator.plan.boundaries import Boundaries, Hops
from orchestrator.plan.experiment import data_task, experiment_of, model_task, outputs_of, rows_of
from orchestrator.plan.graph import FORMAT, Kind, Node, Plan, RegimePlan, node_id
from orchestrator.regimes import wavefront
from orchestrator.regimes.stages import Stage
from workers.specs.as_json import to_json
from workers.specs.tasks import (
    AverageTask,
    EvaluateTask,
    MaterializeTask,
    MeasureTask,
    RoundSpec,
    StageTask,
    snapshot_role,
)

if TYPE_CHECKING:
    from orchestrator.config.schema import Config, Regime
    from workers.domains.planning import AnyOutline
    from workers.models.outline import ChainOutline

#: What measuring a chain takes, on whatever it runs: its figures each have a time of their own.
MEASURE_SECONDS = 10.0

__all__ = ["FORMAT", "Node", "Plan", "RegimePlan", "build_plan", "node_id"]


def build_plan(
    config: Config,
    outlines: Mapping[str, ChainOutline],
    data: AnyOutline,
    *,
    found: object | None = None,
    weights_digest: str | None = None,
    rates: Rates | None = None,
    on_host: bool = False,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """The graph of all regimes. `outlines`: regime name -> its chain. `found`: what the model's family found when it
    looked at the model. `weights_digest`: identity of the initial weights' files. `rates` only change predicted
    seconds, `on_host` (workers train on the CPU) predicted memory. `figures`: what measure nodes found, by node id; a
    plan without them decides by counting and names the nodes as `unmeasured`. Raises ConfigError when a regime insists
    on snapshots that exceed the budget."""
    builder = _Builder(config, data, found, weights_digest, rates or config.rates(), on_host, figures or {})
    for name in config.regimes:
        builder.add(config.regime(name), outlines[name])
    return builder.plan()


class _Builder:
    """Collects nodes; a node asked for twice is one node."""

    def __init__(
        self,
        config: Config,
        data: AnyOutline,
        found: object | None,
        weights_digest: str | None,
        rates: Rates,
        on_host: bool,
        figures: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.config = config
        self.figures = figures
        #: Measure nodes without figures.
        self.unmeasured: dict[str, None] = {}
        self.on_host = on_host
        self.data = data
        self.found = found
        self.classes = outputs_of(config, data, found)
        self.weights_digest = weights_digest
        self.rates = rates
        self.rows = rows_of(config, data)
        self.nodes: dict[str, Node] = {}
        self.asked: dict[str, dict[str, None]] = {}
        self.targets: dict[str, None] = {}
        self.regimes: dict[str, RegimePlan] = {}
        #: Split -> evaluate node of the model as it came (pretrained language models).
        self.original: dict[str, str] = {}
        storing = [name for name in config.regimes if config.regime(name).kind != "e2e"]
        self.sharing = max(1, len(storing))

    def plan(self) -> Plan:
        nodes = tuple(
            node
            if node.regimes == tuple(self.asked[node.id])
            else dataclasses.replace(node, regimes=tuple(self.asked[node.id]))
            for node in self.nodes.values()
        )
        return Plan(nodes, tuple(self.targets), dict(self.regimes), dict(self.original), tuple(self.unmeasured))

    def node(
        self,
        kind: Kind,
        regime: str,
        label: str,
        task: dict[str, Any],
        parents: dict[str, str],
        predicted: Estimate,
    ) -> str:
        identifier = node_id(kind, task, parents)
        if identifier not in self.nodes:
            self.nodes[identifier] = Node(identifier, kind, label, (regime,), task, parents, predicted)
        self.asked.setdefault(identifier, {})[regime] = None
        return identifier

    def add(self, regime: Regime, outline: ChainOutline) -> None:
        self.regimes[regime.name] = RegimeBuilder(self, regime, outline).build()


class RegimeBuilder:
    """Adds the nodes of one regime."""

    def __init__(self, graph: _Builder, regime: Regime, outline: ChainOutline) -> None:
        self.graph = graph
        self.regime = regime
        self.outline = outline
        self.blocks = tuple(block.name for block in outline.blocks)
        self.stages = regime.layout(self.blocks)
        self.training_blocks = regime.in_training(self.blocks)
        self.training = {stage.name: regime.stage_training(stage) for stage in self.stages}
        config = graph.config
        self.experiment = experiment_of(config, regime, graph.classes, graph.found)
        self.experiment_json = to_json(self.experiment)
        #: The wave's steps; none where the stages run one after the other.
        self.wave = self._wave()
        self.boundaries = Boundaries(
            regime,
            outline,
            self.stages,
            self.training,
            graph.rows,
            views=config.domain.views(config.data),
            wave=self.wave,
        )
        self.decisions: dict[Hops, Decision] = {}
        #: Version of the blocks before it, boundary, split, view -> materialize node.
        self.sets: dict[tuple[int, int, str, int | None], str] = {}
        #: Part -> the node that holds it now: moves on from stage to stage, in a wave from round to round.
        self.weights: dict[str, str] = {}
        self.version = 0
        self.data_node = ""
        #: Evaluate node that may say that nothing more needs to be trained.
        self.gate: str | None = None
        self.ended = _Ended()
        self.gate_spec = regime.run_exit.gate if regime.kind == "segprop" else None
        row_bytes = [self.boundaries.bytes_behind(index) for index in range(len(self.blocks))]
        self.costs = Costs.nominal(outline, graph.rates, regime.training.precision, row_bytes)
        self.estimator = Estimator(regime, outline, graph.rows, graph.rates, graph.found, graph.on_host)

    def build(self) -> RegimePlan:
        regime, graph = self.regime, self.graph
        self.data_node = self._data_node()
        model_node = self._model_node()
        self.weights = dict.fromkeys((*self.blocks, "head"), model_node)
        self._settle_costs()
        boundaries = [self.boundaries.facts(hops, self.costs) for hops in self.boundaries.order]
        keep = regime.snapshots.retention == "keep"
        budget = regime.snapshots.budget
        share = None if budget is None else budget // graph.sharing
        # In a wave all boundaries are alive at one time, as where nothing is released.
        together = keep or bool(self.wave)
        decisions = snapshot_policy.decide(boundaries, regime.snapshots.mode, share, keep=together)
        self.decisions = dict(zip(self.boundaries.order, decisions, strict=True))
        stored = [
            boundary.set_bytes if decision.source == "snapshots" else 0
            for boundary, decision in zip(boundaries, decisions, strict=True)
        ]
        if regime.traits.scores_original and graph.weights_digest is not None and not graph.original:
            for split in ("validation", "test"):
                graph.original[split] = self._evaluate_node(f"original {split}", split)
            graph.targets.update(dict.fromkeys(graph.original.values()))
        if self.wave:
            self._wavefront()
        else:
            self._sequential()
        ended = self.ended
        validation = self._evaluate_node("final validation", "validation")
        test = self._evaluate_node("final test", "test")
        scored = (*ended.assembled.values(), *ended.truncated.values())
        graph.targets.update(dict.fromkeys((*ended.stages, *scored, validation, test)))
        return RegimePlan(
            name=regime.name,
            kind=regime.kind,
            stages=tuple(ended.stages),
            weights=dict(self.weights),
            assembled=ended.assembled,
            truncated=ended.truncated,
            layers=ended.layers,
            validation=validation,
            test=test,
            decisions=ended.decisions,
            reads=ended.reads,
            peak_snapshot_bytes=snapshot_policy.peak_bytes(stored, keep=together),
            retention=regime.snapshots.retention,
            production=regime.snapshots.production,
            boundaries=tuple(self._prediction(index) for index in range(len(self.boundaries))),
            rounds=ended.rounds,
            averages=tuple(ended.averages),
            run_exit={}
            if self.gate_spec is None
            else {key: value for key, value in to_json(self.gate_spec).items() if value is not None},
            width=sum(stage.group != wavefront.FINAL for stage in self.stages[: regime.wavefront.rounds])
            if self.wave
            else 1,
        )

    def _sequential(self) -> None:
        """One stage after the other."""
        for stage in self.stages:
            previous = self.ended.stages[-1] if self.ended.stages else None
            node = self._stage_node(stage, previous)
            self.weights.update(dict.fromkeys(stage.trained, node))
            self._end(stage, node)
            if self.gate_spec is not None:
                self.gate = self.ended.assembled[node]

    def _wavefront(self) -> None:
        """Rounds of all stages, side by side."""
        initial = dict(self.weights)
        made: dict[str, str] = {}

        def held(weights: Mapping[str, str]) -> dict[str, str]:
            return initial | {part: made[key] for part, key in weights.items()}

        for step in self.wave:
            match step:
                case wavefront.Round():
                    self.weights, self.version = held(step.weights), step.index
                    made[step.key] = self._stage_node(
                        step.stage,
                        None if step.previous is None else made[step.previous],
                        step=step,
                        before=None if step.continues is None else made[step.continues],
                    )
                case wavefront.Average():
                    made[step.key] = self._average_node(step, [made[key] for key in step.replicas])
                    self.ended.averages.append(made[step.key])
                case wavefront.StageEnd():
                    self.weights = held(step.weights)
                    *earlier, last = [made[key] for key in step.rounds]
                    self.ended.rounds[last] = tuple(earlier)
                    self._end(step.stage, last)

    def _end(self, stage: Stage, node: str) -> None:
        """A stage is over with this train node: what is known of it, and the scores of the network as it is then."""
        ended, regime = self.ended, self.regime
        ended.stages.append(node)
        if regime.traits.alike_layers and regime.kind != "e2e":
            ended.layers[node] = self._last_layer(stage)
        if self.graph.config.evaluation.stages:
            ended.assembled[node] = self._evaluate_node(f"assembled after {stage.name}", "validation")
            shorter = self._truncated(stage)
            if shorter is not None:
                ended.truncated[node] = self._evaluate_node(f"truncated after {stage.name}", "validation", shorter)

    def _wave(self) -> tuple[wavefront.Step, ...]:
        regime = self.regime
        if regime.pipeline != "wavefront":
            return ()
        epochs = {stage.name: self.training[stage.name].epochs for stage in self.stages}
        settings = regime.wavefront
        return wavefront.steps(self.stages, epochs, rounds=settings.rounds, average_every=settings.average_every)

    # -- nodes --------------------------------------------------------------------------------------------

    def _add(self, kind: Kind, label: str, task: dict[str, Any], parents: dict[str, str], predicted: Estimate) -> str:
        shared = kind in ("data", "model")
        text = label if shared else f"{self.regime.name}/{label}"
        return self.graph.node(kind, self.regime.name, text, task, parents, predicted)

    def _data_node(self) -> str:
        graph = self.graph
        task = data_task(graph.config, graph.data)
        rows = graph.rows.train + graph.rows.validation + graph.rows.test
        return self._add("data", "data", to_json(task), {}, formulas.data_estimate(rows))

    def _model_node(self) -> str:
        graph = self.graph
        task = model_task(graph.config, self.regime, graph.classes, graph.found, graph.weights_digest)
        parameters = sum(part.parameters for part in (*self.outline.blocks, self.outline.head))
        return self._add("model", "model", to_json(task), {}, formulas.model_estimate(parameters))

    def _settle_costs(self) -> None:
        """Measured costs instead of nominal ones, where the configuration asks for them and they are known."""
        if self.regime.snapshots.costs != "measured" or not self.boundaries.order:
            return
        graph = self.graph
        node = self._measure_node()
        graph.targets[node] = None
        if node not in graph.figures:
            graph.unmeasured[node] = None
            return
        self.costs = Costs.from_json(graph.figures[node], self.outline)
        rates = Rates.measured(self.costs.flops_per_s(self.outline) / 1e9)
        self.estimator = dataclasses.replace(self.estimator, rates=rates)

    def _measure_node(self) -> str:
        spec = self.boundaries.specs[self.boundaries.order[-1]]
        # All of the chain, so that regimes with other boundaries share the node.
        wanted = set(alike_blocks(self.outline).values())
        blocks = tuple((block, index) for index, block in enumerate(self.blocks) if block in wanted)
        task = MeasureTask(
            experiment=self.experiment,
            blocks=blocks,
            precision=spec.precision,
            dtype=spec.dtype,
            encoding=spec.encoding,
            channels_last=spec.channels_last,
            group_rows=spec.group_rows,
            batch_rows=self.regime.training.micro,
            shard_bytes=spec.shard_bytes,
        )
        parents = {"data": self.data_node} | {f"weights/{block}": self.weights[block] for block, _ in blocks}
        return self._add("measure", "costs of snapshots", to_json(task), parents, Estimate(seconds=MEASURE_SECONDS))

    def _stage_node(
        self,
        stage: Stage,
        previous: str | None,
        *,
        step: wavefront.Round | None = None,
        before: str | None = None,
    ) -> str:
        """A whole stage, or the round of it that `step` is; `before`: the node that it continues."""
        train = self.training[stage.name]
        epochs = None if step is None else step.epochs
        if epochs is not None:
            train = dataclasses.replace(train, commit="last")  # what goes on is where the last round stopped
        parents = {"data": self.data_node}
        # In the order of the path, with the prefix first: what a stage loads, as one reads the chain.
        hop_parts = [block for hop in stage.hops for block in hop]
        parts = [part for part in stage.path if part not in ("adapter", "aux")]
        if "aux" in stage.path and self.regime.traits.copies_head:
            parts.append("head")  # a language model's local head starts as a copy of its own
        parents |= {f"weights/{part}": self.weights[part] for part in (*hop_parts, *parts)}
        sets: tuple[str, ...] = ()
        start = Decision("images", f"starts at the {self.regime.domain.raw}")
        boundary = self.boundaries.specs[stage.hops] if stage.hops else None
        decision = self.decisions[stage.hops] if stage.hops else start
        if decision.source == "snapshots":
            roles = self._read_sets(stage, epochs)
            parents |= roles
            sets = tuple(roles.values())
        if before is not None:
            parents["continue"] = before
        if train.head_optimizer == "carry" and previous is not None and self.regime.kind == "segprop":
            parents["optimizer"] = previous
        task = to_json(
            StageTask(
                experiment=self.experiment,
                name=stage.name,
                path=stage.path,
                trained=stage.trained,
                train=train,
                source=decision.source,
                boundary=boundary,
                window=self._window(stage),
                round=None if epochs is None else RoundSpec(first=epochs[0], end=epochs[1]),
                gate=None if self.gate is None else self.gate_spec,
            )
        )
        parents |= self._gate_parent()
        part = train if epochs is None else dataclasses.replace(train, epochs=epochs[1] - epochs[0])
        predicted = self.estimator.stage(stage, part, boundary, decision.source)
        label = stage.name if epochs is None or step is None else f"{stage.name} round {step.index + 1}"
        node = self._add("train", label, task, parents, predicted)
        self.ended.decisions[node], self.ended.reads[node] = decision, sets
        return node

    def _gate_parent(self) -> dict[str, str]:
        return {} if self.gate is None else {"gate": self.gate}

    def _average_node(self, step: wavefront.Average, replicas: Sequence[str]) -> str:
        task = to_json(AverageTask(experiment=self.experiment, parts=step.parts))
        parents = {f"replica/{number}": node for number, node in enumerate(replicas)}
        parameters = sum(self.outline.part(part).parameters for part in step.parts)
        predicted = formulas.average_estimate(parameters, len(replicas))
        return self._add("average", f"average round {step.time + 1}", task, parents, predicted)

    def _window(self, stage: Stage) -> int | None:
        """Also where the boundary is computed again for every batch: the order does not depend on what is stored."""
        settings = self.regime.snapshots
        return settings.window if stage.hops and settings.shuffle == "window" else None

    def _read_sets(self, stage: Stage, epochs: tuple[int, int] | None) -> dict[str, str]:
        index = self.boundaries.order.index(stage.hops)
        views = self.boundaries.views_read(stage, epochs)
        # In the order in which the first epochs will ask: view 0 first, validation at the end of the epoch.
        roles = {snapshot_role("train", views[0]): self._set_node(index, "train", views[0])}
        roles[snapshot_role("validation", None)] = self._set_node(index, "validation", None)
        for view in views[1:]:
            roles[snapshot_role("train", view)] = self._set_node(index, "train", view)
        return roles

    def _set_node(self, index: int, split: str, view: int | None) -> str:
        known = self.sets.get((self.version, index, split, view))
        if known is not None:
            return known
        hops = self.boundaries.order[index]
        spec = self.boundaries.specs[hops]
        parents = {"data": self.data_node}
        parents |= {f"weights/{block}": self.weights[block] for hop in hops for block in hop}
        rolled = self._rolled(index)
        if rolled:
            parents["previous"] = self._set_node(index - 1, split, view)
        parents |= self._gate_parent()
        task = {
            **self._materialize_json(index),
            "split": split,
            "view": view,
            **({"gate": to_json(self.gate_spec)} if self.gate is not None else {}),
        }
        made = hops[-1:] if rolled else hops
        rows = self.graph.rows.of(split)
        predicted = self.estimator.frozen(
            [self.outline.part(block) for hop in made for block in hop],
            min(spec.group_rows, rows),
            rows=rows,
            precision=spec.precision,
            stored_row_bytes=self.boundaries.row_bytes(hops),
            read_row_bytes=self.boundaries.row_bytes(hops[:-1]) if rolled else 0,
        )
        if self.costs.basis == "measured":
            predicted = dataclasses.replace(predicted, seconds=make_seconds(self.costs, hops, rows, rolled=rolled))
        which = "validation" if view is None else f"{split} view {view}"
        label = f"snapshot {hops[-1][-1]} {which}"
        if self.boundaries.moves(hops):
            label += f" round {self.version + 1}"
        node = self._add("materialize", label, task, parents, predicted)
        self.sets[self.version, index, split, view] = node
        return node

    def _rolled(self, index: int) -> bool:
        """Whether a boundary's sets are made from those of the one before."""
        return index > 0 and self.decisions[self.boundaries.order[index - 1]].source == "snapshots"

    def _materialize_json(self, index: int) -> dict[str, Any]:
        """What the tasks of one boundary share; made once, since there may be thousands of views."""
        cache: dict[int, dict[str, Any]] = self.__dict__.setdefault("_materialize_cache", {})
        if index not in cache:
            task = MaterializeTask(
                experiment=self.experiment,
                boundary=self.boundaries.specs[self.boundaries.order[index]],
                split="train",
                view=0,
            )
            cache[index] = to_json(task)
        return cache[index]

    def _truncated(self, stage: Stage) -> tuple[str, ...] | None:
        """The chain as far as it is trained, and the global head: None where a stage's own path says it already, or
        where parts of different shapes do not fit together (ResNets)."""
        if not self.regime.traits.alike_layers or self.regime.kind != "segprop":
            return None
        end = sum(len(hop) for hop in stage.hops)
        end += sum(part in self.training_blocks[end : self._head_start] for part in stage.trained)
        if not stage.hops:
            end = self.regime.base
        if self.regime.split.intermediate == "omit" or end >= self._head_start:
            return None
        return (*self.training_blocks[:end], *self.training_blocks[self._head_start :], "head")

    def _last_layer(self, stage: Stage) -> int | Literal["head"]:
        if stage.group == "head":
            return "head"
        end = self._head_start if self.regime.kind == "segprop" else len(self.training_blocks)
        numbers = [
            int(block.removeprefix("layer"))
            for block in (*(block for hop in stage.hops for block in hop), *stage.trained)
            if block in self.training_blocks[1:end]
        ]
        return max(numbers, default=-1)

    @property
    def _head_start(self) -> int:
        return len(self.training_blocks) - self.regime.split.head

    def _evaluate_node(
        self, label: str, split: Literal["validation", "test"], path: tuple[str, ...] | None = None
    ) -> str:
        config, training = self.graph.config, self.regime.training
        path = path or (*self.blocks, "head")
        task = EvaluateTask(
            experiment=self.experiment,
            path=path,
            split=split,
            batch_size=config.evaluation_batch,
            precision=training.precision,
            channels_last=training.channels_last,
        )
        parents = {"data": self.data_node} | {f"weights/{part}": self.weights[part] for part in path}
        rows = self.graph.rows.of(split)
        predicted = self.estimator.frozen(
            [self.outline.part(part) for part in path],
            min(config.evaluation_batch, rows),
            rows=rows,
            precision=training.precision,
        )
        return self._add("evaluate", label, to_json(task), parents, predicted)

    def _prediction(self, index: int) -> Prediction:
        """What was decided for one boundary, in seconds."""
        hops, ended = self.boundaries.order[index], self.ended
        costs, decision = self.boundaries.costs(hops, self.costs), self.decisions[hops]
        return Prediction(
            label=hops[-1][-1],
            source=decision.source,
            reason=decision.reason,
            basis=self.costs.basis,
            bytes=self.boundaries.rows_made(hops) * self.boundaries.row_bytes(hops),
            make_seconds=costs.make_from_previous if self._rolled(index) else costs.make_from_start,
            read_seconds=costs.read,
            recompute_seconds=costs.recompute,
            # A set that no version of a block sets apart is one node.
            sets=tuple(dict.fromkeys(node for (_, at, _, _), node in self.sets.items() if at == index)),
            stages=tuple(
                node
                for stage, last in zip(self.stages, ended.stages, strict=True)
                if stage.hops == hops
                for node in (*ended.rounds.get(last, ()), last)
            ),
        )


@dataclasses.dataclass
class _Ended:
    """What is known of the stages that are planned; see `RegimePlan`."""

    stages: list[str] = dataclasses.field(default_factory=list)
    assembled: dict[str, str] = dataclasses.field(default_factory=dict)
    truncated: dict[str, str] = dataclasses.field(default_factory=dict)
    layers: dict[str, int | Literal["head"]] = dataclasses.field(default_factory=dict)
    decisions: dict[str, Decision] = dataclasses.field(default_factory=dict)
    reads: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rounds: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    averages: list[str] = dataclasses.field(default_factory=list)
