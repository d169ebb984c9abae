"""Ask questions of the network after every stage: one row a question, each answered by a node of the plan. Benchmarks
(`evaluation.judge`) are asked beside them, a node for each.

A diagnosis after each stage is a task kind (`workers.specs.task_kinds`, `workers.tasks.execute`), a row here that adds
its node, and a section of the summary that shows its answers (`orchestrator.reports.sections`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from cache_store.errors import ConfigError
from orchestrator.config.regimes import yardstick_of
from orchestrator.config.schema import Config, JudgeConfig
from orchestrator.costs.formulas import Estimate
from orchestrator.plan.regime_state import RegimeState
from orchestrator.regimes.stages import Stage
from orchestrator.units import human_bytes
from workers.judge.judges import JUDGES
from workers.specs.as_json import to_json
from workers.specs.tasks import MEASURED_BLOCK, MOST_FEATURES, BoundariesTask, EvaluateTask, JudgeTask, QuestionsTask

Question = Callable[[RegimeState, Stage], str | None]
#: What reading a benchmark's questions takes, with the harness.
QUESTIONS_S = 10.0
#: Estimating all measures of a boundary, of a sample, in seconds on one core.
ESTIMATING_S = 4e-4


def evaluate_node(
    state: RegimeState, label: str, split: Literal["validation", "test"], path: tuple[str, ...] | None = None
) -> str:
    """Add a node that scores the network as it is now. `path`: its parts in forward order; None: all of them."""
    config, training, rows = state.inputs.config, state.regime.training, state.inputs.rows.of(split)
    path = path or (*state.blocks, "head")
    task = EvaluateTask(
        experiment=state.experiment,
        path=path,
        split=split,
        batch_size=config.evaluation_batch,
        precision=training.precision,
        channels_last=training.channels_last,
        tied=state.tied or None,
        frozen=state.frozen_beside,
    )
    parents = {"data": state.data_node} | {f"weights/{part}": state.weights[part] for part in path}
    parts = [state.outline.part(part) for part in path]
    predicted = state.estimator.frozen(
        state.outline.held_together(parts) if state.tied else parts,
        min(config.evaluation_batch, rows),
        rows=rows,
        precision=training.precision,
        load_row_seconds=state.estimator.load.evaluate,
    )
    return state.add("evaluate", label, to_json(task), parents, predicted)


def judge_nodes(
    state: RegimeState, label: str, *, untouched: bool = False, before: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Add, for every benchmark that is asked for, a node that judges the network as it is now: all of its parts, as
    `evaluate_node` scores it. `untouched`: it is the model as it came; `before`: the nodes after the
    stage before, where the run's exit may leave the network as it was. Benchmark -> node; {} where none is asked."""
    earlier = {task: {} if task not in before else {"before": before[task]} for task in state.inputs.questions}
    return {task: _judge_node(state, task, label, untouched, earlier[task]) for task in earlier}


def _judge_node(state: RegimeState, benchmark: str, label: str, untouched: bool, earlier: Mapping[str, str]) -> str:
    judge, asked = _asking(state), state.inputs.questions[benchmark]
    row, path = JUDGES[benchmark], (*state.blocks, "head")
    task = JudgeTask(
        experiment=state.experiment,
        benchmark=benchmark,
        batch_size=judge.batch_size,
        dtype=judge.dtype,
        limit=judge.limit,
        **{name: getattr(judge, name) for name in sorted(row.uses)},
        allow_code_execution=judge.allow_code_execution,
        allow_unisolated=judge.allow_unisolated,
        libraries=asked.libraries,
    )
    parents = {"questions": _questions_node(state, benchmark, untouched), "model": state.model_node}
    parents |= {f"weights/{part}": state.weights[part] for part in path} | dict(earlier)
    return state.add("judge", f"{benchmark} {label}", to_json(task), parents, _judging(state, asked.tokens))


def _questions_node(state: RegimeState, benchmark: str, untouched: bool) -> str:
    """Add the node that keeps a benchmark's questions. What trains on questions of its own is compared with them as
    soon as its data are prepared, long before anything is judged."""
    config, judge, asked = state.inputs.config, _asking(state), state.inputs.questions[benchmark]
    task = QuestionsTask(
        benchmark=benchmark,
        fingerprint=asked.fingerprint,
        path=judge.data,
        limit=judge.limit,
        subjects=judge.subjects if "subjects" in JUDGES[benchmark].uses else None,
        allow_code_execution=judge.allow_code_execution,
        allow_unisolated=judge.allow_unisolated,
        allow_contaminated=judge.allow_contaminated,
    )
    parents = {"model": state.model_node}
    if not untouched and config.domain.export_reads_data(config.data):
        parents["data"] = state.data_node
    return state.add("questions", f"questions of {benchmark}", to_json(task), parents, Estimate(seconds=QUESTIONS_S))


def _asking(state: RegimeState) -> JudgeConfig:
    judge = state.inputs.config.evaluation.judge
    if judge is None:
        raise ValueError("a plan with questions for a configuration that asks none")
    return judge


