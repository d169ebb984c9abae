"""Write a finished run's results: summary, report, TensorBoard events, exported models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cache_store.errors import CorruptShard, UserError
from cache_store.records.nodes import Commit, NodeStore
from cache_store.storage.durable import read_regular, typed_errors, write_atomically
from cache_store.storage.open import existing_storage
from orchestrator.environment import describe_environment
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Outcome
from orchestrator.exports.card import Exported, card
from orchestrator.exports.lineage import trainings
from orchestrator.plan.graph import Plan
from orchestrator.reports.live_points import step_curves
from orchestrator.reports.page import write_report
from orchestrator.reports.records import Summary
from orchestrator.reports.summary import summarize, write_summary
from orchestrator.reports.tables.result_table import print_places, print_table
from orchestrator.runs.recorded import Recorded
from orchestrator.trackers.live import FILE as POINTS
from orchestrator.trackers.table import track
from workers.export import Trained
from workers.export import export as write_export
from workers.export import export_adapter as write_adapter
from workers.specs.as_json import from_json
from workers.specs.export_files import CARD, TRAINED_QUESTIONS
from workers.specs.tasks import ModelTask

#: Of exported models, in a run directory.
MODELS = "model"
#: Of networks as they were after a stage, in a run directory.
STAGES = "stages"
#: Of low-rank adapters by themselves: of finished regimes, and of regimes up to a stage.
ADAPTERS, ADAPTER_STAGES = "adapter", "adapter-stages"


def report(recorded: Recorded) -> None:
    """Write summary.json and report.html again from what the store holds."""
    ledger = CommitLog.read(existing_storage(recorded.store), recorded.plan)
    finished = all(target in ledger.commits for target in recorded.plan.targets)
    outcome = Outcome("done" if finished else "stopped", reused=set(ledger.commits))
    exports = {
        name: str(path.relative_to(recorded.run_dir))
        for name in recorded.plan.regimes
        if (path := _export_folder(recorded, name)).exists()
    }
    summary = write_results(recorded, ledger, outcome, exports)
    print_table(summary)
    print_places(recorded.run_dir, summary)


def export(recorded: Recorded, regimes: Sequence[str]) -> list[Path]:
    """Write the final weights of these regimes again, and return the folders. UserError when one of them is not
    finished."""
    ledger = CommitLog.read(existing_storage(recorded.store), recorded.plan)
    for name in regimes:
        _require_finished(recorded, name, ledger)
    summary = _summary(recorded, ledger, Outcome("done", reused=set(ledger.commits)), {})
    written = []
    for name, path in export_finished(recorded, ledger, regimes, anew=True).items():
        _write_card(recorded, summary, recorded.run_dir / path, name)
        print(recorded.run_dir / path)
        written.append(recorded.run_dir / path)
    return written


def export_stage(recorded: Recorded, regimes: Sequence[str], stage: str) -> list[Path]:
    """Write the whole networks as they were after a stage: its name, or its number in its regime, counted from 1; and
    return the folders.

    UserError when no regime has such a stage, or when it is not finished."""
    ledger = CommitLog.read(existing_storage(recorded.store), recorded.plan)
    summary = _summary(recorded, ledger, Outcome("done", reused=set(ledger.commits)), {})
    written = []
    for name, label, weights in _after_stage(recorded, regimes, stage, ledger):
        folder = recorded.run_dir / STAGES / name / label
        _write(recorded, name, _trained(recorded, name, weights, ledger), NodeStore(ledger.storage), folder)
        _write_card(recorded, summary, folder, name, label)
        print(folder)
        written.append(folder)
    return written


def export_adapters(recorded: Recorded, regimes: Sequence[str], stage: str | None) -> None:
    """Write the low-rank adapters of these regimes by themselves, of the whole training or up to a stage, and leave out
    regimes without any. UserError as `export` and `export_stage`, and where there are no adapters, or they do not say
    all that was trained."""
    ledger = CommitLog.read(existing_storage(recorded.store), recorded.plan)
    adapted = [name for name in regimes if _adapts(recorded.plan, name)]
    if not adapted:
        raise UserError(
            f"--adapter: {', '.join(regimes)}: no stage trained low-rank adapters (training.lora); leave --adapter out"
        )
    wanted: list[tuple[Path, str, str | None, Mapping[str, str]]] = []
    if stage is None:
        for name in adapted:
            _require_finished(recorded, name, ledger)
            wanted.append((recorded.run_dir / ADAPTERS / name, name, None, recorded.plan.regimes[name].weights))
    else:
        for name, label, held in _after_stage(recorded, adapted, stage, ledger):
            wanted.append((recorded.run_dir / ADAPTER_STAGES / name / label, name, label, held))
    summary = _summary(recorded, ledger, Outcome("done", reused=set(ledger.commits)), {})
    for folder, name, after, weights in wanted:
        _write_adapter(recorded, _trained(recorded, name, weights, ledger), weights, ledger, folder)
        _write_card(recorded, summary, folder, name, after, adapter=True)
        print(folder)


def _adapts(plan: Plan, regime: str) -> bool:
    return any(plan.node(node).task["train"]["lora"] is not None for node in plan.regimes[regime].stages)


def _write_adapter(
    recorded: Recorded, trained: Trained, weights: Mapping[str, str], ledger: CommitLog, folder: Path
) -> None:
    plan = recorded.plan
    lineage = {part: [ledger.commits[each] for each in trainings(plan, node, part)] for part, node in weights.items()}
    start = next(node for node in plan.nodes if node.initializes)
    base = from_json(ModelTask, start.task).model
    write_adapter(trained, lineage, base, NodeStore(ledger.storage), folder)


def _after_stage(
    recorded: Recorded, regimes: Sequence[str], stage: str, ledger: CommitLog
) -> list[tuple[str, str, dict[str, str]]]:
    """Find (regime, name of the stage, part -> node that holds it then). UserError as `export_stage`."""
    found = {name: node for name in regimes if (node := _stage_called(recorded.plan, name, stage)) is not None}
    if not found:
        known = "; ".join(f"{name}: {', '.join(_stage_names(recorded.plan, name))}" for name in regimes)
        raise UserError(f"--stage: {stage}: there is no such stage; there are {known}")
    after = []
    for name, node in found.items():
        weights, label = weights_after(recorded.plan, name, node), recorded.plan.node(node).task["name"]
        if any(needed not in ledger.commits for needed in (*weights.values(), *_beside(recorded))):
            raise UserError(f"{name}/{label}: not finished, there are no weights to export yet; run it first")
        after.append((name, label, weights))
    return after


def _stage_called(plan: Plan, regime: str, stage: str) -> str | None:
    """Find a stage of a regime by its name or number."""
    nodes, names = plan.regimes[regime].stages, _stage_names(plan, regime)
    if stage.isdecimal():
        return nodes[int(stage) - 1] if 1 <= int(stage) <= len(nodes) else None
    return nodes[names.index(stage)] if stage in names else None


def _stage_names(plan: Plan, regime: str) -> list[str]:
    return [plan.node(node).task["name"] for node in plan.regimes[regime].stages]


def weights_after(plan: Plan, regime: str, stage: str) -> dict[str, str]:
    """Part -> the node that holds it after a stage, given its train node: what is scored and judged then.

    UserError for stages that overlap, of which nothing was asked when they ended."""
    planned = plan.regimes[regime]
    asked = [planned.assembled, *planned.judged.values()]
    scoring = next((answers[stage] for answers in asked if stage in answers), None)
    if stage == planned.stages[-1]:
        return dict(planned.weights)
    if scoring is not None:
        roles = plan.node(scoring).parents
        return {part: roles[f"weights/{part}"] for part in planned.weights}
    if planned.rounds:
        raise UserError(
            f"{regime}: its stages overlap, and what the network was when one ended was not scored "
            "(evaluation.stages: false); the last stage can be exported"
        )
    model = next(node.id for node in plan.nodes if node.initializes and regime in node.regimes)
    weights = dict.fromkeys(planned.weights, model)
    for node in planned.stages[: planned.stages.index(stage) + 1]:
        weights.update(dict.fromkeys(plan.node(node).task["trained"], node))
    return weights


def _require_finished(recorded: Recorded, regime: str, ledger: CommitLog) -> None:
    if not _is_finished(recorded, regime, ledger):
        raise UserError(f"{regime}: not finished, there are no final weights to export yet; run it first")


def _is_finished(recorded: Recorded, regime: str, ledger: CommitLog) -> bool:
    """Tell whether all that an export of the regime is made of is committed."""
    needed = (*recorded.plan.regimes[regime].weights.values(), *_beside(recorded))
    return all(node in ledger.commits for node in needed)


def _export_folder(recorded: Recorded, regime: str) -> Path:
    return recorded.run_dir / MODELS / regime


def export_finished(
    recorded: Recorded, ledger: CommitLog, regimes: Sequence[str], *, anew: bool = False
) -> dict[str, str]:
    """Regime -> folder of its checkpoint, relative to the run directory, for those that are finished. Folders that are
    whole are left alone unless `anew`."""
    nodes = NodeStore(ledger.storage)
    written: dict[str, str] = {}
    for name in regimes:
        if not _is_finished(recorded, name, ledger):
            continue
        folder = _export_folder(recorded, name)
        trained = _trained(recorded, name, recorded.plan.regimes[name].weights, ledger)
        _write(recorded, name, trained, nodes, folder, anew=anew)
        written[name] = str(folder.relative_to(recorded.run_dir))
    return written


def _write(
    recorded: Recorded, name: str, trained: Trained, nodes: NodeStore, folder: Path, *, anew: bool = True
) -> None:
    """Export; damage is said with what to do about it."""
    try:
        write_export(trained, nodes, folder, anew=anew)
    except CorruptShard as error:
        raise CorruptShard(
            f"{error.message}, so {name} cannot be exported; `segprop cache verify {recorded.run_dir} --repair` "
            "moves what is damaged away, and `segprop run` then makes it again",
            **error.details,
        ) from error


def _trained(recorded: Recorded, name: str, weights: Mapping[str, str], ledger: CommitLog) -> Trained:
    parts = {part: ledger.commits[node] for part, node in weights.items()}
    return Trained(
        recorded.experiments[name],
        parts,
        partial(_model_commit, recorded, ledger),
        data=recorded.data_facts,
        data_commit=_questions_commit(recorded, ledger),
    )


def _beside(recorded: Recorded) -> list[str]:
    """Name the nodes whose commits hold what an export copies beside the weights. They are targets of the plan."""
    return [node.id for node in recorded.plan.nodes if not node.parents and (node.initializes or recorded.reads_data)]


def _questions_commit(recorded: Recorded, ledger: CommitLog) -> Commit | None:
    """Find the commit that says what questions were trained on, where the data are questions."""
    commits = (ledger.commits[node] for node in _beside(recorded))
    return next((commit for commit in commits if TRAINED_QUESTIONS in commit.files), None)


def _model_commit(recorded: Recorded, ledger: CommitLog) -> Commit:
    """The commit of the initial weights, which holds what goes beside them."""
    return ledger.commits[next(node.id for node in recorded.plan.nodes if node.initializes)]


def write_results(recorded: Recorded, ledger: CommitLog, outcome: Outcome, exports: dict[str, str]) -> Summary:
    """Write summary, report and what trackers are told; `exports`: regime -> folder of its model."""
    run_dir, summary = recorded.run_dir, _summary(recorded, ledger, outcome, exports)
    write_summary(run_dir / "summary.json", summary)
    write_report(summary, run_dir / "report.html", step_curves(run_dir / POINTS, summary.regimes))
    for name, folder in exports.items():
        _write_card(recorded, summary, run_dir / folder, name)
    track(run_dir, summary)
    return summary


def _summary(recorded: Recorded, ledger: CommitLog, outcome: Outcome, exports: Mapping[str, str]) -> Summary:
    return summarize(
        recorded.run,
        recorded.plan,
        ledger.commits,
        status=outcome.status,
        environment=replace(describe_environment(), reused_versions=dict(recorded.reuse_versions) or None),
        reused=outcome.reused,
        failures=outcome.failures,
        exports=exports,
        about=recorded.about,
    )


def _write_card(
    recorded: Recorded, summary: Summary, folder: Path, regime: str, stage: str | None = None, *, adapter: bool = False
) -> None:
    """Write the model card of an exported folder. One that says the same is left alone."""
    with typed_errors("read", folder):
        files = frozenset(path.name for path in folder.iterdir())
    exported = Exported(regime, stage, adapter, files)
    text = card(summary, recorded.plan, recorded.experiments[regime], exported).encode()
    with typed_errors("read", folder):
        same = CARD in files and read_regular(folder / CARD, len(text) + 1) == text
    if not same:
        write_atomically(folder / CARD, text)
