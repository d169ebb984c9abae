"""Put the tasks of a run into the order in which people follow them: for each regime its stages, and before each stage
the snapshot sets that it is the first to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.execution.beat import RunningTask
from orchestrator.execution.run_record import RunRecord
from orchestrator.plan.graph import Plan
from orchestrator.progress import completed, describe
from orchestrator.reports.commit_view import CommitFigures
from orchestrator.runs.dry_run import boundary_of, with_previous
from orchestrator.status.observe import DONE, RegimeStatus, StageStatus
from orchestrator.ui.records import FAILED, RELEASED, REUSED, RUNNING, STOPPED, STORED, WAITING, Part
from orchestrator.units import bytes_text, rate_text, score_text, seconds_text
from workers.control import Update


@dataclass(frozen=True)
class Moment:
    """What is known of a run's nodes at one look. `own`: those that this run committed by its log, None where it has
    none; `sets`: the snapshot sets in the store."""

    record: RunRecord
    plan: Plan | None
    figures: Callable[[str], CommitFigures | None]
    running: Mapping[str, RunningTask]
    failed: Mapping[str, str]
    own: frozenset[str] | None
    sets: frozenset[str]

    def state(self, node_id: str) -> str:
        """Return the state of a node that is no stage."""
        if self.figures(node_id) is not None:
            return self.stored(node_id)
        return FAILED if node_id in self.failed else RUNNING if node_id in self.running else WAITING

    def stored(self, node_id: str) -> str:
        """Tell of a committed node whether this run made it, or found it in the store."""
        return STORED if self.own is None or node_id in self.own else REUSED

    def gone(self, node_id: str) -> bool:
        """Tell whether a node's snapshot set was deleted after its last use."""
        figures = self.figures(node_id)
        return figures is not None and figures.set is not None and figures.set not in self.sets


def preparation(moment: Moment) -> tuple[Part, ...]:
    """Return what all regimes start from: the data, and the weights as they came."""
    if moment.plan is None:
        return ()
    roots = [node for node in moment.plan.nodes if not node.parents]
    return tuple(_group(moment, node.label, (node.id,)) for node in roots)


def regime_parts(moment: Moment, name: str, status: RegimeStatus) -> tuple[Part, ...]:
    """Return the parts of a regime in order, its scores last."""
    regime = moment.record.regimes[name]
    parts: list[Part] = []
    shown: set[str] = set()
    for node_id, stage in zip(regime.stages, status.stages, strict=True):
        parts += [_group(moment, label, nodes) for label, nodes in _fresh_sets(moment, name, node_id, shown)]
        parts.append(_stage(moment, node_id, stage))
    scores = dict.fromkeys((*regime.assembled.values(), regime.validation, regime.test))
    return (*parts, _group(moment, "scores", tuple(scores)))


def _fresh_sets(moment: Moment, name: str, stage: str, shown: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the sets that a stage is the first to read, a boundary at a time."""
    plan = moment.plan
    if plan is None or name not in plan.regimes:
        return
    read = plan.regimes[name].reads.get(stage, ())
    fresh = [plan.node(set_id) for set_id in with_previous(plan, read) if set_id not in shown]
    shown.update(node.id for node in fresh)
    for boundary in dict.fromkeys(boundary_of(node) for node in fresh):
        yield (
            f"snapshots after {boundary[-1][-1]}",
            tuple(node.id for node in fresh if boundary_of(node) == boundary),
        )


def _group(moment: Moment, label: str, nodes: Sequence[str]) -> Part:
    states = [moment.state(node_id) for node_id in nodes]
    done = sum(state in (STORED, REUSED) for state in states)
    running = [moment.running[node_id].progress for node_id in nodes if node_id in moment.running]
    reasons = [moment.failed[node_id] for node_id in nodes if node_id in moment.failed]
    known = [figures for node_id in nodes if (figures := moment.figures(node_id)) is not None]
    stored = sum(each.bytes or 0 for each in known)
    share = None
    if running:
        share = (done + sum(completed(update) or 0.0 for update in running)) / len(nodes)
    return Part(
        label=label,
        stage=False,
        state=_together(states, released=done == len(nodes) and all(map(moment.gone, nodes))),
        done=done,
        total=len(nodes),
        share=share,
        words=reasons[0] if reasons else "; ".join(describe(update) for update in running[:1]),
        facts=(("size", bytes_text(stored)),) if stored else (),
    )


def _together(states: Sequence[str], *, released: bool) -> str:
    """Return the state of several nodes as one."""
    if released:
        return RELEASED
    for state in (FAILED, RUNNING):
        if state in states:
            return state
    if all(state == REUSED for state in states):
        return REUSED
    return STORED if all(state in (STORED, REUSED) for state in states) else WAITING


#: State of a stage as `segprop status` has it, where the page does not know better.
_STAGE_STATES = {RUNNING: RUNNING, FAILED: FAILED, STOPPED: STOPPED}


def _stage(moment: Moment, node_id: str, stage: StageStatus) -> Part:
    done = stage.state == DONE
    task = moment.running.get(node_id)
    words = stage.reason or ("" if task is None else describe(_place(task.progress)))
    return Part(
        label=stage.name,
        stage=True,
        state=moment.stored(node_id) if done else _STAGE_STATES.get(stage.state, WAITING),
        done=int(done),
        total=1,
        share=None if task is None else completed(task.progress),
        words=words,
        facts=tuple(_facts(stage)),
    )


def _place(update: Update) -> Update:
    """Return where a stage is, without the figures that stand below it."""
    return Update(phase=update.phase, epoch=update.epoch, epochs=update.epochs, step=update.step, steps=update.steps)


def _facts(stage: StageStatus) -> Iterator[tuple[str, str]]:
    if stage.epochs or stage.epochs_planned:
        yield "epochs", str(stage.epochs) + (f" of {stage.epochs_planned}" if stage.epochs_planned else "")
    for name, metrics in (("validation", stage.metrics), ("whole chain", stage.assembled)):
        if score_text(metrics):
            yield name, score_text(metrics, named=True)
    if stage.loss is not None:
        yield "loss", f"{stage.loss:.4f}"
    if stage.rate is not None:
        yield "rate", f"{rate_text(stage.rate)}/s"
    if stage.state == DONE and stage.seconds is not None:
        yield "time", seconds_text(stage.seconds)
    if stage.seconds_left is not None:
        yield "left", seconds_text(stage.seconds_left)
    if stage.attempts > 1:
        yield "attempts", str(stage.attempts)
    if stage.machine and stage.state != DONE:
        yield "machine", stage.machine
