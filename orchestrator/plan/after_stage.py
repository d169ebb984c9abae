"""Ask questions of the network after every stage: one row a question, each answered by a node of the plan.

A diagnosis after each stage is a task kind (`workers.specs.task_kinds`, `workers.tasks.execute`), a row here that adds
its node, and a section of the summary that shows its answers (`orchestrator.reports.sections`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from orchestrator.plan.regime_state import RegimeState
from orchestrator.regimes.stages import Stage
from workers.specs.as_json import to_json
from workers.specs.tasks import EvaluateTask

Question = Callable[[RegimeState, Stage], str | None]


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


#: Name -> what adds the node that answers it after a stage, None where the question does not arise. `assembled` and
#: `truncated` are fields of `RegimePlan`; what others find is in its `diagnoses`, under their names.
QUESTIONS: dict[str, Question] = {"assembled": _assembled, "truncated": _truncated}
