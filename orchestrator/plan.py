"""The stage graph that a configuration asks for, built.

Pure: configuration, outlines of the chain and of the data set go in, nodes come out (`graph` says what these
are). No torch, no Ray, no clock, no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from orchestrator import estimate, language_memory, policy
from orchestrator.costs import BoundaryCosts, Costs, Prediction, alike_blocks, boundary_costs, make_seconds
from orchestrator.estimate import Estimate, Rates
from orchestrator.experiment import decoding, experiment_of, initializing, rows_of, tokenizing
from orchestrator.graph import FORMAT, Kind, Node, Plan, RegimePlan, node_id
from orchestrator.policy import Decision
from orchestrator.stages import Stage
from workers.lm_specs import CausalLMSpec
from workers.specs import (
    BoundarySpec,
    DataSpec,
    DataTask,
    EvaluateTask,
    MaterializeTask,
    MeasureTask,
    ModelTask,
    StageTask,
    TrainSpec,
    snapshot_role,
    to_json,
)

if TYPE_CHECKING:
    from orchestrator.config import Config, Regime
    from workers.data.inspect import DataOutline
    from workers.data.text.inspect import TextOutline
    from workers.models.causal_lm.outline import LMOutline, LMPartOutline
    from workers.models.outline import ChainOutline, PartOutline

#: What measuring a chain takes, on whatever it runs: its figures each have a time of their own.
MEASURE_SECONDS = 10.0

__all__ = ["FORMAT", "Node", "Plan", "RegimePlan", "build_plan", "node_id"]


def build_plan(
    config: Config,
    outlines: Mapping[str, ChainOutline],
    data: DataOutline | TextOutline,
    *,
    language: LMOutline | None = None,
    weights_digest: str | None = None,
    rates: Rates | None = None,
    on_host: bool = False,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """The graph of all regimes. `outlines`: regime name -> its chain. `language`: the checkpoint of a language
    model. `weights_digest`: identity of the initial weights' files. `rates` only change predicted seconds, `on_host`
    (workers train on the CPU) predicted memory. `figures`: what measure nodes found, by node id; a plan without them
    decides by counting and names the nodes as `unmeasured`. Raises ConfigError when a regime insists on snapshots that
    exceed the budget."""
    builder = _Builder(config, data, language, weights_digest, rates or config.rates(), on_host, figures or {})
    for name in config.regimes:
        builder.add(config.regime(name), outlines[name])
    return builder.plan()


class _Builder:
    """Collects nodes; a node asked for twice is one node."""

    def __init__(
        self,
        config: Config,
        data: DataOutline | TextOutline,
        language: LMOutline | None,
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
        self.language = language
        self.classes = data.classes if language is None else language.vocabulary  # type: ignore[union-attr]
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
        self.regimes[regime.name] = _RegimeBuilder(self, regime, outline).build()


class _RegimeBuilder:
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
        self.experiment = experiment_of(config, regime, graph.classes, graph.language)
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
        self.rates = graph.rates
        row_bytes = [self._bytes_behind(index) for index in range(len(self.blocks))]
        precision = regime.training.precision
        self.costs = Costs.nominal(outline, self.rates, precision, row_bytes)

    def build(self) -> RegimePlan:
        regime, graph = self.regime, self.graph
        self.data_node = self._data_node()
        model_node = self._model_node()
        self.weights = dict.fromkeys((*self.blocks, "head"), model_node)
        self._settle_costs()
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
        if graph.language is not None and graph.weights_digest is not None and not graph.original:
            for split in ("validation", "test"):
                graph.original[split] = self._evaluate_node(f"original {split}", split)
            graph.targets.update(dict.fromkeys(graph.original.values()))
        stage_ids: list[str] = []
        assembled: dict[str, str] = {}
        truncated: dict[str, str] = {}
        layers: dict[str, int | Literal["head"]] = {}
        reasons: dict[str, Decision] = {}
        reads: dict[str, tuple[str, ...]] = {}
        for stage in self.stages:
            node, decision, sets = self._stage_node(stage, stage_ids[-1] if stage_ids else None)
            stage_ids.append(node)
            reasons[node], reads[node] = decision, sets
            self.weights.update(dict.fromkeys(stage.trained, node))
            if regime.is_text and regime.kind != "e2e":
                layers[node] = self._last_layer(stage)
            if graph.config.evaluation.stages:
                assembled[node] = self._evaluate_node(f"assembled after {stage.name}", "validation")
                shorter = self._truncated(stage)
                if shorter is not None:
                    truncated[node] = self._evaluate_node(f"truncated after {stage.name}", "validation", shorter)
        validation = self._evaluate_node("final validation", "validation")
        test = self._evaluate_node("final test", "test")
        graph.targets.update(dict.fromkeys((*stage_ids, *assembled.values(), *truncated.values(), validation, test)))
        return RegimePlan(
            name=regime.name,
            kind=regime.kind,
            stages=tuple(stage_ids),
            weights=dict(self.weights),
            assembled=assembled,
            truncated=truncated,
            layers=layers,
            validation=validation,
            test=test,
            decisions=reasons,
            reads=reads,
            peak_snapshot_bytes=policy.peak_bytes(stored, keep=keep),
            retention=regime.snapshots.retention,
            production=regime.snapshots.production,
            boundaries=tuple(self._prediction(index, stage_ids) for index in range(len(self.boundaries))),
        )

    # -- nodes --------------------------------------------------------------------------------------------

    def _add(self, kind: Kind, label: str, task: dict[str, Any], parents: dict[str, str], predicted: Estimate) -> str:
        shared = kind in ("data", "model")
        text = label if shared else f"{self.regime.name}/{label}"
        return self.graph.node(kind, self.regime.name, text, task, parents, predicted)

    def _data_node(self) -> str:
        config, graph = self.graph.config, self.graph
        task = DataTask(data=decoding(config.data), fingerprint=graph.data.fingerprint)
        if isinstance(config.model, CausalLMSpec):
            # Text is split before it is packed, so that no document is in two splits.
            task = dataclasses.replace(task, seed=config.seed, model=tokenizing(config.model))
        rows = graph.rows.train + graph.rows.validation + graph.rows.test
        return self._add("data", "data", to_json(task), {}, estimate.data_estimate(rows))

    def _model_node(self) -> str:
        config = self.graph.config
        task = ModelTask(
            model=initializing(self.regime.model, self.graph.language),
            classes=self.graph.classes,
            seed=config.seed,
            weights_digest=self.graph.weights_digest,
        )
        parameters = sum(part.parameters for part in (*self.outline.blocks, self.outline.head))
        return self._add("model", "model", to_json(task), {}, estimate.model_estimate(parameters))

    def _settle_costs(self) -> None:
        """Measured costs instead of nominal ones, where the configuration asks for them and they are known."""
        if self.regime.snapshots.costs != "measured" or not self.boundaries:
            return
        graph = self.graph
        node = self._measure_node()
        graph.targets[node] = None
        if node not in graph.figures:
            graph.unmeasured[node] = None
            return
        self.costs = Costs.from_json(graph.figures[node], self.outline)
        self.rates = Rates.measured(self.costs.flops_per_s(self.outline) / 1e9)

    def _measure_node(self) -> str:
        spec = self.specs[self.boundaries[-1]]
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

    def _stage_node(self, stage: Stage, previous: str | None) -> tuple[str, Decision, tuple[str, ...]]:
        train = self.training[stage.name]
        parents = {"data": self.data_node}
        # In the order of the path, with the prefix first: what a stage loads, as one reads the chain.
        hop_parts = [block for hop in stage.hops for block in hop]
        parts = [part for part in stage.path if part not in ("adapter", "aux")]
        if "aux" in stage.path and self.regime.is_text:
            parts.append("head")  # a language model's local head starts as a copy of its own
        parents |= {f"weights/{part}": self.weights[part] for part in (*hop_parts, *parts)}
        sets: tuple[str, ...] = ()
        start = Decision("images", f"starts at the {'text' if self.regime.is_text else 'images'}")
        decision = self.decisions[stage.hops] if stage.hops else start
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
                window=self._window(stage),
            )
        )
        predicted = self._stage_estimate(stage, train, decision)
        return self._add("train", stage.name, task, parents, predicted), decision, sets

    def _window(self, stage: Stage) -> int | None:
        """Also where the boundary is computed again for every batch: the order does not depend on what is stored."""
        settings = self.regime.snapshots
        return settings.window if stage.hops and settings.shuffle == "window" else None

    def _read_sets(self, stage: Stage) -> dict[str, str]:
        index = self.boundaries.index(stage.hops)
        # In the order in which the first epochs will ask: view 0 first, validation at the end of the epoch.
        roles = {snapshot_role("train", 0): self._set_node(index, "train", 0)}
        roles[snapshot_role("validation", None)] = self._set_node(index, "validation", None)
        for view in range(1, self._views(stage)):
            roles[snapshot_role("train", view)] = self._set_node(index, "train", view)
        return roles

    def _set_node(self, index: int, split: str, view: int | None) -> str:
        known = self.sets.get((index, split, view))
        if known is not None:
            return known
        hops = self.boundaries[index]
        spec = self.specs[hops]
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
        predicted = self._frozen_estimate(
            [self.outline.part(block) for hop in made for block in hop],
            min(spec.group_rows, rows),
            rows=rows,
            precision=spec.precision,
            stored_row_bytes=self._row_bytes(hops),
            read_row_bytes=self._row_bytes(hops[:-1]) if rolled else 0,
        )
        if self.costs.basis == "measured":
            predicted = dataclasses.replace(predicted, seconds=make_seconds(self.costs, hops, rows, rolled=rolled))
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

    def _truncated(self, stage: Stage) -> tuple[str, ...] | None:
        """The chain as far as it is trained, and the global head: None where a stage's own path says it already, or
        where parts of different shapes do not fit together (ResNets)."""
        if not self.regime.is_text or self.regime.kind != "segprop":
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
        predicted = self._frozen_estimate(
            [self.outline.part(part) for part in path],
            min(config.evaluation_batch, rows),
            rows=rows,
            precision=training.precision,
        )
        return self._add("evaluate", label, to_json(task), parents, predicted)

    # -- figures ------------------------------------------------------------------------------------------

    def _views(self, stage: Stage) -> int:
        epochs = estimate.epochs_to_run(self.training[stage.name], self.graph.rows.train)
        data = self.graph.config.data
        return estimate.views_used(data.views, epochs) if isinstance(data, DataSpec) else 1

    def _shapes(self, hops: Sequence[Sequence[str]]) -> tuple[tuple[int, ...], ...]:
        return self.outline.boundaries[sum(len(hop) for hop in hops)]

    def _bytes_behind(self, block: int) -> int:
        """Stored bytes of one sample behind a block, were its boundary stored."""
        settings = self.regime.snapshots
        return estimate.row_bytes(self.outline.boundaries[block + 1], self._dtype(), settings.encoding)

    def _dtype(self) -> Any:
        dtype = self.regime.snapshots.dtype
        return estimate.SNAPSHOT_DTYPE[self.regime.training.precision] if dtype == "auto" else dtype

    def _row_bytes(self, hops: tuple[tuple[str, ...], ...]) -> int:
        """Stored bytes of one sample at the boundary after `hops`."""
        spec = self.specs[hops]
        return estimate.row_bytes(self._shapes(hops), spec.dtype, spec.encoding)

    def _boundary_spec(self, hops: tuple[tuple[str, ...], ...]) -> BoundarySpec:
        settings, training = self.regime.snapshots, self.regime.training
        return BoundarySpec(
            hops=hops,
            precision=training.precision,
            dtype=self._dtype(),
            group_rows=self.regime.group_rows,
            shard_bytes=settings.shard_bytes,
            channels_last=training.channels_last,
            encoding=settings.encoding,
        )

    def _figures(self, index: int) -> policy.Boundary:
        hops = self.boundaries[index]
        rows, views = self.graph.rows, self.views[hops]
        stored_rows = views * rows.train + rows.validation
        prefix = estimate.prefix_flops(self.outline, [block for hop in hops for block in hop])
        passes = self._passes(hops)
        set_bytes = stored_rows * self._row_bytes(hops)
        if self.costs.basis == "measured":
            costs = self._boundary_costs(index)
            return policy.Boundary(
                label=hops[-1][-1],
                set_bytes=set_bytes,
                make_from_images=costs.make_from_start,
                make_from_previous=costs.make_from_previous,
                recompute=costs.recompute,
                read=costs.read,
                in_seconds=True,
            )
        return policy.Boundary(
            label=hops[-1][-1],
            set_bytes=set_bytes,
            make_from_images=stored_rows * prefix,
            make_from_previous=stored_rows * (estimate.prefix_flops(self.outline, hops[-1]) if index else prefix),
            recompute=passes * (rows.train + rows.validation) * prefix,
        )

    def _passes(self, hops: tuple[tuple[str, ...], ...]) -> int:
        """Epochs of all stages that start from this boundary."""
        rows = self.graph.rows.train
        return sum(
            estimate.epochs_to_run(self.training[stage.name], rows) for stage in self.stages if stage.hops == hops
        )

    def _boundary_costs(self, index: int) -> BoundaryCosts:
        hops = self.boundaries[index]
        return boundary_costs(self.costs, hops, self.graph.rows, views=self.views[hops], passes=self._passes(hops))

    def _prediction(self, index: int, stage_ids: Sequence[str]) -> Prediction:
        """What was decided for one boundary, in seconds."""
        hops = self.boundaries[index]
        costs, decision = self._boundary_costs(index), self.decisions[hops]
        rolled = index > 0 and self.decisions[self.boundaries[index - 1]].source == "snapshots"
        figures = self._figures(index)
        return Prediction(
            label=hops[-1][-1],
            source=decision.source,
            reason=decision.reason,
            basis=self.costs.basis,
            bytes=figures.set_bytes,
            make_seconds=costs.make_from_previous if rolled else costs.make_from_start,
            read_seconds=costs.read,
            recompute_seconds=costs.recompute,
            sets=tuple(node for (at, _, _), node in self.sets.items() if at == index),
            stages=tuple(node for stage, node in zip(self.stages, stage_ids, strict=True) if stage.hops == hops),
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
        rows, rates = self.graph.rows, self.rates
        if not stage.hops:
            image = self.outline.boundaries[0]
            predicted = estimate.train_estimate(
                parts,
                trained,
                train,
                rows=rows,
                rates=rates,
                input_elements=estimate.elements(image),
                input_item_bytes=4,
            )
            return self._language_memory(predicted, parts, trained, train)
        spec = self.specs[stage.hops]
        prefix = [self.outline.part(block) for hop in stage.hops for block in hop]
        if decision.source != "recompute":
            prefix = []
        stored = estimate.ITEM_BYTES[spec.dtype]
        predicted = estimate.train_estimate(
            parts,
            trained,
            train,
            rows=rows,
            rates=rates,
            input_elements=estimate.elements(self._shapes(stage.hops)),
            input_item_bytes=stored,
            reads_snapshots=decision.source == "snapshots",
            prefix=prefix,
            group_rows=spec.group_rows,
        )
        return self._language_memory(
            predicted,
            parts,
            trained,
            train,
            prefix=prefix,
            group_rows=spec.group_rows,
            stored_item_bytes=stored,
        )

    def _language_memory(
        self,
        predicted: Estimate,
        parts: Sequence[PartOutline],
        trained: frozenset[str],
        train: TrainSpec,
        *,
        prefix: Sequence[PartOutline] = (),
        group_rows: int = 0,
        stored_item_bytes: int | None = None,
    ) -> Estimate:
        """A language model's parts say more of their memory than shapes do; images stay as predicted."""
        if self.graph.language is None:
            return predicted
        memory = language_memory.stage_memory(
            cast("Sequence[LMPartOutline]", parts),
            trained,
            train,
            master=self.master,
            prefix=cast("Sequence[LMPartOutline]", prefix),
            group_rows=group_rows,
            stored_item_bytes=stored_item_bytes,
            on_host=self.graph.on_host,
        )
        return estimate.with_memory(predicted, memory)

    def _frozen_estimate(self, parts: Sequence[PartOutline], batch_rows: int, **figures: Any) -> Estimate:
        """As `estimate.frozen_estimate`, with a language model's memory."""
        predicted = estimate.frozen_estimate(parts, batch_rows=batch_rows, rates=self.rates, **figures)
        if self.graph.language is None or not parts:
            return predicted
        peak = language_memory.frozen_bytes(
            cast("Sequence[LMPartOutline]", parts), batch_rows, master=self.master, precision=figures["precision"]
        )
        return dataclasses.replace(predicted, peak_bytes=peak)

    @property
    def master(self) -> str:
        """The type of the weights, which `auto` leaves to the checkpoint."""
        model = self.regime.model
        assert isinstance(model, CausalLMSpec)
        assert self.graph.language is not None
        return model.master if model.master != "auto" else str(self.graph.language.config["dtype"])


def _boundary_order(stages: Sequence[Stage]) -> list[tuple[tuple[str, ...], ...]]:
    """The distinct boundaries that stages read, from the images on. Each is the one before plus one hop."""
    return list(dict.fromkeys(stage.hops for stage in stages if stage.hops))
