"""The stage graph that a configuration asks for, built.

Pure: configuration, outlines of the chain and of the data set go in, nodes come out (`graph` says what these
are). No torch, no Ray, no clock, no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from orchestrator import estimate, policy
from orchestrator.estimate import Estimate, Rates
from orchestrator.graph import FORMAT, Kind, Node, Plan, RegimePlan, node_id
from orchestrator.policy import Decision
from orchestrator.stages import Stage
from workers.specs import (
    BoundarySpec,
    DataSpec,
    DataTask,
    EvaluateTask,
    Experiment,
    MaterializeTask,
    ModelSpec,
    ModelTask,
    StageTask,
    TrainSpec,
    to_json,
)

if TYPE_CHECKING:
    from orchestrator.config import Config, Regime
    from workers.data.inspect import DataOutline
    from workers.models.outline import ChainOutline, PartOutline

__all__ = ["FORMAT", "Node", "Plan", "RegimePlan", "build_plan", "node_id"]


def build_plan(
    config: Config,
    outlines: Mapping[str, ChainOutline],
    data: DataOutline,
    *,
    weights_digest: str | None = None,
    rates: Rates | None = None,
) -> Plan:
    """The graph of all regimes. `outlines`: regime name -> its chain. `weights_digest`: sha256 of the file
    `model.weights`. `rates` only change predicted seconds. Raises ConfigError when a regime insists on
    snapshots that exceed the budget."""
    builder = _Builder(config, data, weights_digest, rates or config.rates())
    for name in config.regimes:
        builder.add(config.regime(name), outlines[name])
    return builder.plan()


class _Builder:
    """Collects nodes; a node asked for twice is one node."""

    def __init__(self, config: Config, data: DataOutline, weights_digest: str | None, rates: Rates) -> None:
        self.config = config
        self.data = data
        self.weights_digest = weights_digest
        self.rates = rates
        self.rows = estimate.split_rows(config.data, data.train_rows, data.test_rows)
        self.nodes: dict[str, Node] = {}
        self.asked: dict[str, dict[str, None]] = {}
        self.targets: dict[str, None] = {}
        self.regimes: dict[str, RegimePlan] = {}
        storing = [name for name in config.regimes if config.regime(name).kind != "e2e"]
        self.sharing = max(1, len(storing))

    def plan(self) -> Plan:
        nodes = tuple(
            node
            if node.regimes == tuple(self.asked[node.id])
            else dataclasses.replace(node, regimes=tuple(self.asked[node.id]))
            for node in self.nodes.values()
        )
        return Plan(nodes, tuple(self.targets), dict(self.regimes))

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
        self.regimes[regime.name] = _RegimeBuilder(self, regime, outline).build()


class _RegimeBuilder:
    """Adds the nodes of one regime."""

    def __init__(self, graph: _Builder, regime: Regime, outline: ChainOutline) -> None:
        self.graph = graph
        self.regime = regime
        self.outline = outline
        self.blocks = tuple(block.name for block in outline.blocks)
        self.stages = regime.layout(self.blocks)
        self.training = {stage.name: regime.stage_training(stage) for stage in self.stages}
        config = graph.config
        self.experiment = Experiment(
            # Where files lie is no part of the experiment: the store holds decoded data and initial weights.
            model=dataclasses.replace(regime.model, weights=None),
            data=dataclasses.replace(config.data, path=None, download=False),
            classes=graph.data.classes,
            seed=config.seed,
        )
        self.experiment_json = to_json(self.experiment)
        self.boundaries = _boundary_order(self.stages)
        self.specs = {hops: self._boundary_spec(hops) for hops in self.boundaries}
        self.views = {
            hops: max(self._views(stage) for stage in self.stages if stage.hops == hops) for hops in self.boundaries
        }
        self.decisions: dict[tuple[tuple[str, ...], ...], Decision] = {}
        self.sets: dict[tuple[int, str, int | None], str] = {}
        self.weights: dict[str, str] = {}
        self.data_node = ""

    def build(self) -> RegimePlan:
        regime, graph = self.regime, self.graph
        boundaries = [self._figures(index) for index in range(len(self.boundaries))]
        keep = regime.snapshots.retention == "keep"
        budget = regime.snapshots.budget
        share = None if budget is None else budget // graph.sharing
        decisions = policy.decide(boundaries, regime.snapshots.mode, share, keep=keep)
        self.decisions = dict(zip(self.boundaries, decisions, strict=True))
        stored = [
            boundary.set_bytes if decision.source == "snapshots" else 0
            for boundary, decision in zip(boundaries, decisions, strict=True)
        ]
        self.data_node = self._data_node()
        model_node = self._model_node()
        self.weights = dict.fromkeys((*self.blocks, "head"), model_node)
        stage_ids: list[str] = []
        assembled: dict[str, str] = {}
        reasons: dict[str, Decision] = {}
        reads: dict[str, tuple[str, ...]] = {}
        for stage in self.stages:
            node, decision, sets = self._stage_node(stage, stage_ids[-1] if stage_ids else None)
            stage_ids.append(node)
            reasons[node], reads[node] = decision, sets
            self.weights.update(dict.fromkeys(stage.trained, node))
            if graph.config.evaluation.stages:
                assembled[node] = self._evaluate_node(f"assembled after {stage.name}", "validation")
        validation = self._evaluate_node("final validation", "validation")
        test = self._evaluate_node("final test", "test")
        graph.targets.update(dict.fromkeys((*stage_ids, *assembled.values(), validation, test)))
        return RegimePlan(
            name=regime.name,
            kind=regime.kind,
            stages=tuple(stage_ids),
            weights=dict(self.weights),
            assembled=assembled,
            validation=validation,
            test=test,
            decisions=reasons,
            reads=reads,
            peak_snapshot_bytes=policy.peak_bytes(stored, keep=keep),
            retention=regime.snapshots.retention,
        )

    # -- nodes --------------------------------------------------------------------------------------------

    def _add(self, kind: Kind, label: str, task: dict[str, Any], parents: dict[str, str], predicted: Estimate) -> str:
        shared = kind in ("data", "model")
        text = label if shared else f"{self.regime.name}/{label}"
        return self.graph.node(kind, self.regime.name, text, task, parents, predicted)

    def _data_node(self) -> str:
        data = self.graph.config.data
        task = to_json(DataTask(data=_decoding(data), fingerprint=self.graph.data.fingerprint))
        rows = self.graph.data.train_rows + self.graph.data.test_rows
        return self._add("data", "data", task, {}, estimate.data_estimate(rows))

    def _model_node(self) -> str:
        config = self.graph.config
        task = ModelTask(
            model=_initializing(self.regime.model),
            classes=self.graph.data.classes,
            seed=config.seed,
            weights_digest=self.graph.weights_digest,
        )
        parameters = sum(part.parameters for part in (*self.outline.blocks, self.outline.head))
        return self._add("model", "model", to_json(task), {}, estimate.model_estimate(parameters))

    def _stage_node(self, stage: Stage, previous: str | None) -> tuple[str, Decision, tuple[str, ...]]:
        train = self.training[stage.name]
        parents = {"data": self.data_node}
        # In the order of the path, with the prefix first: what a stage loads, as one reads the chain.
        hop_parts = [block for hop in stage.hops for block in hop]
        parts = [part for part in stage.path if part not in ("adapter", "aux")]
        parents |= {f"weights/{part}": self.weights[part] for part in (*hop_parts, *parts)}
        sets: tuple[str, ...] = ()
        decision = self.decisions[stage.hops] if stage.hops else Decision("images", "starts at the images")
        if decision.source == "snapshots":
            roles = self._read_sets(stage)
            parents |= roles
            sets = tuple(roles.values())
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
                boundary=self.specs[stage.hops] if stage.hops else None,
            )
        )
        predicted = self._stage_estimate(stage, train, decision)
        return self._add("train", stage.name, task, parents, predicted), decision, sets

    def _read_sets(self, stage: Stage) -> dict[str, str]:
        index = self.boundaries.index(stage.hops)
        # In the order in which the first epochs will ask: view 0 first, validation at the end of the epoch.
        roles = {"snapshot/train/0": self._set_node(index, "train", 0)}
        roles["snapshot/validation/eval"] = self._set_node(index, "validation", None)
        for view in range(1, self._views(stage)):
            roles[f"snapshot/train/{view}"] = self._set_node(index, "train", view)
        return roles

    def _set_node(self, index: int, split: str, view: int | None) -> str:
        known = self.sets.get((index, split, view))
        if known is not None:
            return known
        hops = self.boundaries[index]
        spec, dtype = self.specs[hops], self.specs[hops].dtype
        parents = {"data": self.data_node}
        parents |= {f"weights/{block}": self.weights[block] for hop in hops for block in hop}
        rolled = index > 0 and self.decisions[self.boundaries[index - 1]].source == "snapshots"
        if rolled:
            parents["previous"] = self._set_node(index - 1, split, view)
        task = {
            **self._materialize_json(index),
            "split": split,
            "view": view,
        }
        made = hops[-1:] if rolled else hops
        rows = self.graph.rows.of(split)
        predicted = estimate.frozen_estimate(
            [self.outline.part(block) for hop in made for block in hop],
            rows=rows,
            batch_rows=min(spec.group_rows, rows),
            precision=spec.precision,
            rates=self.graph.rates,
            stored_row_bytes=estimate.row_bytes(self._shapes(hops), dtype),
            read_row_bytes=estimate.row_bytes(self._shapes(hops[:-1]), dtype) if rolled else 0,
        )
        which = "validation" if view is None else f"{split} view {view}"
        label = f"snapshot {hops[-1][-1]} {which}"
        node = self._add("materialize", label, task, parents, predicted)
        self.sets[(index, split, view)] = node
        return node

    def _materialize_json(self, index: int) -> dict[str, Any]:
        """What the tasks of one boundary share; made once, since there may be thousands of views."""
        cache: dict[int, dict[str, Any]] = self.__dict__.setdefault("_materialize_cache", {})
        if index not in cache:
            task = MaterializeTask(
                experiment=self.experiment,
                boundary=self.specs[self.boundaries[index]],
                split="train",
                view=0,
            )
            cache[index] = to_json(task)
        return cache[index]

    def _evaluate_node(self, label: str, split: Literal["validation", "test"]) -> str:
        config, training = self.graph.config, self.regime.training
        path = (*self.blocks, "head")
        task = EvaluateTask(
            experiment=self.experiment,
            path=path,
            split=split,
            batch_size=config.evaluation.batch_size,
            precision=training.precision,
            channels_last=training.channels_last,
        )
        parents = {"data": self.data_node} | {f"weights/{part}": self.weights[part] for part in path}
        rows = self.graph.rows.of(split)
        predicted = estimate.frozen_estimate(
            [self.outline.part(part) for part in path],
            rows=rows,
            batch_rows=min(config.evaluation.batch_size, rows),
            precision=training.precision,
            rates=self.graph.rates,
        )
        return self._add("evaluate", label, to_json(task), parents, predicted)

    # -- figures ------------------------------------------------------------------------------------------

    def _views(self, stage: Stage) -> int:
        epochs = estimate.epochs_to_run(self.training[stage.name], self.graph.rows.train)
        return estimate.views_used(self.graph.config.data, epochs)

    def _shapes(self, hops: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
        return self.outline.boundaries[sum(len(hop) for hop in hops)]

    def _boundary_spec(self, hops: tuple[tuple[str, ...], ...]) -> BoundarySpec:
        settings, training = self.regime.snapshots, self.regime.training
        dtype: Any = estimate.SNAPSHOT_DTYPE[training.precision] if settings.dtype == "auto" else settings.dtype
        return BoundarySpec(
            hops=hops,
            precision=training.precision,
            dtype=dtype,
            group_rows=settings.group_rows,
            shard_bytes=settings.shard_bytes,
            channels_last=training.channels_last,
        )

    def _figures(self, index: int) -> policy.Boundary:
        hops = self.boundaries[index]
        rows, views = self.graph.rows, self.views[hops]
        stored_rows = views * rows.train + rows.validation
        prefix = estimate.prefix_flops(self.outline, [block for hop in hops for block in hop])
        passes = sum(
            estimate.epochs_to_run(self.training[stage.name], rows.train) for stage in self.stages if stage.hops == hops
        )
        return policy.Boundary(
            label=hops[-1][-1],
            set_bytes=stored_rows * estimate.row_bytes(self._shapes(hops), self.specs[hops].dtype),
            make_from_images=stored_rows * prefix,
            make_from_previous=stored_rows * (estimate.prefix_flops(self.outline, hops[-1]) if index else prefix),
            recompute=passes * (rows.train + rows.validation) * prefix,
        )

    def _stage_estimate(self, stage: Stage, train: TrainSpec, decision: Decision) -> Estimate:
        parts: list[PartOutline] = []
        for name in stage.path:
            if name == "adapter" and stage.adapter is not None:
                parts.append(self.outline.adapter(*stage.adapter))
            elif name == "aux" and stage.aux is not None:
                parts.append(self.outline.aux(stage.aux))
            else:
                parts.append(self.outline.part(name))
        trained = frozenset((*stage.trained, "adapter", "aux"))
        rows, rates = self.graph.rows, self.graph.rates
        if not stage.hops:
            image = self.outline.boundaries[0]
            return estimate.train_estimate(
                parts,
                trained,
                train,
                rows=rows,
                rates=rates,
                input_elements=estimate.elements(image),
                input_item_bytes=4,
            )
        spec = self.specs[stage.hops]
        prefix = [self.outline.part(block) for hop in stage.hops for block in hop]
        return estimate.train_estimate(
            parts,
            trained,
            train,
            rows=rows,
            rates=rates,
            input_elements=estimate.elements(self._shapes(stage.hops)),
            input_item_bytes=estimate.ITEM_BYTES[spec.dtype],
            reads_snapshots=decision.source == "snapshots",
            prefix=prefix if decision.source == "recompute" else (),
            group_rows=spec.group_rows,
        )


def _boundary_order(stages: Sequence[Stage]) -> list[tuple[tuple[str, ...], ...]]:
    """The distinct boundaries that stages read, from the images on. Each is the one before plus one hop."""
    return list(dict.fromkeys(stage.hops for stage in stages if stage.hops))


def _decoding(data: DataSpec) -> DataSpec:
    """The settings that decide how a data set is decoded; the others are set to their defaults, so that data
    are decoded once for all the ways they are augmented, split and limited."""
    return DataSpec(
        name=data.name,
        path=data.path,
        download=data.download,
        image_size=data.image_size,
        resize=data.resize,
    )


def _initializing(model: ModelSpec) -> ModelSpec:
    """The settings that decide the initial weights: how the chain is cut later does not."""
    return dataclasses.replace(model, segments="stages", head_convs=1, dropout=ModelSpec.dropout)