def _judging(state: RegimeState, tokens: int) -> Estimate:
    """Predict so many tokens going once through the whole network, as samples of the run's own length. ConfigError
    where it does not fit the device, wherever the run itself keeps its weights."""
    config, parts = state.inputs.config, [state.outline.part(part) for part in (*state.blocks, "head")]
    length, *_ = config.domain.sample(config.data, state.inputs.data)
    rows = max(1, tokens // length)
    predicted = dataclasses.replace(state.estimator, frozen_beside=None).frozen(
        state.outline.held_together(parts) if state.tied else parts,
        min(rows, _asking(state).batch_size),
        rows=rows,
        precision=state.regime.training.precision,
        load_row_seconds=0.0,
    )
    usable = state.inputs.speeds.device_bytes
    if usable is not None and predicted.peak_bytes > usable and not state.inputs.on_host:
        raise ConfigError(
            f"a benchmark is asked of the whole network on the device: about {human_bytes(predicted.peak_bytes)}, and "
            f"it has {human_bytes(usable)} for tensors; allowed: a smaller evaluation.judge.batch_size, or null and "
            "segprop judge on the exported folders, on a larger device or with --device cpu",
            where="evaluation.judge",
        )
    return predicted


def _assembled(state: RegimeState, stage: Stage) -> str | None:
    """Score the whole chain."""
    if not state.inputs.config.evaluation.stages:
        return None
    return evaluate_node(state, f"assembled after {stage.name}", "validation")


def _truncated(state: RegimeState, stage: Stage) -> str | None:
    """Score the chain as far as it is trained, with the global head: not where a stage's own path says it already,
    where parts of different shapes do not fit together (ResNets), or where training begins at the head."""
    regime = state.regime
    if not state.inputs.config.evaluation.stages or not regime.traits.alike_layers or not regime.row.has_base:
        return None
    end = sum(len(hop) for hop in stage.hops)
    end += sum(part in state.training_blocks[end : state.head_start] for part in stage.trained)
    if not stage.hops:
        end = regime.cut(state.blocks).first_piece
    if regime.split.intermediate == "omit" or regime.split.order == "top_down" or end >= state.head_start:
        return None
    shorter = (*state.training_blocks[:end], *state.training_blocks[state.head_start :], "head")
    return evaluate_node(state, f"truncated after {stage.name}", "validation", shorter)


def _boundaries(state: RegimeState, stage: Stage) -> str | None:
    """Measure the boundaries that are not what they were when they were measured last."""
    asked = state.inputs.config.evaluation.boundaries
    last = stage.name == state.stages[-1].name
    if asked is None or (asked.of == "final" and not last):
        return None
    before = [
        tuple(state.weights[block] for block in state.blocks[:depth]) for depth in range(1, len(state.blocks) + 1)
    ]
    new = [depth for depth, nodes in enumerate(before, 1) if nodes not in state.measured]
    if not new:
        return None
    state.measured |= set(before)
    path = state.blocks[: new[-1]]
    # The nearest boundary that some stage reads: after a stage, the next one's.
    near = [hops for hops in state.boundaries.order if hops in state.stored and sum(map(len, hops)) <= new[0]]
    collected, training = state.collected, state.regime.training
    keeps = last and "cka" in asked.measures and state.regime.name == reference_of(state.inputs.config)
    task = BoundariesTask(
        experiment=state.experiment,
        path=path,
        boundaries=tuple(state.blocks[depth - 1] for depth in new),
        measures=asked.measures,
        samples=asked.samples,
        batch_size=state.inputs.config.evaluation_batch,
        precision=training.precision,
        channels_last=training.channels_last,
        stored=state.boundaries.specs[near[-1]] if near else None,
        keeps=keeps or None,
        frozen=state.frozen_beside,
        bandwidth=asked.bandwidth if "nhsic" in asked.measures and asked.bandwidth != "fixed" else None,
    )
    parents = {"data": state.data_node} | {f"weights/{block}": state.weights[block] for block in path}
    if "cka" in asked.measures and collected.reference is not None:
        parents["reference"] = collected.reference
    node = state.add("boundaries", f"boundaries after {stage.name}", to_json(task), parents, _measuring(state, task))
    if keeps:
        collected.reference = node
    return node


def reference_of(config: Config) -> str | None:
    """Name the regime whose boundaries the others' are compared with, where they are: the yardstick, if it is trained
    as a whole."""
    asked, name = config.evaluation.boundaries, yardstick_of(config)
    if asked is None or "cka" not in asked.measures or name is None:
        return None
    return name if config.regime(name).row.baseline else None


def _measuring(state: RegimeState, task: BoundariesTask) -> Estimate:
    """Predict the samples going through the blocks that are not read from snapshots, and the estimates."""
    splits = ("train", "validation") if "probe" in task.measures else ("train",)
    rows = {split: min(task.samples, state.inputs.rows.of(split)) for split in splits}
    predicted = state.estimator.frozen(
        [state.outline.part(block) for block in task.path],
        min(task.batch_size, rows["train"]),
        rows=sum(rows.values()),
        precision=task.precision,
        load_row_seconds=state.estimator.load.train,
    )
    # Features of all boundaries lie on the host; of one at a time on the device, with two kernels of every block.
    features = 4 * MOST_FEATURES
    estimating = rows["train"] * (3 * features + 2 * 8 * MEASURED_BLOCK)
    held = (len(task.boundaries) + 1) * features * sum(rows.values()) if state.inputs.on_host else 0
    return dataclasses.replace(
        predicted,
        seconds=predicted.seconds + len(task.boundaries) * rows["train"] * ESTIMATING_S,
        peak_bytes=predicted.peak_bytes + held + estimating,
    )


#: Name -> what adds the node that answers it after a stage, None where the question does not arise. `assembled` and
#: `truncated` are fields of `RegimePlan`; what others find is in its `diagnoses`, under their names.
QUESTIONS: dict[str, Question] = {"assembled": _assembled, "truncated": _truncated, "boundaries": _boundaries}
