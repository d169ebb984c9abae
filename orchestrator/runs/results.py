"""Write a finished run's results: summary, report, TensorBoard events, exported models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cache_store.errors import CorruptShard, UserError
from cache_store.records.nodes import Commit, NodeStore
from cache_store.storage.open import existing_storage
from orchestrator.environment import describe_environment
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Outcome
from orchestrator.reports.page import write_report
from orchestrator.reports.records import Summary
from orchestrator.reports.summary import summarize, write_summary
from orchestrator.reports.tables.result_table import print_places, print_table
from orchestrator.runs.recorded import Recorded
from orchestrator.trackers.table import track
from workers.export import Trained
from workers.export import export as write_export
from workers.specs.export_files import TRAINED_QUESTIONS


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


def export(recorded: Recorded, regimes: Sequence[str]) -> None:
    """Write the final weights of these regimes again. UserError when one of them is not finished."""
    ledger = CommitLog.read(existing_storage(recorded.store), recorded.plan)
    for name in regimes:
        if not _is_finished(recorded, name, ledger):
            raise UserError(f"{name}: not finished, there are no final weights to export yet; run it first")
    for path in export_finished(recorded, ledger, regimes, anew=True).values():
        print(recorded.run_dir / path)


def _is_finished(recorded: Recorded, regime: str, ledger: CommitLog) -> bool:
    """Tell whether all that an export of the regime is made of is committed."""
    needed = (*recorded.plan.regimes[regime].weights.values(), *_beside(recorded))
    return all(node in ledger.commits for node in needed)


def _export_folder(recorded: Recorded, regime: str) -> Path:
    return recorded.run_dir / "model" / regime


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
        try:
            write_export(_trained(recorded, name, ledger), nodes, folder, anew=anew)
        except CorruptShard as error:
            raise CorruptShard(
                f"{error.message}, so {name} cannot be exported; `segprop cache verify {recorded.run_dir} --repair` "
                "moves what is damaged away, and `segprop run` then makes it again",
                **error.details,
            ) from error
        written[name] = str(folder.relative_to(recorded.run_dir))
    return written


def _trained(recorded: Recorded, name: str, ledger: CommitLog) -> Trained:
    parts = {part: ledger.commits[node] for part, node in recorded.plan.regimes[name].weights.items()}
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
    run_dir = recorded.run_dir
    summary = summarize(
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
    write_summary(run_dir / "summary.json", summary)
    write_report(summary, run_dir / "report.html")
    track(run_dir, summary)
    return summary
