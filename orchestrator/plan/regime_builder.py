"""Add the nodes of one regime to a plan: data, initial weights, stages or rounds of them, scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from cache_store.errors import ConfigError
from orchestrator.config.rates import Rates
from orchestrator.config.rules.memory import goes_together
from orchestrator.costs import formulas
from orchestrator.costs.boundary_costs import Costs, alike_blocks
from orchestrator.costs.estimator import Trained
from orchestrator.costs.fit import evened, largest_micro
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.tiers import Limits, Option, cheapest, smallest, ways
from orchestrator.plan.after_stage import QUESTIONS, evaluate_node, judge_nodes
from orchestrator.plan.experiment import data_task, model_task
from orchestrator.plan.graph import RegimePlan
from orchestrator.plan.regime_state import Collected, Ended, PlanInputs, RegimeState
from orchestrator.plan.snapshot_nodes import SnapshotNodes
from orchestrator.regimes import wavefront
from orchestrator.regimes.blocks import turns_words
from orchestrator.regimes.stages import Stage
from orchestrator.units import human_bytes
from workers.specs.as_json import to_json
from workers.specs.experiment import TrainSpec
from workers.specs.memory import ON_DEVICE, MemorySpec
from workers.specs.tasks import AverageTask, BoundarySpec, EpochTestSpec, MeasureTask, RoundSpec, StageTask

if TYPE_CHECKING:
    from orchestrator.config.schema import Regime
    from workers.models.outline import ChainOutline

#: What measuring a chain takes, on whatever it runs: its figures each have a time of their own.
MEASURE_SECONDS = 10.0


def add_regime(inputs: PlanInputs, collected: Collected, regime: Regime, outline: ChainOutline) -> RegimePlan:
    """Add the nodes and targets of one regime; return where its outcome is found."""
    state = RegimeState(inputs, collected, regime, outline)
    state.data_node = _data_node(state)
    model = state.model_node = _model_node(state)
    state.weights = dict.fromkeys((*state.blocks, "head"), model)
    _settle_costs(state)
    regime_plan = RegimeBuilder(state).build()
    # What an export copies beside trained weights is made again where it was lost, though every stage has its commit.
    collected.targets[model] = None
    if inputs.config.domain.export_reads_data(inputs.config.data):
        collected.targets[state.data_node] = None
    return regime_plan


class RegimeBuilder:
    """Adds stages and scores. The state has its data node, the initial weights, and settled costs."""

    def __init__(self, state: RegimeState) -> None:
        self._state = state
        self._ended = Ended()
        self._snapshots = SnapshotNodes(state)

    def build(self) -> RegimePlan:
        state, ended, regime = self._state, self._ended, self._state.regime
        self._score_original()
        if state.wave:
            self._wavefront()
        else:
            self._sequential()
        validation = evaluate_node(state, "final validation", "validation")
        test = evaluate_node(state, "final test", "test")
        answers = [node for question in QUESTIONS for node in ended.answered(question).values()]
        judged = [node for nodes in ended.judged.values() for node in nodes.values()]
        state.collected.targets.update(dict.fromkeys((*ended.stages, *answers, validation, test, *judged)))
        return RegimePlan(
            name=regime.name,
            kind=regime.kind,
            variant=regime.variant,
            stages=tuple(ended.stages),
            weights=dict(state.weights),
            assembled=ended.answered("assembled"),
            truncated=ended.answered("truncated"),
            layers=ended.layers,
            validation=validation,
            test=test,
            decisions=ended.decisions,
            reads=ended.reads,
            peak_snapshot_bytes=self._snapshots.peak_bytes,
            retention=regime.snapshots.retention,
            production=regime.snapshots.production,
            boundaries=self._snapshots.predictions(ended),
            rounds=ended.rounds,
            averages=tuple(ended.averages),
            views={node: ended.views[node] for node in ended.stages if node in ended.views},
            run_exit={}
            if state.gate_spec is None
            else {key: value for key, value in to_json(state.gate_spec).items() if value is not None},
            width=sum(stage.group != wavefront.FINAL for stage in state.stages[: regime.wavefront.rounds])
            if state.wave
            else 1,
            notes=tuple(self._notes()),
            diagnoses={name: found for name, found in ended.answers.items() if name not in ("assembled", "truncated")},
            judged=ended.judged,
        )

    def _notes(self) -> Iterator[str]:
        """Yield what a user should know of the stages, in sentences."""
        state = self._state
        if state.ties.note is not None:
            yield state.ties.note
        for stage in state.stages:
            schedule = state.regime.schedule(stage, tied=state.tied_in(stage))
            if schedule is None:
                continue
            steps = formulas.steps_to_run(state.training[stage.name], state.inputs.rows.train)
            yield turns_words(schedule, steps)

    def _score_original(self) -> None:
        """Score a pretrained language model as it came, once for all regimes."""
        inputs, collected = self._state.inputs, self._state.collected
        if not self._state.regime.traits.scores_original or inputs.weights_digest is None or collected.original:
            return
        splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
        for split in splits:
            collected.original[split] = evaluate_node(self._state, f"original {split}", split)
        judge = inputs.config.evaluation.judge
        if judge is not None and "original" in judge.of:
            collected.judged |= judge_nodes(self._state, "of the original", untouched=True)
        collected.targets.update(dict.fromkeys((*collected.original.values(), *collected.judged.values())))

    def _sequential(self) -> None:
        """Add one stage after the other."""
        state = self._state
        for stage in state.stages:
            previous = self._ended.stages[-1] if self._ended.stages else None
            node = self._stage_node(stage, previous)
            state.weights.update(dict.fromkeys(stage.trained, node))
            self._end(stage, node)
            if state.gate_spec is not None:
                state.gate = self._ended.answers["assembled"][node]

    def _wavefront(self) -> None:
        """Add rounds of all stages, side by side."""
        state = self._state
        initial = dict(state.weights)
        made: dict[str, str] = {}

        def held(weights: Mapping[str, str]) -> dict[str, str]:
            return initial | {part: made[key] for part, key in weights.items()}

        for step in state.wave:
            match step:
                case wavefront.Round():
                    state.weights, state.version = held(step.weights), step.index
                    made[step.key] = self._stage_node(
                        step.stage,
                        None if step.previous is None else made[step.previous],
                        step=step,
                        before=None if step.continues is None else made[step.continues],
                    )
                case wavefront.Average():
                    made[step.key] = self._average_node(step, [made[key] for key in step.replicas])
                    self._ended.averages.append(made[step.key])
                case wavefront.StageEnd():
                    state.weights = held(step.weights)
                    *earlier, last = [made[key] for key in step.rounds]
                    self._ended.rounds[last] = tuple(earlier)
                    self._end(step.stage, last)

    def _end(self, stage: Stage, node: str) -> None:
        """Note that a stage is over with this train node, and ask what is asked of the network as it is then."""
        state, ended = self._state, self._ended
        state.tied = state.tied_in(stage)
        ended.stages.append(node)
        if state.regime.traits.alike_layers and not state.regime.row.whole:
            ended.layers[node] = self._last_layer(stage)
        for name, ask in QUESTIONS.items():
            answer = ask(state, stage)
            if answer is not None:
                ended.answers.setdefault(name, {})[node] = answer
        judge = state.inputs.config.evaluation.judge
        if judge is not None and (
            "stages" in judge.of or ("final" in judge.of and stage.name == state.stages[-1].name)
        ):
            before = {task: next(reversed(nodes.values())) for task, nodes in ended.judged.items()}
            before = before if state.gate_spec is not None else {}
            for benchmark, answer in judge_nodes(state, f"after {stage.name}", before=before).items():
                ended.judged.setdefault(benchmark, {})[node] = answer

    def _stage_node(
        self,
        stage: Stage,
        previous: str | None,
        *,
        step: wavefront.Round | None = None,
        before: str | None = None,
    ) -> str:
        """Add a whole stage, or the round of it that `step` is; `before`: the node that it continues."""
        state = self._state
        train = state.training[stage.name]
        epochs = None if step is None else step.epochs
        if epochs is not None:
            train = dataclasses.replace(train, commit="last")  # what goes on is where the last round stopped
        parents = {"data": state.data_node, **self._weights_read(stage)}
        boundary = state.boundaries.specs[stage.hops] if stage.hops else None
        decision, sets = self._snapshots.decision(stage), dict[str, str]()
        train, memory = settled(state, stage, train, decision.source)
        if decision.source == "snapshots":
            sets = self._snapshots.read(stage, epochs)
            parents |= sets
        if before is not None:
            parents["continue"] = before
        if train.head_optimizer == "carry" and previous is not None and state.regime.row.has_base:
            parents["optimizer"] = previous
        task = StageTask(
            experiment=state.experiment_of_stage(stage, decision.source),
            name=stage.name,
            path=stage.path,
            trained=stage.trained,
            train=train,
            source=decision.source,
            boundary=boundary,
            window=self._window(stage),
            round=None if epochs is None else RoundSpec(first=epochs[0], end=epochs[1]),
            gate=None if state.gate is None else state.gate_spec,
            test=self._epoch_test(),
            tied=state.tied_in(stage) or None,
            memory=None if memory == ON_DEVICE else memory,
            schedule=state.regime.schedule(stage, tied=state.tied_in(stage)),
        )
        parents |= state.gate_parent()
        part = train if epochs is None else dataclasses.replace(train, epochs=epochs[1] - epochs[0])
        how = Trained(part, memory, state.tied_in(stage))
        predicted = state.estimator.stage(stage, how, boundary, decision.source)
        if task.test is not None:
            parents |= {f"weights/{part}": state.weights[part] for part in task.test.path}
            predicted = state.with_tests(predicted, formulas.epochs_to_run(part, state.inputs.rows.train))
        label = stage.name if epochs is None or step is None else f"{stage.name} round {step.index + 1}"
        node = state.add("train", label, to_json(task), parents, predicted)
        self._ended.decisions[node], self._ended.reads[node] = decision, tuple(sets.values())
        seen = state.views_seen(stage, decision.source)
        if seen is not None:
            self._ended.views[node] = seen
        return node

    def _weights_read(self, stage: Stage) -> dict[str, str]:
        """Role -> node, in the order of the path with the prefix first: what a stage loads, as one reads the chain."""
        hop_parts = [block for hop in stage.hops for block in hop]
        parts = [part for part in stage.path if part not in ("adapter", "aux")]
        if "aux" in stage.path and self._state.regime.traits.copies_head:
            parts.append("head")  # a language model's local head starts as a copy of its own
        return {f"weights/{part}": self._state.weights[part] for part in (*hop_parts, *parts)}

    def _epoch_test(self) -> EpochTestSpec | None:
        config = self._state.inputs.config
        if config.evaluation.every is None:
            return None
        return EpochTestSpec(path=(*self._state.blocks, "head"), batch_size=config.evaluation_batch)

    def _average_node(self, step: wavefront.Average, replicas: Sequence[str]) -> str:
        state = self._state
        task = to_json(AverageTask(experiment=state.experiment, parts=step.parts))
        parents = {f"replica/{number}": node for number, node in enumerate(replicas)}
        parameters = sum(state.outline.part(part).parameters for part in step.parts)
        predicted = formulas.average_estimate(parameters, len(replicas))
        return state.add("average", f"average round {step.time + 1}", task, parents, predicted)

    def _window(self, stage: Stage) -> int | None:
        """Also where the boundary is computed again for every batch: the order does not depend on what is stored."""
        settings = self._state.regime.snapshots
        return settings.window if stage.hops and settings.shuffle == "window" else None

    def _last_layer(self, stage: Stage) -> int | Literal["head"]:
        state = self._state
        if stage.group == "head":
            return "head"
        stem = state.regime.traits.stem
        end = state.head_start if state.regime.row.has_base else len(state.training_blocks)
        numbers = [
            state.blocks.index(block) - stem
            for block in (*(block for hop in stage.hops for block in hop), *stage.trained)
            if block in state.training_blocks[stem:end]
        ]
        return max(numbers, default=-1)


# -- what stages leave to the plan ----------------------------------------------------------------------------


def settled(state: RegimeState, stage: Stage, train: TrainSpec, source: str) -> tuple[TrainSpec, MemorySpec]:
    """Return the settings of a stage with everything that is `auto` in them settled. ConfigError where `memory` has an
    `auto` and nothing that it may mean fits."""
    return _Settling(state, stage, train, source).settled()


@dataclasses.dataclass(frozen=True)
class _Settling:
    state: RegimeState
    stage: Stage
    train: TrainSpec
    source: str

    def settled(self) -> tuple[TrainSpec, MemorySpec]:
        asked = self.state.regime.stage_memory(self.stage)
        usable = self.state.inputs.speeds.device_bytes
        if not asked.open or usable is None:
            return self._with_micro(asked), asked
        limits = Limits(usable, self.state.inputs.speeds.host_bytes)
        options = tuple(self._options(asked))
        found = cheapest(options, limits)
        if found is None:
            raise self._nothing_fits(smallest(options, limits), limits)
        return found.train, found.memory

    def _options(self, asked: MemorySpec) -> Iterator[Option]:
        config, regime = self.state.inputs.config, self.state.regime
        for memory in ways(asked):
            if goes_together(config, regime, self.train, memory):
                train = self._with_micro(memory)
                yield Option(memory, train, self.state.estimator.stage(*self._asked(train, memory)))

    def _with_micro(self, memory: MemorySpec) -> TrainSpec:
        """The settings with `micro_batch: auto` as a number: the largest with which the stage fits the device, or 1
        where none does. Micro-batches of a step are as equal as can be."""
        usable, train = self.state.inputs.speeds.device_bytes, self.train
        if train.micro_batch != "auto" or usable is None:
            return train

        def predicted(size: int) -> Estimate:
            own = dataclasses.replace(train, micro_batch=size)
            return self.state.estimator.stage(*self._asked(own, memory))

        # A rank of a gang takes its part of a step.
        batch = -(-train.batch_size // (predicted(1).ranks or 1))
        size, _ = largest_micro(lambda size: predicted(size).peak_bytes, usable, 1, batch) or (1, 0)
        return dataclasses.replace(train, micro_batch=evened(size, batch))

    def _asked(self, train: TrainSpec, memory: MemorySpec) -> tuple[Stage, Trained, BoundarySpec | None, str]:
        """What the estimator wants to know."""
        state, stage = self.state, self.stage
        boundary = state.boundaries.specs[stage.hops] if stage.hops else None
        return stage, Trained(train, memory, state.tied_in(stage)), boundary, self.source

    def _nothing_fits(self, least: Option | None, limits: Limits) -> ConfigError:
        name = f"auto: {self.state.regime.name}/{self.stage.name}"
        if least is None:
            return ConfigError(f"{name}: nothing that it may mean goes with its other settings", where="memory")
        taken = least.predicted.peak_bytes
        needs = f"{human_bytes(taken)} of the device, which has {human_bytes(limits.device)} for tensors"
        if taken <= limits.device and limits.host is not None:
            needs = (
                f"{human_bytes(least.host_bytes)} of the host's memory, of which it may take {human_bytes(limits.host)}"
            )
        more = "" if self.train.micro_batch == "auto" else ", or set training.micro_batch: auto"
        return ConfigError(
            f"{name} needs at least {needs} ({least.words}); train less at once (split.base_segment_size, split.base)"
            f"{more}; segprop plan --device CARD without memory: auto searches further",
            where="memory",
            peak_bytes=taken,
            device_bytes=limits.device,
            host_bytes=least.host_bytes,
        )


# -- before the stages ----------------------------------------------------------------------------------------


def _data_node(state: RegimeState) -> str:
    rows = state.inputs.rows
    task = data_task(state.inputs.config, state.inputs.data, state.inputs.found)
    every = rows.train + rows.validation + rows.test
    return state.add("data", "data", to_json(task), {}, formulas.data_estimate(every))


def _model_node(state: RegimeState) -> str:
    inputs = state.inputs
    task = model_task(inputs.config, state.regime, inputs.data, inputs.found, inputs.weights_digest)
    parts = [*state.outline.blocks, state.outline.head]
    parameters = sum(part.parameters for part in (state.outline.held_together(parts) if state.tied else parts))
    return state.add("model", "model", to_json(task), {}, formulas.model_estimate(parameters))


def _settle_costs(state: RegimeState) -> None:
    """Take measured costs instead of nominal ones, where the configuration asks for them and they are known."""
    if state.regime.snapshots.costs != "measured" or not state.boundaries.order:
        return
    node = _measure_node(state)
    state.collected.targets[node] = None
    if node not in state.inputs.figures:
        state.collected.unmeasured[node] = None
        return
    state.costs = Costs.measured(state.inputs.figures[node], state.outline)
    nominal = state.inputs.rates
    rates = Rates.measured(state.costs.flops_per_s(state.outline) / 1e9, nominal.threads, nominal.loads_ahead)
    # Measured beside as many threads as a stage has, where `load` is what one core takes.
    load = dataclasses.replace(state.estimator.load, train=state.costs.load_batch * nominal.threads)
    state.estimator = dataclasses.replace(state.estimator, rates=rates, load=load)


def _measure_node(state: RegimeState) -> str:
    spec, training = state.boundaries.specs[state.boundaries.order[-1]], state.regime.training
    # All of the chain, so that regimes with other boundaries share the node.
    wanted = set(alike_blocks(state.outline).values())
    blocks = tuple((block, index) for index, block in enumerate(state.blocks) if block in wanted)
    task = MeasureTask(
        experiment=state.experiment,
        blocks=blocks,
        precision=spec.precision,
        dtype=spec.dtype,
        encoding=spec.encoding,
        channels_last=spec.channels_last,
        group_rows=spec.group_rows,
        batch_rows=min(training.micro, spec.group_rows) if training.micro_batch == "auto" else training.micro,
        shard_bytes=spec.shard_bytes,
    )
    parents = {"data": state.data_node} | {f"weights/{block}": state.weights[block] for block, _ in blocks}
    return state.add("measure", "costs of snapshots", to_json(task), parents, Estimate(seconds=MEASURE_SECONDS))
